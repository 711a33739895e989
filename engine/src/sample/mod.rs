//! Choosing the next token from a row of logits: llama.cpp's chain in llama.cpp's order.
//!
//! logit bias, penalties, top-k, typical, top-p, min-p, temperature, draw. (The samplers that llama.cpp has in between
//! and that are off by default, DRY, top-n-sigma and XTC, are not here.) Temperature 0 takes the best token after bias and
//! penalties. The same seed and logits give the same tokens on every platform: the generator is `rng::Rng`, the
//! exponential `exp::exp_neg`, and every sum has a fixed order. Knows nothing of models or text.

mod candidates;
mod constraint;
mod exp;
mod logprobs;
mod options;
mod penalties;
mod rng;
#[cfg(test)]
mod tests;

pub use constraint::Constraint;
pub use logprobs::{LogProbs, logprobs};
pub use options::{SampleError, SamplerOptions};
pub use rng::Rng;

use candidates::{Candidate, Candidates};
use kernels::MOST_BEST;
use penalties::Penalties;

/// What was read of a row of logits.
#[derive(Debug)]
pub enum Logits<'a> {
    /// All of it, `[n_vocab]`.
    Whole(&'a mut [f32]),
    /// The best, best first, ties to the lower id: as many as [`Sampler::few`] asked for, or more. None is NaN or infinite, but some may be
    /// minus infinity.
    Best {
        /// Ids and logits.
        best: &'a [(u32, f32)],
        /// Entries of the vocabulary.
        n_vocab: usize,
    },
}

/// A chain of sampling steps and its state: the random stream and the tokens that the penalties look at.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    seed: u64,
    rng: rng::Rng,
    penalties: Penalties,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// [`SampleError::Option`] names the option that is out of its range.
    pub fn new(options: SamplerOptions) -> Result<Self, SampleError> {
        options.check()?;
        let seed = options.seed_or_random();
        let penalties = Penalties::new(&options);
        Ok(Self { seed, rng: rng::Rng::new(seed), penalties, candidates: Candidates::default(), options })
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The seed in use, also when none was given.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Chooses a token from `logits` (`[n_vocab]`; bias and penalties are written into it). Does not [`accept`](Self::accept) it.
    ///
    /// # Errors
    /// NaN or +inf among the logits, all tokens banned, or a bias for a token that does not exist.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32, SampleError> {
        let o = &self.options;
        for &(token, bias) in &o.logit_bias {
            let n_vocab = logits.len();
            *logits.get_mut(token as usize).ok_or(SampleError::BiasToken { token, n_vocab })? += bias;
        }
        self.penalties.apply(logits);
        let c = &mut self.candidates;
        if o.temperature == 0.0 {
            c.top_k(logits, 1)?;
            return Ok(c.items[0].id);
        }
        let mut sum = None;
        match o.top(logits.len()) {
            Some(k) => c.top_k(logits, k)?,
            None if o.typical_p < 1.0 => drop(c.all(logits, 1.0, 0.0)?),
            None => sum = c.all(logits, o.top_p, o.min_p)?,
        }
        Ok(self.draw(sum))
    }

    /// How many of the best of `n_vocab` logits choose the token that all of them would; `None`: all are needed. So it is where no more than
    /// the k best can be drawn and nothing raises a logit: of k and as many more as there are tokens whose logits fall, k are left.
    pub fn few(&self, n_vocab: usize) -> Option<usize> {
        let o = &self.options;
        let falls = |&(token, bias): &(u32, f32)| bias <= 0.0 && (token as usize) < n_vocab;
        let lowered = self.penalties.lower().filter(|_| o.logit_bias.iter().all(falls))?;
        let few = o.top(n_vocab)?.saturating_add(lowered).saturating_add(o.logit_bias.len());
        (few <= n_vocab.min(MOST_BEST)).then_some(few)
    }

    /// [`Sampler::sample`] of what was read of a row, with the same outcome.
    ///
    /// # Errors
    /// As there.
    pub fn choose(&mut self, row: Logits<'_>) -> Result<u32, SampleError> {
        let (best, n_vocab) = match row {
            Logits::Whole(logits) => return self.sample(logits),
            Logits::Best { best, n_vocab } => (best, n_vocab),
        };
        let (o, penalties) = (&self.options, &self.penalties);
        let logit = |id: u32, logit: f32| {
            let bias = o.logit_bias.iter().filter(|b| b.0 == id);
            penalties.of(id, bias.fold(logit, |l, b| l + b.1))
        };
        let some = best.iter().map(|&(id, l)| Candidate { id, logit: logit(id, l) });
        self.candidates.top_k_of(some, o.top(n_vocab).unwrap_or(best.len()), n_vocab)?;
        Ok(if o.temperature == 0.0 { self.candidates.items[0].id } else { self.draw(None) })
    }

    /// Filters the candidates and draws one. `sum`: as [`Candidates::all`] gave it.
    fn draw(&mut self, sum: Option<f64>) -> u32 {
        let (o, c) = (&self.options, &mut self.candidates);
        if o.typical_p < 1.0 {
            c.typical(o.typical_p);
        }
        if o.top_p < 1.0 {
            c.top_p(o.top_p, sum);
        }
        if o.min_p > 0.0 {
            c.min_p(o.min_p);
        }
        c.draw(o.temperature, self.rng.uniform())
    }

    /// Tells the penalties that `token` is now part of the text.
    pub fn accept(&mut self, token: u32) {
        self.penalties.accept(token);
    }

    /// Says what the text so far is: the penalties see the tail of `prompt`, as in llama.cpp, and forget all else.
    pub fn prime(&mut self, prompt: &[u32]) {
        self.penalties.clear();
        let tail = prompt.len().saturating_sub(self.options.repeat_last_n);
        prompt[tail..].iter().for_each(|&t| self.penalties.accept(t));
    }

    /// Forgets all tokens and goes back to the start of the random stream.
    pub fn reset(&mut self) {
        self.penalties.clear();
        self.rng = rng::Rng::new(self.seed);
    }
}
