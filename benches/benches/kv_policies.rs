//! Choosing what stays of one layer: 4096 entries, budget 1024, in the geometries of Llama-3-8B (8 kv heads) and
//! DeepSeek-V2-Lite (one latent). One thread; counts entries per second (all heads of the layer).
//!
//! `cargo bench -p rsinfer-benches --bench kv_policies`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::kv::policy::{AttentionKind, LayerGeometry, LayerView, Rotary, select};
use engine::kv::{Budget, KvPlan, KvSpec};
use std::time::Duration;

const ENTRIES: usize = 4096;
const BUDGET: usize = 1024;
const SPECS: [&str; 8] =
    ["random", "knorm", "keydiff", "tova", "h2o", "snapkv", "expected", "expected:covariance=no"];

fn values(n: usize) -> Vec<f32> {
    let mut s = 1u32;
    let next = move |_| {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

fn geometry(mla: bool) -> LayerGeometry {
    let (heads, kv_heads, key, k_pe, value) = if mla { (16, 1, 512, 64, 0) } else { (32, 8, 128, 0, 128) };
    let dims = if mla { k_pe } else { key };
    let freqs = (0..dims / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / dims as f64)).collect();
    let start = if mla { key } else { 0 };
    LayerGeometry {
        layer: 0,
        n_layers: 1,
        kind: if mla { AttentionKind::Mla } else { AttentionKind::Gqa },
        heads,
        kv_heads,
        key,
        k_pe,
        value,
        scale: 0.1,
        rotary: Rotary { start, freqs, adjacent: true },
        records_queries: true,
    }
}

fn policies(c: &mut Criterion) {
    for (name, mla) in [("llama-3-8b", false), ("deepseek-v2-lite", true)] {
        let g = geometry(mla);
        let mut group = c.benchmark_group(name);
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(300))
            .throughput(Throughput::Elements(ENTRIES as u64));
        let positions: Vec<u64> = (0..g.kv_heads).flat_map(|_| 0..ENTRIES as u64).collect();
        let keys = values(g.kv_heads * ENTRIES * g.key);
        let k_pe = values(ENTRIES * g.k_pe);
        let v = values(g.kv_heads * ENTRIES * g.value);
        let mass: Vec<f32> = values(g.kv_heads * ENTRIES).iter().map(|m| m.abs()).collect();
        for spec in SPECS {
            let parsed = KvSpec::parse(spec, Some(Budget::Entries(BUDGET))).expect("a sound string");
            let plan = parsed.plan(2 * ENTRIES, std::slice::from_ref(&g)).expect("it serves the layer");
            let KvPlan::Set(plan) = plan else { panic!("{spec} chooses nothing") };
            let latest = plan.needs.queries as u64;
            let queries = values(g.heads * plan.needs.queries * (g.key + g.k_pe));
            let query_positions: Vec<u64> = (ENTRIES as u64 - latest..ENTRIES as u64).collect();
            let view = LayerView {
                geometry: &g,
                entries: ENTRIES,
                positions: &positions,
                keys: &keys,
                k_pe: &k_pe,
                values: &v,
                mass_total: &mass,
                mass_recent: &mass,
                queries: &queries,
                query_positions: &query_positions,
                prompt: ENTRIES,
                next: ENTRIES as u64,
            };
            group.bench_function(spec, |b| {
                b.iter(|| select(&*plan.policy, &view, BUDGET).expect("a selection"));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, policies);
criterion_main!(benches);
