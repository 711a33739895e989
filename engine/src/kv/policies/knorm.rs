//! Knorm: keys of small norm stay.
//!
//! Idea: keys with a small L2 norm tend to get much attention, so the norm alone tells what matters, before any query comes.
//! Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430. Score: -||k||.
//! Parameters: none.
//!
//! On MLA the key is the latent: its norm stands for that of the keys made from it. Every layer is treated alike;
//! `per-layer:0-1=100%(knorm:...)` spares the first two.

use crate::kv::policy::{KvPolicy, LayerView, Needs, PolicyInfo, norm};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "keys of small norm stay (MLA: the latent's norm)",
    paper: "arXiv:2406.11430",
    ..PolicyInfo::policy("knorm", |_| Ok(Arc::new(Knorm)))
};

#[derive(Debug)]
struct Knorm;

impl KvPolicy for Knorm {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Needs::default() }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        for (score, key) in out.iter_mut().zip(view.keys(head)) {
            *score = -norm(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::kv::policies::testing::{Layer, policy};
    use crate::kv::policy::select;

    #[test]
    fn small_keys_stay_in_every_head_and_small_latents_on_mla() {
        let mut layer = Layer::gqa(4, 2, 4, 6);
        layer.keys.fill(3.0);
        let (entries, width) = (6, 4);
        for (head, entry) in [(0, 1), (0, 4), (1, 0), (1, 2)] {
            layer.keys[(head * entries + entry) * width..][..width].fill(-0.5);
        }
        let kept = select(&*policy("knorm:2"), &layer.view(), 2).unwrap();
        assert_eq!((kept.head(0), kept.head(1)), (&[1, 4][..], &[0, 2][..]));

        let mut layer = Layer::mla(4, 8, 2, 5);
        layer.keys.fill(1.0);
        layer.k_pe.fill(100.0);
        layer.keys[3 * 8..4 * 8].fill(0.1);
        assert_eq!(select(&*policy("knorm:1"), &layer.view(), 1).unwrap().head(0), [3]);
    }
}
