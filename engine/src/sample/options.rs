//! What a sampler can be told, with llama.cpp's defaults, and what it refuses. Knows nothing of how sampling is done.

use super::rng;

/// Settings of a [`Sampler`](super::Sampler). The defaults are those of llama.cpp's tools.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest tokens whose probabilities add up to this (arXiv:1904.09751); 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as probable as the best (arXiv:2407.01082); 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling's mass (arXiv:2202.00666); 1 keeps all.
    pub typical_p: f32,
    /// How many of the latest tokens the penalties look at; 0 switches them off, `usize::MAX` means all.
    pub repeat_last_n: usize,
    /// A seen token's logit is divided by this if positive, else multiplied (arXiv:1909.05858); 1 is off.
    pub repeat_penalty: f32,
    /// Taken from the logit of every seen token.
    pub presence_penalty: f32,
    /// Taken from the logit once for every time the token was seen.
    pub frequency_penalty: f32,
    /// Added to single tokens' logits before everything else; `-inf` bans a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text; `None` draws one (see [`Sampler::seed`](super::Sampler::seed)).
    pub seed: Option<u64>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// Why options were refused or a token could not be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// An option out of its range.
    #[error("{option} is {value}: {expected}")]
    Option {
        /// The field of [`SamplerOptions`].
        option: &'static str,
        /// What it was set to.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// No memory for the candidates.
    #[error("cannot allocate {bytes} bytes for the candidates of a token")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// A logit bias for a token that the vocabulary does not have.
    #[error("logit_bias names token {token}, but the vocabulary has only {n_vocab}")]
    BiasToken {
        /// The token id.
        token: u32,
        /// The number of logits.
        n_vocab: usize,
    },
    /// The model's output was NaN or infinite.
    #[error("the logit of token {token} is {value}: the model or its file is broken")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// NaN or +inf.
        value: f32,
    },
    /// What the text is held to cannot go on.
    #[error("constrained output: {0}")]
    Constraint(String),
    /// Every token is banned, or there are no logits at all.
    #[error("no token can be chosen: all {n_vocab} are banned")]
    NoCandidate {
        /// The number of logits.
        n_vocab: usize,
    },
}

impl SamplerOptions {
    /// Always the most probable token (the lower id on a tie), no penalties.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, seed: Some(0), ..Self::default() }
    }

    /// Checks every option's range.
    ///
    /// # Errors
    /// [`SampleError::Option`] for the first that is out of it.
    pub fn check(&self) -> Result<(), SampleError> {
        let ranged = |option, value: f32, ok: bool, expected| match ok {
            true => Ok(()),
            false => Err(SampleError::Option { option, value, expected }),
        };
        let unit = |v: f32| (0.0..=1.0).contains(&v);
        let t = self.temperature;
        ranged("temperature", t, t >= 0.0 && t.is_finite(), "it must be 0 or more")?;
        ranged("top_p", self.top_p, unit(self.top_p), "it must lie between 0 and 1")?;
        ranged("min_p", self.min_p, unit(self.min_p), "it must lie between 0 and 1")?;
        ranged("typical_p", self.typical_p, unit(self.typical_p), "it must lie between 0 and 1")?;
        let r = self.repeat_penalty;
        ranged("repeat_penalty", r, r > 0.0 && r.is_finite(), "it must be above 0 (1 is off)")?;
        let (p, f) = (self.presence_penalty, self.frequency_penalty);
        ranged("presence_penalty", p, p.is_finite(), "it must be a finite number")?;
        ranged("frequency_penalty", f, f.is_finite(), "it must be a finite number")?;
        for &(_, b) in &self.logit_bias {
            ranged("logit_bias", b, b < f32::INFINITY, "a bias must be finite, or -inf to ban a token")?;
        }
        Ok(())
    }

    /// No more than so many of the best tokens can be drawn.
    pub(super) fn top(&self, n_vocab: usize) -> Option<usize> {
        match self.top_k {
            _ if self.temperature == 0.0 => Some(1),
            k if k > 0 && k < n_vocab => Some(k),
            _ => None,
        }
    }

    pub(super) fn seed_or_random(&self) -> u64 {
        self.seed.unwrap_or_else(rng::random_seed)
    }
}
