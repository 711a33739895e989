//! H2O: heavy hitters and the latest entries stay.
//!
//! Idea: few entries collect most of the attention over time (heavy hitters); keep those and the latest. Source: H2O,
//! arXiv:2306.14048. Score: attention summed over all queries so far. Parameters: `recent`, half of the budget: latest
//! entries that stay.
//!
//! Grouped heads share a sum. Deviations: the paper drops one entry at every token; that is `every=1`. With another rhythm the
//! sum still counts every query from the entry's first on.

use crate::kv::policy::{
    Budget, KvPolicy, LayerView, Needs, ParamError, ParamInfo, Params, PolicyInfo, Protect,
};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "what got most attention so far stays, and the latest entries",
    paper: "arXiv:2306.14048",
    params: &[ParamInfo { name: "recent", default: "half of the budget", what: "latest entries that stay" }],
    ..PolicyInfo::policy("h2o", |p| Ok(Arc::new(H2o { recent: recent(p)? })))
};

fn recent(p: &Params<'_>) -> Result<Option<usize>, ParamError> {
    let recent = p.whole("recent")?;
    match (recent, p.budget()) {
        (Some(r), Some(Budget::Entries(n))) if r > n => {
            Err(p.error("recent", format!("{r} latest entries do not fit the budget of {n}")))
        }
        _ => Ok(recent),
    }
}

#[derive(Debug)]
struct H2o {
    recent: Option<usize>,
}

impl KvPolicy for H2o {
    fn needs(&self) -> Needs {
        Needs { mass_total: true, ..Needs::default() }
    }

    fn protect(&self, _: &LayerView<'_>, n: usize) -> Protect {
        Protect { first: 0, recent: self.recent.unwrap_or(n / 2) }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        out.copy_from_slice(view.mass_total(head));
    }
}
