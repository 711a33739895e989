//! Expected attention: what future queries will probably attend to stays.
//!
//! Idea: queries before rotation follow roughly a normal distribution; estimate it from past ones, turn it to the coming
//! positions on average, and the attention to expect of it has a closed form. Source: Expected Attention, arXiv:2510.00636.
//! Score per query head: softmax over entries of (s k.m + s^2/2 k'C k), m and C the queries' mean and covariance after the
//! mean rotation of the next `future` positions, s the softmax scale; averaged over grouped heads, plus `epsilon`, times the
//! value's norm. Parameters: `queries`, 128: latest ones the estimate is made of; `future`, 512; `sinks`, 4: first positions
//! that stay and are left out of the estimate; `covariance`, yes; `values`, yes: weigh by the value's norm; `epsilon`, 0.
//!
//! Deviations: the estimate is made of the latest queries only, where NVIDIA's kvpress takes all of the prompt's. The norm is the
//! value's, not that of its output projection (as in kvpress). On MLA queries are absorbed, keys are latent and rotary key
//! together, and the latent's norm stands for the values'.
//!
//! Evicts at the prompt's end; with `evict=both` also while decoding. An eviction costs entries x queries x heads x key
//! dimensions multiply-adds per layer (docs/performance.md): `queries` sets it.

use crate::kv::policy::{
    AttentionKind, Evict, KvPolicy, LayerGeometry, LayerView, Needs, ParamInfo, PolicyInfo, Protect,
    add_scaled, dot, norm,
};
use std::sync::Arc;

pub(crate) const INFO: PolicyInfo = PolicyInfo {
    idea: "what future queries are expected to attend to stays",
    paper: "arXiv:2510.00636",
    params: &[
        ParamInfo { name: "queries", default: "128", what: "latest queries the estimate is made of" },
        ParamInfo { name: "future", default: "512", what: "positions to look ahead" },
        ParamInfo { name: "sinks", default: "4", what: "first positions that stay" },
        ParamInfo { name: "covariance", default: "yes", what: "no: the mean query alone" },
        ParamInfo { name: "values", default: "yes", what: "no: leave out the value's norm" },
        ParamInfo { name: "epsilon", default: "0", what: "added before the value's norm" },
    ],
    evict: Evict::Prompt,
    ..PolicyInfo::policy("expected", |p| {
        let yes = |key| Ok(p.choice(key, &["yes", "no"])? != Some(1));
        let positive = |key, default| match p.whole(key)?.unwrap_or(default) {
            0 => Err(p.error(key, format!("{key} must be at least 1"))),
            n => Ok(n),
        };
        Ok(Arc::new(Expected {
            queries: positive("queries", 128)?,
            future: positive("future", 512)?,
            sinks: p.whole("sinks")?.unwrap_or(4) as u64,
            covariance: yes("covariance")?,
            values: yes("values")?,
            epsilon: p.number("epsilon")?.unwrap_or(0.0),
        }))
    })
};

#[derive(Debug)]
struct Expected {
    queries: usize,
    future: usize,
    sinks: u64,
    covariance: bool,
    values: bool,
    epsilon: f32,
}

/// The queries to come of one head: their mean, and deviations from it whose mean square is the variance.
struct Queries {
    mean: Vec<f32>,
    deviations: Vec<f32>,
}

impl Expected {
    /// Per recorded query and pair of dimensions: the complex factor that takes the rotation back and puts the mean rotation
    /// of the coming positions in its place.
    fn turns(&self, view: &LayerView<'_>) -> Vec<(f32, f32)> {
        let (freqs, ahead) = (&view.geometry.rotary.freqs, self.future as f64);
        let one = |p: u64, f: f64| {
            // Mean of e^(i f t) over the next positions: a geometric sum.
            let (below, above) = ((f / 2.0).sin(), (ahead * f / 2.0).sin());
            let size = match below.abs() < 1e-12 {
                true => (ahead * f / 2.0).cos() / (f / 2.0).cos(),
                false => above / (ahead * below),
            };
            let angle = (view.next as f64 - p as f64 + (ahead - 1.0) / 2.0) * f;
            ((size * angle.cos()) as f32, (size * angle.sin()) as f32)
        };
        view.query_positions.iter().flat_map(|p| freqs.iter().map(move |f| one(*p, *f))).collect()
    }

    fn estimate(&self, view: &LayerView<'_>, query_head: usize, turns: &[(f32, f32)]) -> Queries {
        let g = view.geometry;
        let (width, pairs) = (g.key + g.k_pe, g.rotary.freqs.len());
        // Queries of the sinks are unlike the others; where there are no others, they must do.
        let first = match view.query_positions.partition_point(|p| *p < self.sinks) {
            n if n == view.query_positions.len() => 0,
            n => n,
        };
        let mut rows: Vec<f32> = view.queries(query_head).skip(first).flatten().copied().collect();
        let mut mean = vec![0.0; width];
        let n = rows.len() / width;
        for (row, turns) in rows.chunks_exact_mut(width).zip(turns.chunks_exact(pairs.max(1)).skip(first)) {
            let rotated = &mut row[g.rotary.start..];
            for (i, (cos, sin)) in turns.iter().enumerate() {
                let (a, b) = if g.rotary.adjacent { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                let (x, y) = (rotated[a], rotated[b]);
                (rotated[a], rotated[b]) = (x * cos - y * sin, x * sin + y * cos);
            }
        }
        rows.chunks_exact(width).for_each(|row| add_scaled(&mut mean, 1.0 / n as f32, row));
        match self.covariance {
            true => rows.chunks_exact_mut(width).for_each(|row| add_scaled(row, -1.0, &mean)),
            false => rows.clear(),
        }
        Queries { mean, deviations: rows }
    }
}

/// Turns logits into probabilities.
fn softmax(x: &mut [f32]) {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - most).exp();
        sum += f64::from(*x);
    }
    x.iter_mut().for_each(|x| *x = (f64::from(*x) / sum) as f32);
}

impl KvPolicy for Expected {
    fn needs(&self) -> Needs {
        Needs {
            keys: true,
            values: self.values,
            queries: self.queries,
            whole_prompt: true,
            ..Needs::default()
        }
    }

    fn supports(&self, g: &LayerGeometry) -> Result<(), String> {
        if g.records_queries {
            Ok(())
        } else {
            Err("its queries cannot be recorded in the coordinates of its keys".into())
        }
    }

    fn protect(&self, _: &LayerView<'_>, _: usize) -> Protect {
        Protect { first: self.sinks, recent: 0 }
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        let g = view.geometry;
        let (width, group) = (g.key + g.k_pe, view.group(head));
        let (sinks, out) = out.split_at_mut(view.positions(head).partition_point(|p| *p < self.sinks));
        sinks.fill(f32::INFINITY);
        out.fill(0.0);
        let keys: Vec<f32> = match g.kind {
            AttentionKind::Gqa => Vec::new(),
            AttentionKind::Mla => {
                let rows = view.keys(head).zip(view.k_pe.chunks_exact(g.k_pe.max(1)));
                rows.flat_map(|(c, k_pe)| c.iter().chain(k_pe)).copied().collect()
            }
        };
        let mut rows = if keys.is_empty() { view.keys(head) } else { keys.chunks_exact(width) };
        let rows: Vec<&[f32]> = rows.by_ref().skip(sinks.len()).collect();
        let turns = self.turns(view);
        let mut logits = vec![0.0; out.len()];
        for query_head in group.clone() {
            let queries = self.estimate(view, query_head, &turns);
            let n = (queries.deviations.len() / width).max(1) as f32;
            for (logit, key) in logits.iter_mut().zip(&rows) {
                let square = |d: &[f32]| dot(d, key).powi(2);
                let variance = queries.deviations.chunks_exact(width).map(square).sum::<f32>() / n;
                *logit = g.scale * dot(&queries.mean, key) + 0.5 * g.scale * g.scale * variance;
            }
            softmax(&mut logits);
            add_scaled(out, 1.0 / group.len() as f32, &logits);
        }
        if self.values {
            for (score, value) in out.iter_mut().zip(view.values(head).skip(sinks.len())) {
                *score = (*score + self.epsilon) * norm(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::policies::testing::{Layer, policy};
    use crate::kv::policy::{KvError, select};
    use crate::kv::{KvPlan, KvSpec};

    #[test]
    fn the_mean_rotation_is_that_of_the_sum() {
        let layer = Layer::gqa(1, 1, 8, 20);
        for future in [1, 2, 7, 512] {
            let e = Expected { queries: 9, future, sinks: 0, covariance: true, values: true, epsilon: 0.0 };
            let view = layer.view();
            let freqs = &layer.geometry.rotary.freqs;
            for (at, (cos, sin)) in e.turns(&view).into_iter().enumerate() {
                let (p, f) = (view.query_positions[at / freqs.len()], freqs[at % freqs.len()]);
                let angle = |t: usize| (view.next as f64 + t as f64 - p as f64) * f;
                let mean =
                    |of: fn(f64) -> f64| (0..future).map(|t| of(angle(t))).sum::<f64>() / future as f64;
                assert!((f64::from(cos) - mean(f64::cos)).abs() < 1e-6);
                assert!((f64::from(sin) - mean(f64::sin)).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn without_queries_only_values_count() {
        let mut layer = Layer::gqa(2, 1, 8, 12);
        layer.queries.clear();
        layer.query_positions.clear();
        layer.values[5 * 8..6 * 8].fill(9.0);
        let kept = select(&*policy("expected:5"), &layer.view(), 5).unwrap();
        assert_eq!(kept.head(0), [0, 1, 2, 3, 5]);
    }

    #[test]
    fn layers_that_record_no_queries_are_refused_at_load() {
        let mut g = Layer::mla(2, 8, 4, 0).geometry;
        g.records_queries = false;
        let spec: KvSpec = "expected:9".parse().unwrap();
        assert!(matches!(spec.plan(64, &[g.clone()]), Err(KvError::Unsupported { layer: 3, .. })));
        g.records_queries = true;
        assert!(matches!(spec.plan(64, &[g]), Ok(KvPlan::Set(_))));
    }
}
