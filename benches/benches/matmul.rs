//! Matrix products: type x instruction set x shape, one token, four sequences and a prompt of 512, as bytes of weights per second and
//! multiply-adds per second. The machine's own limits, measured in the same run, are printed first.
//!
//! `cargo bench -p rsinfer-benches --bench matmul -- q4_K/avx512` runs the part that matches.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::isa::Isa;
use kernels::cpu::matmul::{Input, Rounded, multiply_with, needs_quantized};
use kernels::cpu::tiles::{LEAST_PROMPT, Tiles};
use kernels::cpu::{Pool, machine, quantized::Quantized};
use kernels::testing::{Fill, Rng, weights};
use kernels::{HostBytes, View, ViewMut, Weight, Write};
use quant::FORMATS;
use std::time::Duration;

/// Rows by columns: attention, and a feed-forward layer's two directions.
const SHAPES: [(usize, usize); 3] = [(2048, 2048), (8192, 2048), (2048, 8192)];

/// Copies of the weights used in turn take at least this, so that one token reads memory and no cache.
const SPREAD: usize = 192 << 20;

fn limits(threads: usize) {
    let giga = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{:.0}", v / 1e9));
    println!("{threads} threads read {:.1} GB/s", machine::read_bandwidth(threads) / 1e9);
    for isa in Isa::available() {
        let (int8, float) = (machine::int8_peak(isa, threads), machine::float_peak(isa, threads));
        let tiles = giga(machine::tile_peak(isa, threads));
        println!("{}: at most {} int8, {tiles} bf16 and {} f32 GMAC/s", isa.name(), giga(int8), giga(float));
    }
}

fn products(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let pool = Pool::new(threads);
    limits(threads);
    for format in FORMATS {
        for (rows, cols) in SHAPES {
            let mut rng = Rng(1);
            let few = weights(format.dtype, 16, cols, Fill::Even, &mut rng);
            let one = few.repeat(rows / 16);
            let count = (SPREAD / one.len()).max(1);
            let bytes = HostBytes::from_vec(one.repeat(count));
            let w = Weight::host(format.dtype, count, rows, cols, bytes).expect("whole blocks");
            for isa in Isa::available() {
                for n in [1, 4, 512] {
                    // The specification is not meant to be fast.
                    if n > 1 && isa == Isa::Scalar {
                        continue;
                    }
                    let mut group = c.benchmark_group(format!("{}/{}", format.name, isa.name()));
                    group.sample_size(10).measurement_time(Duration::from_secs(1));
                    group.warm_up_time(Duration::from_millis(200));
                    group.throughput(if n < 512 {
                        Throughput::Bytes((w.n_bytes() / count) as u64)
                    } else {
                        Throughput::Elements((n * rows * cols) as u64)
                    });
                    let x = rng.activations(n * cols);
                    let (mut q, mut tiles) = (Quantized::new(), Tiles::default());
                    let (mut y, mut turn) = (vec![0.0; n * rows], 0);
                    let tiled = needs_quantized(&w) && isa.has_tiles() && n >= LEAST_PROMPT as usize;
                    group.bench_function(format!("{rows}x{cols}/n={n}"), |b| {
                        b.iter(|| {
                            let float = View::from_host(&x, cols);
                            let rounded = if tiled {
                                tiles.set_all(isa, &pool, float);
                                Rounded::Bf16(&tiles)
                            } else {
                                q.set_with(isa, &pool, float);
                                Rounded::Int8(&q)
                            };
                            let input = Input { float, rounded };
                            let out = ViewMut::from_host(&mut y, rows);
                            turn = (turn + 1) % count;
                            multiply_with(isa, &pool, &w, turn, input, None, out, Write::Set);
                        });
                    });
                    group.finish();
                }
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
