//! KeyDiff: keys unlike the others stay.
//!
//! Idea: keys that point away from the mean direction are rare and tend to get much attention; keys like the mean can stand in
//! for each other. Source: KeyDiff, arXiv:2504.15364. Score: -cos(k, mean of k/||k||). Parameters: none.
//!
//! On MLA the latents are compared, without the rotary key: all heads' keys are made of them. The paper evicts block by block
//! while it reads the prompt; so does the cache when the prompt does not fit, else it evicts at the prompt's end.

use crate::kv::policy::{KvPolicy, LayerView, Needs, PolicyInfo, add_scaled, dot, norm};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "keys unlike the mean key stay (MLA: latents)",
    paper: "arXiv:2504.15364",
    ..PolicyInfo::policy("keydiff", |_| Ok(Arc::new(KeyDiff)))
};

#[derive(Debug)]
struct KeyDiff;

impl KvPolicy for KeyDiff {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Needs::default() }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        let mut anchor = vec![0.0; view.geometry.key];
        for (length, key) in out.iter_mut().zip(view.keys(head)) {
            // A key of zeros has no direction: it is like none.
            *length = norm(key).max(f32::MIN_POSITIVE);
            add_scaled(&mut anchor, 1.0 / *length, key);
        }
        let anchor_length = norm(&anchor).max(f32::MIN_POSITIVE);
        for (score, key) in out.iter_mut().zip(view.keys(head)) {
            *score = -dot(key, &anchor) / (*score * anchor_length);
        }
    }
}
