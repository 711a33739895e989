//! Absorbed MLA on tensor cores: parts of rows, put together here, against the formula in f64. Both tile sizes, any number of heads, latents
//! and rotated parts of any multiple of eight, sinks, rings, parts of every length, queries of every magnitude.
//!
//! Up to 16 heads are held to the formula. More round queries and weights to f16, which the formula does too for them; and what that costs is
//! held to what f16 inputs cost.

use crate::attention::{Cache, cache, cache_of, close, dot, entries, fill, mla, span, visible};
use crate::{Gpu, n, p, without_a_wait};
use kernels::Visible;
use kernels::cuda::modules::{module, text_for};
use kernels::testing::Rng;
use ptx::{Fault, Param, PtxError};
use quant::DType;
use std::f64::consts::LN_2;

/// Module, entries of a tile.
type Texts = (&'static str, usize);
const TEXTS: [Texts; 2] = [("mla_f16", 32), ("mla_small_f16", 16)];

/// Entry point, heads of a block, f16 parts, stages. The second text has no blocks of 64.
type Kernel = (&'static str, usize, usize, usize);
const SPLIT: Kernel = ("mla_split", 16, 2, 4);
const WHOLE: [Kernel; 3] = [("mla_64", 64, 1, 3), ("mla_32", 32, 1, 3), ("mla_16", 16, 1, 3)];

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
    seen.div_ceil(part_len(s, seen))
}

/// Entries of a part of such a list.
fn part_len(s: Shape, seen: usize) -> usize {
    if s.most == 0 {
        return s.split;
    }
    let [eighth, each] = [8, s.most].map(|n| seen.div_ceil(n).next_multiple_of(32));
    each.max(eighth.clamp(s.split, 4 * s.split))
}

/// Those for so many heads.
fn kernels_of(text: Texts, heads: usize) -> &'static [Kernel] {
    if heads <= 16 { &[SPLIT] } else { &WHOLE[usize::from(text == TEXTS[1])..] }
}

/// The parts of each row, of each head the maximum, the sum and the weighted sums of every part: the same bits from all kernels for so many
/// heads.
fn run(g: &mut Gpu, text: Texts, s: Shape, v: &Visible, x: &Inputs) -> Vec<Vec<f32>> {
    run_on(g, text, kernels_of(text, s.heads), s, v, x)
}

fn run_on(g: &mut Gpu, text: Texts, kernels: &[Kernel], s: Shape, v: &Visible, x: &Inputs) -> Vec<Vec<f32>> {
    let [one, others @ ..] = kernels else { panic!("no kernel") };
    let rows = run_one(g, text, *one, s, v, x);
    let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    for other in others {
        let same = bits(&rows) == bits(&run_one(g, text, *other, s, v, x));
        assert!(same, "{} {} is not {}: {s:?}", text.0, other.0, one.0);
    }
    rows
}

fn run_one(g: &mut Gpu, text: Texts, k: Kernel, s: Shape, v: &Visible, x: &Inputs) -> Vec<Vec<f32>> {
    try_one(g, text, k, s, v, x).unwrap_or_else(|e| panic!("{e}"))
}

fn try_one(
    g: &mut Gpu,
    (_, tile): Texts,
    (entry, heads, parts_of, stages): Kernel,
    s: Shape,
    v: &Visible,
    x: &Inputs,
) -> Result<Vec<Vec<f32>>, PtxError> {
    let (mut spans, mut ends) = (Vec::new(), Vec::new());
    for i in 0..v.rows() {
        spans.extend(v.row(i).iter().flat_map(|s| [s.start, s.len, u32::from(s.sink)]));
        ends.push((spans.len() / 3) as u32);
    }
    let splits = (0..v.rows()).map(|i| parts(s, v.seen(i))).max().unwrap();
    let size = s.latent + 2;
    let out = g.room(v.rows() * s.heads * splits * size);
    let [spans, ends] = [&spans, &ends].map(|list| g.words(list)).map(|list| g.constant(list));
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
        p(spans),
        p(ends),
        n(s.split),
        n(s.most),
        p(out),
    ];
    let row = heads * (tile + 8);
    let shared = stages * (tile * 292 + 1) + 4 * row + parts_of * row + 9 * heads + 256 + 12;
    // What a block of an A100 may have, and one of a GeForce.
    assert!(4 * shared <= if tile == 32 { 163 << 10 } else { 99 << 10 }, "{entry}: {shared} words");
    g.try_run(entry, [s.heads.div_ceil(heads), splits, v.rows()], 256, shared, &params)?;
    let mut rows = Vec::new();
    for i in 0..v.rows() {
        let mut row = Vec::new();
        for h in 0..s.heads {
            let at = out + (4 * size * splits * (i * s.heads + h)) as u64;
            row.extend(g.read(at, parts(s, v.seen(i)) * size));
        }
        rows.push(row);
    }
    Ok(rows)
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

fn f16(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

/// Queries as kernels of one part round them: each head under the power of two that brings its largest value into [2^13, 2^14).
fn rounded(s: Shape, [absorbed, q, q2]: [&[f32]; 3]) -> [Vec<f32>; 3] {
    let (mut absorbed, mut q, mut q2) = (absorbed.to_vec(), q.to_vec(), q2.to_vec());
    let step = s.nope + s.rope;
    let heads =
        absorbed.chunks_exact_mut(s.latent).zip(q.chunks_exact_mut(step)).zip(q2.chunks_exact_mut(step));
    for ((a, q), q2) in heads {
        let all = || a.iter().chain(&q[s.nope..]).chain(&q2[s.nope..]);
        let most = all().fold(0f32, |m, x| m.max(x.abs()));
        let power = (13.0 - most.log2().floor()).min(126.0).exp2();
        let each = a.iter_mut().chain(&mut q[s.nope..]).chain(&mut q2[s.nope..]);
        each.for_each(|x| *x = f16(*x * power) / power);
    }
    [absorbed, q, q2]
}

/// The formula with queries and weights rounded as kernels of one part do: weights under a power of two that follows the largest score of
/// tiles where that is more than twice it.
fn in_f16(s: Shape, tile: usize, v: &Visible, x: &Inputs) -> Vec<f64> {
    let [absorbed, q, q2] = rounded(s, [&x.absorbed, &x.q[0], &x.q[1]]);
    let mut out = Vec::new();
    for job in 0..v.rows() * s.heads {
        let list = entries(v, job / s.heads);
        let at = job * (s.nope + s.rope) + s.nope;
        let mut parts: Vec<(f64, f64, Vec<f64>)> = Vec::new();
        for part in list.chunks(part_len(s, list.len())) {
            let (mut max, mut sum, mut acc) = (-4_194_304.0, 0.0, vec![0.0; s.latent]);
            for run in part.chunk_by(|a, b| a.1 == b.1).flat_map(|r| r.chunks(tile)) {
                let score = |(slot, sink): &(usize, bool)| {
                    let pe = &(if *sink { &q2 } else { &q })[at..at + s.rope];
                    let latent = &absorbed[job * s.latent..][..s.latent];
                    f64::from(x.scale) * (dot(latent, &x.c.values[*slot]) + dot(pe, &x.pe.values[*slot]))
                };
                let scores: Vec<f64> = run.iter().map(score).collect();
                let top = scores.iter().copied().fold(f64::MIN, f64::max);
                if top > max + LN_2 {
                    let above = (top / LN_2).round_ties_even() * LN_2;
                    let less = f64::exp(max - above);
                    acc.iter_mut().for_each(|a| *a *= less);
                    (max, sum) = (above, sum * less);
                }
                for ((slot, _), score) in run.iter().zip(scores) {
                    let weight = f64::from(f16((16384.0 * (score - max).exp()) as f32)) / 16384.0;
                    sum += weight;
                    acc.iter_mut().zip(&x.c.values[*slot]).for_each(|(a, v)| *a += weight * v);
                }
            }
            parts.push((max, sum, acc));
        }
        let max = parts.iter().fold(f64::MIN, |m, p| m.max(p.0));
        let sum: f64 = parts.iter().map(|p| p.1 * (p.0 - max).exp()).sum();
        let value = |i| parts.iter().map(|p| p.2[i] * (p.0 - max).exp()).sum::<f64>() / sum;
        out.extend((0..s.latent).map(value));
    }
    out
}

/// The root of the mean square of what two results differ by.
fn rms(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    (got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>() / got.len() as f64).sqrt()
}

/// Up to 16 heads: each value within 3e-6 of the formula. More: all values together within 1e-5 of the one that rounds as they do, and each
/// within 2^-11, since a score beside a boundary of f16 may put its weight on the other side.
fn check(g: &mut Gpu, text: Texts, s: Shape, v: &Visible, x: &Inputs, what: &str) {
    check_on(g, text, kernels_of(text, s.heads), s, v, x, what);
}

fn check_on(g: &mut Gpu, text: Texts, kernels: &[Kernel], s: Shape, v: &Visible, x: &Inputs, what: &str) {
    let got: Vec<f32> = run_on(g, text, kernels, s, v, x).iter().flat_map(|row| merged(row, s)).collect();
    let what = format!("{} {what}: {s:?}", text.0);
    if s.heads <= 16 {
        let want = mla(v, [&x.absorbed, &x.q[0], &x.q[1]], [&x.c, &x.pe], (s.heads, s.nope, s.rope), x.scale);
        return close(&got, &want, &what);
    }
    let (got, want): (Vec<f64>, _) = (got.into_iter().map(f64::from).collect(), in_f16(s, text.1, v, x));
    let worst = got.iter().zip(&want).fold(0f64, |m, (g, w)| m.max((g - w).abs()));
    let all = rms(&got, &want);
    assert!(all <= 1e-5 && worst <= 2f64.powi(-11), "{what}: {all:e}, at most {worst:e}");
}

fn gpu(name: &str) -> Gpu {
    Gpu::new(text_for(name, 80).unwrap())
}

const fn shape(heads: usize, latent: usize, nope: usize, rope: usize, split: usize, most: usize) -> Shape {
    Shape { heads, latent, nope, rope, split, most }
}

/// Shapes, rows, entries that the first sees.
const CASES: [(Shape, usize, usize); 10] = [
    (shape(1, 8, 4, 8, 32, 0), 1, 1),
    (shape(16, 512, 128, 64, 64, 0), 2, 130),
    (shape(17, 72, 3, 24, 128, 2), 2, 33),
    (shape(32, 256, 5, 56, 128, 0), 1, 100),
    (shape(40, 136, 1, 64, 64, 1), 2, 97),
    (shape(70, 264, 2, 40, 64, 0), 1, 71),
    (shape(9, 512, 16, 32, 32, 2), 3, 80),
    (shape(2, 8, 0, 8, 32, 64), 2, 290),
    (shape(18, 16, 0, 8, 32, 16), 1, 1100),
    (shape(20, 512, 2, 64, 64, 0), 1, 40),
];

fn check_case(text: Texts, kernels: &[Kernel], i: usize) {
    let (s, rows, depth) = CASES[i];
    let mut g = gpu(text.0);
    let slots = depth + 12;
    let x = inputs(&mut g, s, rows, slots, i as u64);
    let v = visible(rows, depth, slots, i % 2 == 1);
    check_on(&mut g, text, kernels, s, &v, &x, &format!("depth {depth}"));
}

#[test]
fn parts_of_every_shape() {
    for text in TEXTS {
        (0..CASES.len()).for_each(|i| check_case(text, kernels_of(text, CASES[i].0.heads), i));
    }
}

/// What is asked of an entry point with one thing wrong.
pub(crate) fn suite(entry: &str) {
    let kernel = *[SPLIT].iter().chain(&WHOLE).find(|k| k.0 == entry).unwrap();
    let (cases, heads) = if entry == SPLIT.0 { ([0, 6, 1], 16) } else { ([2, 5, 9], 64) };
    cases.into_iter().for_each(|i| check_case(TEXTS[0], &[kernel], i));
    magnitude(TEXTS[0], &[kernel], heads, 1, 1e-3);
    far_apart(TEXTS[0], &[kernel], heads);
}

/// Lists of every length about those of tiles.
#[test]
fn lists_of_every_length() {
    let s = Shape { heads: 3, latent: 64, nope: 0, rope: 16, split: 128, most: 0 };
    for text in TEXTS {
        let mut g = gpu(text.0);
        let mut v = Visible::default();
        for seen in [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 96, 97, 128, 129] {
            v.push([span(3, seen, false)]);
        }
        let x = inputs(&mut g, s, v.rows(), 132, 4);
        check(&mut g, text, s, &v, &x, "lists of every length");
    }
}

#[test]
fn queries_of_every_magnitude() {
    for text in TEXTS {
        for (i, by) in [1e-30f32, 1e-3, 1.0, 1e4, 1e30].into_iter().enumerate() {
            magnitude(text, kernels_of(text, 18), 18, i, by);
            magnitude(text, &[SPLIT], 5, i, by);
        }
    }
}

/// Queries of one channel far above the rest, times `by`; heads of their own scale.
fn magnitude(text: Texts, kernels: &[Kernel], heads: usize, i: usize, by: f32) {
    let s = Shape { heads, latent: 64, nope: 8, rope: 16, split: 64, most: 0 };
    let mut g = gpu(text.0);
    let mut x = inputs(&mut g, s, 1, 80, i as u64);
    // Scores stay near 1 but for the heads that this makes smaller.
    x.scale /= by;
    for (h, q) in x.absorbed.chunks_exact_mut(s.latent).enumerate() {
        q.iter_mut().for_each(|q| *q *= by / (1 << (3 * (h % 4))) as f32);
        q[h] *= 20.0;
    }
    x.q.iter_mut().flatten().for_each(|q| *q *= by);
    check_on(&mut g, text, kernels, s, &visible(1, 70, 80, true), &x, &format!("queries times {by:e}"));
}

#[test]
fn scores_far_apart() {
    for text in TEXTS {
        far_apart(text, &[SPLIT], 16);
        far_apart(text, kernels_of(text, 64), 64);
    }
}

/// Scores far apart: a softmax that moves on with every tile, and weights that lose their low parts.
fn far_apart(text: Texts, kernels: &[Kernel], heads: usize) {
    let s = Shape { heads, latent: 32, nope: 0, rope: 32, split: 128, most: 0 };
    let mut g = gpu(text.0);
    let mut x = inputs(&mut g, s, 1, 128, 2);
    x.scale *= 6.0;
    let mut v = Visible::default();
    v.push([span(0, 128, false)]);
    check_on(&mut g, text, kernels, s, &v, &x, "scores far apart");
    // Infinite scores count as the largest there are: every entry weighs the same.
    if heads <= 16 {
        x.absorbed.fill(0.0);
        x.q[0].fill(f32::INFINITY);
        let got: Vec<f32> = run_on(&mut g, text, kernels, s, &v, &x)[0].clone();
        assert!(got.chunks_exact(s.latent + 2).all(|part| part[0].abs() == 4_194_304.0 && part[1] >= 1.0));
    }
}

/// The same entries in other slots, cut into other spans and next to other rows, give the same bits.
#[test]
fn bits_depend_on_the_row_alone() {
    let s = Shape { heads: 20, latent: 40, nope: 2, rope: 8, split: 64, most: 0 };
    for text in TEXTS {
        let mut g = gpu(text.0);
        let x = inputs(&mut g, s, 2, 130, 7);
        let bits = |g: &mut Gpu, lists: &[&[(usize, usize, bool)]]| -> Vec<u32> {
            let mut v = Visible::default();
            lists.iter().for_each(|l| v.push(l.iter().map(|s| span(s.0, s.1, s.2))));
            run(g, text, s, &v, &x)[0].iter().map(|x| x.to_bits()).collect()
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
    check(&mut g, TEXTS[0], s, &visible(1, 40, 60, true), &x, "128 heads");
    assert!(module("mla_f16").is_none(), "Turing has kernels of its own");
}

/// Of every wait: a part that begins before the queries are there, and one that has nothing to do and does not wait.
#[test]
fn kernels_that_do_not_wait_are_caught() {
    let text = text_for("mla_f16", 90).unwrap().text;
    for k in [SPLIT, WHOLE[2]] {
        let s =
            Shape { heads: if k == SPLIT { 2 } else { 17 }, latent: 8, nope: 0, rope: 8, split: 32, most: 0 };
        let run = |text: &str| {
            let mut g = Gpu::of_text(text)?;
            let x = inputs(&mut g, s, 2, 40, 1);
            let mut v = Visible::default();
            [40, 20].into_iter().for_each(|seen| v.push([span(0, seen, false)]));
            try_one(&mut g, TEXTS[0], k, s, &v, &x).map(|_| ())
        };
        assert_eq!(run(text), Ok(()));
        for mutant in without_a_wait(text, k.0) {
            let Err(PtxError::Run { fault, .. }) = run(&mutant) else { panic!("{}: a wait is missing", k.0) };
            assert!(matches!(fault, Fault::NoWait | Fault::Early { .. }), "{}: {fault}", k.0);
        }
    }
}

/// What f16 inputs cost, and what the kernels add: against f64 with nothing rounded, theirs is at most 1.6 times the error of f64 with queries
/// and cache in f16. Cached channels far above others and of one sign, softmaxes that are flat and that are peaked, rows of several parts.
#[test]
fn rounding_costs_what_f16_inputs_cost() {
    let s = Shape { heads: 17, latent: 512, nope: 0, rope: 64, split: 512, most: 64 };
    let g = &mut gpu("mla_f16");
    for (depth, spread, large) in
        [(40, 1.0, 0), (300, 4.0, 6), (1100, 1.0, 0), (1100, 2.0, 6), (2100, 8.0, 3)]
    {
        let mut rng = Rng(depth as u64);
        let mut normal = |n: usize| -> Vec<f32> {
            (0..n).map(|_| (0..12).map(|_| rng.unit()).sum::<f32>() / 2.0).collect()
        };
        let (mut c, pe) = (normal(depth * s.latent), normal(depth * s.rope));
        for row in c.chunks_exact_mut(s.latent) {
            row[..large].iter_mut().for_each(|x| *x = *x * 5.0 + 60.0);
        }
        let mut absorbed = normal(s.heads * s.latent);
        // Scores' deviation is `spread`, the large channels' share of it about a quarter.
        absorbed.chunks_exact_mut(s.latent).for_each(|q| q[..large].iter_mut().for_each(|x| *x *= 0.6));
        let q = normal(s.heads * s.rope);
        let x = Inputs {
            c: cache_of(g, DType::F16, s.latent, &c),
            pe: cache_of(g, DType::F16, s.rope, &pe),
            q: [q.clone(), q],
            absorbed,
            scale: spread / 24.0,
        };
        let mut v = Visible::default();
        v.push([span(0, depth, false)]);
        let wide = |x: &[f32], width: usize| Cache {
            at: 0,
            row: 0,
            values: x.chunks_exact(width).map(|r| r.iter().map(|x| f64::from(*x)).collect()).collect(),
        };
        let formula = |[a, q, q2]: [&[f32]; 3], caches: [&Cache; 2]| {
            mla(&v, [a, q, q2], caches, (s.heads, s.nope, s.rope), x.scale)
        };
        let queries = [&x.absorbed[..], &x.q[0], &x.q[1]];
        let exact = formula(queries, [&wide(&c, s.latent), &wide(&pe, s.rope)]);
        let [a, q, q2] = rounded(s, queries);
        let inputs = rms(&formula([&a, &q, &q2], [&x.c, &x.pe]), &exact);
        let got = run_one(g, TEXTS[0], WHOLE[0], s, &v, &x);
        let got: Vec<f64> = merged(&got[0], s).into_iter().map(f64::from).collect();
        let ours = rms(&got, &exact);
        println!("{depth} entries, deviation {spread}, {large} large channels: {:.2}", ours / inputs);
        assert!(ours <= 1.6 * inputs, "{depth} entries: {ours:e}, not {inputs:e}");
    }
}
