//! `bench`: llama-bench's tests and columns. ppN: N random tokens through an empty cache; tgN: N tokens one by one; ppN+tgM:
//! both in one; `@ dN`: with N tokens in the cache already; `xN`: N sequences, decoded together. A warm-up run, then the
//! repetitions.

mod measure;
mod report;

use crate::memory::Resident;
use crate::model::{LoadConfig, MemoryConfig, SessionConfig, Source};
use crate::output;
use anyhow::Result;
use engine::device::DeviceChoice;
use engine::gguf::Summary;
use engine::{DType, KvSpec, Model};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What to measure.
pub struct Config {
    pub setups: Vec<Setup>,
    pub tests: Vec<Test>,
    pub repetitions: usize,
    pub delay: Duration,
    pub format: Format,
    pub verbose: bool,
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A Markdown table
    Md,
    /// A JSON array
    Json,
    /// One JSON object a line
    Jsonl,
    /// Comma-separated values
    Csv,
}

/// A model and how it is run.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    pub source: Source,
    pub memory: MemoryConfig,
    pub threads: usize,
    pub batch: usize,
    pub cache_k: DType,
    pub cache_v: DType,
    pub kv: KvSpec,
}

impl Setup {
    fn session(&self, ctx: usize) -> SessionConfig {
        let Setup { batch, cache_k, cache_v, ref kv, .. } = *self;
        SessionConfig { ctx: Some(ctx), batch, cache_k, cache_v, cache_k_pe: None, kv: kv.clone() }
    }
}

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    pub prompt: usize,
    pub generated: usize,
    pub depth: usize,
    /// Each with a prompt, an answer and a depth of its own.
    pub sequences: usize,
}

impl Test {
    /// Tokens of a sequence at the end.
    fn tokens(&self) -> usize {
        self.depth + self.prompt + self.generated
    }

    fn name(&self) -> String {
        let mut name = match (self.prompt, self.generated) {
            (p, 0) => format!("pp{p}"),
            (0, g) => format!("tg{g}"),
            (p, g) => format!("pp{p}+tg{g}"),
        };
        if self.sequences > 1 {
            name += &format!(" x{}", self.sequences);
        }
        if self.depth > 0 {
            name += &format!(" @ d{}", self.depth);
        }
        name
    }
}

/// What is printed of a model.
struct Info {
    label: String,
    size: u64,
    params: u64,
    device: String,
    /// The device's first word.
    backend: String,
    /// Which weights a pass reads depends on its tokens: it has experts.
    sparse: bool,
}

/// A test's result.
struct Outcome {
    setup: Setup,
    test: Test,
    info: Arc<Info>,
    /// Of each repetition.
    seconds: Vec<f64>,
    /// When the test began.
    time: String,
    /// Weights and, on average, cache that one generated token reads, its share of what a pass reads for all sequences;
    /// `None` where that depends on the experts they choose.
    token_bytes: Option<f64>,
    /// Bytes per second that the machine reads with as many threads.
    bandwidth: f64,
    memory: Memory,
}

/// What a test's session took, and what the process held with it.
#[derive(Clone, Copy, Default)]
struct Memory {
    /// Bytes of the cache.
    cache: usize,
    /// Bytes of all other buffers.
    scratch: usize,
    /// Largest resident sizes seen after a repetition; `None` where the system does not say.
    resident: Option<Resident>,
}

impl Outcome {
    /// Tokens per second of all sequences together.
    fn rates(&self) -> Vec<f64> {
        let n = (self.test.sequences * (self.test.prompt + self.test.generated)) as f64;
        self.seconds.iter().map(|s| n / s).collect()
    }

    /// Bytes read per second; of generation only, where every token reads all its weights.
    fn read_rate(&self) -> Option<f64> {
        self.token_bytes.filter(|_| self.test.prompt == 0).map(|b| report::mean(&self.rates()).0 * b)
    }
}

pub fn run(c: &Config) -> Result<()> {
    let mut report = report::Report::new(c.format, &c.setups);
    let mut bandwidths = HashMap::new();
    let mut loaded: Option<(Setup, Arc<Model>)> = None;
    for setup in &c.setups {
        let reuse =
            |s: &Setup| s.source == setup.source && s.memory == setup.memory && s.threads == setup.threads;
        let model = match loaded.take() {
            Some((s, model)) if reuse(&s) => model,
            _ => {
                let load = LoadConfig {
                    source: setup.source.clone(),
                    memory: setup.memory.clone(),
                    threads: setup.threads,
                };
                let on = load.plan_all(c.tests.iter().map(|t| (setup.session(t.tokens()), t.sequences)))?;
                load.load(on)?.0
            }
        };
        loaded = Some((setup.clone(), model.clone()));
        let bandwidth =
            *bandwidths.entry(setup.threads).or_insert_with(|| engine::read_bandwidth(setup.threads));
        if c.verbose {
            eprintln!("memory bandwidth with {} threads: {:.2} GB/s", setup.threads, bandwidth / 1e9);
        }
        let info = Arc::new(describe(&model)?);
        for &test in &c.tests {
            std::thread::sleep(c.delay);
            let time = now();
            let (seconds, memory) = measure::measure(c, setup, &model, test)?;
            let depth = test.depth + test.generated / 2;
            let cache =
                model.read_bytes(&setup.session(test.tokens()).options(test.tokens()), depth.max(1))?;
            let weights = model.info().read_bytes_per_token as f64 / test.sequences as f64;
            // Shares of the host's bandwidth say nothing of a GPU.
            let here = setup.memory.device == DeviceChoice::Cpu && (test.sequences == 1 || !info.sparse);
            let token_bytes = here.then_some(weights + cache as f64);
            let info = info.clone();
            let setup = setup.clone();
            let outcome = Outcome { setup, test, info, seconds, time, token_bytes, bandwidth, memory };
            output::print(&report.add(&outcome))?;
        }
    }
    Ok(output::print(report.finish())?)
}

fn describe(model: &Model) -> Result<Info> {
    let (i, s) = (model.info(), Summary::of(model.file())?);
    let kind = s.file_type.and_then(|t| t.1).or(s.by_type.first().map(|t| t.dtype.name())).unwrap_or("?");
    Ok(Info {
        label: output::one_line(&format!("{} {} {kind}", i.arch, s.size_label)),
        size: i.tensor_bytes,
        params: i.n_params,
        device: i.device.clone(),
        backend: i.device.split([' ', '(']).next().unwrap_or_default().into(),
        sparse: model.file().tensors().iter().any(|t| t.name.contains("_exps.")),
    })
}

/// Now, as `2026-01-31T12:00:00Z`.
fn now() -> String {
    let s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (s / 86_400, s % 86_400);
    let (y, m, d) = civil(days as i64);
    format!("{y:04}-{m:02}-{d:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Days since 1970-01-01 to a date, by the 400-year cycle of the Gregorian calendar counted from 0000-03-01.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (d, m) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    (era * 400 + year + i64::from(m <= 2), m, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_483), (2026, 1, 30));
        assert_eq!(now().len(), 20);
    }

    #[test]
    fn names() {
        let test = |prompt, generated, depth, sequences| Test { prompt, generated, depth, sequences }.name();
        assert_eq!(test(512, 0, 0, 1), "pp512");
        assert_eq!(test(0, 128, 4096, 1), "tg128 @ d4096");
        assert_eq!(test(512, 128, 0, 1), "pp512+tg128");
        assert_eq!(test(0, 128, 4096, 8), "tg128 x8 @ d4096");
    }
}
