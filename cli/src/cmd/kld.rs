//! The distance between two models' predictions, and the base file that carries one model's predictions to the other.
//!
//! The file is llama-perplexity's (tools/perplexity in llama.cpp): `_logits_`, n_ctx, n_vocab, n_chunk as i32, the tokens as
//! i32, then one row a scored position: f32 scale, f32 minimum, n_vocab 16-bit steps (padded to an even number), so that
//! ln p = minimum + scale * step. Predictions below e^-16 of the best are stored as the minimum.

use super::perplexity::{Stat, log_sum_exp};
use crate::output::OutFile;
use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"_logits_";

/// 16-bit words of a row.
fn row_words(n_vocab: usize) -> usize {
    2 * n_vocab.div_ceil(2) + 4
}

/// Writes a base file.
pub struct BaseWriter {
    out: OutFile,
    n_vocab: usize,
    row: Vec<u8>,
}

impl BaseWriter {
    /// `tokens`: whole chunks of `n_ctx`.
    pub fn start(mut out: OutFile, n_ctx: usize, n_vocab: usize, tokens: &[u32]) -> Result<Self> {
        let mut h = MAGIC.to_vec();
        for n in [n_ctx, n_vocab, tokens.len() / n_ctx] {
            h.extend(i32::try_from(n)?.to_le_bytes());
        }
        h.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        out.write_all(&h)?;
        Ok(Self { out, n_vocab, row: Vec::new() })
    }

    /// Appends a scored position's logits.
    pub fn row(&mut self, logits: &[f32]) -> Result<()> {
        compress(logits, &mut self.row);
        self.row.resize(2 * row_words(self.n_vocab), 0);
        Ok(self.out.write_all(&self.row)?)
    }

    pub fn finish(self) -> Result<()> {
        self.out.finish()
    }
}

fn compress(logits: &[f32], row: &mut Vec<u8>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min = logits.iter().copied().fold(f32::INFINITY, f32::min).max(max - 16.0);
    let scale = (max - min) / 65535.0;
    let min_log_prob = (f64::from(min) - log_sum_exp(logits)) as f32;
    row.clear();
    row.extend(scale.to_le_bytes());
    row.extend(min_log_prob.to_le_bytes());
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    // `as` saturates: below the minimum is step 0.
    row.extend(logits.iter().flat_map(|l| (((l - min) * inverse).round_ties_even() as u16).to_le_bytes()));
}

/// Reads a base file.
pub struct BaseReader {
    path: PathBuf,
    input: BufReader<File>,
    pub n_ctx: usize,
    pub n_vocab: usize,
    /// Whole chunks of `n_ctx`.
    pub tokens: Vec<u32>,
    bytes: Vec<u8>,
    row: Row,
}

/// The stored predictions of one position.
#[derive(Default)]
pub struct Row {
    scale: f32,
    min: f32,
    steps: Vec<u16>,
}

impl Row {
    fn log_prob(&self, token: usize) -> f32 {
        self.min + self.scale * f32::from(self.steps[token])
    }
}

impl BaseReader {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let length = file.metadata().map_or(0, |m| m.len());
        let mut input = BufReader::with_capacity(1 << 20, file);
        let mut head = [0u8; 20];
        let read = input.read_exact(&mut head);
        if read.is_err() || &head[..8] != MAGIC {
            bail!("{}: not a file of predictions as --kl-divergence-base writes it", path.display());
        }
        let field = |i: usize| i32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let [n_ctx, n_vocab, n_chunk] = [8, 12, 16].map(|i| u64::try_from(field(i)).unwrap_or(0));
        let scored = if n_ctx >= 4 { n_ctx - 1 - n_ctx / 2 } else { 0 };
        let row = 2 * row_words(n_vocab as usize) as u64;
        // The sizes that the header claims must be those of the file before anything is allocated for them.
        let need = n_chunk.checked_mul(n_ctx * 4 + scored * row).and_then(|n| n.checked_add(20));
        if scored == 0 || n_vocab == 0 || n_chunk == 0 || need.is_none_or(|n| n > length) {
            bail!("{}: truncated, or its header is wrong", path.display());
        }
        let mut bytes = vec![0; (n_chunk * n_ctx * 4) as usize];
        input.read_exact(&mut bytes)?;
        let (quads, _) = bytes.as_chunks::<4>();
        let tokens = quads.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let bytes = vec![0; row as usize];
        let (n_ctx, n_vocab) = (n_ctx as usize, n_vocab as usize);
        Ok(Self { path: path.into(), input, n_ctx, n_vocab, tokens, bytes, row: Row::default() })
    }

    /// The next scored position.
    pub fn row(&mut self) -> Result<&Row> {
        let read = self.input.read_exact(&mut self.bytes);
        read.with_context(|| format!("cannot read {}", self.path.display()))?;
        let b = &self.bytes;
        self.row.scale = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        self.row.min = f32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        let (pairs, _) = b[8..].as_chunks::<2>();
        self.row.steps.clear();
        self.row.steps.extend(pairs[..self.n_vocab].iter().map(|p| u16::from_le_bytes(*p)));
        Ok(&self.row)
    }
}

/// Running sums over all scored positions; Q is the model measured, base the one in the file.
#[derive(Default)]
pub struct Divergence {
    nll: Stat,
    nll_base: Stat,
    nll_both: f64,
    same_top: usize,
    kld: Stat,
    dp: Stat,
    dp2: Stat,
    klds: Vec<f32>,
    dps: Vec<f32>,
}

impl Divergence {
    /// Adds a position followed by `next` in the text.
    pub fn add(&mut self, logits: &[f32], base: &Row, next: u32) {
        let norm = log_sum_exp(logits);
        let next = next as usize;
        let (nll, nll_base) = (norm - f64::from(logits[next]), -f64::from(base.log_prob(next)));
        self.nll.add(nll);
        self.nll_base.add(nll_base);
        self.nll_both += nll * nll_base;
        let (mut kld, mut top, mut top_base) = (0.0, 0, 0);
        for (i, &l) in logits.iter().enumerate() {
            let log_base = base.log_prob(i);
            top = if l > logits[top] { i } else { top };
            top_base = if base.steps[i] > base.steps[top_base] { i } else { top_base };
            // What lies e^-16 and more below certainty is not resolved by the file and carries no weight.
            if log_base > -16.0 {
                kld += f64::from(log_base.exp()) * (f64::from(log_base) - f64::from(l) + norm);
            }
        }
        self.same_top += usize::from(top == top_base);
        self.kld.add(kld);
        self.klds.push(kld as f32);
        let dp = (-nll).exp() - (-nll_base).exp();
        self.dp.add(dp);
        self.dp2.add(dp * dp);
        self.dps.push(dp as f32);
    }

    fn ratio(&self) -> Ratio {
        let n = self.klds.len();
        let (ln_q, err_q) = self.nll.mean(n);
        let (ln_base, err_base) = self.nll_base.mean(n);
        let count = n as f64;
        let cov = if n < 10 { 0.0 } else { (self.nll_both / count - ln_q * ln_base) / (count - 1.0) };
        let ln_err = (err_q * err_q + err_base * err_base - 2.0 * cov).max(0.0).sqrt();
        Ratio { ln_q, err_q, ln_base, err_base, cov, ln_err }
    }

    /// Share of positions where both models' best token is the same, in percent, with its error.
    fn same(&self) -> (f64, f64) {
        let n = self.klds.len() as f64;
        let p = self.same_top as f64 / n;
        (100.0 * p, 100.0 * (p * (1.0 - p) / (n - 1.0).max(1.0)).sqrt())
    }

    /// Root mean square of the differences in probability, in percent, with its error.
    fn rms(&self) -> (f64, f64) {
        let (mse, err) = self.dp2.mean(self.dps.len());
        let rms = mse.sqrt();
        (100.0 * rms, if rms > 0.0 { 100.0 * 0.5 / rms * err } else { 0.0 })
    }

    /// The figures so far, one line of the table.
    pub fn line(&self, chunk: usize) -> String {
        let r = self.ratio();
        let ppl = r.ln_q.exp();
        let (kld, kld_err) = self.kld.mean(self.klds.len());
        let ((rms, rms_err), (same, same_err)) = (self.rms(), self.same());
        format!(
            "{chunk:4}    {ppl:9.4} ± {:9.4}    {:10.5} ± {:10.5}    {kld:10.5} ± {kld_err:10.5}    {rms:6.3} ± {rms_err:6.3} %    {same:6.3} ± {same_err:6.3} %\n",
            ppl * r.err_q,
            r.ln_q - r.ln_base,
            r.ln_err,
        )
    }

    /// All statistics.
    pub fn report(&self) -> String {
        let n = self.klds.len();
        let r = self.ratio();
        let (q, base) = (r.ln_q.exp(), r.ln_base.exp());
        let (ln_ratio, ratio) = (r.ln_q - r.ln_base, (r.ln_q - r.ln_base).exp());
        let correlation = 100.0 * r.cov / (r.err_q * r.err_base);
        let (q_err, base_err) = (q * r.err_q, base * r.err_base);
        let diff_err = (q_err * q_err + base_err * base_err - 2.0 * q * base * r.cov).max(0.0).sqrt();
        let mut o = String::from("\n====== Perplexity statistics ======\n");
        let row = |name: &str, value: f64, err: f64| format!("{name:<30}: {value:10.6} ± {err:10.6}\n");
        o += &row("Mean PPL(Q)", q, q_err);
        o += &row("Mean PPL(base)", base, base_err);
        let _ = writeln!(o, "{:<30}: {correlation:6.2}%", "Cor(ln(PPL(Q)), ln(PPL(base)))");
        o += &row("Mean ln(PPL(Q)/PPL(base))", ln_ratio, r.ln_err);
        o += &row("Mean PPL(Q)/PPL(base)", ratio, ratio * r.ln_err);
        o += &row("Mean PPL(Q)-PPL(base)", q - base, diff_err);

        let (kld, kld_err) = self.kld.mean(n);
        let sorted = sorted(&self.klds);
        let _ = writeln!(o, "\n====== KL divergence statistics ======");
        let _ = writeln!(o, "Mean    KLD: {kld:10.6} ± {kld_err:10.6}");
        for (name, at) in PERCENTILES.iter().filter(|p| !["75.0%  ", "25.0%  "].contains(&p.0)) {
            let _ = writeln!(o, "{name} KLD: {:10.6}", percentile(&sorted, *at));
        }
        let (dp, dp_err) = self.dp.mean(n);
        let sorted = self::sorted(&self.dps);
        let _ = writeln!(o, "\n====== Token probability statistics ======");
        let _ = writeln!(o, "Mean    Δp: {:6.3} ± {:5.3} %", 100.0 * dp, 100.0 * dp_err);
        for (name, at) in PERCENTILES {
            let _ = writeln!(o, "{name} Δp: {:6.3}%", 100.0 * percentile(&sorted, *at));
        }
        let ((rms, rms_err), (same, same_err)) = (self.rms(), self.same());
        let _ = writeln!(o, "RMS Δp    : {rms:6.3} ± {rms_err:5.3} %");
        let _ = writeln!(o, "Same top p: {same:6.3} ± {same_err:5.3} %");
        o
    }
}

/// ln of both perplexities with their errors and covariance, and the error of their difference.
struct Ratio {
    ln_q: f64,
    err_q: f64,
    ln_base: f64,
    err_base: f64,
    cov: f64,
    ln_err: f64,
}

const PERCENTILES: &[(&str, f64)] = &[
    ("Maximum", 1.0),
    ("99.9%  ", 0.999),
    ("99.0%  ", 0.99),
    ("95.0%  ", 0.95),
    ("90.0%  ", 0.9),
    ("75.0%  ", 0.75),
    ("Median ", 0.5),
    ("25.0%  ", 0.25),
    ("10.0%  ", 0.1),
    (" 5.0%  ", 0.05),
    (" 1.0%  ", 0.01),
    (" 0.1%  ", 0.001),
    ("Minimum", 0.0),
];

fn sorted(values: &[f32]) -> Vec<f32> {
    let mut v = values.to_vec();
    v.sort_unstable_by(f32::total_cmp);
    v
}

/// Linear interpolation between the two nearest of sorted values; 0 of none.
fn percentile(sorted: &[f32], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = fraction * last as f64;
    let (i, part) = (at as usize, at.fract());
    (1.0 - part) * f64::from(sorted[i]) + part * f64::from(sorted[(i + 1).min(last)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_file_carries_the_predictions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let (n_vocab, n_ctx) = (7, 4);
        let logits: Vec<f32> = vec![1.0, 5.5, -3.0, -40.0, 2.25, 5.25, 0.0];
        let mut w =
            BaseWriter::start(OutFile::create(&path).unwrap(), n_ctx, n_vocab, &[1, 2, 3, 4]).unwrap();
        w.row(&logits).unwrap();
        w.finish().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 + 12 + 16 + 2 * 12);
        let mut r = BaseReader::open(&path).unwrap();
        assert_eq!((r.n_ctx, r.n_vocab, r.tokens.as_slice()), (4, 7, [1, 2, 3, 4].as_slice()));
        let norm = log_sum_exp(&logits);
        let row = r.row().unwrap();
        for (i, &l) in logits.iter().enumerate() {
            let want = f64::from(l.max(5.5 - 16.0)) - norm;
            assert!((f64::from(row.log_prob(i)) - want).abs() < 2e-4, "{i}");
        }
        let mut d = Divergence::default();
        d.add(&logits, row, 1);
        assert!(d.kld.sum.abs() < 1e-4 && d.same_top == 1, "{}", d.kld.sum);
        assert!(r.row().is_err());
        // A cut file is refused before anything is allocated for what it claims.
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 8, 19, 30, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(BaseReader::open(&path).is_err(), "{cut}");
        }
        let mut huge = whole.clone();
        huge[16..20].copy_from_slice(&i32::MAX.to_le_bytes());
        std::fs::write(&path, &huge).unwrap();
        assert!(BaseReader::open(&path).is_err());
    }

    #[test]
    fn divergence_of_known_distributions() {
        // base (1/4, 3/4), Q (1/2, 1/2): KL = 1/4 ln(1/2) + 3/4 ln(3/2).
        let mut bytes = Vec::new();
        compress(&[0.0, 3f32.ln()], &mut bytes);
        let scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let min = f32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let mut d = Divergence::default();
        d.add(&[0.7, 0.7], &Row { scale, min, steps: vec![0, 65535] }, 0);
        let want = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((d.kld.sum - want).abs() < 1e-5);
        assert!((d.dp.sum - 0.25).abs() < 1e-5);
        assert_eq!(d.same_top, 0);
        assert!((percentile(&[0.0, 1.0, 2.0], 0.25) - 0.5).abs() < 1e-9);
    }
}
