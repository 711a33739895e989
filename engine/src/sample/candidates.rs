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

/// Buckets of `top_p`: a sixteenth of a nat each; what is 32 nats behind the best weighs nothing.
const BUCKETS: usize = 512;

/// The bucket of a token so far behind the best.
fn bucket(behind: f32) -> usize {
    ((behind * 16.0) as usize).min(BUCKETS - 1)
}

/// Room for `n` entries in a list: vocabularies are as long as a file says.
fn room<T>(list: &mut Vec<T>, n: usize) -> Result<(), SampleError> {
    let bytes = n.saturating_mul(size_of::<T>());
    list.try_reserve_exact(n.saturating_sub(list.len())).map_err(|_| SampleError::Memory { bytes })
}

fn not_finite(logits: &[f32]) -> SampleError {
    let bad = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY).unwrap_or(0);
    SampleError::NotFinite { token: bad as u32, value: logits[bad] }
}

impl Candidates {
    /// The k best, sorted: one pass that collects what beats the k-th best so far and cuts the buffer back when it is full.
    pub fn top_k(&mut self, logits: &[f32], k: usize) -> Result<(), SampleError> {
        const STEP: usize = 64;
        let full = (2 * k).max(256);
        let buf = &mut self.items;
        buf.clear();
        room(buf, full + STEP)?;
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
            if buf.len() >= full {
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

    /// The same out of some tokens with their logits, which are finite or minus infinity, of a vocabulary of `n_vocab`.
    pub fn top_k_of(
        &mut self,
        some: impl Iterator<Item = Candidate>,
        k: usize,
        n_vocab: usize,
    ) -> Result<(), SampleError> {
        self.items.clear();
        self.items.extend(some.filter(|c| c.logit > f32::NEG_INFINITY));
        self.items.sort_unstable_by(by_logit);
        self.items.truncate(k);
        if self.items.is_empty() { Err(SampleError::NoCandidate { n_vocab }) } else { Ok(()) }
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
        // Those that later filters use, too.
        let n = logits.len();
        room(&mut self.items, n)?;
        room(&mut self.weights, n)?;
        room(&mut self.order, n)?;
        room(&mut self.scored, n)?;
        if top_p >= 1.0 && min_p <= 0.0 {
            let known = logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY);
            self.items.extend(known.map(|(i, &logit)| Candidate { id: i as u32, logit }));
            return Ok(None);
        }
        self.weights.resize(logits.len(), 0.0);
        let sum = exp::exp_shifted(logits, max, &mut self.weights);
        // Half the bound: rounding must never cost a member of the nucleus. The best token always stays.
        let nucleus = 0.5 * (1.0 - f64::from(top_p)) / logits.len() as f64 * sum;
        // Likewise a little less than min_p: the filter itself compares logits.
        let bar = (nucleus as f32).max(min_p * (1.0 - 1e-5)).min(1.0);
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
        // Eight at a time: one running maximum would wait for itself.
        let (eights, tail) = self.items.as_chunks::<8>();
        let mut lanes = [f32::NEG_INFINITY; 8];
        for eight in eights {
            for (m, c) in lanes.iter_mut().zip(eight) {
                *m = if c.logit > *m { c.logit } else { *m };
            }
        }
        lanes.into_iter().chain(tail.iter().map(|c| c.logit)).fold(f32::NEG_INFINITY, f32::max)
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
    /// exp(logit - max) over everything `p` is a share of, as [`Candidates::all`] gave it; `None` means over what is left. One
    /// pass adds up the candidates by their distance from the best, which leaves a sixteenth of a nat to look at closely; in
    /// there the worst member is found by halving (linear, no sort). The members keep their order.
    pub fn top_p(&mut self, p: f32, sum: Option<f64>) {
        let max = self.max();
        let mass = |items: &[Candidate]| -> f64 {
            items.iter().map(|c| f64::from(exp::exp_neg(c.logit - max))).sum()
        };
        let target = f64::from(p) * sum.unwrap_or_else(|| mass(&self.items));
        let mut above = 0.0;
        self.order.clear();
        if self.items.len() > 4 * BUCKETS {
            let weight = |c: &Candidate| match sum {
                // They were computed for the sum.
                Some(_) => self.weights[c.id as usize],
                None => exp::exp_neg(c.logit - max),
            };
            // Neighbours often fall into the same bucket: two sets keep one addition from waiting for the other.
            let mut masses = [[0f64; BUCKETS]; 2];
            for (i, c) in self.items.iter().enumerate() {
                masses[i % 2][bucket(max - c.logit)] += f64::from(weight(c));
            }
            let mut last = 0;
            while last < BUCKETS - 1 && above + masses[0][last] + masses[1][last] < target {
                above += masses[0][last] + masses[1][last];
                last += 1;
            }
            self.order.extend(self.items.iter().filter(|c| bucket(max - c.logit) == last));
        } else {
            self.order.extend_from_slice(&self.items);
        }
        let mut rest = self.order.as_mut_slice();
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
        let mut worst = None;
        for &last in rest.iter() {
            worst = Some(last);
            above += mass(&[last]);
            if above >= target {
                break;
            }
        }
        // Where rounding keeps the sum below the target to the end, the last one looked at is the worst of all.
        if let Some(last) = worst {
            self.items.retain(|c| by_logit(c, &last).is_le());
        }
    }

    /// Keeps tokens at least `p` times as probable as the best (arXiv:2407.01082).
    pub fn min_p(&mut self, p: f32) {
        let bar = f64::from(self.max()) + f64::from(p).ln();
        self.items.retain(|c| f64::from(c.logit) >= bar);
    }

    /// One of the candidates, each with probability proportional to exp(logit / temperature); `u` uniform in [0, 1).
    pub fn draw(&mut self, temperature: f32, u: f64) -> u32 {
        let max = self.max() / temperature;
        self.weights.clear();
        self.weights.extend(self.items.iter().map(|c| exp::exp_neg(c.logit / temperature - max)));
        let mut left = u * exp::sum(&self.weights);
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
