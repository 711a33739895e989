//! A text as one vector: the states behind the last norm, pooled and scaled to length 1. Knows nothing of text.

use crate::context::Context;
use crate::gguf::Metadata;
use crate::kv::{Rows, SeqId};
use crate::plan::of_context;
use crate::session::{Model, SessionOptions};
use crate::{EngineError, KvSpec};
use std::sync::Arc;

/// How the states of a text's tokens become one vector (`{arch}.pooling_type`, llama.cpp's enum llama_pooling_type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    First,
    /// The last token's.
    Last,
}

impl Pooling {
    /// What the file says; the last token's where it is silent, as in models that generate.
    ///
    /// # Errors
    /// A pooling that makes no vector of a text (rank), or is unknown.
    pub fn of(metadata: &Metadata) -> Result<Self, EngineError> {
        let arch = metadata.str("general.architecture")?.unwrap_or_default();
        let key = format!("{arch}.pooling_type");
        match metadata.u32(&key)? {
            None | Some(0 | 3) => Ok(Self::Last),
            Some(1) => Ok(Self::Mean),
            Some(2) => Ok(Self::First),
            Some(other) => {
                Err(EngineError::Unsupported(format!("{key} is {other} (0 to 3 are implemented)")))
            }
        }
    }
}

/// One text on its way to a vector, a batch at a time, so that a caller can do other things in between.
pub struct Embedding {
    context: Context,
    seq: SeqId,
    tokens: Vec<u32>,
    pooling: Pooling,
    done: usize,
    sum: Vec<f64>,
}

impl Embedding {
    /// Bytes of the host that a text of so many tokens takes while it is embedded.
    ///
    /// # Errors
    /// As [`Embedding::new`].
    pub fn bytes(model: &Arc<Model>, tokens: usize) -> Result<u64, EngineError> {
        let on = model.devices();
        let (needs, passes) = of_context(model.network(), &options(tokens), 1)?;
        let (_, work) = passes.runner(model.network(), &on.metered(model.threads()))?;
        let work = on.all().iter().zip(work).filter(|(d, _)| d.is_host()).map(|(_, w)| w.total());
        let kv = needs.kv.iter().enumerate().filter(|(l, _)| on.layer(*l).is_host()).map(|(_, b)| b);
        Ok(kv.sum::<u64>() + work.sum::<u64>())
    }

    /// Allocates a cache of its own for `tokens`.
    ///
    /// # Errors
    /// No tokens, tokens outside of the vocabulary, memory that cannot be had.
    pub fn new(model: &Arc<Model>, tokens: Vec<u32>, pooling: Pooling) -> Result<Self, EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::Option("there is no token to embed".into()));
        }
        let mut context = Context::new(model, &options(tokens.len()), 1)?;
        let seq = context.cache_mut().admit(0)?;
        context.check(seq, &tokens)?;
        let sum = vec![0.0; model.info().d_model];
        Ok(Self { context, seq, tokens, pooling, done: 0, sum })
    }

    /// Computes one batch; the vector `[d_model]` after the last.
    ///
    /// # Errors
    /// What the engine reports; a vector that is not finite or is zero.
    pub fn step(&mut self) -> Result<Option<Vec<f32>>, EngineError> {
        let end = self.tokens.len().min(self.done + self.context.batch());
        let tokens = &self.tokens[self.done..end];
        self.context.forward(&[Rows { seq: self.seq, tokens, prompt: self.tokens.len() }])?;
        let rows: Vec<u32> = match self.pooling {
            Pooling::Mean => (0..tokens.len() as u32).collect(),
            Pooling::First if self.done == 0 => vec![0],
            Pooling::Last if end == self.tokens.len() => vec![tokens.len() as u32 - 1],
            _ => Vec::new(),
        };
        let mut states = Vec::new();
        self.context.states(&rows, &mut states)?;
        for row in states.chunks_exact(self.sum.len()) {
            self.sum.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x));
        }
        self.done = end;
        if end < self.tokens.len() {
            return Ok(None);
        }
        let length = self.sum.iter().map(|s| s * s).sum::<f64>().sqrt();
        if !length.is_finite() || length == 0.0 {
            return Err(EngineError::Option(
                "the embedding is not finite: the model or its file is broken".into(),
            ));
        }
        // The mean's divisor goes with the length.
        Ok(Some(self.sum.iter().map(|s| (s / length) as f32).collect()))
    }
}

/// A cache that keeps all of a text.
fn options(tokens: usize) -> SessionOptions {
    SessionOptions { ctx: tokens, kv: KvSpec::default(), ..Default::default() }
}

/// The vector `[d_model]` of length 1 of a text.
///
/// # Errors
/// As [`Embedding::new`] and [`Embedding::step`].
pub fn embed(model: &Arc<Model>, tokens: &[u32], pooling: Pooling) -> Result<Vec<f32>, EngineError> {
    let mut e = Embedding::new(model, tokens.to_vec(), pooling)?;
    loop {
        if let Some(vector) = e.step()? {
            return Ok(vector);
        }
    }
}
