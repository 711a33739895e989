//! Groups of options that several commands share, and how their values are read.

use super::place::PlacementArgs;
use crate::model::{LoadConfig, MemoryConfig, SessionConfig, Source};
use crate::store::parameters::Parameters;
use anyhow::Result;
use clap::Args;
use engine::device::DeviceChoice;
use engine::plan::Access;
use engine::{DType, KvSpec, Numa, SamplerOptions};

/// MODEL, as the first free argument or with `-m`.
#[derive(Args)]
pub struct ModelArgs {
    /// A GGUF file (any part of a split one), the name of a stored model (`rsinfer list`), or `demo`
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    model: Option<String>,
    /// MODEL, as llama.cpp's tools spell it
    #[arg(short = 'm', long = "model", value_name = "MODEL", conflicts_with = "model")]
    model_flag: Option<String>,
}

impl ModelArgs {
    pub fn source(&self) -> Result<Source> {
        let name = self.model_flag.as_ref().or(self.model.as_ref());
        Source::named(name.expect("clap asks for one of the two"))
    }
}

/// How a model is loaded.
#[derive(Args)]
pub struct LoadArgs {
    /// Compute threads [default: all cores]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=1024), value_name = "N")]
    threads: Option<u16>,
    #[command(flatten)]
    memory: MemoryArgs,
}

/// What computes; how weights get into memory, and stay there.
#[derive(Args)]
pub struct MemoryArgs {
    /// Map the file: pages are read when they are used (the default)
    #[arg(long, overrides_with_all = ["no_mmap", "mlock"])]
    mmap: bool,
    /// Read the file into memory instead of mapping it
    #[arg(long, conflicts_with = "mlock", overrides_with = "mmap")]
    no_mmap: bool,
    /// Keep the mapped file in memory, all of it
    #[arg(long, alias = "use-mlock", overrides_with = "mmap")]
    mlock: bool,
    /// Of a model larger than memory keep the experts used most, so many bytes of them (4GiB)
    #[arg(long, default_value = "0", value_name = "SIZE", value_parser = size, conflicts_with_all = ["no_mmap", "mlock"])]
    pin_experts: u64,
    /// On a machine with several memory nodes: deal pages to all (distribute), stay on one (isolate), as started (numactl)
    #[arg(long, value_name = "HOW", value_parser = numa)]
    numa: Option<Numa>,
    #[command(flatten)]
    place: PlacementArgs,
}

impl MemoryArgs {
    /// # Errors
    /// GPUs asked for and forbidden in one.
    pub fn resolve(&self) -> Result<MemoryConfig> {
        let access = match (self.no_mmap, self.mlock) {
            (true, _) => Access::Read,
            (_, true) => Access::Locked,
            _ => Access::Mapped,
        };
        let (device, place) = self.place.resolve()?;
        Ok(MemoryConfig { device, place, access, pin_experts: self.pin_experts, numa: self.numa })
    }
}

fn numa(s: &str) -> Result<Numa, String> {
    match s {
        "distribute" => Ok(Numa::Distribute),
        "isolate" => Ok(Numa::Isolate),
        "numactl" => Ok(Numa::Numactl),
        _ => Err("possible: distribute, isolate, numactl".into()),
    }
}

impl LoadArgs {
    /// # Errors
    /// As [`MemoryArgs::resolve`].
    pub fn resolve(self, source: Source) -> Result<LoadConfig> {
        self.resolve_of(&Parameters::default(), source)
    }

    /// As [`LoadArgs::resolve`]; what the command line leaves out is what a stored model says.
    pub fn resolve_of(self, p: &Parameters, source: Source) -> Result<LoadConfig> {
        let mut memory = self.memory.resolve()?;
        if memory.access == Access::Mapped && !self.memory.mmap {
            memory.access = match (p.boolean("use_mmap"), p.boolean("use_mlock")) {
                (Some(false), _) => Access::Read,
                (_, Some(true)) => Access::Locked,
                _ => Access::Mapped,
            };
        }
        if memory.device != DeviceChoice::Cpu {
            let (layers, main) = (p.size("num_gpu"), p.size("main_gpu").filter(|n| *n > 0));
            memory.place.gpu_layers = memory.place.gpu_layers.or(layers);
            memory.place.main_gpu = memory.place.main_gpu.or(main);
        }
        let stored =
            p.int("num_thread").and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1024).contains(n));
        let threads = self.threads.map(usize::from).or(stored).unwrap_or_else(cores);
        Ok(LoadConfig { source, memory, threads })
    }
}

/// Bytes: `16GiB`, `512M`, `1.5g`, `1000000`. Units are binary, as memory is sold.
pub fn size(s: &str) -> Result<u64, String> {
    let wrong = || format!("{s:?} is no size such as 16GiB");
    let at = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, unit) = (s[..at].parse::<f64>().map_err(|_| wrong())?, s[at..].trim().to_ascii_lowercase());
    let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let bytes = number * (1u64 << shift) as f64;
    if unit.is_empty() && bytes > 0.0 && bytes < (1u64 << 20) as f64 {
        return Err(format!("{s} is so many bytes: do you mean {s}GiB?"));
    }
    if bytes < (1u64 << 60) as f64 { Ok(bytes as u64) } else { Err(wrong()) }
}

/// Cores that the process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// The element types of the KV cache.
#[derive(Args)]
pub struct CacheTypeArgs {
    /// Cache type of keys (or of MLA's latent): f32, f16, bf16, q8_0 ... (-ctk)
    #[arg(long = "cache-type-k", value_name = "TYPE", value_parser = parse_cache_type)]
    k: Option<DType>,
    /// Cache type of values (-ctv)
    #[arg(long = "cache-type-v", value_name = "TYPE", value_parser = parse_cache_type)]
    v: Option<DType>,
    /// Cache type of MLA's rotary key [default: that of keys, but not below f16: it carries the positions]
    #[arg(long = "cache-type-k-pe", value_name = "TYPE", value_parser = parse_cache_type)]
    k_pe: Option<DType>,
}

/// The KV cache: element types and policy.
#[derive(Args)]
pub struct CacheArgs {
    #[command(flatten)]
    types: CacheTypeArgs,
    #[command(flatten)]
    kv: KvArg,
}

/// `--kv`.
#[derive(Args)]
pub struct KvArg {
    /// What the cache keeps: full, window:N, sinks:S+window:W (text without end in constant memory) or a policy with a budget
    /// [default: full]
    #[arg(long, value_name = "POLICY")]
    kv: Option<KvSpec>,
}

impl KvArg {
    pub fn get(&self) -> KvSpec {
        self.kv.clone().unwrap_or_default()
    }
}

impl CacheTypeArgs {
    pub fn session(&self, ctx: Option<usize>, batch: usize, default: DType) -> SessionConfig {
        let (cache_k, cache_v) = (self.k.unwrap_or(default), self.v.unwrap_or(default));
        SessionConfig { ctx, batch, cache_k, cache_v, cache_k_pe: self.k_pe, kv: KvSpec::default() }
    }
}

impl CacheArgs {
    pub fn session(&self, ctx: Option<usize>, batch: usize, default: DType) -> SessionConfig {
        SessionConfig { kv: self.kv.get(), ..self.types.session(ctx, batch, default) }
    }

    /// As [`CacheArgs::session`]; what the command line leaves out is what a stored model says.
    pub fn session_of(&self, p: &Parameters, ctx: Option<usize>, batch: usize) -> SessionConfig {
        let mut s = self.session(ctx, batch, DType::F16);
        s.kv = self.kv.kv.clone().or_else(|| p.kv()).unwrap_or_default();
        s.cache_k = self.types.k.or_else(|| p.dtype("cache_type_k")).unwrap_or(s.cache_k);
        s.cache_v = self.types.v.or_else(|| p.dtype("cache_type_v")).unwrap_or(s.cache_v);
        s.cache_k_pe = self.types.k_pe.or_else(|| p.dtype("cache_type_k_pe"));
        s
    }
}

/// A tensor type by its name. Whether the engine can use it for a cache is the engine's to say.
pub fn parse_cache_type(s: &str) -> Result<DType, String> {
    DType::from_name(s).ok_or_else(|| format!("{s:?} is no tensor type (f32, f16, bf16, q8_0 ...)"))
}

/// `-b`.
#[derive(Args)]
pub struct BatchArg {
    /// Prompt tokens computed at once [default: 512]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: Option<u32>,
}

impl BatchArg {
    pub fn get(&self) -> usize {
        self.get_of(&Parameters::default())
    }

    /// As [`BatchArg::get`]; what the command line leaves out is what a stored model says.
    pub fn get_of(&self, p: &Parameters) -> usize {
        let stored = p.int("num_batch").and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
        self.batch_size.or(stored).unwrap_or(512) as usize
    }
}

/// The sampling chain, with llama.cpp's names and defaults.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Temperature; 0 takes the most probable token [default: 0.8]
    #[arg(long, alias = "temperature", allow_negative_numbers = true, value_name = "X")]
    temp: Option<f32>,
    /// Keep the K most probable tokens (0: all) [default: 40]
    #[arg(long, allow_negative_numbers = true, value_name = "K")]
    top_k: Option<i64>,
    /// Keep the most probable tokens that add up to P (1: all) [default: 0.95]
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens at least P times as probable as the best (0: all) [default: 0.05]
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    min_p: Option<f32>,
    /// Locally typical sampling (1: off) [default: 1]
    #[arg(long, alias = "typical-p", allow_negative_numbers = true, value_name = "P")]
    typical: Option<f32>,
    /// Tokens that the penalties look back on (0: none, -1: all) [default: 64]
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    repeat_last_n: Option<i64>,
    /// Penalty on tokens seen (1: off) [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    repeat_penalty: Option<f32>,
    /// Taken from the logit of tokens seen (0: off) [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    presence_penalty: Option<f32>,
    /// Taken from the logit for every time a token was seen (0: off) [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    frequency_penalty: Option<f32>,
    /// Add to a token's logit: `15043+1`, `15043-2.5`, `15043-inf` (repeatable)
    #[arg(short, long, value_name = "ID(+|-)X", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text (-1: a new one every time) [default: -1]
    #[arg(short, long, allow_negative_numbers = true, value_name = "N")]
    seed: Option<i64>,
}

impl SamplingArgs {
    /// What the command line leaves out is what a stored model says, or llama.cpp's default.
    pub fn resolve(&self, stored: &Parameters) -> SamplerOptions {
        let base = stored.sampler(SamplerOptions::default());
        SamplerOptions {
            temperature: self.temp.unwrap_or(base.temperature),
            top_k: self.top_k.map_or(base.top_k, |k| k.try_into().unwrap_or(0)),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            typical_p: self.typical.unwrap_or(base.typical_p),
            repeat_last_n: self
                .repeat_last_n
                .map_or(base.repeat_last_n, |n| n.try_into().unwrap_or(usize::MAX)),
            repeat_penalty: self.repeat_penalty.unwrap_or(base.repeat_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.map_or(base.seed, |s| s.try_into().ok()),
        }
    }
}

fn parse_bias(s: &str) -> Result<(u32, f32), String> {
    let wrong = || format!("{s:?} is not of the form ID+X, ID-X or ID=X");
    let at = s.find(['+', '-', '=']).ok_or_else(wrong)?;
    let id = s[..at].trim().parse().map_err(|_| wrong())?;
    let value = if s.as_bytes()[at] == b'-' { &s[at..] } else { &s[at + 1..] };
    Ok((id, value.trim().parse().map_err(|_| wrong())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases() {
        for (s, want) in [("7+1", 1.0), ("7-2.5", -2.5), ("7-inf", f32::NEG_INFINITY), ("7=-3", -3.0)] {
            assert_eq!(parse_bias(s), Ok((7, want)));
        }
        for s in ["", "7", "+1", "x+1", "7+y", "-7+1"] {
            assert!(parse_bias(s).is_err(), "{s}");
        }
    }
}
