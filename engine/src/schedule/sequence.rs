//! A place in the cache and the job that runs on it. Knows nothing of other places.

use std::ops::Range;
use std::sync::Arc;

/// A request, as far as scheduling goes.
#[derive(Clone, Debug)]
pub struct Job {
    /// Chosen by the caller; no two jobs at a time share one.
    pub id: u64,
    /// The whole prompt, at least one token.
    pub prompt: Arc<[u32]>,
    /// The answer must not depend on what was cached before: of other requests' tokens only those are used again that were
    /// computed as rows of a prompt, for decoded rows differ in rounding.
    pub exact: bool,
    /// All rows of the prompt are to be computed: nothing that is cached is used again.
    pub whole: bool,
}

/// A job at work.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub job: Job,
    /// The token decoded last, which is not cached yet.
    pub next: Option<[u32; 1]>,
}

/// What a place in the cache holds, and who works on it.
#[derive(Clone, Debug, Default)]
pub(super) struct Slot {
    /// Tokens cached.
    pub tokens: Vec<u32>,
    /// So many of them, from the first, are what a prompt's rows would give to the bit.
    pub exact: usize,
    /// When it was used last; 0: never.
    pub used: u64,
    pub work: Option<Work>,
}

impl Slot {
    /// How much of the job's prompt can be taken from here. At least one token is left to compute: its logits are needed.
    pub fn common(&self, job: &Job) -> usize {
        if job.whole {
            return 0;
        }
        let most = if job.exact { self.exact } else { self.tokens.len() };
        let n = self.tokens.iter().zip(job.prompt.iter()).take_while(|(a, b)| a == b).count();
        n.min(most).min(job.prompt.len() - 1)
    }

    /// Keeps the first `n` tokens.
    pub fn truncate(&mut self, n: usize) {
        self.tokens.truncate(n);
        self.exact = self.exact.min(n);
    }

    /// What of the prompt is not cached; empty while decoding or idle.
    pub fn rest(&self) -> Range<usize> {
        match &self.work {
            Some(w) if w.next.is_none() && self.tokens.len() < w.job.prompt.len() => {
                self.tokens.len()..w.job.prompt.len()
            }
            _ => 0..0,
        }
    }

    /// Whether there is a decoded token to compute.
    pub fn decodes(&self) -> bool {
        self.work.as_ref().is_some_and(|w| w.next.is_some())
    }
}
