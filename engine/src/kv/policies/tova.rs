//! TOVA: what the latest query attends to stays.
//!
//! Idea: a decoder with a bounded cache is a recurrent network of many states; drop the state that the current token looks at
//! least. Source: "Transformers are Multi-State RNNs", arXiv:2401.06104. Score: attention of the latest query, averaged over
//! all heads of the layer, so that all heads keep the same entries. Parameters: none.
//!
//! Deviation: the paper drops one entry at every token; that is `every=1`.

use crate::kv::policy::{KvPolicy, LayerView, Needs, PolicyInfo};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "what the latest query attends to stays, one choice per layer",
    paper: "arXiv:2401.06104",
    ..PolicyInfo::policy("tova", |_| Ok(Arc::new(Tova)))
};

#[derive(Debug)]
struct Tova;

impl KvPolicy for Tova {
    fn needs(&self) -> Needs {
        Needs { mass_recent: 1, ..Needs::default() }
    }

    fn per_head(&self) -> bool {
        false
    }

    fn score(&self, view: &LayerView<'_>, _: usize, out: &mut [f32]) {
        out.fill(0.0);
        for head in 0..view.geometry.kv_heads {
            out.iter_mut().zip(view.mass_recent(head)).for_each(|(score, mass)| *score += mass);
        }
    }
}
