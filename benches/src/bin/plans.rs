//! `plans`: what to run with how much memory: the tables of docs/memory.md, made by the planner from headers that `synth`
//! writes. Each row is what `rsinfer plan` says with the same flags.

use anyhow::{Context, Result};
use benches::peers::replace_between;
use benches::synth::{self, Geometry, Types};
use clap::Parser;
use engine::SessionOptions;
use engine::plan::{Access, Fit, Gpu, Machine, Plan, PlanModel, PlanOptions, Rules, fit};
use engine::quantize::Target;
use std::fmt::Write;
use std::path::Path;

/// Print what to run with how much memory
#[derive(Parser)]
struct Args {
    /// Put the tables into docs/memory.md
    #[arg(long)]
    write_docs: bool,
}

const MODELS: [(&str, &str); 4] = [
    ("DeepSeek-V2-Lite (16B, 2.4B a token)", "deepseek-v2-lite"),
    ("DeepSeek-V3 and R1 (671B, 37B a token)", "deepseek-v3"),
    ("Llama-3.3-70B", "llama-3.3-70b"),
    ("Gemma-3-27B (text)", "gemma-3-27b"),
];
/// The best first.
const TYPES: [Target; 6] =
    [Target::Q8_0, Target::Q6_K, Target::Q5_K_M, Target::Q4_K_M, Target::Q3_K_M, Target::Q2_K];
const MEMORY: [u64; 5] = [16, 32, 64, 128, 256];
/// Left to the system, in GiB, of the host's memory and of each GPU's.
const SYSTEM: u64 = 2;
const GPU: Gpu = Gpu { bytes: 23 << 30, display: false };
const CTX: usize = 32_768;

/// A model in one type, planned.
struct Choice {
    target: Target,
    plan: Plan,
    /// What had to change besides the placement.
    changes: String,
}

impl Choice {
    fn of(target: Target, found: Fit) -> Option<Self> {
        if found.plan.fits() {
            return Some(Self { target, plan: found.plan, changes: String::new() });
        }
        let way = found.ways.into_iter().next()?;
        Some(Self { target, changes: way.flags(), plan: way.plan })
    }

    /// Nothing is changed, and no weight is read from disk twice.
    fn whole(&self) -> bool {
        self.changes.is_empty() && self.plan.devices[0].streamed() == 0
    }

    fn flags(&self) -> String {
        let mut flags = vec![format!("-c {CTX}")];
        if self.plan.uses_gpu() {
            flags.push(format!("-ngl {}", self.plan.gpu_layers));
        }
        if self.plan.uses_gpu() && self.plan.cpu_moe > 0 {
            flags.push(format!("--n-cpu-moe {}", self.plan.cpu_moe));
        }
        if !self.changes.is_empty() {
            // A changed context stands in place of the first.
            flags.retain(|f| !(f.starts_with("-c") && self.changes.contains("-c ")));
            flags.push(self.changes.clone());
        }
        flags.join(" ")
    }
}

/// The best type of which all weights find room, or the smallest.
fn choose(models: &[(Target, PlanModel)], machine: &Machine) -> Result<Option<Choice>> {
    let session = SessionOptions { ctx: CTX, ..SessionOptions::default() };
    let options = PlanOptions { session, parallel: 1, access: Access::Mapped, pinned: 0, threads: 8 };
    let mut last = None;
    for (target, model) in models {
        let found = fit(model, &options, machine, &Rules::default())?;
        last = Choice::of(*target, found);
        if last.as_ref().is_some_and(Choice::whole) {
            break;
        }
    }
    Ok(last)
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1u32 << 30))
}

fn table(text: &mut String, title: &str, models: &[(Target, PlanModel)]) -> Result<()> {
    writeln!(text, "\n**{title}**\n")?;
    writeln!(
        text,
        "| memory | GPUs | type | flags | own memory | file mapped | on GPUs | read from disk again |"
    )?;
    writeln!(text, "| --- | --- | --- | --- | --- | --- | --- | --- |")?;
    for memory in MEMORY {
        for gpus in 0..=2 {
            let machine = Machine { memory: (memory - SYSTEM) << 30, gpus: vec![GPU; gpus] };
            let cards = if gpus == 0 { "none".into() } else { format!("{gpus} x 24") };
            let Some(c) = choose(models, &machine)? else {
                writeln!(text, "| {memory} | {cards} | does not fit | | | | | |")?;
                continue;
            };
            let host = &c.plan.devices[0];
            let on_gpus = c.plan.devices[1..].iter().map(|d| d.resident()).sum::<u64>();
            let on_gpus = if c.plan.uses_gpu() { gib(on_gpus) } else { String::new() };
            let again = if host.streamed() > 0 { gib(host.streamed()) } else { String::new() };
            let (own, mapped) = (gib(host.resident()), gib(host.mapped()));
            let (target, flags) = (c.target, c.flags());
            writeln!(
                text,
                "| {memory} | {cards} | {target} | `{flags}` | {own} | {mapped} | {on_gpus} | {again} |"
            )?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let a = Args::parse();
    let folder = tempfile::tempdir()?;
    let mut text = String::new();
    for (title, name) in MODELS {
        let g = Geometry::named(name).with_context(|| format!("no geometry {name}"))?;
        let mut models = Vec::new();
        for target in TYPES {
            let path = folder.path().join(format!("{name}-{target}.gguf"));
            synth::write_header(&g, Types::Mix(target), &path)?;
            models.push((target, PlanModel::open(&path)?));
        }
        table(&mut text, title, &models)?;
    }
    if a.write_docs {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/memory.md");
        let old = std::fs::read_to_string(&page)?;
        let new = replace_between(&old, "<!-- plans: begin -->", "<!-- plans: end -->", &text)
            .with_context(|| format!("{} has no place for the tables", page.display()))?;
        std::fs::write(&page, new)?;
    }
    print!("{text}");
    Ok(())
}
