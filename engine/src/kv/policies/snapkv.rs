//! SnapKV: what the end of the prompt attends to stays, in clusters.
//!
//! Idea: the last tokens of a prompt (the observation window, often the question) show which of it will be needed. Source:
//! SnapKV, arXiv:2404.14469. Score: attention of the window's queries, pooled over neighbouring entries so that what stays
//! hangs together; the window itself stays. Parameters: `window`, 32; `kernel`, 5: entries pooled (odd); `pool`, avg or max.
//!
//! Evicts at the prompt's end, as in the paper; with `evict=both` also while decoding, by the latest `window` queries.
//! Grouped heads share a sum, from which `max` is taken. If several prompts follow each other, each end counts.

use crate::kv::policy::{Evict, KvPolicy, LayerView, Needs, ParamInfo, PolicyInfo, Protect};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "what the end of the prompt attends to stays, with neighbours",
    paper: "arXiv:2404.14469",
    params: &[
        ParamInfo { name: "window", default: "32", what: "latest queries that vote; their entries stay" },
        ParamInfo { name: "kernel", default: "5", what: "neighbours pooled, an odd number" },
        ParamInfo { name: "pool", default: "avg", what: "avg or max" },
    ],
    evict: Evict::Prompt,
    ..PolicyInfo::policy("snapkv", |p| {
        let (window, kernel) = (p.whole("window")?.unwrap_or(32), p.whole("kernel")?.unwrap_or(5));
        if window == 0 || window > 1024 {
            return Err(
                p.error("window", format!("window is a number of queries from 1 to 1024, not {window}"))
            );
        }
        if kernel % 2 == 0 || kernel > 63 {
            return Err(p.error("kernel", format!("kernel is an odd number up to 63, not {kernel}")));
        }
        Ok(Arc::new(SnapKv { window, kernel, max: p.choice("pool", &["avg", "max"])? == Some(1) }))
    })
};

#[derive(Debug)]
struct SnapKv {
    window: usize,
    kernel: usize,
    max: bool,
}

impl KvPolicy for SnapKv {
    fn needs(&self) -> Needs {
        Needs { mass_recent: self.window, whole_prompt: true, ..Needs::default() }
    }

    fn protect(&self, _: &LayerView<'_>, _: usize) -> Protect {
        Protect { first: 0, recent: self.window }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        let (scored, window) = out.split_at_mut(view.entries.saturating_sub(self.window));
        let mass = &view.mass_recent(head)[..scored.len()];
        let half = self.kernel / 2;
        for (i, score) in scored.iter_mut().enumerate() {
            // Beyond the ends there is no mass; the window's own is not pooled in.
            let near = &mass[i.saturating_sub(half)..(i + half + 1).min(mass.len())];
            *score = match self.max {
                true => near.iter().fold(0.0, |a, b| if *b > a || b.is_nan() { *b } else { a }),
                false => near.iter().sum::<f32>() / self.kernel as f32,
            };
        }
        window.fill(f32::INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use crate::kv::policies::testing::{Layer, policy};
    use crate::kv::policy::select;

    #[test]
    fn neighbours_of_what_the_window_sees_stay() {
        let mut layer = Layer::gqa(1, 1, 4, 20);
        layer.mass_recent.fill(0.0);
        (layer.mass_recent[6], layer.mass_recent[12], layer.mass_recent[16]) = (1.0, 0.9, 9.0);
        let kept = |spec: &str, n| select(&*policy(spec), &layer.view(), n).unwrap().head(0).to_vec();
        assert_eq!(kept("snapkv:7,window=4,kernel=3", 7), [5, 6, 7, 16, 17, 18, 19]);
        assert_eq!(kept("snapkv:6,window=4,kernel=1", 6), [6, 12, 16, 17, 18, 19]);
        // The window's heavy entry lends nothing to those before it.
        assert_eq!(kept("snapkv:6,window=4,kernel=3,pool=max", 6), [6, 7, 16, 17, 18, 19]);
        assert_eq!(kept("snapkv:3,window=4", 3), [17, 18, 19]);
        assert_eq!(kept("snapkv:10,window=99", 10), (10..20).collect::<Vec<_>>());
    }
}
