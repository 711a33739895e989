//! `perplexity`: llama-perplexity's method and output. The text is cut into chunks of n_ctx tokens; each is evaluated on its
//! own with BOS in place of its first token where the vocabulary asks for BOS, and the predictions in its second half count.

use super::kld::{BaseReader, BaseWriter, Divergence};
use crate::model::{LoadConfig, SessionConfig};
use crate::output;
use anyhow::{Context, Result, bail};
use engine::text::EncodeOptions;
use engine::{Model, Session};
use std::path::PathBuf;
use std::sync::Arc;

/// What to measure.
pub struct Config {
    pub load: LoadConfig,
    pub session: SessionConfig,
    pub n_ctx: usize,
    /// At most this many chunks.
    pub chunks: Option<usize>,
    pub mode: Mode,
}

/// Against what.
pub enum Mode {
    /// The text alone.
    Perplexity { text: String },
    /// Chunks `stride` tokens apart of which the last `stride` predictions count.
    Strided { text: String, stride: usize },
    /// The text, writing the predictions for a later comparison.
    WriteBase { text: String, base: PathBuf },
    /// The text and predictions in a base file.
    Divergence { base: PathBuf },
}

/// Sum and sum of squares, for a mean and its standard error.
#[derive(Clone, Copy, Default)]
pub struct Stat {
    pub sum: f64,
    pub sum2: f64,
}

impl Stat {
    pub fn add(&mut self, x: f64) {
        self.sum += x;
        self.sum2 += x * x;
    }

    /// Mean and standard error of `count` values.
    pub fn mean(&self, count: usize) -> (f64, f64) {
        let n = count as f64;
        let mean = self.sum / n;
        let var = self.sum2 / n - mean * mean;
        (mean, if var > 0.0 && count > 1 { (var / (n - 1.0)).sqrt() } else { 0.0 })
    }
}

/// ln of the sum of exp(logit), in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|&l| f64::from((l - max).exp())).sum::<f64>().ln()
}

pub fn run(c: &Config) -> Result<()> {
    let base = match &c.mode {
        Mode::Divergence { base } => Some(BaseReader::open(base)?),
        _ => None,
    };
    // Only now the slow part; and the output before it, so that a typo in its name costs nothing.
    let out = match &c.mode {
        Mode::WriteBase { base, .. } => Some(output::OutFile::create(base)?),
        _ => None,
    };
    let ctx = match (&c.mode, &base) {
        (_, Some(base)) => base.n_ctx,
        (Mode::Strided { stride, .. }, _) => c.n_ctx + stride / 2,
        _ => c.n_ctx,
    };
    let on = c.load.clone().plan(&mut SessionConfig { ctx: Some(ctx), ..c.session.clone() }, false)?;
    let (model, _) = c.load.load(on)?;
    match &c.mode {
        Mode::Perplexity { text } => chunked(c, &model, &tokens(&model, text), None),
        Mode::WriteBase { text, .. } => chunked(c, &model, &tokens(&model, text), out),
        Mode::Strided { text, stride } => strided(c, &model, &tokens(&model, text), *stride),
        Mode::Divergence { .. } => divergence(c, &model, base.context("opened above")?),
    }
}

fn tokens(model: &Model, text: &str) -> Vec<u32> {
    model.vocab().encode(text, EncodeOptions { add_special: true, parse_special: false })
}

/// The chunk with BOS in place of its first token, if the vocabulary puts BOS before texts.
fn with_bos(model: &Model, chunk: &[u32]) -> Vec<u32> {
    let mut chunk = chunk.to_vec();
    if let (true, Some(bos)) = (model.vocab().adds_bos(), model.vocab().bos()) {
        chunk[0] = bos;
    }
    chunk
}

/// Evaluates one chunk from an empty cache; `score` gets (position, logits, next token) for positions `from..len-1`.
fn score_chunk(
    session: &mut Session,
    chunk: &[u32],
    from: usize,
    mut score: impl FnMut(usize, &[f32], u32) -> Result<()>,
) -> Result<()> {
    session.truncate(0);
    let model = session.model().clone();
    session.eval_all(&with_bos(&model, chunk), |i, logits| {
        if i >= from && i + 1 < chunk.len() { score(i, logits, chunk[i + 1]) } else { Ok(()) }
    })
}

/// Number of chunks, saying on stderr what will be done.
fn announce(c: &Config, what: &str, n_tokens: usize, max: usize, n_ctx: usize) -> usize {
    let n = c.chunks.map_or(max, |m| m.min(max));
    eprintln!(
        "{what} over {n} chunks of {n_ctx} tokens ({n_tokens} tokens in the text), batch {}",
        c.session.batch
    );
    n
}

fn enough(n_tokens: usize, need: usize, n_ctx: usize) -> Result<()> {
    if n_tokens < need {
        bail!(
            "the text has {n_tokens} tokens; a context of {n_ctx} needs at least {need} (shorten it with -c)"
        );
    }
    Ok(())
}

fn estimate(nll: &Stat, count: usize) -> Result<()> {
    let (mean, error) = nll.mean(count);
    let ppl = mean.exp();
    Ok(output::print(&format!("\nFinal estimate: PPL = {ppl:.4} +/- {:.5}\n", error * ppl))?)
}

fn chunked(c: &Config, model: &Arc<Model>, ids: &[u32], out: Option<output::OutFile>) -> Result<()> {
    let n_ctx = c.n_ctx;
    enough(ids.len(), 2 * n_ctx, n_ctx)?;
    let n_chunk = announce(c, "perplexity", ids.len(), ids.len() / n_ctx, n_ctx);
    let mut session = c.session.open(model, n_ctx)?;
    let mut base = match out {
        Some(file) => Some(BaseWriter::start(file, n_ctx, model.info().n_vocab, &ids[..n_chunk * n_ctx])?),
        None => None,
    };
    let (mut nll, mut count) = (Stat::default(), 0);
    for (i, chunk) in ids.chunks_exact(n_ctx).take(n_chunk).enumerate() {
        score_chunk(&mut session, chunk, n_ctx / 2, |_, logits, next| {
            nll.add(log_sum_exp(logits) - f64::from(logits[next as usize]));
            count += 1;
            base.as_mut().map_or(Ok(()), |b| b.row(logits))
        })?;
        output::print(&format!("[{}]{:.4},", i + 1, (nll.sum / f64::from(count)).exp()))?;
    }
    if let Some(base) = base {
        base.finish()?;
    }
    estimate(&nll, count as usize)
}

fn strided(c: &Config, model: &Arc<Model>, ids: &[u32], stride: usize) -> Result<()> {
    let n_ctx = c.n_ctx + stride / 2;
    if stride >= n_ctx {
        bail!("a stride of {stride} does not fit a context of {n_ctx}");
    }
    enough(ids.len(), (2 * c.n_ctx).max(n_ctx + 1), c.n_ctx)?;
    let n_chunk = announce(c, "strided perplexity", ids.len(), (ids.len() - n_ctx).div_ceil(stride), n_ctx);
    let mut session = c.session.open(model, n_ctx)?;
    let (mut nll, mut count) = (Stat::default(), 0);
    for i in 0..n_chunk {
        let start = i * stride;
        // The last chunk may end with the text.
        let chunk = &ids[start..(start + n_ctx).min(ids.len())];
        score_chunk(&mut session, chunk, n_ctx - stride - 1, |_, logits, next| {
            nll.add(log_sum_exp(logits) - f64::from(logits[next as usize]));
            count += 1;
            Ok(())
        })?;
        output::print(&format!("[{}]{:.4},", i + 1, (nll.sum / f64::from(count)).exp()))?;
    }
    estimate(&nll, count as usize)
}

fn divergence(c: &Config, model: &Arc<Model>, mut base: BaseReader) -> Result<()> {
    let n_vocab = model.info().n_vocab;
    if base.n_vocab != n_vocab {
        bail!("the base file is of a vocabulary of {} tokens, this model has {n_vocab}", base.n_vocab);
    }
    if let Some(&id) = base.tokens.iter().find(|&&t| t as usize >= n_vocab) {
        bail!("the base file holds token id {id}, but the vocabulary has {n_vocab} entries");
    }
    let n_ctx = base.n_ctx;
    let n_chunk = announce(c, "KL divergence", base.tokens.len(), base.tokens.len() / n_ctx, n_ctx);
    let mut session = c.session.open(model, n_ctx)?;
    let mut d = Divergence::default();
    output::print(
        "\nchunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p\n",
    )?;
    let ids = std::mem::take(&mut base.tokens);
    for (i, chunk) in ids.chunks_exact(n_ctx).take(n_chunk).enumerate() {
        score_chunk(&mut session, chunk, n_ctx / 2, |_, logits, next| {
            let row = base.row()?;
            d.add(logits, row, next);
            Ok(())
        })?;
        output::print(&d.line(i + 1))?;
    }
    Ok(output::print(&d.report())?)
}
