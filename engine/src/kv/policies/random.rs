//! Random: the honest baseline that any other policy must beat.
//!
//! Idea: every token draws a number once, per layer and head; the largest stay. So what stays is a uniform sample of all
//! that ever came (reservoir sampling by priorities), whenever evictions happen. Source: none.
//! Parameters: `seed`, 0; `recent`, 0: latest entries that stay.

use crate::kv::policy::{KvPolicy, LayerView, Needs, ParamInfo, PolicyInfo, Protect};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "a uniform sample of all entries stays: the honest baseline",
    params: &[
        ParamInfo { name: "seed", default: "0", what: "another sample" },
        ParamInfo { name: "recent", default: "0", what: "latest entries that stay" },
    ],
    ..PolicyInfo::policy("random", |p| {
        let seed = p.whole("seed")?.unwrap_or(0) as u64;
        Ok(Arc::new(Random { seed, recent: p.whole("recent")?.unwrap_or(0) }))
    })
};

#[derive(Debug)]
struct Random {
    seed: u64,
    recent: usize,
}

impl KvPolicy for Random {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn protect(&self, _: &LayerView<'_>, _: usize) -> Protect {
        Protect { first: 0, recent: self.recent }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        let stream = [view.geometry.layer, head].iter().fold(mix(self.seed), |s, x| mix(s ^ *x as u64));
        for (s, position) in out.iter_mut().zip(view.positions(head)) {
            *s = (mix(stream ^ mix(*position)) >> 40) as f32;
        }
    }
}

/// SplitMix64's step (Steele, Lea and Flood, OOPSLA 2014): neighbouring inputs give unrelated outputs.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use crate::kv::policies::testing::{Layer, policy};
    use crate::kv::policy::select;

    #[test]
    fn the_sample_is_uniform_and_repeatable() {
        let layer = Layer::gqa(1, 1, 4, 1000);
        let mut quarter = [0usize; 4];
        for seed in 0..50 {
            let p = policy(&format!("random:budget=100,seed={seed}"));
            let kept = select(&*p, &layer.view(), 100).unwrap();
            assert_eq!(kept, select(&*p, &layer.view(), 100).unwrap());
            kept.head(0).iter().for_each(|i| quarter[*i as usize / 250] += 1);
        }
        // 5000 draws: 1250 each, standard deviation 30.
        assert!(quarter.iter().all(|n| n.abs_diff(1250) < 150), "{quarter:?}");
    }

    #[test]
    fn evicting_in_steps_leaves_the_same_sample() {
        let p = policy("random:budget=20");
        let whole = Layer::gqa(1, 1, 4, 300);
        let at_once = select(&*p, &whole.view(), 20).unwrap();
        let mut steps = Layer::gqa(1, 1, 4, 100);
        for _ in 0..4 {
            steps.keep(&select(&*p, &steps.view(), 20).unwrap());
            steps.grow(50);
        }
        steps.keep(&select(&*p, &steps.view(), 20).unwrap());
        let positions: Vec<u64> = at_once.head(0).iter().map(|i| u64::from(*i)).collect();
        assert_eq!(steps.positions, positions);
    }

    #[test]
    fn heads_and_layers_draw_for_themselves() {
        let layer = Layer::gqa(2, 2, 4, 100);
        let kept = select(&*policy("random:budget=50"), &layer.view(), 50).unwrap();
        assert_ne!(kept.head(0), kept.head(1));
    }
}
