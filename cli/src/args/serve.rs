//! Arguments of `serve`, and Ollama's environment variables.

use super::shared::{LoadArgs, cores, parse_cache_type};
use crate::serve::config::Config;
use crate::serve::duration::{KeepAlive, go_seconds};
use anyhow::Result;
use clap::Args;
use engine::{DType, KvSpec};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Rows of prompts that may come between two tokens of others.
const CHUNK: usize = 128;

/// Serve models to Ollama's, OpenAI's and llama.cpp's clients
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer serve                                   models are loaded when they are asked for; `demo` is always there\n  \
    rsinfer serve -m model.gguf --parallel 4\n  \
    curl localhost:11434/api/chat -d '{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":\"Hello!\"}]}'\n\n\
    Environment, where no flag says otherwise: OLLAMA_HOST, OLLAMA_KEEP_ALIVE, OLLAMA_NUM_PARALLEL, OLLAMA_MAX_QUEUE,\n\
    OLLAMA_MAX_LOADED_MODELS, OLLAMA_CONTEXT_LENGTH, OLLAMA_KV_CACHE_TYPE, OLLAMA_LOAD_TIMEOUT, OLLAMA_ORIGINS, OLLAMA_DEBUG.\n\
    Those about GPUs (OLLAMA_GPU_OVERHEAD, OLLAMA_SCHED_SPREAD) are read and of no effect; --device says what computes.\n\
    SIGTERM or Ctrl-C finishes the answers under way; a second one ends at once. TLS is left to a proxy.")]
pub struct ServeArgs {
    /// Where to listen, HOST:PORT [default: 127.0.0.1:11434]
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// The port alone
    #[arg(long, value_name = "N")]
    port: Option<u16>,
    /// Serve this GGUF file under its name without .gguf; the first is loaded at once (repeatable)
    #[arg(short, long, value_name = "FILE", num_args = 1..)]
    model: Vec<PathBuf>,
    /// Sequences of a model that are computed together [default: 1]
    #[arg(long, alias = "np", value_name = "N")]
    parallel: Option<usize>,
    /// Context of each sequence where a request does not say, 0 for what the model was trained for [default: that, but at most 4096]
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Prompt tokens computed at once
    #[arg(short, long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch_size: u32,
    /// Prompt tokens computed at once while others wait for their next token
    #[arg(long, default_value_t = CHUNK, value_name = "N")]
    chunk: usize,
    /// What caches keep, as in `run` [default: the system prompt and the latest tokens, so that no conversation ends]
    #[arg(long, value_name = "POLICY")]
    kv: Option<KvSpec>,
    /// Cache type of keys (or of MLA's latent): f16, q8_0, q4_0 ... (-ctk)
    #[arg(long = "cache-type-k", value_name = "TYPE", value_parser = parse_cache_type)]
    cache_k: Option<DType>,
    /// Cache type of values (-ctv)
    #[arg(long = "cache-type-v", value_name = "TYPE", value_parser = parse_cache_type)]
    cache_v: Option<DType>,
    /// How long an idle model stays loaded: 5m, 1h30m, seconds; negative: for ever; 0: not at all
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, value_parser = keep_alive)]
    keep_alive: Option<KeepAlive>,
    /// Requests that may wait [default: 512]
    #[arg(long, value_name = "N")]
    max_queue: Option<usize>,
    /// Models loaded at a time, while they fit the memory [default: 3]
    #[arg(long, value_name = "N")]
    max_loaded_models: Option<usize>,
    /// Ask for this key (Authorization: Bearer KEY)
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    #[command(flatten)]
    load: LoadArgs,
}

fn keep_alive(s: &str) -> Result<KeepAlive, String> {
    KeepAlive::parse(s).ok_or_else(|| format!("{s:?} is no duration such as 5m, nor seconds"))
}

/// A variable's value, without blanks and quotes around it; empty is not set.
fn var(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    let value = value.trim().trim_matches(['"', '\'']).trim().to_owned();
    (!value.is_empty()).then_some(value)
}

/// A variable that must make sense.
fn parsed<T>(name: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    let value = var(name)?;
    let parsed = parse(&value);
    if parsed.is_none() {
        super::usage("serve", format!("{name}={value:?} makes no sense"));
    }
    parsed
}

fn number<T: FromStr>(name: &str) -> Option<T> {
    parsed(name, |s| s.parse().ok())
}

/// `host:port` of an address as OLLAMA_HOST has it: the scheme, the host or the port may be missing.
fn address(s: &str) -> String {
    let (port, rest) = match s.split_once("://") {
        Some(("https", rest)) => (443, rest),
        Some((_, rest)) => (80, rest),
        None => (11434, s),
    };
    let rest = rest.split('/').next().unwrap_or(rest);
    let host = |h: &str| if h.is_empty() { "127.0.0.1".to_owned() } else { h.to_owned() };
    match rest.rsplit_once(':') {
        // An IPv6 address without a port has colons too.
        Some((h, p)) if p.bytes().all(|b| b.is_ascii_digit()) && (h.ends_with(']') || !h.contains(':')) => {
            format!("{}:{}", host(h), if p.is_empty() { port.to_string() } else { p.into() })
        }
        _ if rest.contains(':') && !rest.starts_with('[') => format!("[{rest}]:{port}"),
        _ => format!("{}:{port}", host(rest)),
    }
}

impl ServeArgs {
    pub fn resolve(self) -> Result<Config> {
        let mut host = address(&self.host.or_else(|| var("OLLAMA_HOST")).unwrap_or_default());
        if let (Some(port), Some((h, _))) = (self.port, host.rsplit_once(':')) {
            host = format!("{h}:{port}");
        }
        let both = parsed("OLLAMA_KV_CACHE_TYPE", DType::from_name);
        let truth = |s: &str| Some(s.parse::<bool>().unwrap_or(true));
        let gpus = parsed("OLLAMA_GPU_OVERHEAD", |s| s.parse::<u64>().ok()).is_some_and(|n| n > 0);
        if gpus || parsed("OLLAMA_SCHED_SPREAD", truth) == Some(true) {
            eprintln!(
                "note: OLLAMA_GPU_OVERHEAD and OLLAMA_SCHED_SPREAD are of no effect: --device says what computes"
            );
        }
        if parsed("OLLAMA_NOPRUNE", truth) == Some(false) {
            eprintln!(
                "note: OLLAMA_NOPRUNE=false is of no effect: no file is removed when the server starts"
            );
        }
        let not_zero = |n: usize| (n > 0).then_some(n);
        let timeout = parsed("OLLAMA_LOAD_TIMEOUT", |s| s.parse().ok().or_else(|| go_seconds(s)));
        let timeout = timeout.map_or(Some(300.0), |t| (t > 0.0).then_some(t.min(1e9)));
        let debug = |s: &str| s.parse::<bool>().map(u8::from).or_else(|_| s.parse()).ok().or(Some(1));
        let threads = self.load.resolve(crate::model::Source::Demo)?;
        Ok(Config {
            host,
            models: self.model,
            threads: if threads.threads == 0 { cores() } else { threads.threads },
            memory: threads.memory,
            ctx: self.ctx_size.or_else(|| number("OLLAMA_CONTEXT_LENGTH").and_then(not_zero)),
            batch: self.batch_size as usize,
            chunk: self.chunk.max(1),
            cache_k: self.cache_k.or(both).unwrap_or(DType::F16),
            cache_v: self.cache_v.or(both).unwrap_or(DType::F16),
            cache_k_pe: None,
            kv: self.kv,
            parallel: self.parallel.or_else(|| number("OLLAMA_NUM_PARALLEL")).unwrap_or(1).clamp(1, 256),
            keep_alive: (self.keep_alive)
                .or_else(|| parsed("OLLAMA_KEEP_ALIVE", KeepAlive::parse))
                .unwrap_or(KeepAlive(Some(Duration::from_secs(300)))),
            max_queue: self.max_queue.or_else(|| number("OLLAMA_MAX_QUEUE")).unwrap_or(512),
            max_loaded: (self.max_loaded_models.or_else(|| number("OLLAMA_MAX_LOADED_MODELS")))
                .and_then(not_zero)
                .unwrap_or(3),
            load_timeout: timeout.map(Duration::from_secs_f64),
            api_key: self.api_key.or_else(|| var("RSINFER_API_KEY")),
            origins: var("OLLAMA_ORIGINS")
                .map(|s| s.split(',').map(|o| o.trim().to_owned()).filter(|o| !o.is_empty()).collect())
                .unwrap_or_default(),
            debug: parsed("OLLAMA_DEBUG", debug).unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (s, want) in [
            ("", "127.0.0.1:11434"),
            ("0.0.0.0", "0.0.0.0:11434"),
            (":8080", "127.0.0.1:8080"),
            ("example.com:56789", "example.com:56789"),
            ("http://example.com", "example.com:80"),
            ("https://example.com", "example.com:443"),
            ("http://example.com:7/x", "example.com:7"),
            ("[::1]", "[::1]:11434"),
            ("::1", "[::1]:11434"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(address(s), want, "{s}");
        }
    }
}
