//! Made-up layers for tests of policies.

use crate::kv::policy::{AttentionKind, KvPolicy, LayerGeometry, LayerView, Rotary, Selection};
use crate::kv::{KvPlan, KvSpec};
use std::sync::Arc;

/// The policy of a `--kv` string that needs one.
pub(crate) fn policy(spec: &str) -> Arc<dyn KvPolicy> {
    let spec: KvSpec = spec.parse().unwrap();
    match spec.plan(4096, &[]).unwrap() {
        KvPlan::Set(plan) => plan.policy,
        other => panic!("{spec} is {other:?}"),
    }
}

/// Entries with seeded contents; the same position always has the same ones.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub geometry: LayerGeometry,
    pub positions: Vec<u64>,
    pub keys: Vec<f32>,
    pub k_pe: Vec<f32>,
    pub values: Vec<f32>,
    pub mass_total: Vec<f32>,
    pub mass_recent: Vec<f32>,
    pub queries: Vec<f32>,
    pub query_positions: Vec<u64>,
    pub prompt: usize,
    next: u64,
}

/// A number in -1..1 that depends on all of `at`.
fn noise(at: [u64; 3]) -> f32 {
    let mut x = at.iter().fold(7u64, |s, a| (s ^ a).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29));
    x ^= x >> 31;
    (x.wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

impl Layer {
    pub fn gqa(heads: usize, kv_heads: usize, dims: usize, entries: usize) -> Self {
        let freqs = (0..dims / 2).map(|i| 10f64.powf(-(i as f64))).collect();
        Self::new(LayerGeometry {
            layer: 3,
            n_layers: 8,
            kind: AttentionKind::Gqa,
            heads,
            kv_heads,
            key: dims,
            k_pe: 0,
            value: dims,
            scale: 1.0 / (dims as f32).sqrt(),
            rotary: Rotary { start: 0, freqs, adjacent: true },
            records_queries: true,
        })
        .grown(entries)
    }

    pub fn mla(heads: usize, latent: usize, rope: usize, entries: usize) -> Self {
        let freqs = (0..rope / 2).map(|i| 10f64.powf(-(i as f64))).collect();
        Self::new(LayerGeometry {
            kind: AttentionKind::Mla,
            heads,
            kv_heads: 1,
            key: latent,
            k_pe: rope,
            value: 0,
            rotary: Rotary { start: latent, freqs, adjacent: true },
            ..Self::gqa(1, 1, 2, 0).geometry
        })
        .grown(entries)
    }

    fn new(geometry: LayerGeometry) -> Self {
        Self {
            geometry,
            positions: vec![],
            keys: vec![],
            k_pe: vec![],
            values: vec![],
            mass_total: vec![],
            mass_recent: vec![],
            queries: vec![],
            query_positions: vec![],
            prompt: 0,
            next: 0,
        }
    }

    fn grown(mut self, n: usize) -> Self {
        self.grow(n);
        self
    }

    /// Entries held.
    pub fn entries(&self) -> usize {
        self.positions.len() / self.geometry.kv_heads
    }

    /// Adds `n` tokens.
    pub fn grow(&mut self, n: usize) {
        let kept: Vec<Vec<u64>> = match self.entries() {
            0 => vec![vec![]; self.geometry.kv_heads],
            n => self.positions.chunks(n).map(<[u64]>::to_vec).collect(),
        };
        self.next += n as u64;
        let added = self.next - n as u64..self.next;
        self.fill(kept.into_iter().map(|k| k.into_iter().chain(added.clone()).collect()).collect());
    }

    /// Evicts what is not selected.
    pub fn keep(&mut self, s: &Selection) {
        let n = self.entries();
        let head = |h: usize| s.head(h).iter().map(|i| self.positions[h * n + *i as usize]).collect();
        self.fill((0..self.geometry.kv_heads).map(head).collect());
    }

    fn fill(&mut self, positions: Vec<Vec<u64>>) {
        let g = self.geometry.clone();
        let rows = |salt: u64, width: usize| -> Vec<f32> {
            let row = |h: usize, p: u64| (0..width).map(move |i| noise([salt + h as u64, p, i as u64]));
            let head = |(h, ps): (usize, &Vec<u64>)| {
                ps.iter().flat_map(|p| row(h, *p).collect::<Vec<_>>()).collect::<Vec<_>>()
            };
            positions.iter().enumerate().flat_map(head).collect()
        };
        (self.keys, self.values) = (rows(100, g.key), rows(200, g.value));
        self.k_pe = rows(300, g.k_pe);
        self.mass_total = rows(400, 1).iter().map(|m| m.abs()).collect();
        self.mass_recent = rows(500, 1).iter().map(|m| m.abs()).collect();
        self.query_positions = (self.next.saturating_sub(16)..self.next).collect();
        let query = |h: u64, p: u64| (0..(g.key + g.k_pe) as u64).map(move |i| noise([600 + h, p, i]));
        self.queries = (0..g.heads as u64)
            .flat_map(|h| self.query_positions.iter().flat_map(move |p| query(h, *p)))
            .collect();
        self.prompt = self.next as usize;
        self.positions = positions.concat();
    }

    pub fn view(&self) -> LayerView<'_> {
        LayerView {
            geometry: &self.geometry,
            entries: self.entries(),
            positions: &self.positions,
            keys: &self.keys,
            k_pe: &self.k_pe,
            values: &self.values,
            mass_total: &self.mass_total,
            mass_recent: &self.mass_recent,
            queries: &self.queries,
            query_positions: &self.query_positions,
            prompt: self.prompt,
            next: self.next,
        }
    }
}
