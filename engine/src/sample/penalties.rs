//! Repeat, presence and frequency penalties over the latest tokens, by llama.cpp's formula:
//! `logit = (logit > 0 ? logit / repeat : logit * repeat) - count * frequency - presence` for every token seen.
//! Knows nothing of the other steps of the chain.

use super::SamplerOptions;
use std::collections::{HashMap, VecDeque};

/// The window of latest tokens and how often each occurs in it.
#[derive(Clone, Debug)]
pub struct Penalties {
    last_n: usize,
    repeat: f32,
    presence: f32,
    frequency: f32,
    window: VecDeque<u32>,
    counts: HashMap<u32, u32>,
}

impl Penalties {
    pub fn new(o: &SamplerOptions) -> Self {
        let off = o.repeat_penalty == 1.0 && o.presence_penalty == 0.0 && o.frequency_penalty == 0.0;
        Self {
            last_n: if off { 0 } else { o.repeat_last_n },
            repeat: o.repeat_penalty,
            presence: o.presence_penalty,
            frequency: o.frequency_penalty,
            window: VecDeque::new(),
            counts: HashMap::new(),
        }
    }

    pub fn clear(&mut self) {
        self.window.clear();
        self.counts.clear();
    }

    pub fn accept(&mut self, token: u32) {
        if self.last_n == 0 {
            return;
        }
        *self.counts.entry(token).or_default() += 1;
        // With no limit the order of arrival never matters, and the counts are bounded by the vocabulary.
        if self.last_n == usize::MAX {
            return;
        }
        if self.window.len() == self.last_n {
            let old = self.window.pop_front().expect("last_n > 0");
            if let Some(n) = self.counts.get_mut(&old) {
                *n -= 1;
                if *n == 0 {
                    self.counts.remove(&old);
                }
            }
        }
        self.window.push_back(token);
    }

    pub fn apply(&self, logits: &mut [f32]) {
        for (&token, &count) in &self.counts {
            if let Some(l) = logits.get_mut(token as usize) {
                *l = self.lowered(*l, count);
            }
        }
    }

    /// A token's logit as [`Penalties::apply`] leaves it.
    pub fn of(&self, token: u32, logit: f32) -> f32 {
        self.counts.get(&token).map_or(logit, |count| self.lowered(logit, *count))
    }

    fn lowered(&self, logit: f32, count: u32) -> f32 {
        let l = if logit > 0.0 { logit / self.repeat } else { logit * self.repeat };
        l - (count as f32 * self.frequency + self.presence)
    }

    /// How many tokens' logits change; `None`: some may rise.
    pub fn lower(&self) -> Option<usize> {
        let lower = self.repeat >= 1.0 && self.presence >= 0.0 && self.frequency >= 0.0;
        (lower || self.counts.is_empty()).then_some(self.counts.len())
    }
}
