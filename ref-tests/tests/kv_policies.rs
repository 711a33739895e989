//! Eviction policies select what the papers' formulas say, worked out by kv/policies.py (NumPy, on its own) on layers that
//! kv/record.py recorded with transformers; and what NVIDIA's kvpress keeps of the same layer, where it knows the method.

use engine::kv::policy::{AttentionKind, LayerGeometry, LayerView, Rotary, select};
use engine::kv::{KvPlan, KvSpec};
use ref_tests::{fixture, read_npy};
use serde_json::Value;
use std::collections::BTreeMap;

type Kept = BTreeMap<String, Vec<Vec<u32>>>;

/// A recorded layer.
struct Layer {
    geometry: LayerGeometry,
    entries: usize,
    folder: String,
}

impl Layer {
    fn load(name: &str) -> Self {
        let folder = format!("kv-policies/{name}");
        let info = json(&format!("{folder}/layer.json"));
        let number = |key: &str| info[key].as_u64().unwrap() as usize;
        let rotary = &info["rotary"];
        let freqs = rotary["freqs"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap()).collect();
        let geometry = LayerGeometry {
            layer: number("layer"),
            n_layers: number("n_layers"),
            kind: if info["kind"] == "mla" { AttentionKind::Mla } else { AttentionKind::Gqa },
            heads: number("heads"),
            kv_heads: number("kv_heads"),
            key: number("key"),
            k_pe: number("k_pe"),
            value: number("value"),
            scale: info["scale"].as_f64().unwrap() as f32,
            rotary: Rotary {
                start: rotary["start"].as_u64().unwrap() as usize,
                freqs,
                adjacent: rotary["adjacent"].as_bool().unwrap(),
            },
            records_queries: true,
        };
        Self { geometry, entries: number("entries"), folder }
    }

    fn read(&self, name: &str) -> Vec<f32> {
        read_npy(&fixture(&format!("{}/{name}.npy", self.folder))).2
    }

    fn kept(&self, file: &str) -> Kept {
        serde_json::from_value(json(&format!("{}/{file}.json", self.folder))).unwrap()
    }

    /// What the policy keeps when the prompt has been read, per kv head.
    fn select(&self, spec: &str) -> Vec<Vec<u32>> {
        let (g, n) = (&self.geometry, self.entries);
        let parsed: KvSpec = spec.parse().unwrap_or_else(|e| panic!("{e}"));
        let plan = parsed.plan(4096, std::slice::from_ref(g)).unwrap();
        let KvPlan::Set(plan) = plan else { panic!("{spec} chooses nothing") };
        let needs = plan.needs;
        let if_needed = |needed: bool, name: &str| if needed { self.read(name) } else { Vec::new() };
        let keys = if_needed(needs.keys, "keys");
        let k_pe = if_needed(needs.keys && g.k_pe > 0, "k_pe");
        let values = if_needed(needs.values && g.value > 0, "values");
        let mass_total = if_needed(needs.mass_total, "mass_total");
        let mass_recent = if_needed(needs.mass_recent > 0, &format!("mass_recent_{}", needs.mass_recent));
        let queries = if_needed(needs.queries > 0, "queries");
        let latest = needs.queries.min(n);
        let width = g.key + g.k_pe;
        let queries: Vec<f32> =
            queries.chunks(n * width).flat_map(|head| &head[(n - latest) * width..]).copied().collect();
        let positions: Vec<u64> = (0..g.kv_heads).flat_map(|_| 0..n as u64).collect();
        let query_positions: Vec<u64> = (n - latest..n).map(|p| p as u64).collect();
        let view = LayerView {
            geometry: g,
            entries: n,
            positions: &positions,
            keys: &keys,
            k_pe: &k_pe,
            values: &values,
            mass_total: &mass_total,
            mass_recent: &mass_recent,
            queries: &queries,
            query_positions: &query_positions,
            prompt: n,
            next: n as u64,
        };
        let selection =
            select(&*plan.policy, &view, plan.budgets[0]).unwrap_or_else(|e| panic!("{spec}: {e}"));
        (0..selection.heads).map(|h| selection.head(h).to_vec()).collect()
    }
}

fn json(path: &str) -> Value {
    let path = fixture(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn policies_keep_what_the_papers_formulas_keep() {
    for name in ["llama3", "deepseek2-v2-lite"] {
        let layer = Layer::load(name);
        let kept = layer.kept("kept");
        for policy in ["knorm", "keydiff", "tova", "h2o", "snapkv", "expected"] {
            assert!(kept.keys().any(|spec| spec.starts_with(policy)), "{policy} is missing");
        }
        for (spec, wanted) in kept {
            assert_eq!(layer.select(&spec), wanted, "{name}: {spec}");
        }
    }
}

#[test]
fn policies_keep_what_kvpress_keeps() {
    let layer = Layer::load("llama3");
    let last = layer.entries as u32 - 1;
    for (spec, wanted) in layer.kept("kvpress") {
        let ours = layer.select(&spec);
        for (head, wanted) in wanted.iter().enumerate() {
            let ours = &ours[head % ours.len()];
            if spec.starts_with("tova") {
                // kvpress always keeps the latest entry, the paper does not.
                let differ: Vec<_> = wanted.iter().filter(|i| !ours.contains(i)).collect();
                assert!(differ.is_empty() || differ == [&last], "{spec}: {differ:?}");
            } else {
                assert_eq!(ours, wanted, "{spec}, head {head}");
            }
        }
    }
}
