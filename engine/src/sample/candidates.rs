//! The tokens still in the race, and the filters that narrow them: top-k, typical, top-p, min-p.
//!
//! Vocabularies have 32k to 262k entries while a few dozen survive, so nothing here sorts more than it must: top-k is one
//! pass over the logits with a small buffer, top-p first throws out what cannot belong to the nucleus and then finds
//! the worst member by halving. Ties go to the lower id; results depend on the logits alone.

use super::{SampleError, exp};
use std::cmp::Ordering;

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub id: u32,
    pub logit: f32,
}

/// Higher logit first, then lower id. Logits here are never NaN.
fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Candidates and scratch space, reused from token to token.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    pub items: Vec<Candidate>,
    weights: Vec<f32>,
    order: Vec<Candidate>,
    scored: Vec<(f32, Candidate)>,
}

fn not_finite(logits: &[f32]) -> SampleError {
    let bad = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY).unwrap_or(0);
    SampleError::NotFinite { token: bad as u32, value: logits[bad] }
}

impl Candidates {
    /// The k best, sorted: one pass that collects what beats the k-th best so far and cuts the buffer back when it is full.
    pub fn top_k(&mut self, logits: &[f32], k: usize) -> Result<(), SampleError> {
        const STEP: usize = 64;
        let room = (2 * k).max(256);
        let buf = &mut self.items;
        buf.clear();
        buf.reserve(room + STEP);
        let mut bar = f32::NEG_INFINITY;
        for (c, chunk) in logits.chunks(STEP).enumerate() {
            // False for NaN too. An equal logit later in the row has a higher id and loses the tie.
            if chunk.iter().fold(true, |below, &l| below & (l <= bar)) {
                continue;
            }
            for (i, &logit) in chunk.iter().enumerate() {
                if logit <= bar {
                    continue;
                }
                if logit.is_nan() || logit == f32::INFINITY {
                    return Err(not_finite(logits));
                }
                buf.push(Candidate { id: (c * STEP + i) as u32, logit });
            }
            if buf.len() >= room {
                buf.select_nth_unstable_by(k - 1, by_logit);
                buf.truncate(k);
                bar = buf[k - 1].logit;
            }
        }
        if buf.len() > k {
            buf.select_nth_unstable_by(k - 1, by_logit);
            buf.truncate(k);
        }
        buf.sort_unstable_by(by_logit);
        match buf.is_empty() {
            true => Err(SampleError::NoCandidate { n_vocab: logits.len() }),
            false => Ok(()),
        }
    }

    /// All tokens that are not banned, in order of id. With `top_p < 1`, those that cannot belong to the nucleus are
    /// left out: of n tokens, those with a probability below (1 - top_p) / n add up to less than 1 - top_p. Likewise for
    /// `min_p`. Returns the sum of exp(logit - max) over *all* tokens if it was needed.
    pub fn all(&mut self, logits: &[f32], top_p: f32, min_p: f32) -> Result<Option<f64>, SampleError> {
        let (max, ok) = exp::max_checked(logits);
        if !ok {
            return Err(not_finite(logits));
        }
        if max == f32::NEG_INFINITY {
            return Err(SampleError::NoCandidate { n_vocab: logits.len() });
        }
        self.items.clear();
        if top_p >= 1.0 && min_p <= 0.0 {
            let known = logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY);
            self.items.extend(known.map(|(i, &logit)| Candidate { id: i as u32, logit }));
            return Ok(None);
        }
        self.weights.resize(logits.len(), 0.0);
        let sum = exp::exp_shifted(logits, max, &mut self.weights);
        // Half the bound: rounding must never cost a member of the nucleus. The best token always stays.
        let nucleus = 0.5 * (1.0 - f64::from(top_p)) / logits.len() as f64 * sum;
        let bar = (nucleus as f32).max(min_p).min(1.0);
        const STEP: usize = 32;
        for (c, chunk) in self.weights.chunks(STEP).enumerate() {
            if chunk.iter().fold(true, |below, &w| below & (w < bar)) {
                continue;
            }
            for (i, &w) in chunk.iter().enumerate() {
                let id = c * STEP + i;
                if w >= bar && logits[id] > f32::NEG_INFINITY {
                    self.items.push(Candidate { id: id as u32, logit: logits[id] });
                }
            }
        }
        Ok(Some(sum))
    }

    /// The largest logit left.
    fn max(&self) -> f32 {
        self.items.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.logit))
    }

    /// Locally typical sampling (arXiv:2202.00666): keeps the tokens whose surprise is nearest to the expected surprise,
    /// until their probabilities exceed `p`.
    pub fn typical(&mut self, p: f32) {
        let max = self.max();
        let weights = self.items.iter().map(|c| f64::from(exp::exp_neg(c.logit - max)));
        let sum: f64 = weights.clone().sum();
        // -ln q - H with q = w / sum: the ln(sum) of both cancel.
        let mean =
            weights.zip(&self.items).map(|(w, c)| if w > 0.0 { w * f64::from(c.logit - max) } else { 0.0 });
        let mean = (mean.sum::<f64>() / sum) as f32;
        self.scored.clear();
        self.scored.extend(self.items.iter().map(|&c| ((mean - (c.logit - max)).abs(), c)));
        self.scored.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.id.cmp(&b.1.id)));
        let mut mass = 0.0;
        self.items.clear();
        for &(_, c) in &self.scored {
            self.items.push(c);
            mass += f64::from(exp::exp_neg(c.logit - max));
            if mass > f64::from(p) * sum {
                break;
            }
        }
    }

    /// Nucleus sampling (arXiv:1904.09751): the fewest best tokens whose probabilities reach `p`. `sum` is that of
    /// exp(logit - max) over everything `p` is a share of; `None` means over what is left. The worst member is found by
    /// halving (linear in the number of candidates, no sort); the members keep their order.
    pub fn top_p(&mut self, p: f32, sum: Option<f64>) {
        let max = self.max();
        let mass = |items: &[Candidate]| -> f64 {
            items.iter().map(|c| f64::from(exp::exp_neg(c.logit - max))).sum()
        };
        let target = f64::from(p) * sum.unwrap_or_else(|| mass(&self.items));
        self.order.clone_from(&self.items);
        let (mut rest, mut above) = (self.order.as_mut_slice(), 0.0);
        while rest.len() > 32 {
            let mid = rest.len() / 2;
            rest.select_nth_unstable_by(mid, by_logit);
            let (better, worse) = rest.split_at_mut(mid);
            let with_better = above + mass(better);
            if with_better >= target {
                rest = better;
            } else {
                above = with_better;
                rest = worse;
            }
        }
        rest.sort_unstable_by(by_logit);
        for &last in rest.iter() {
            above += mass(&[last]);
            if above >= target {
                self.items.retain(|c| by_logit(c, &last).is_le());
                return;
            }
        }
    }

    /// Keeps tokens at least `p` times as probable as the best (arXiv:2407.01082).
    pub fn min_p(&mut self, p: f32) {
        let max = self.max();
        self.items.retain(|c| exp::exp_neg(c.logit - max) >= p);
    }

    /// One of the candidates, each with probability proportional to exp(logit / temperature); `u` uniform in [0, 1).
    pub fn draw(&mut self, temperature: f32, u: f64) -> u32 {
        let max = self.max() / temperature;
        self.weights.clear();
        self.weights.extend(self.items.iter().map(|c| exp::exp_neg(c.logit / temperature - max)));
        let sum: f64 = self.weights.iter().map(|&w| f64::from(w)).sum();
        let mut left = u * sum;
        let mut last = 0;
        for (c, &w) in self.items.iter().zip(&self.weights) {
            if w > 0.0 {
                last = c.id;
                left -= f64::from(w);
                if left < 0.0 {
                    break;
                }
            }
        }
        last
    }
}
