//! Full, window, and sinks with a window: no choice, only recency.
//!
//! Idea: the latest tokens matter most, and the first few collect attention that belongs nowhere (attention sinks): without
//! them a windowed model falls apart. Source: StreamingLLM, arXiv:2309.17453. Parameters: `sinks`, 4.
//!
//! Alone, they are executed by the ring. As sets (inside a wrapper, or with `every`, `evict` or `positions`) they select what
//! the ring shows to the latest query: positions below `sinks` and the latest `budget - sinks`.
//! Deviation: StreamingLLM numbers positions within the cache; here that is `positions=compact`.

use crate::kv::policy::{Budget, KvPolicy, LayerBudget, LayerView, Needs, Protect};
use crate::kv::policy::{ParamError, ParamInfo, Params, PolicyInfo};
use std::sync::Arc;

pub(crate) const FULL: PolicyInfo = PolicyInfo {
    idea: "every entry stays; generation ends with the context",
    primary: "",
    ..PolicyInfo::policy("full", |_| Ok(Arc::new(Full)))
};

pub(crate) const WINDOW: PolicyInfo = PolicyInfo {
    idea: "the latest entries stay",
    ..PolicyInfo::policy("window", |_| Ok(Arc::new(Streaming { sinks: 0 })))
};

pub(crate) const SINKS: PolicyInfo = PolicyInfo {
    idea: "the first entries (attention sinks) and the latest stay: sinks:4+window:2044",
    paper: "arXiv:2309.17453",
    params: &[ParamInfo { name: "sinks", default: "4", what: "first positions that stay" }],
    primary: "sinks",
    ..PolicyInfo::policy("sinks", |p| Ok(Arc::new(Streaming { sinks: Streaming::sinks(p)? })))
};

/// Everything stays: for completeness of the list; caches never ask it.
#[derive(Debug)]
struct Full;

impl KvPolicy for Full {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn per_head(&self) -> bool {
        false
    }

    fn budget(&self, b: LayerBudget) -> usize {
        b.ctx
    }

    fn score(&self, _: &LayerView<'_>, _: usize, out: &mut [f32]) {
        out.fill(0.0);
    }
}

/// The first positions and the latest entries.
#[derive(Debug)]
pub(crate) struct Streaming {
    /// Positions below this one stay.
    pub sinks: usize,
}

impl Streaming {
    /// Sinks if none are given.
    pub const SINKS: usize = 4;

    /// The parameter `sinks`.
    pub fn sinks(p: &Params<'_>) -> Result<usize, ParamError> {
        let sinks = p.whole("sinks")?.unwrap_or(Self::SINKS);
        match p.budget() {
            Some(Budget::Entries(n)) if n <= 2 * sinks => {
                Err(p.error("sinks", format!("{sinks} sinks in a budget of {n}: the window must be larger")))
            }
            _ => Ok(sinks),
        }
    }
}

impl KvPolicy for Streaming {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn per_head(&self) -> bool {
        false
    }

    fn protect(&self, _: &LayerView<'_>, _: usize) -> Protect {
        Protect { first: self.sinks as u64, recent: 0 }
    }

    fn score(&self, _: &LayerView<'_>, _: usize, out: &mut [f32]) {
        // All alike: of equals the later stay.
        out.fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use crate::kv::policies::testing::{Layer, policy};
    use crate::kv::policy::select;

    #[test]
    fn as_sets_they_select_what_the_ring_shows() {
        for (spec, sinks, window) in [
            ("window:7,every=1", 0u64, 7u64),
            ("sinks:3+window:5,every=1", 3, 5),
            ("sinks:1+window:2,every=1", 1, 2),
        ] {
            let n = (sinks + window) as usize;
            for len in 1..40u64 {
                let layer = Layer::gqa(2, 2, 4, len as usize);
                let kept = select(&*policy(spec), &layer.view(), n).unwrap();
                let query = len - 1;
                let seen: Vec<u32> =
                    (0..len).filter(|p| *p < sinks || p + window > query).map(|p| p as u32).collect();
                assert_eq!(kept.head(1), seen, "{spec} at {len}");
            }
        }
    }
}
