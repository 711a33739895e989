//! `larger`: models larger than memory. rsinfer and llama.cpp decode the same tokens in a control group with less memory than the
//! file has bytes, in turns: tokens per second, bytes read from disk per token, and what an ideal LRU memory would have read.

use anyhow::{Context, Result, bail};
use benches::larger::{Group, Outcome, Row, cost, decode, forget, markdown, median, skew};
use benches::synth::{self, Attention, Geometry, Types};
use clap::Parser;
use engine::pager::PagerOptions;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Measure decoding with less memory than the model has bytes, beside llama.cpp in the same control group
#[derive(Parser)]
#[command(after_help = "Examples:\n  \
    larger --python venv/bin/python              the table (minutes)\n  \
    larger --no-peer --shares 50 --rounds 1\n  \
    larger --pin 25 --skew 0.5                   what pinned experts gain where routers prefer some\n  \
    larger --cost --model model.gguf             what the pager costs where everything fits\n\n\
    Needs Linux and the right to make control groups (root, or a delegated group: systemd-run --user --scope -p\n\
    Delegate=yes ...). The cache of the file is dropped before each run. Python needs llama-cpp-python.")]
struct Args {
    /// The model [default: DeepSeek-V2-Lite's geometry with 7 layers and a compressed query, 2.5 GB, made and removed]
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Limits, in percent of the file
    #[arg(long, value_delimiter = ',', default_value = "100,75,50,35", value_name = "P,...")]
    shares: Vec<u64>,
    /// Tokens measured, after half as many that are not
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// A run ends after so many seconds with the tokens that it has made
    #[arg(long, default_value_t = 60.0, value_name = "S")]
    seconds: f64,
    /// Rounds; medians are taken over them
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Threads of both [default: all cores]
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Python that has llama-cpp-python
    #[arg(long, value_name = "FILE", required_unless_present_any = ["no_peer", "inside", "pin", "cost"])]
    python: Option<PathBuf>,
    /// Compare with experts pinned, so many percent of the limit, instead of llama.cpp
    #[arg(long, value_name = "P", conflicts_with = "python")]
    pin: Option<u64>,
    /// The router's rows of the expert at rank r are scaled by (1 + r)^-X in the model made
    #[arg(long, value_name = "X", conflicts_with = "model")]
    skew: Option<f32>,
    /// No limits: decode with the pager and without, in turns, on a model that memory holds
    #[arg(long, requires = "model")]
    cost: bool,
    /// Measure rsinfer alone
    #[arg(long)]
    no_peer: bool,
    /// Keep the model made
    #[arg(long)]
    keep: bool,
    /// Decode in this process, which has the limit given, and print the outcome
    #[arg(long, hide = true, value_name = "BYTES")]
    inside: Option<u64>,
    /// With --inside: bytes of experts to pin
    #[arg(long, hide = true, default_value_t = 0, value_name = "BYTES")]
    pinned: u64,
}

fn main() -> Result<()> {
    let a = Args::parse();
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    let threads = a.threads.unwrap_or(cores);
    let (warm, tokens) = (a.tokens as usize / 2, a.tokens as usize);
    if let Some(limit) = a.inside {
        let model = a.model.context("--inside needs --model")?;
        let pager = PagerOptions { pin: a.pinned, ..Default::default() };
        let outcome = decode(&model, threads, warm, tokens, a.seconds, limit, pager)?;
        println!("{}", serde_json::to_string(&outcome)?);
        return Ok(());
    }
    if let Some(model) = a.model.as_ref().filter(|_| a.cost) {
        let mut all = cost(model, threads, tokens, a.rounds.into())?;
        let ms = |s: f64| s * 1e3;
        all.iter()
            .for_each(|(with, without)| eprintln!("{:.3} ms, without {:.3} ms", ms(*with), ms(*without)));
        all.sort_by(|x, y| (x.0 / x.1).total_cmp(&(y.0 / y.1)));
        let ratio = |at: usize| all[at].0 / all[at].1;
        let n = all.len();
        println!(
            "with / without the pager: median {:.4}, {:.4} to {:.4} in {n} rounds",
            ratio(n / 2),
            ratio(0),
            ratio(n - 1)
        );
        return Ok(());
    }
    let group = Group::create()?;
    let (model, made) = match &a.model {
        Some(path) => (path.clone(), false),
        None => (make(a.skew)?, true),
    };
    let measured = measure(&a, &group, &model, threads, (warm, tokens));
    if made && !a.keep {
        std::fs::remove_file(&model).with_context(|| model.display().to_string())?;
    }
    print!("{}", markdown(&measured?, if a.pin.is_some() { "pinned" } else { "llama.cpp" }));
    Ok(())
}

fn make(skewed: Option<f32>) -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let folder = this.ancestors().nth(2).context("this program lies in a target folder")?.join("larger");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = folder.join("deepseek-v2-lite-7-layers.gguf");
    // Without a compressed query llama.cpp takes a file for V2-Lite only if it has 27 layers; with one, any number will do.
    let mut geometry = Geometry { layers: 7, ..Geometry::named("deepseek-v2-lite").context("in the table")? };
    if let Attention::Latent { q_lora, .. } = &mut geometry.attention {
        *q_lora = Some(1536);
    }
    synth::write(&geometry, Types::from_name("Q4_K").context("a type")?, 1, &path)?;
    if let Some(exponent) = skewed {
        skew(&path, exponent)?;
    }
    Ok(path)
}

fn measure(a: &Args, group: &Group, model: &Path, threads: usize, n: (usize, usize)) -> Result<Vec<Row>> {
    let size = std::fs::metadata(model).with_context(|| model.display().to_string())?.len();
    let this = std::env::current_exe()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/llama_cpp/larger_peer.py");
    let mut rows = Vec::new();
    for &share in &a.shares {
        let limit = size * share / 100;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 1..=a.rounds {
            let common = |c: &mut Command| {
                c.args(["--threads", &threads.to_string(), "--tokens", &n.1.to_string()]);
                c.args(["--seconds", &a.seconds.to_string()]);
            };
            let run = |name: &str, command: &mut Command, all: &mut Vec<Outcome>| -> Result<()> {
                forget(model)?;
                let outcome = group.run(limit, command)?;
                eprintln!("{share}%, round {round}: {name}: {outcome}");
                all.push(outcome);
                Ok(())
            };
            let own = |pinned: u64| {
                let mut command = Command::new(&this);
                command.arg("--model").arg(model).args(["--inside", &limit.to_string()]);
                command.args(["--pinned", &pinned.to_string()]);
                common(&mut command);
                command
            };
            run("rsinfer", &mut own(0), &mut ours)?;
            if let Some(share) = a.pin {
                run("pinned", &mut own(limit * share / 100), &mut theirs)?;
            } else if let Some(python) = a.python.as_ref().filter(|_| !a.no_peer) {
                let mut command = Command::new(python);
                command.arg(&script).arg(model).args(["--warm", &n.0.to_string()]);
                common(&mut command);
                run("llama.cpp", &mut command, &mut theirs)?;
            }
        }
        rows.push(Row { share, limit, ours: median(ours), theirs: median(theirs) });
    }
    if rows.is_empty() {
        bail!("--shares names no limit");
    }
    Ok(rows)
}
