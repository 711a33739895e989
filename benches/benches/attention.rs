//! Attention on the CPU: decoding at depth and a prompt of 512 tokens, in the head geometries of public models.
//! Decoding counts cache bytes per second, a prompt multiply-adds per second.
//!
//! `cargo bench -p rsinfer-benches --bench attention`; threads: `RSINFER_THREADS`, all cores otherwise.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::CpuBackend;
use kernels::*;
use quant::DType;
use std::time::Duration;

fn values(n: usize) -> Vec<f32> {
    let mut s = 1u32;
    let next = move |_| {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

fn device() -> Device {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = std::env::var("RSINFER_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(cores);
    Device::new(CpuBackend::new(threads))
}

fn cache(dev: &Device, dtype: DType, slots: usize, width: usize) -> KvBuf {
    let mut c = dev.alloc_kv(dtype, slots, width).unwrap();
    let row = values(width + slots);
    for s in 0..slots {
        dev.kv_write(View::from_host(&row[s..][..width], width), &mut c, &[s as u32]).unwrap();
    }
    c
}

/// Row i sees `depth + i + 1` entries.
fn visible(n: usize, depth: usize, prompt: usize) -> Visible {
    let mut v = Visible::default();
    v.set_prompt(prompt);
    for i in 0..n {
        v.push([Span { start: 0, len: (depth + i + 1) as u32, sink: false }]);
    }
    v
}

fn grouped(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("attention");
    g.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (name, heads, kv_heads, hd) in [("llama-1b", 32, 8, 64), ("gemma-1b", 4, 1, 256)] {
        for dtype in [DType::F16, DType::Q8_0] {
            for (n, depth) in [(1, 511), (1, 4095), (1, 16383), (512, 0)] {
                let slots = depth + n;
                let (k, v) =
                    (cache(&dev, dtype, slots, kv_heads * hd), cache(&dev, dtype, slots, kv_heads * hd));
                let q = values(n * heads * hd);
                let visible = visible(n, depth, if n > 1 { n } else { 0 });
                let mut out = vec![0.0; n * heads * hd];
                let seen: usize = (0..n).map(|i| visible.seen(i)).sum();
                g.throughput(if n == 1 {
                    Throughput::Bytes((k.bytes() + v.bytes()) as u64)
                } else {
                    Throughput::Elements((seen * heads * hd * 2) as u64)
                });
                g.bench_function(format!("{name}/{dtype}/n{n}/depth{}", depth + 1), |b| {
                    b.iter(|| {
                        let a = Attention {
                            heads,
                            kv_heads,
                            scale: 0.125,
                            q: View::from_host(&q, heads * hd),
                            q_sink: None,
                            k: &k,
                            v: &v,
                            visible: &visible,
                        };
                        dev.attention(a, ViewMut::from_host(&mut out, heads * hd)).unwrap();
                    })
                });
            }
        }
    }
}

fn latent(c: &mut Criterion) {
    let dev = device();
    let mut g = c.benchmark_group("mla");
    g.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let (nope, rope, value, latent) = (128, 64, 128, 512);
    for (name, heads) in [("v2-lite", 16), ("v3", 128)] {
        let stack = |rows: usize, cols: usize| {
            let q8 = DType::Q8_0;
            let mut bytes = vec![0; heads * rows * q8.row_bytes(cols).unwrap()];
            (q8.format().quantize.unwrap())(&values(heads * rows * cols), &mut bytes, None);
            Weight::host(q8, heads, rows, cols, HostBytes::from_vec(bytes)).unwrap()
        };
        let (k_b, v_b) = (stack(latent, nope), stack(value, latent));
        for (n, depth) in [(1, 0), (1, 511), (1, 4095), (1, 16383), (512, 0)] {
            if n > 1 && heads > 16 {
                continue;
            }
            let slots = depth + n;
            let (lat, k_pe) = (cache(&dev, DType::F16, slots, latent), cache(&dev, DType::F16, slots, rope));
            let hd = nope + rope;
            let q = values(n * heads * hd);
            let visible = visible(n, depth, if n > 1 { n } else { 0 });
            let mut out = vec![0.0; n * heads * value];
            let seen: usize = (0..n).map(|i| visible.seen(i)).sum();
            g.throughput(if n == 1 {
                Throughput::Bytes((lat.bytes() + k_pe.bytes() + k_b.n_bytes() + v_b.n_bytes()) as u64)
            } else {
                let up = slots * latent * (nope + value);
                Throughput::Elements((heads * (up + seen * (hd + value))) as u64)
            });
            g.bench_function(format!("{name}/n{n}/depth{}", depth + 1), |b| {
                b.iter(|| {
                    let m = Mla {
                        heads,
                        nope,
                        rope,
                        value,
                        scale: 0.07,
                        q: View::from_host(&q, heads * hd),
                        q_sink: None,
                        latent: &lat,
                        k_pe: &k_pe,
                        up: MlaUp::Split { k_b: &k_b, v_b: &v_b },
                        visible: &visible,
                    };
                    dev.mla(m, ViewMut::from_host(&mut out, heads * value)).unwrap();
                })
            });
        }
    }
}

criterion_group!(benches, grouped, latent);
criterion_main!(benches);
