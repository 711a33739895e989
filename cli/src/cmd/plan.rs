//! `plan`: where every byte of a run would go, and what to change if it does not fit. Loads nothing.

use crate::model::{LoadConfig, SessionConfig};
use crate::output;
use anyhow::{Result, bail};
use engine::plan::{
    Device, DevicePlan, Fit, Gpu, Machine, Part, Plan, PlanModel, PlanOptions, available_memory, fit,
};
use serde_json::{Value, json};
use std::fmt::Write;

/// What to plan.
pub struct Config {
    pub load: LoadConfig,
    pub session: SessionConfig,
    pub parallel: usize,
    /// `None`: what this machine has left.
    pub memory: Option<u64>,
    pub gpus: Vec<Gpu>,
    pub fit: bool,
    pub json: bool,
}

pub fn run(c: &Config) -> Result<()> {
    let model = c.load.headers()?;
    let Some(memory) = c.memory.or_else(available_memory) else {
        bail!("this system does not say how much memory is left: give it with --memory");
    };
    let options = PlanOptions {
        session: c.session.options(c.session.ctx(model.ctx_train())?),
        parallel: c.parallel,
        access: c.load.memory.access,
        pinned: c.load.memory.pin_experts,
        threads: c.load.threads,
    };
    let (found, note) = if c.gpus.is_empty() {
        let gpus = c.load.memory.device.look()?;
        c.load.fit(&gpus, &model, &options, memory)?
    } else {
        let machine = Machine { memory, gpus: c.gpus.clone() };
        (fit(&model, &options, &machine, &c.load.memory.place.rules(&model, c.gpus.len())?)?, None)
    };
    if let Some(note) = note {
        eprintln!("note: {note}");
    }
    let chosen = found.ways.first().filter(|_| c.fit);
    let (plan, options) = chosen.map_or((&found.plan, &options), |w| (&w.plan, &w.options));
    let changed = chosen.map(|w| w.flags());
    let changed = changed.as_deref();
    let text = match c.json {
        true => serde_json::to_string_pretty(&as_json(c, &model, options, plan, &found, changed))? + "\n",
        false => as_text(&model, options, plan, &found, changed)?,
    };
    Ok(output::print(&text)?)
}

fn device_name(d: Device) -> String {
    match d {
        Device::Cpu => "CPU".into(),
        Device::Gpu(i) => format!("GPU{i}"),
    }
}

/// A device's part of a plan, in bytes.
pub fn device_json(d: &DevicePlan) -> Value {
    let weights: Vec<Value> = Part::ALL
        .iter()
        .zip(&d.weights)
        .filter(|(_, b)| b.mapped + b.resident > 0)
        .map(|(part, b)| {
            json!({"part": part.name(), "mapped_bytes": b.mapped, "resident_bytes": b.resident, "copied_bytes": b.copied})
        })
        .collect();
    json!({
        "device": device_name(d.device), "size_bytes": d.size, "weights": weights, "kv_bytes": d.kv,
        "activation_bytes": d.activations, "scratch_bytes": d.scratch, "sampling_bytes": d.sampling,
        "host_bytes": d.host, "policy_bytes": d.policy, "resident_bytes": d.resident(), "mapped_bytes": d.mapped(),
        "kept_bytes": if d.locked { d.mapped() } else { d.pinned }, "left_bytes": d.left(), "streamed_bytes": d.streamed(), "shortfall_bytes": d.shortfall(),
    })
}

fn as_json(
    c: &Config,
    m: &PlanModel,
    o: &PlanOptions,
    p: &Plan,
    found: &Fit,
    changed: Option<&str>,
) -> Value {
    let s = &o.session;
    let ways: Vec<Value> =
        if p.fits() { vec![] } else { found.ways.iter().map(|w| json!(w.flags())).collect() };
    json!({
        "model": m.name(), "architecture": m.arch(), "file": c.load.source.name(), "layers": m.n_layers(),
        "context": s.ctx, "parallel": o.parallel, "batch": s.batch, "threads": o.threads, "kv": s.kv.to_string(),
        "cache_type_k": s.cache_k.name(), "cache_type_v": s.cache_v.name(),
        "fits": p.fits(), "shortfall_bytes": p.shortfall(),
        "resident_bytes": p.resident_bytes(), "mapped_bytes": p.mapped_bytes(), "kv_bytes": p.kv(),
        "kv_bytes_per_sequence": p.kv() / o.parallel as u64,
        "gpu_layers": p.gpu_layers, "cpu_moe_layers": p.cpu_moe, "estimated_tensors": m.guessed(),
        "devices": p.devices.iter().map(device_json).collect::<Vec<_>>(),
        "changed": changed, "flags_that_fit": ways,
    })
}

fn as_text(m: &PlanModel, o: &PlanOptions, p: &Plan, found: &Fit, changed: Option<&str>) -> Result<String> {
    let (mut t, s) = (String::new(), &o.session);
    let weights: u64 = m.weights().iter().map(|w| w.bytes).sum();
    writeln!(
        t,
        "{}: {}, {} layers, {} of weights",
        output::one_line(m.name()),
        m.arch(),
        m.n_layers(),
        output::bytes(weights)
    )?;
    let values = if m.has_values() { format!(", values {}", s.cache_v.name()) } else { String::new() };
    let sequences = if o.parallel == 1 { "one sequence".into() } else { format!("{} sequences", o.parallel) };
    writeln!(
        t,
        "{sequences} of {} tokens, kv {} (keys {}{values}), batch {}, {} threads\n",
        s.ctx,
        s.kv,
        s.cache_k.name(),
        s.batch,
        o.threads
    )?;
    if m.guessed() > 0 {
        writeln!(
            t,
            "{} tensors are in parts that are not here; their types are taken from other layers\n",
            m.guessed()
        )?;
    }
    if let Some(flags) = changed {
        writeln!(t, "To make it fit: {flags}\n")?;
    }
    let used: Vec<&DevicePlan> = p.devices.iter().collect();
    let mut row = |name: &str, f: &dyn Fn(&DevicePlan) -> String| {
        let cells: String = used.iter().map(|d| format!("{:>24}", f(d))).collect();
        if cells.trim().is_empty() { Ok(()) } else { writeln!(t, "  {name:<18}{cells}") }
    };
    let size = |n: u64| if n == 0 { String::new() } else { output::bytes(n) };
    row("", &|d| format!("{} {}", device_name(d.device), output::bytes(d.size)))?;
    for (i, part) in Part::ALL.iter().enumerate() {
        row(part.name(), &|d| {
            let b = d.weights[i];
            match (b.mapped, b.resident) {
                (0, 0) => String::new(),
                (0, r) if b.copied > 0 => format!("{} copied", output::bytes(r)),
                (0, r) => output::bytes(r),
                (mapped, _) => format!("{} mapped", output::bytes(mapped)),
            }
        })?;
    }
    let copies = |d: &DevicePlan| if d.mapped() > 0 { d.weights_resident() } else { 0 };
    row("vectors as f32", &|d| size(copies(d)))?;
    row("kv cache", &|d| size(d.kv))?;
    row("activations", &|d| size(d.activations))?;
    row("scratch", &|d| size(d.scratch))?;
    row("sampling", &|d| size(d.sampling))?;
    row("kv policy", &|d| size(d.policy))?;
    row("host", &|d| size(d.host))?;
    row("in memory", &|d| output::bytes(d.resident()))?;
    row("mapped", &|d| size(d.mapped()))?;
    row("must stay", &|d| if d.locked { output::bytes(d.mapped()) } else { size(d.pinned) })?;
    row("left", &|d| {
        if d.shortfall() > 0 {
            format!("{} short", output::bytes(d.shortfall()))
        } else {
            output::bytes(d.left())
        }
    })?;
    if o.parallel > 1 {
        writeln!(t, "\nEach sequence: {} of cache.", output::bytes(p.kv() / o.parallel as u64))?;
    }
    if p.uses_gpu() {
        writeln!(
            t,
            "\n{} of {} layers on GPUs, the output counted as one; experts of {} layers on the CPU.",
            p.gpu_layers,
            m.n_layers() + 1,
            p.cpu_moe
        )?;
    }
    let host = &p.devices[0];
    if p.fits() && host.streamed() > 0 {
        writeln!(
            t,
            "\n{} of the mapped weights have no room: they are read from disk again as they are needed.",
            output::bytes(host.streamed())
        )?;
    }
    if !p.fits() {
        writeln!(t, "\n{}", refusal(found))?;
    }
    Ok(t)
}

/// What is missing, and what fits, in one line.
pub fn refusal(f: &Fit) -> String {
    let short = f.plan.devices.iter().filter(|d| d.shortfall() > 0);
    let short: Vec<String> = short
        .map(|d| {
            format!(
                "{} is short of {} bytes ({} of {})",
                device_name(d.device),
                d.shortfall(),
                output::bytes(d.required()),
                output::bytes(d.size)
            )
        })
        .collect();
    let short = format!("it does not fit: {}", short.join("; "));
    if f.ways.is_empty() {
        if f.plan.devices[0].shortfall() == 0 {
            return format!("{short}. Only other rules for GPUs would fit (-ot, --main-gpu, --tensor-split)");
        }
        let host = f.plan.devices[0].size;
        return match f.least <= host {
            true => {
                format!("{short}. Only less text at a time would fit: a smaller context, fewer sequences")
            }
            false => {
                format!("{short}. Nothing makes it fit: the smallest run takes {}", output::bytes(f.least))
            }
        };
    }
    let ways: Vec<String> = f.ways.iter().map(engine::plan::Way::flags).collect();
    format!("{short}. What would fit (--fit takes the first): {}", ways.join("  or  "))
}
