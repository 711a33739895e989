//! Arguments of `bench`: llama-bench's, every number a list (`a,b`) or range (`first-last+step`, `first-last*factor`).

use super::shared::{KvArg, MemoryArgs, cores, parse_cache_type};
use crate::cmd::bench::{Config, Format, Setup, Test};
use crate::model::Source;
use anyhow::Result;
use clap::Args;
use engine::DType;

/// Measure prompt processing and generation speed
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer bench model.gguf                        pp512 and tg128\n  \
    rsinfer bench model.gguf -p 128,512 -n 0 -t 1-4*2\n  \
    rsinfer bench model.gguf -n 128 -d 0,4096 -o json\n  \
    rsinfer bench model.gguf -p 0 -n 64 -np 1,2,4,8   one conversation, then several at a time\n\n\
    Columns are llama-bench's and four more. For generation, GB/s is bytes of weights and cache read per second, and the\n\
    next column its share of the memory bandwidth measured in the same run. Of the resident memory after a repetition,\n\
    mapped is the pages of files (weights) and anonymous all else (cache, buffers, vocabulary; Linux only).")]
pub struct BenchArgs {
    /// GGUF files, or `demo`
    #[arg(value_name = "MODEL", required_unless_present = "more")]
    models: Vec<String>,
    /// MODEL, as llama.cpp's tools spell it (repeatable)
    #[arg(short = 'm', long = "model", value_name = "MODEL")]
    more: Vec<String>,
    /// Prompt lengths (0: no such test)
    #[arg(short = 'p', long, default_value = "512", value_name = "N,...", value_parser = list)]
    n_prompt: List,
    /// Numbers of generated tokens (0: no such test)
    #[arg(short, long, default_value = "128", value_name = "N,...", value_parser = list)]
    n_gen: List,
    /// Prompt and generation in one test, PP,TG (-pg; repeatable)
    #[arg(long = "prompt-gen", value_name = "PP,TG", value_parser = pair)]
    pg: Vec<(usize, usize)>,
    /// Tokens in the cache before the test begins
    #[arg(short = 'd', long, default_value = "0", value_name = "N,...", value_parser = list)]
    n_depth: List,
    /// Sequences with a cache each, decoded together (-np); t/s is of all of them
    #[arg(long, alias = "n-parallel", default_value = "1", value_name = "N,...", value_parser = list)]
    parallel: List,
    /// Prompt tokens computed at once
    #[arg(short, long, default_value = "2048", value_name = "N,...", value_parser = list)]
    batch_size: List,
    /// Compute threads [default: all cores]
    #[arg(short, long, value_name = "N,...", value_parser = list)]
    threads: Option<List>,
    /// Repetitions
    #[arg(short, long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Seconds to wait before each test
    #[arg(long, default_value_t = 0, value_name = "N")]
    delay: u64,
    /// Output format
    #[arg(short, long, value_enum, default_value = "md")]
    output: Format,
    /// Cache types of keys (-ctk)
    #[arg(long = "cache-type-k", default_value = "f16", value_name = "TYPE,...", value_delimiter = ',', value_parser = parse_cache_type)]
    ctk: Vec<DType>,
    /// Cache types of values (-ctv)
    #[arg(long = "cache-type-v", default_value = "f16", value_name = "TYPE,...", value_delimiter = ',', value_parser = parse_cache_type)]
    ctv: Vec<DType>,
    #[command(flatten)]
    kv: KvArg,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Show progress on stderr
    #[arg(long, short)]
    verbose: bool,
}

/// Values of one option. (Clap would spread a bare Vec over several occurrences.)
#[derive(Clone, Debug, PartialEq)]
struct List(Vec<usize>);

impl BenchArgs {
    pub fn resolve(self) -> Result<Config> {
        let threads = self.threads.map_or_else(|| vec![cores()], |l| l.0);
        if threads.contains(&0) || self.batch_size.0.contains(&0) {
            super::usage("bench", "threads and batch size must be at least 1");
        }
        if self.parallel.0.iter().any(|n| !(1..=65536).contains(n)) {
            super::usage("bench", "--parallel must be from 1 to 65536");
        }
        let memory = self.memory.resolve()?;
        let mut setups = Vec::new();
        for model in self.models.iter().chain(&self.more) {
            let source = Source::named(model)?;
            for &threads in &threads {
                for &batch in &self.batch_size.0 {
                    for (&cache_k, &cache_v) in
                        self.ctk.iter().flat_map(|k| self.ctv.iter().map(move |v| (k, v)))
                    {
                        let (source, kv) = (source.clone(), self.kv.get());
                        let memory = memory.clone();
                        setups.push(Setup { source, memory, threads, batch, cache_k, cache_v, kv });
                    }
                }
            }
        }
        let single = self.n_prompt.0.iter().map(|&p| (p, 0)).chain(self.n_gen.0.iter().map(|&n| (0, n)));
        let pairs: Vec<(usize, usize)> = single.chain(self.pg).filter(|t| *t != (0, 0)).collect();
        let mut tests = Vec::new();
        for &depth in &self.n_depth.0 {
            for &(prompt, generated) in &pairs {
                let test = |&sequences| Test { prompt, generated, depth, sequences };
                tests.extend(self.parallel.0.iter().map(test));
            }
        }
        Ok(Config {
            setups,
            tests,
            repetitions: self.repetitions as usize,
            delay: std::time::Duration::from_secs(self.delay),
            format: self.output,
            verbose: self.verbose,
        })
    }
}

fn number(s: &str) -> Result<usize, String> {
    s.trim().parse().map_err(|_| format!("{s:?} is not a number"))
}

fn pair(s: &str) -> Result<(usize, usize), String> {
    let (a, b) = s.split_once(',').ok_or("two numbers are needed: PP,TG")?;
    Ok((number(a)?, number(b)?))
}

fn list(s: &str) -> Result<List, String> {
    let mut out = Vec::new();
    for part in s.split(',') {
        let Some((first, last)) = part.split_once('-') else {
            out.push(number(part)?);
            continue;
        };
        let (last, step, factor) = match (last.split_once('+'), last.split_once('*')) {
            (Some((l, step)), _) => (number(l)?, number(step)?, 1),
            (_, Some((l, factor))) => (number(l)?, 0, number(factor)?),
            _ => (number(last)?, 1, 1),
        };
        let mut n = number(first)?;
        if n > last || (step == 0 && (factor < 2 || n == 0)) {
            return Err(format!("{part:?} is no range that ends"));
        }
        while n <= last {
            out.push(n);
            if out.len() > 10_000 {
                return Err(format!("{part:?} is too long a list"));
            }
            n = n.saturating_mul(factor).saturating_add(step);
        }
    }
    Ok(List(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        for (s, want) in [
            ("512", vec![512]),
            ("1,2", vec![1, 2]),
            ("1-3", vec![1, 2, 3]),
            ("0-10+5,7", vec![0, 5, 10, 7]),
            ("1-8*2", vec![1, 2, 4, 8]),
        ] {
            assert_eq!(list(s), Ok(List(want)), "{s}");
        }
        for s in ["", "x", "3-1", "1-4*1", "0-4*2", "1-4+0", "-1"] {
            assert!(list(s).is_err(), "{s}");
        }
        assert_eq!(pair("512,128"), Ok((512, 128)));
    }
}
