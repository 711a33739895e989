//! Groups of options that several commands share, and how their values are read.

use crate::model::{LoadConfig, SessionConfig, Source};
use clap::Args;
use engine::{DType, KvSpec, SamplerOptions};

/// MODEL, as the first free argument or with `-m`.
#[derive(Args)]
pub struct ModelArgs {
    /// A GGUF file (any part of a split one), or `demo`
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    model: Option<String>,
    /// MODEL, as llama.cpp's tools spell it
    #[arg(short = 'm', long = "model", value_name = "MODEL", conflicts_with = "model")]
    model_flag: Option<String>,
}

impl ModelArgs {
    pub fn source(&self) -> Source {
        let name = self.model_flag.as_ref().or(self.model.as_ref());
        Source::parse(name.expect("clap asks for one of the two"))
    }
}

/// How a model is loaded.
#[derive(Args)]
pub struct LoadArgs {
    /// Compute threads [default: all cores]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=1024), value_name = "N")]
    threads: Option<u16>,
    /// Read the file into memory instead of mapping it
    #[arg(long)]
    no_mmap: bool,
}

impl LoadArgs {
    pub fn resolve(&self, source: Source) -> LoadConfig {
        LoadConfig { source, mmap: !self.no_mmap, threads: self.threads.map_or_else(cores, usize::from) }
    }
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
    #[arg(long, default_value = "full", value_name = "POLICY")]
    pub kv: KvSpec,
}

impl CacheTypeArgs {
    pub fn session(&self, ctx: Option<usize>, batch: usize, default: DType) -> SessionConfig {
        let (cache_k, cache_v) = (self.k.unwrap_or(default), self.v.unwrap_or(default));
        SessionConfig { ctx, batch, cache_k, cache_v, cache_k_pe: self.k_pe, kv: KvSpec::default() }
    }
}

impl CacheArgs {
    pub fn session(&self, ctx: Option<usize>, batch: usize, default: DType) -> SessionConfig {
        SessionConfig { kv: self.kv.kv.clone(), ..self.types.session(ctx, batch, default) }
    }
}

/// A tensor type by its name. Whether the engine can use it for a cache is the engine's to say.
pub fn parse_cache_type(s: &str) -> Result<DType, String> {
    DType::from_name(s).ok_or_else(|| format!("{s:?} is no tensor type (f32, f16, bf16, q8_0 ...)"))
}

/// `-b`.
#[derive(Args)]
pub struct BatchArg {
    /// Prompt tokens computed at once
    #[arg(short, long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
}

impl BatchArg {
    pub fn get(&self) -> usize {
        self.batch_size as usize
    }
}

/// The sampling chain, with llama.cpp's names and defaults.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Temperature; 0 takes the most probable token
    #[arg(
        long,
        alias = "temperature",
        default_value_t = 0.8,
        allow_negative_numbers = true,
        value_name = "X"
    )]
    temp: f32,
    /// Keep the K most probable tokens (0: all)
    #[arg(long, default_value_t = 40, allow_negative_numbers = true, value_name = "K")]
    top_k: i64,
    /// Keep the most probable tokens that add up to P (1: all)
    #[arg(long, default_value_t = 0.95, allow_negative_numbers = true, value_name = "P")]
    top_p: f32,
    /// Keep tokens at least P times as probable as the best (0: all)
    #[arg(long, default_value_t = 0.05, allow_negative_numbers = true, value_name = "P")]
    min_p: f32,
    /// Locally typical sampling (1: off)
    #[arg(long, alias = "typical-p", default_value_t = 1.0, allow_negative_numbers = true, value_name = "P")]
    typical: f32,
    /// Tokens that the penalties look back on (0: none, -1: all)
    #[arg(long, default_value_t = 64, allow_negative_numbers = true, value_name = "N")]
    repeat_last_n: i64,
    /// Penalty on tokens seen (1: off)
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_name = "X")]
    repeat_penalty: f32,
    /// Taken from the logit of tokens seen (0: off)
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "X")]
    presence_penalty: f32,
    /// Taken from the logit for every time a token was seen (0: off)
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_name = "X")]
    frequency_penalty: f32,
    /// Add to a token's logit: `15043+1`, `15043-2.5`, `15043-inf` (repeatable)
    #[arg(short, long, value_name = "ID(+|-)X", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text (-1: a new one every time)
    #[arg(short, long, default_value_t = -1, allow_negative_numbers = true, value_name = "N")]
    seed: i64,
}

impl SamplingArgs {
    pub fn resolve(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k.try_into().unwrap_or(0),
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            repeat_last_n: self.repeat_last_n.try_into().unwrap_or(usize::MAX),
            repeat_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.try_into().ok(),
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
