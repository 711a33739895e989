//! Absorbed MLA on tensor cores: parts of rows, put together here, against the formula in f64. Both tile sizes, any number of heads, latents
//! and rotated parts of any multiple of eight, sinks, rings, parts of every length, queries of every magnitude.

use crate::attention::{Cache, cache, close, fill, mla, span, visible};
use crate::{Gpu, n, p};
use kernels::Visible;
use kernels::cuda::modules::{module, text_for};
use kernels::testing::Rng;
use ptx::Param;
use quant::DType;

/// Module, entries of a tile, stages for up to 16 heads and for more.
const KERNELS: [(&str, usize, [usize; 2]); 2] = [("mla_f16", 32, [4, 3]), ("mla_small_f16", 16, [4, 4])];

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    latent: usize,
    nope: usize,
    rope: usize,
    split: usize,
    most: usize,
}

/// What a call is about: caches and queries, `[rows, heads, latent]` and twice `[rows, heads, nope + rope]`.
struct Inputs {
    c: Cache,
    pe: Cache,
    absorbed: Vec<f32>,
    q: [Vec<f32>; 2],
    scale: f32,
}

fn inputs(g: &mut Gpu, s: Shape, rows: usize, slots: usize, seed: u64) -> Inputs {
    let mut rng = Rng(seed);
    let c = cache(g, DType::F16, slots, s.latent, &mut rng);
    let pe = cache(g, DType::F16, slots, s.rope, &mut rng);
    let width = rows * s.heads * (s.nope + s.rope);
    let absorbed = fill(&mut rng, rows * s.heads * s.latent);
    let q = [0; 2].map(|_| fill(&mut rng, width));
    Inputs { c, pe, absorbed, q, scale: 2.0 / ((s.latent + s.rope) as f32).sqrt() }
}

/// Parts that a list of `seen` entries has.
fn parts(s: Shape, seen: usize) -> usize {
    let each = if s.most == 0 { 0 } else { seen.div_ceil(s.most).next_multiple_of(32) };
    seen.div_ceil(each.max(s.split))
}

/// The parts of each row: of each head the maximum, the sum and the weighted sums of every part.
fn run(g: &mut Gpu, kernel: (&str, usize, [usize; 2]), s: Shape, v: &Visible, x: &Inputs) -> Vec<Vec<f32>> {
    let (_, tile, stages) = kernel;
    let (mut spans, mut ends) = (Vec::new(), Vec::new());
    for i in 0..v.rows() {
        spans.extend(v.row(i).iter().flat_map(|s| [s.start, s.len, u32::from(s.sink)]));
        ends.push((spans.len() / 3) as u32);
    }
    let splits = (0..v.rows()).map(|i| parts(s, v.seen(i))).max().unwrap();
    let size = s.latent + 2;
    let out = g.room(v.rows() * s.heads * splits * size);
    let (entry, heads, stages) =
        if s.heads <= 16 { ("mla_16", 16, stages[0]) } else { ("mla_32", 32, stages[1]) };
    let params = [
        p(g.floats(&x.absorbed)),
        p(g.floats(&x.q[0])),
        p(g.floats(&x.q[1])),
        n(s.heads * (s.nope + s.rope)),
        p(x.c.at),
        p(x.c.row as u64),
        p(x.pe.at),
        p(x.pe.row as u64),
        n(s.heads),
        n(s.latent),
        n(s.nope),
        n(s.rope),
        Param::F32(x.scale),
        p(g.words(&spans)),
        p(g.words(&ends)),
        n(s.split),
        n(s.most),
        p(out),
    ];
    let row = heads * (tile + 8);
    let shared = stages * (tile * 288 + 1) + 4 * row + 2 * row + 3 * heads;
    g.run_shared(entry, [s.heads.div_ceil(heads), splits, v.rows()], 256, shared, &params);
    let mut rows = Vec::new();
    for i in 0..v.rows() {
        let mut row = Vec::new();
        for h in 0..s.heads {
            let at = out + (4 * size * splits * (i * s.heads + h)) as u64;
            row.extend(g.read(at, parts(s, v.seen(i)) * size));
        }
        rows.push(row);
    }
    rows
}

/// Parts of `heads` heads put together in f64.
fn merged(parts: &[f32], s: Shape) -> Vec<f32> {
    let mut out = Vec::new();
    for head in parts.chunks_exact(parts.len() / s.heads) {
        let parts: Vec<&[f32]> = head.chunks_exact(s.latent + 2).collect();
        let max = parts.iter().fold(f32::MIN, |m, x| m.max(x[0]));
        let less = |x: &[f32]| (f64::from(x[0]) - f64::from(max)).exp();
        let sum: f64 = parts.iter().map(|x| f64::from(x[1]) * less(x)).sum();
        out.extend((2..s.latent + 2).map(|i| {
            let y: f64 = parts.iter().map(|x| f64::from(x[i]) * less(x)).sum();
            (y / sum) as f32
        }));
    }
    out
}

fn check(g: &mut Gpu, kernel: (&str, usize, [usize; 2]), s: Shape, v: &Visible, x: &Inputs, what: &str) {
    let got: Vec<f32> = run(g, kernel, s, v, x).iter().flat_map(|row| merged(row, s)).collect();
    let want = mla(v, [&x.absorbed, &x.q[0], &x.q[1]], [&x.c, &x.pe], (s.heads, s.nope, s.rope), x.scale);
    close(&got, &want, &format!("{} {what}: {s:?}", kernel.0));
}

fn gpu(name: &str) -> Gpu {
    Gpu::new(text_for(name, 80).unwrap())
}

#[test]
fn parts_of_every_shape() {
    let shape = |heads, latent, nope, rope, split, most| Shape { heads, latent, nope, rope, split, most };
    let cases = [
        (shape(1, 8, 4, 8, 32, 0), 1, 1),
        (shape(16, 512, 128, 64, 64, 0), 2, 130),
        (shape(17, 72, 3, 24, 128, 2), 2, 33),
        (shape(32, 256, 5, 56, 128, 0), 1, 100),
        (shape(40, 136, 1, 64, 64, 1), 2, 97),
        (shape(9, 512, 16, 32, 32, 2), 3, 80),
    ];
    for kernel in KERNELS {
        for (i, (s, rows, depth)) in cases.into_iter().enumerate() {
            let mut g = gpu(kernel.0);
            let slots = depth + 12;
            let x = inputs(&mut g, s, rows, slots, i as u64);
            let v = visible(rows, depth, slots, i % 2 == 1);
            check(&mut g, kernel, s, &v, &x, &format!("depth {depth}"));
        }
    }
}

/// Lists of every length about those of tiles.
#[test]
fn lists_of_every_length() {
    let s = Shape { heads: 3, latent: 64, nope: 0, rope: 16, split: 128, most: 0 };
    for kernel in KERNELS {
        let mut g = gpu(kernel.0);
        let mut v = Visible::default();
        for seen in [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 96, 97, 128, 129] {
            v.push([span(3, seen, false)]);
        }
        let x = inputs(&mut g, s, v.rows(), 132, 4);
        check(&mut g, kernel, s, &v, &x, "lists of every length");
    }
}

/// Queries of one channel far above the rest, of great and of tiny magnitude; heads of their own scale.
#[test]
fn queries_of_every_magnitude() {
    let s = Shape { heads: 18, latent: 64, nope: 8, rope: 16, split: 64, most: 0 };
    for kernel in KERNELS {
        for (i, by) in [1e-30f32, 1e-3, 1.0, 1e4, 1e30].into_iter().enumerate() {
            let mut g = gpu(kernel.0);
            let mut x = inputs(&mut g, s, 1, 80, i as u64);
            // Scores stay near 1 but for the heads that this makes smaller.
            x.scale /= by;
            for (h, q) in x.absorbed.chunks_exact_mut(s.latent).enumerate() {
                q.iter_mut().for_each(|q| *q *= by / (1 << (3 * (h % 4))) as f32);
                q[h] *= 20.0;
            }
            x.q.iter_mut().flatten().for_each(|q| *q *= by);
            check(&mut g, kernel, s, &visible(1, 70, 80, true), &x, &format!("queries times {by:e}"));
        }
    }
}

/// Scores far apart: a softmax that moves on with every tile, and weights that lose their low parts.
#[test]
fn scores_far_apart() {
    let s = Shape { heads: 16, latent: 32, nope: 0, rope: 32, split: 128, most: 0 };
    for kernel in KERNELS {
        let mut g = gpu(kernel.0);
        let mut x = inputs(&mut g, s, 1, 128, 2);
        x.scale *= 6.0;
        let mut v = Visible::default();
        v.push([span(0, 128, false)]);
        check(&mut g, kernel, s, &v, &x, "scores far apart");
        // Infinite scores count as the largest there are: every entry weighs the same.
        x.absorbed.fill(0.0);
        x.q[0].fill(f32::INFINITY);
        let got: Vec<f32> = run(&mut g, kernel, s, &v, &x)[0].clone();
        assert!(got.chunks_exact(s.latent + 2).all(|part| part[0].abs() == 4_194_304.0 && part[1] >= 1.0));
    }
}

/// The same entries in other slots, cut into other spans and next to other rows, give the same bits.
#[test]
fn bits_depend_on_the_row_alone() {
    let s = Shape { heads: 20, latent: 40, nope: 2, rope: 8, split: 64, most: 0 };
    for kernel in KERNELS {
        let mut g = gpu(kernel.0);
        let x = inputs(&mut g, s, 2, 130, 7);
        let bits = |g: &mut Gpu, lists: &[&[(usize, usize, bool)]]| -> Vec<u32> {
            let mut v = Visible::default();
            lists.iter().for_each(|l| v.push(l.iter().map(|s| span(s.0, s.1, s.2))));
            run(g, kernel, s, &v, &x)[0].iter().map(|x| x.to_bits()).collect()
        };
        let alone = bits(&mut g, &[&[(5, 100, false)]]);
        assert_eq!(alone, bits(&mut g, &[&[(5, 100, false)], &[(0, 3, true), (20, 90, false)]]));
        assert_eq!(alone, bits(&mut g, &[&[(5, 1, false), (6, 40, false), (46, 59, false)]]));
        let sinks = bits(&mut g, &[&[(5, 4, true), (9, 96, false)]]);
        assert_eq!(sinks, bits(&mut g, &[&[(5, 3, true), (8, 1, true), (9, 96, false)], &[(0, 1, false)]]));
        assert_ne!(sinks, alone);
    }
}

/// One launch at the shape of the largest models, as long as a tile or two.
#[test]
fn heads_of_the_largest_models() {
    let s = Shape { heads: 128, latent: 512, nope: 128, rope: 64, split: 256, most: 32 };
    let mut g = gpu("mla_f16");
    let x = inputs(&mut g, s, 1, 60, 3);
    check(&mut g, KERNELS[0], s, &visible(1, 40, 60, true), &x, "128 heads");
    assert!(module("mla_f16").is_none(), "Turing has kernels of its own");
}
