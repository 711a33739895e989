//! Wrappers: budgets per layer, and entries that stay whatever the policy inside says.
//!
//! - `pyramid`: budgets fall linearly from the first layer to the last, their sum unchanged. Idea: attention is spread in low
//!   layers and gathers on few tokens in high ones. Source: PyramidKV, arXiv:2406.02069. Parameters: `beta`, 20: the last
//!   layer gets 1/beta of the mean; `recent`, 8: entries that every layer gets beforehand (the window that SnapKV would keep).
//!   Deviation: what the first layer cannot use, because the context is shorter than its budget, goes to the last ones.
//! - `per-layer:0-1=100%,2=512(...)`: budgets by rank of the layer; the others keep the policy's.
//! - `keep-prompt(...)`: the prompt stays, within the budget; `keep-first:16(...)`: the first positions stay.

use crate::kv::policy::{
    Budget, KvError, KvPolicy, LayerBudget, LayerGeometry, LayerView, Needs, Protect, Selection,
};
use crate::kv::policy::{ParamError, ParamInfo, Params, PolicyInfo};
use std::ops::RangeInclusive;
use std::sync::Arc;

pub(crate) const PYRAMID: PolicyInfo = PolicyInfo {
    idea: "wrapper: budgets fall from the first layer to the last",
    paper: "arXiv:2406.02069",
    params: &[
        ParamInfo { name: "beta", default: "20", what: "the mean budget over the last layer's" },
        ParamInfo { name: "recent", default: "8", what: "entries every layer gets beforehand" },
    ],
    ..PolicyInfo::wrapper("pyramid", |p, inner| {
        let beta = p.number("beta")?.unwrap_or(20.0);
        if beta < 1.0 {
            return Err(p.error("beta", format!("beta must be at least 1, `{beta}` is not")));
        }
        let shape = Shape::Pyramid { beta: f64::from(beta), recent: p.whole("recent")?.unwrap_or(8) };
        Ok(Arc::new(Wrapper { inner, shape, keep: Keep::Nothing }))
    })
};

pub(crate) const PER_LAYER: PolicyInfo = PolicyInfo {
    idea: "wrapper: budgets by layer: per-layer:0-1=100%,2=512(...)",
    free: true,
    params: &[ParamInfo {
        name: "FROM-TO",
        default: "the policy's",
        what: "budget of these layers, or of one",
    }],
    ..PolicyInfo::wrapper("per-layer", |p, inner| {
        Ok(Arc::new(Wrapper { inner, shape: Shape::Layers(layers(p)?), keep: Keep::Nothing }))
    })
};

pub(crate) const KEEP_PROMPT: PolicyInfo = PolicyInfo {
    idea: "wrapper: the prompt stays, within the budget",
    ..PolicyInfo::wrapper("keep-prompt", |_, inner| {
        Ok(Arc::new(Wrapper { inner, shape: Shape::Inner, keep: Keep::Prompt }))
    })
};

pub(crate) const KEEP_FIRST: PolicyInfo = PolicyInfo {
    idea: "wrapper: the first positions stay: keep-first:16(...)",
    params: &[ParamInfo { name: "n", default: "4", what: "positions" }],
    primary: "n",
    ..PolicyInfo::wrapper("keep-first", |p, inner| {
        let keep = Keep::First(p.whole("n")?.unwrap_or(4) as u64);
        Ok(Arc::new(Wrapper { inner, shape: Shape::Inner, keep }))
    })
};

#[derive(Debug)]
enum Shape {
    Inner,
    Pyramid { beta: f64, recent: usize },
    Layers(Vec<(RangeInclusive<usize>, Budget)>),
}

#[derive(Debug)]
enum Keep {
    Nothing,
    Prompt,
    First(u64),
}

/// A policy with other budgets or more protection; all else is the inner one's.
#[derive(Debug)]
struct Wrapper {
    inner: Arc<dyn KvPolicy>,
    shape: Shape,
    keep: Keep,
}

/// The budgets that `per-layer` was given.
fn layers(p: &Params<'_>) -> Result<Vec<(RangeInclusive<usize>, Budget)>, ParamError> {
    let mut out: Vec<(RangeInclusive<usize>, Budget)> = Vec::new();
    for (key, value) in p.all() {
        let (from, to) = key.split_once('-').unwrap_or((key, key));
        let range = match (from.trim().parse::<usize>(), to.trim().parse::<usize>()) {
            (Ok(from), Ok(to)) if from <= to => from..=to,
            _ => return Err(p.error(key, format!("layers are written 3 or 0-3, not `{key}`"))),
        };
        if out.iter().any(|(r, _)| r.start() <= range.end() && range.start() <= r.end()) {
            return Err(p.error(key, format!("{key} names a layer that has a budget already")));
        }
        out.push((range, value.parse().map_err(|e: String| p.error(key, e))?));
    }
    if out.is_empty() {
        return Err(p.error("", "`per-layer` needs budgets: per-layer:0-1=100%,2=512(...)"));
    }
    Ok(out)
}

/// PyramidKV's budgets: an arithmetic progression with the mean `base`, each at most `ctx`.
fn pyramid(b: LayerBudget, beta: f64, recent: usize) -> usize {
    let recent = recent.min(b.base);
    let mean = (b.base - recent) as f64;
    let most = b.ctx.saturating_sub(recent) as f64;
    let first = (2.0 * mean - mean / beta).min(most).max(mean);
    let last = 2.0 * mean - first;
    let share = if b.n_layers > 1 { b.layer as f64 / (b.n_layers - 1) as f64 } else { 0.5 };
    recent + (first - share * (first - last)).round() as usize
}

impl KvPolicy for Wrapper {
    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn supports(&self, geometry: &LayerGeometry) -> Result<(), String> {
        self.inner.supports(geometry)
    }

    fn per_head(&self) -> bool {
        self.inner.per_head()
    }

    fn budget(&self, b: LayerBudget) -> usize {
        let inner = self.inner.budget(b);
        match &self.shape {
            Shape::Inner => inner,
            Shape::Pyramid { beta, recent } => pyramid(LayerBudget { base: inner, ..b }, *beta, *recent),
            Shape::Layers(l) => {
                l.iter().find(|(r, _)| r.contains(&b.layer)).map_or(inner, |(_, n)| n.resolve(b.ctx))
            }
        }
    }

    fn protect(&self, view: &LayerView<'_>, n: usize) -> Protect {
        let first = match self.keep {
            Keep::Nothing => 0,
            Keep::Prompt => view.prompt as u64,
            Keep::First(n) => n,
        };
        self.inner.protect(view, n).and(Protect { first, recent: 0 })
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        self.inner.score(view, head, out);
    }

    fn keep(&self, view: &LayerView<'_>, n: usize, protect: Protect) -> Result<Selection, KvError> {
        self.inner.keep(view, n, protect)
    }
}
