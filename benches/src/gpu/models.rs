//! Whole models with random weights on a GPU: loading, decoding near and deep, a prompt, eight sequences, and where a decoded token's time goes.

use super::row::{Bar, Row, WAITED};
use super::timed::Timed;
use super::yardstick::Peaks;
use crate::synth::{Geometry, Types};
use anyhow::{Context as _, Result};
use engine::{Context, LoadOptions, Model, Rows, SeqId, SessionOptions};
use kernels::Device;
use kernels::cuda::CudaBackend;
use kernels::testing::Rng;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// What is measured of one model.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Of the parts of a report.
    pub name: &'static str,
    /// `benches::synth`'s geometry.
    pub geometry: &'static str,
    /// Its types.
    pub types: &'static str,
    /// Every token uses every weight: bytes and operations follow from the file.
    pub dense: bool,
    /// Tokens per second asked for at the beginning and at depth 32768, where they are.
    pub rates: Option<[f64; 2]>,
}

/// The models of issue 7.
pub const CASES: [Case; 4] = [
    Case { name: "Llama-3.1-8B Q4_K", geometry: "llama-3.1-8b", types: "Q4_K", dense: true, rates: None },
    Case {
        name: "DeepSeek-V2-Lite Q4_K",
        geometry: "deepseek-v2-lite",
        types: "Q4_K",
        dense: false,
        rates: Some([400.0, 300.0]),
    },
    Case { name: "Llama-3.1-8B Q8_0", geometry: "llama-3.1-8b", types: "Q8_0", dense: true, rates: None },
    Case { name: "Llama-3.1-8B F16", geometry: "llama-3.1-8b", types: "F16", dense: true, rates: None },
];

impl Case {
    /// What is written for it.
    ///
    /// # Panics
    /// Never: the names are in the tables.
    pub fn model(&self, toy: bool) -> (Geometry, Types) {
        let g = Geometry::named(self.geometry).expect("in the table");
        let g = if toy { Geometry { layers: 2, ..g.tiny() } } else { g };
        (g, Types::from_name(self.types).expect("a type"))
    }
}

/// Sizes: tokens decoded after some that are not counted, of a prompt, and of the depth.
struct Sizes {
    warm: usize,
    tokens: usize,
    prompt: usize,
    deep: usize,
}

const FULL: Sizes = Sizes { warm: 16, tokens: 96, prompt: 2048, deep: 32_768 };
const TOY: Sizes = Sizes { warm: 1, tokens: 2, prompt: 12, deep: 70 };
/// Kernels of a decoded token that are listed.
const LISTED: usize = 12;

/// A model on a GPU.
struct Run<'a> {
    case: &'a Case,
    gpu: Timed,
    peaks: Peaks,
    sizes: Sizes,
    model: Arc<Model>,
    geometry: Geometry,
    rng: Rng,
    row: &'a mut dyn FnMut(Row),
}

/// Measures one model; rows come as they are known.
///
/// # Errors
/// A model that cannot be loaded. What fails later is a row.
pub fn measure(
    case: &Case,
    file: &Path,
    gpu: Timed,
    peaks: Peaks,
    toy: bool,
    row: &mut dyn FnMut(Row),
) -> Result<()> {
    let device = Device::new(CudaBackend::new(Box::new(gpu.clone()), "cuda")?);
    let start = Instant::now();
    let options = LoadOptions { devices: Some(device.into()), ..LoadOptions::default() };
    let model = Model::load(file, &options).with_context(|| file.display().to_string())?;
    let seconds = start.elapsed().as_secs_f64();
    let size = model.info().tensor_bytes as f64;
    row(Row::new(
        case.name,
        "loading",
        seconds,
        "s",
        format!("{:.2} GB/s, from memory", size / seconds / 1e9),
    ));
    let sizes = if toy { TOY } else { FULL };
    let mut run = Run { case, gpu, peaks, sizes, model, geometry: case.model(toy).0, rng: Rng(1), row };
    run.step("decoding", Run::decoding);
    run.step("prompt", Run::prompt);
    run.step("eight sequences", Run::several);
    Ok(())
}

impl Run<'_> {
    fn step(&mut self, what: &str, f: fn(&mut Self) -> Result<()>) {
        if let Err(e) = f(self) {
            (self.row)(Row::failed(self.case.name, what, format!("{e:#}")));
        }
    }

    fn ids(&mut self, n: usize) -> Vec<u32> {
        let vocab = self.model.info().n_vocab as u64;
        (0..n).map(|_| (self.rng.bits() % vocab) as u32).collect()
    }

    fn open(&self, ctx: usize, batch: usize, sequences: usize) -> Result<(Context, Vec<SeqId>)> {
        let mut context = Context::new(&self.model, &Self::options(ctx, batch), sequences)?;
        let seqs = (0..sequences).map(|_| context.cache_mut().admit(0)).collect::<Result<_, _>>()?;
        Ok((context, seqs))
    }

    fn options(ctx: usize, batch: usize) -> SessionOptions {
        SessionOptions { ctx, batch, ..SessionOptions::default() }
    }

    /// One token of every sequence, down to the best of its logits, as greedy decoding takes it.
    fn token(&mut self, context: &mut Context, seqs: &[SeqId], best: &mut Vec<(u32, f32)>) -> Result<()> {
        let ids = self.ids(seqs.len());
        let rows: Vec<Rows<'_>> =
            seqs.iter().zip(ids.chunks(1)).map(|(&seq, tokens)| Rows { seq, tokens, prompt: 0 }).collect();
        context.forward(&rows)?;
        best.clear();
        let all: Vec<u32> = (0..seqs.len() as u32).collect();
        anyhow::ensure!(context.best(&all, 1, best)?, "the GPU does not look for the best logits");
        anyhow::ensure!(best.iter().all(|b| b.1.is_finite()), "logits are not finite");
        Ok(())
    }

    /// The median of seconds that a token takes (one of each sequence).
    fn seconds(&mut self, context: &mut Context, seqs: &[SeqId]) -> Result<f64> {
        let (mut best, mut all) = (Vec::new(), Vec::new());
        for i in 0..self.sizes.warm + self.sizes.tokens {
            let start = Instant::now();
            self.token(context, seqs, &mut best)?;
            if i >= self.sizes.warm {
                all.push(start.elapsed().as_secs_f64());
            }
        }
        all.sort_by(f64::total_cmp);
        Ok(all[all.len() / 2])
    }

    fn decoding(&mut self) -> Result<()> {
        let tokens = self.sizes.warm + self.sizes.tokens + 8;
        for (i, depth) in [0, self.sizes.deep].into_iter().enumerate() {
            let ctx = depth + tokens;
            let (mut context, seqs) = self.open(ctx, 64, 1)?;
            let past = self.ids(depth);
            context.assume(seqs[0], &past)?;
            let seconds = self.seconds(&mut context, &seqs)?;
            let at = depth + tokens / 2;
            let bytes = self.model.info().read_bytes_per_token as usize
                + self.model.read_bytes(&Self::options(ctx, 64), at)?;
            let share = bytes as f64 / seconds / self.peaks.copied;
            let rate = 1.0 / seconds;
            let bar = match self.case.rates {
                Some(rates) => Bar::least(format!(">= {:.0} tokens/s", rates[i]), rate, rates[i]),
                None if i == 0 => Bar::least(">= 75% of the bandwidth", share, 0.75),
                None => None,
            };
            let note = format!("{:.0}% of copying ({:.2} GB a token)", 100.0 * share, bytes as f64 / 1e9);
            (self.row)(
                Row::new(self.case.name, format!("decoding at {depth}"), rate, "tokens/s", note).bar(bar),
            );
            self.breakdown(&mut context, &seqs, depth, seconds)?;
        }
        Ok(())
    }

    /// Which kernels a token's time goes to: each launch is waited for, so that they add up to more than a token takes.
    fn breakdown(&mut self, context: &mut Context, seqs: &[SeqId], depth: usize, whole: f64) -> Result<()> {
        let mut best = Vec::new();
        let gpu = self.gpu.clone();
        let spent = gpu.measure(|| self.token(context, seqs, &mut best))?;
        let part = format!("{}: one token at {depth}{WAITED}", self.case.name);
        let (launches, total) = spent.values().fold((0, 0.0), |(n, s), v| (n + v.0, s + v.1));
        let note = format!("{launches} launches; {:.0} us where none is waited for", 1e6 * whole);
        (self.row)(Row::new(&part, "all kernels", 1e6 * total, "us", note));
        let mut all: Vec<_> = spent.into_iter().collect();
        all.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        for (kernel, (n, seconds)) in all.into_iter().take(LISTED) {
            let note = format!(
                "{n} launches, {:.1} us each, {:.0}%",
                1e6 * seconds / n as f64,
                100.0 * seconds / total
            );
            (self.row)(Row::new(&part, kernel, 1e6 * seconds, "us", note));
        }
        Ok(())
    }

    fn prompt(&mut self) -> Result<()> {
        let n = self.sizes.prompt;
        let (mut context, seqs) = self.open(n, n, 1)?;
        let ids = self.ids(n);
        let mut logits = Vec::new();
        let mut all = Vec::new();
        // The first loads kernels.
        for _ in 0..4 {
            context.cache_mut().truncate(seqs[0], 0)?;
            let start = Instant::now();
            context.forward(&[Rows { seq: seqs[0], tokens: &ids, prompt: n }])?;
            logits.clear();
            context.logits(&[n as u32 - 1], &mut logits)?;
            all.push(start.elapsed().as_secs_f64());
        }
        all[1..].sort_by(f64::total_cmp);
        let seconds = all[2];
        // Of matrices alone; of the two with a row for each token of the vocabulary, only one row of one is read.
        let g = self.geometry;
        let inner =
            self.model.info().n_params as f64 - (if g.tied { 1.0 } else { 2.0 }) * (g.vocab * g.d) as f64;
        let rate = 2.0 * inner * n as f64 / seconds / 1e12;
        let (note, bar) = match self.case.dense {
            true => (format!("{rate:.0} TFLOP/s of products"), Bar::least(">= 250 TFLOP/s", rate, 250.0)),
            false => (String::new(), None),
        };
        (self.row)(
            Row::new(self.case.name, format!("prompt of {n}"), n as f64 / seconds, "tokens/s", note).bar(bar),
        );
        context.cache_mut().truncate(seqs[0], 0)?;
        let gpu = self.gpu.clone();
        let spent = gpu.measure(|| context.forward(&[Rows { seq: seqs[0], tokens: &ids, prompt: n }]))?;
        let part = format!("{}: prompt of {n}{WAITED}", self.case.name);
        let mut all: Vec<_> = spent.into_iter().collect();
        all.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        for (kernel, (n, spent)) in all.into_iter().take(LISTED) {
            let note = format!("{n} launches, {:.0}% of {:.1} ms", 100.0 * spent / seconds, 1e3 * seconds);
            (self.row)(Row::new(&part, kernel, 1e3 * spent, "ms", note));
        }
        Ok(())
    }

    fn several(&mut self) -> Result<()> {
        let tokens = self.sizes.warm + self.sizes.tokens;
        let mut rates = Vec::new();
        for sequences in [1, 8] {
            let (mut context, seqs) = self.open(tokens, 64, sequences)?;
            rates.push(sequences as f64 / self.seconds(&mut context, &seqs)?);
        }
        let times = rates[1] / rates[0];
        let bar = if self.case.dense { Bar::least(">= 6 times one", times, 6.0) } else { None };
        let note = format!("{times:.1} times one");
        (self.row)(Row::new(self.case.name, "eight sequences", rates[1], "tokens/s", note).bar(bar));
        Ok(())
    }
}
