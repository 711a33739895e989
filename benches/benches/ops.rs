//! The operations between matrix products: norm, rotary embedding, router, and sampling over whole vocabularies. Norm and
//! rotary count bytes read and written, the router bytes of its weights, sampling logits per second.
//!
//! `cargo bench -p rsinfer-benches --bench ops -- sample/262144` runs the part that matches; threads: `RSINFER_THREADS`, all
//! cores otherwise. Softmax is part of attention: see its bench.

use benches::synth::Blocks;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::{Sampler, SamplerOptions};
use kernels::cpu::CpuBackend;
use kernels::testing::Rng;
use kernels::*;
use quant::DType;
use std::time::Duration;

fn values(n: usize) -> Vec<f32> {
    let mut rng = Rng(3);
    (0..n).map(|_| rng.unit()).collect()
}

fn device() -> Device {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = std::env::var("RSINFER_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(cores);
    Device::new(CpuBackend::new(threads))
}

fn vectors(c: &mut Criterion) {
    let dev = device();
    for (n, d) in [(1, 2048), (1, 7168), (512, 2048)] {
        let mut g = c.benchmark_group("norm");
        g.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        g.throughput(Throughput::Bytes((2 * n * d * 4) as u64));
        let (x, mut out) = (values(n * d), vec![0.0; n * d]);
        let w = Vector::new(values(d));
        g.bench_function(format!("n{n}/{d}"), |b| {
            b.iter(|| {
                dev.rms_norm(View::from_host(&x, d), &w, 1e-6, ViewMut::from_host(&mut out, d)).unwrap()
            })
        });
    }
    for (name, heads, head_dim, dims, style) in [
        ("llama-1b", 32, 64, 64, RopeStyle::Adjacent),
        ("gemma-1b", 4, 256, 256, RopeStyle::Halves),
        ("v3", 128, 192, 64, RopeStyle::Adjacent),
    ] {
        for n in [1, 512] {
            let mut g = c.benchmark_group("rope");
            g.sample_size(20)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1));
            g.throughput(Throughput::Bytes((2 * n * heads * dims * 4) as u64));
            let width = heads * head_dim;
            // A rotation by 0 repeated for ever keeps the values what they are.
            let mut x = values(n * width);
            let mut cos_sin = vec![0.0; n * dims];
            cos_sin.chunks_exact_mut(dims).for_each(|r| r[..dims / 2].fill(1.0));
            let shape = RopeHeads { head_dim, offset: head_dim - dims, dims, style };
            g.bench_function(format!("{name}/n{n}"), |b| {
                b.iter(|| {
                    dev.rope(ViewMut::from_host(&mut x, width), shape, View::from_host(&cos_sin, dims))
                        .unwrap()
                })
            });
        }
    }
}

fn router(c: &mut Criterion) {
    let dev = device();
    for (name, experts, d, used, v3) in [("v2-lite", 64, 2048, 6, false), ("v3", 256, 7168, 8, true)] {
        let mut bytes = vec![0; experts * d * 4];
        let blocks = Blocks::new(DType::F32).unwrap();
        blocks.fill(0.0, 1.0 / (d as f32).sqrt(), &mut Rng(2), &mut bytes);
        let weight = Weight::host(DType::F32, 1, experts, d, HostBytes::from_vec(bytes)).unwrap();
        let correction = Vector::new(vec![0.0; experts]);
        for n in [1, 512] {
            let mut g = c.benchmark_group("router");
            g.sample_size(20)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1));
            g.throughput(if n == 1 {
                Throughput::Bytes(weight.n_bytes() as u64)
            } else {
                Throughput::Elements((n * experts * d) as u64)
            });
            let x = values(n * d);
            let mut routes = Routes::default();
            let groups = Groups { count: 8, used: 4, score: GroupScore::Top2Sum };
            g.bench_function(format!("{name}/n{n}"), |b| {
                b.iter(|| {
                    let r = Router {
                        weight: &weight,
                        gating: if v3 { Gating::Sigmoid } else { Gating::Softmax },
                        correction: v3.then_some(&correction),
                        groups: v3.then_some(groups),
                        used,
                        normalize: v3,
                        scale: 1.0,
                    };
                    dev.route(r, View::from_host(&x, d), &mut routes).unwrap();
                })
            });
        }
    }
}

fn sampling(c: &mut Criterion) {
    let off = SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(1), ..Default::default() };
    let chains = [
        ("greedy", SamplerOptions { temperature: 0.0, ..off.clone() }),
        ("defaults", SamplerOptions { seed: Some(1), ..Default::default() }),
        ("penalties", SamplerOptions { repeat_penalty: 1.1, seed: Some(1), ..Default::default() }),
        ("top-k-40", SamplerOptions { top_k: 40, ..off.clone() }),
        ("top-p-0.95", SamplerOptions { top_p: 0.95, ..off.clone() }),
        ("min-p-0.05", SamplerOptions { min_p: 0.05, ..off.clone() }),
        ("typical-0.9", SamplerOptions { typical_p: 0.9, ..off.clone() }),
        ("temperature", off),
    ];
    for n in [129_280, 262_144] {
        // Bell-shaped like a model's own; flat ones, the worst for top-p, keep nearly everything.
        let mut rng = Rng(7);
        let mut draw = |reach: f32| -> Vec<f32> {
            (0..n).map(|_| reach * (rng.unit() + rng.unit() + rng.unit() + rng.unit())).collect()
        };
        for (shape, logits) in [("peaked", draw(4.0)), ("flat", draw(0.5))] {
            for (name, options) in &chains {
                let mut g = c.benchmark_group(format!("sample/{n}"));
                g.sample_size(20)
                    .warm_up_time(Duration::from_millis(200))
                    .measurement_time(Duration::from_secs(1));
                g.throughput(Throughput::Elements(n as u64));
                let mut sampler = Sampler::new(options.clone()).unwrap();
                let mut row = logits.clone();
                g.bench_function(format!("{shape}/{name}"), |b| {
                    b.iter(|| {
                        let token = sampler.sample(&mut row).unwrap();
                        sampler.accept(token);
                        token
                    })
                });
            }
        }
    }
}

criterion_group!(benches, vectors, router, sampling);
criterion_main!(benches);
