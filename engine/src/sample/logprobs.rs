//! Log-probabilities of a row of logits, for reports: exact over the whole vocabulary, before any filter or temperature.

/// A chosen token's log-probability and the most probable alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    /// ln p of the token asked for; `-inf` if it is banned or not in the vocabulary.
    pub logprob: f32,
    /// The most probable tokens with their ln p, best first; the lower id first on a tie.
    pub top: Vec<(u32, f32)>,
}

/// ln p = logit - ln sum exp for `token` and for the `top_n` best. `logits` is one row `[n_vocab]` without NaN.
pub fn logprobs(logits: &[f32], token: u32, top_n: usize) -> LogProbs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let norm = f64::from(max) + sum.ln();
    let of = |l: f32| (f64::from(l) - norm) as f32;
    let mut best = super::candidates::Candidates::default();
    let found = top_n > 0 && best.top_k(logits, top_n.min(logits.len())).is_ok();
    LogProbs {
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |&l| of(l)),
        top: if found { best.items.iter().map(|c| (c.id, of(c.logit))).collect() } else { Vec::new() },
    }
}
