//! `synth`: writes a GGUF with the geometry of a public model and random weights, for work on speed and memory.

use anyhow::{Context, Result, bail};
use benches::synth::{self, GEOMETRIES, Geometry, Types};
use clap::Parser;
use std::path::PathBuf;
use std::time::Instant;

/// Write a GGUF with the geometry of a public model and random weights
#[derive(Parser)]
#[command(after_help = "Examples:\n  \
    synth llama-3.2-1b --type Q4_K llama.gguf\n  \
    synth deepseek-v3 --layers 5 --type Q4_K_M v3.gguf\n  \
    synth deepseek-v3 --type Q2_K --header-only v3.gguf; rsinfer plan v3.gguf --memory 256GiB\n  \
    synth deepseek-v2-lite --tiny --type Q8_0 small.gguf")]
struct Args {
    /// The public model
    #[arg(value_parser = geometry)]
    model: Geometry,
    /// The file to write
    out: PathBuf,
    /// A tensor type (Q4_K: every matrix, but output and value matrices Q6_K), or a file type of llama-quantize (Q4_K_M)
    #[arg(short, long = "type", value_name = "TYPE", value_parser = types)]
    types: Types,
    /// No exceptions: every matrix gets the tensor type
    #[arg(long)]
    pure: bool,
    /// So many layers instead of the model's own
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    layers: Option<u16>,
    /// The same structure in a few megabytes
    #[arg(long)]
    tiny: bool,
    /// The header without the weights: for `rsinfer plan`
    #[arg(long)]
    header_only: bool,
    /// Same seed, same file
    #[arg(short, long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

fn geometry(s: &str) -> Result<Geometry, String> {
    Geometry::named(s).ok_or_else(|| format!("there are {}", GEOMETRIES.map(|g| g.name).join(", ")))
}

fn types(s: &str) -> Result<Types, String> {
    Types::from_name(s)
        .ok_or_else(|| format!("{s:?} is neither a tensor type nor a file type (Q4_K, Q4_K_M, F16 ...)"))
}

fn main() -> Result<()> {
    let a = Args::parse();
    let mut g = if a.tiny { a.model.tiny() } else { a.model };
    if let Some(n) = a.layers {
        g.layers = n.into();
    }
    let types = match (a.types, a.pure) {
        (Types::Plain(t), true) => Types::Pure(t),
        (Types::Mix(t), true) => bail!("{t} is a mix: --pure goes with a tensor type"),
        (t, false) => t,
        (Types::Pure(_), true) => unreachable!("no name stands for it"),
    };
    let start = Instant::now();
    let written = match a.header_only {
        true => synth::write_header(&g, types, &a.out),
        false => synth::write(&g, types, a.seed, &a.out),
    };
    let bytes = written.with_context(|| g.name.to_owned())?;
    let (size, seconds) = (bytes as f64 / 1e9, start.elapsed().as_secs_f64());
    println!("{}: {} {types}, {size:.2} GB in {seconds:.1} s", a.out.display(), g.name);
    Ok(())
}
