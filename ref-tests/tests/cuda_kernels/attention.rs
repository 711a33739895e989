//! Attention of single queries over caches of every type, against the formula in f64: grouped heads, sinks, rings, MLA.

use crate::{Gpu, n, p};
use kernels::cuda::layout::{pack_row, row_bytes};
use kernels::cuda::modules::module;
use kernels::testing::Rng;
use kernels::{KvBuf, Span, Visible};
use ptx::Param;
use quant::DType;

/// A cache on the device, and what its rows say.
pub(crate) struct Cache {
    pub(crate) at: u64,
    pub(crate) row: usize,
    pub(crate) values: Vec<Vec<f64>>,
}

pub(crate) fn fill(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.unit()).collect()
}

pub(crate) fn cache(gpu: &mut Gpu, dtype: DType, slots: usize, width: usize, rng: &mut Rng) -> Cache {
    cache_of(gpu, dtype, width, &fill(rng, slots * width))
}

/// A cache of these rows, rounded.
pub(crate) fn cache_of(gpu: &mut Gpu, dtype: DType, width: usize, rows: &[f32]) -> Cache {
    let (f, row) = (dtype.format(), row_bytes(dtype, width));
    let (mut device, mut values) = (vec![0u8; rows.len() / width * row], Vec::new());
    for (from, to) in rows.chunks_exact(width).zip(device.chunks_exact_mut(row)) {
        let mut host = vec![0u8; dtype.row_bytes(width).unwrap()];
        (f.quantize.unwrap())(from, &mut host, None);
        pack_row(dtype, &host, to);
        let mut row = vec![0.0; width];
        (f.dequantize)(&host, &mut row);
        values.push(row.into_iter().map(f64::from).collect());
    }
    Cache { at: gpu.bytes(&device), row, values }
}

/// The lists as the device takes them: (start, len, sink) and the end of each row's part; the longest list.
pub(crate) fn lists(gpu: &mut Gpu, visible: &Visible) -> (u64, u64, usize) {
    let (mut spans, mut ends) = (Vec::new(), Vec::new());
    for i in 0..visible.rows() {
        spans.extend(visible.row(i).iter().flat_map(|s| [s.start, s.len, u32::from(s.sink)]));
        ends.push((spans.len() / 3) as u32);
    }
    let longest = (0..visible.rows()).map(|i| visible.seen(i)).max().unwrap();
    let (spans, ends) = (gpu.words(&spans), gpu.words(&ends));
    (gpu.constant(spans), gpu.constant(ends), longest)
}

pub(crate) fn span(start: usize, len: usize, sink: bool) -> Span {
    Span { start: start as u32, len: len as u32, sink }
}

/// Rows of different depth; with `ring`, four sinks and a ring whose oldest entry lies near its end.
pub(crate) fn visible(rows: usize, depth: usize, slots: usize, ring: bool) -> Visible {
    let mut v = Visible::default();
    for i in 0..rows {
        let seen = depth.saturating_sub(7 * i).max(1);
        if ring && seen > 9 {
            let (first, rest) = (slots - 5, seen - 4);
            v.push([
                span(0, 4, true),
                span(first, rest.min(5), false),
                span(4, rest.saturating_sub(5), false),
            ]);
        } else {
            v.push([span(2, seen, false)]);
        }
    }
    v
}

/// The mean of the values by these weights, in f64.
pub(crate) fn weighed(
    entries: &[(usize, bool)],
    weights: &[f64],
    value: impl Fn(usize) -> Vec<f64>,
) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; value(entries[0].0).len()];
    for ((slot, _), weight) in entries.iter().zip(weights) {
        out.iter_mut().zip(value(*slot)).for_each(|(o, v)| *o += weight / sum * v);
    }
    out
}

/// Softmax of the scores and the weighted sum of the values, in f64.
fn attend(
    entries: &[(usize, bool)],
    score: impl Fn(usize, bool) -> f64,
    value: impl Fn(usize) -> Vec<f64>,
) -> Vec<f64> {
    let scores: Vec<f64> = entries.iter().map(|(slot, sink)| score(*slot, *sink)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    weighed(entries, &weights, value)
}

pub(crate) fn entries(v: &Visible, row: usize) -> Vec<(usize, bool)> {
    v.row(row).iter().flat_map(|s| (s.start..s.start + s.len).map(|i| (i as usize, s.sink))).collect()
}

pub(crate) fn dot(q: &[f32], k: &[f64]) -> f64 {
    q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum()
}

/// Absorbed MLA of rows `[heads, latent]`, of their queries `[heads, nope + rope]` (a second time for sinks), over latents and shared
/// keys: `[rows, heads, latent]`.
pub(crate) fn mla(
    v: &Visible,
    [absorbed, q, q2]: [&[f32]; 3],
    [c, pe]: [&Cache; 2],
    (heads, nope, rope): (usize, usize, usize),
    scale: f32,
) -> Vec<f64> {
    let latent = c.values[0].len();
    let mut out = Vec::new();
    for row in 0..v.rows() {
        for h in 0..heads {
            let one = &absorbed[(row * heads + h) * latent..][..latent];
            let at = (row * heads + h) * (nope + rope) + nope;
            out.extend(attend(
                &entries(v, row),
                |slot, sink| {
                    let two = &(if sink { q2 } else { q })[at..at + rope];
                    f64::from(scale) * (dot(one, &c.values[slot]) + dot(two, &pe.values[slot]))
                },
                |slot| c.values[slot].clone(),
            ));
        }
    }
    out
}

pub(crate) fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= 3e-6, "{what}: element {i} is {g}, not {w}");
    }
}

pub(crate) const SPLIT: usize = 64;

/// Adds up the parts of `heads` heads.
fn merge(
    g: &mut Gpu,
    parts: u64,
    lists: (u64, u64, usize),
    heads: usize,
    rows: usize,
    value: usize,
) -> Vec<f32> {
    let splits = lists.2.div_ceil(SPLIT);
    let out = g.room(rows * heads * value);
    let params =
        [p(parts), n(splits), n(value), p(lists.0), p(lists.1), n(SPLIT), n(0), p(out), n(heads * value)];
    g.run("merge", [heads, rows], 128, &params);
    g.read(out, rows * heads * value)
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) key: usize,
    pub(crate) value: usize,
}

/// Grouped heads of rows `[heads, key]` (a second time for sinks): `[rows, heads, value]`.
pub(crate) fn exact(
    v: &Visible,
    Shape { heads, kv_heads, key, value }: Shape,
    [q, q2]: [&[f32]; 2],
    [keys, values]: [&Cache; 2],
    scale: f32,
) -> Vec<f64> {
    let mut out = Vec::new();
    for row in 0..v.rows() {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            let query = |sink: bool| &(if sink { q2 } else { q })[(row * heads + h) * key..][..key];
            out.extend(attend(
                &entries(v, row),
                |slot, sink| f64::from(scale) * dot(query(sink), &keys.values[slot][kv * key..][..key]),
                |slot| values.values[slot][kv * value..][..value].to_vec(),
            ));
        }
    }
    out
}

/// What kernels of decoding are told.
pub(crate) fn attend_params(
    s: Shape,
    q: [u64; 2],
    [keys, values]: [&Cache; 2],
    scale: f32,
    l: (u64, u64, usize),
    parts: u64,
) -> Vec<Param> {
    let Shape { heads, kv_heads, key, value } = s;
    vec![
        p(q[0]),
        p(q[1]),
        n(heads * key),
        p(keys.at),
        p(keys.row as u64),
        p(values.at),
        p(values.row as u64),
        n(kv_heads),
        n(heads / kv_heads),
        n(key),
        n(value),
        Param::F32(scale),
        p(l.0),
        p(l.1),
        n(SPLIT),
        n(0),
        p(parts),
    ]
}

/// Random queries over a cache of `dtype`; returns what the device made of them, and what it should be.
fn grouped(dtype: DType, s: Shape, v: &Visible, slots: usize, seed: u64) -> (Vec<f32>, Vec<f64>) {
    let mut rng = Rng(seed);
    let Shape { heads, kv_heads, key, value } = s;
    let rows = v.rows();
    let mut g = Gpu::new(module(&format!("attention_{}", dtype.name())).unwrap());
    let keys = cache(&mut g, dtype, slots, kv_heads * key, &mut rng);
    let values = cache(&mut g, dtype, slots, kv_heads * value, &mut rng);
    let (q, q2) = (fill(&mut rng, rows * heads * key), fill(&mut rng, rows * heads * key));
    let (dq, dq2) = (g.floats(&q), g.floats(&q2));
    let l = lists(&mut g, v);
    let (splits, group) = (l.2.div_ceil(SPLIT), heads / kv_heads);
    let scale = 4.0 / (key as f32).sqrt();
    let parts = g.room(rows * heads * splits * (value + 2));
    let params = attend_params(s, [dq, dq2], [&keys, &values], scale, l, parts);
    g.run_shared("attend", [splits, kv_heads * group.div_ceil(8), rows], 128, 16 * (key + 1), &params);
    let got = merge(&mut g, parts, l, heads, rows, value);
    let want = exact(v, s, [&q, &q2], [&keys, &values], scale);
    (got, want)
}

/// What is asked of the kernels over f16 caches with one thing wrong.
pub(crate) fn suite() {
    for (i, (heads, kv_heads, key, value, depth)) in [
        (1, 1, 64, 64, 1),
        (9, 1, 96, 32, 17),
        (6, 3, 7, 37, 40),
        (4, 4, 32, 160, 64),
        (17, 1, 64, 256, 130),
        (8, 2, 128, 128, 65),
    ]
    .into_iter()
    .enumerate()
    {
        let v = visible(1 + i % 3, depth, depth + 12, i % 2 == 1);
        let s = Shape { heads, kv_heads, key, value };
        let (got, want) = grouped(DType::F16, s, &v, depth + 12, i as u64);
        close(&got, &want, &format!("{s:?}, depth {depth}"));
    }
}

#[test]
fn grouped_heads_over_every_cache_type() {
    let shapes =
        [(1, 1, 64, 64), (8, 2, 32, 64), (9, 1, 96, 32), (6, 2, 128, 128), (4, 4, 32, 160), (17, 1, 64, 256)];
    let depths = [1, 2, 15, 16, 17, 63, 64, 65, 130];
    let mut covered = 0;
    for (t, dtype) in KvBuf::TYPES.into_iter().enumerate() {
        for (i, depth) in depths.into_iter().enumerate() {
            let (heads, kv_heads, key, value) = shapes[(i + t) % shapes.len()];
            let slots = depth + 12;
            let v = visible(1 + i % 3, depth, slots, i % 2 == 1);
            let (got, want) = grouped(dtype, Shape { heads, kv_heads, key, value }, &v, slots, i as u64);
            close(&got, &want, &format!("{dtype}, {heads}/{kv_heads} heads of {key}/{value}, depth {depth}"));
            covered += 1;
        }
    }
    assert_eq!(covered, 45);
}

/// Odd dimensions, which block formats cannot have.
#[test]
fn dimensions_need_not_be_round() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let v = visible(2, 40, 60, true);
        let s = Shape { heads: 6, kv_heads: 3, key: 7, value: 37 };
        let (got, want) = grouped(dtype, s, &v, 60, 1);
        close(&got, &want, &format!("{dtype}"));
    }
}

/// The same entries in other slots, and next to other rows, give the same bits.
#[test]
fn bits_depend_on_the_row_alone() {
    let s = Shape { heads: 8, kv_heads: 2, key: 32, value: 32 };
    let mut alone = Visible::default();
    alone.push([span(5, 100, false)]);
    let mut both = Visible::default();
    both.push([span(5, 100, false)]);
    both.push([span(0, 3, true), span(20, 90, false)]);
    let mut cut = Visible::default();
    cut.push([span(5, 1, false), span(6, 40, false), span(46, 59, false)]);
    let bits = |v: &Visible| -> Vec<u32> { grouped_of_first_row(v, s).iter().map(|x| x.to_bits()).collect() };
    assert_eq!(bits(&alone), bits(&both));
    assert_eq!(bits(&alone), bits(&cut));
}

/// The first row's output, its inputs the same whatever the other rows are.
fn grouped_of_first_row(v: &Visible, s: Shape) -> Vec<f32> {
    let (got, _) = grouped(DType::F16, s, v, 128, 9);
    got[..s.heads * s.value].to_vec()
}

#[test]
fn mla_shares_the_latent_among_all_heads() {
    let shapes = [(1, 32, 16, 32), (16, 512, 128, 64), (9, 64, 32, 32), (20, 128, 24, 64)];
    for (t, dtype) in KvBuf::TYPES.into_iter().enumerate() {
        for (i, (heads, latent, nope, rope)) in shapes.into_iter().enumerate() {
            let mut rng = Rng((10 * t + i) as u64);
            let (rows, depth) = (1 + i % 2, [17, 66, 1, 130][(i + t) % 4]);
            let slots = depth + 12;
            let v = visible(rows, depth, slots, i % 2 == 1);
            let mut g = Gpu::new(module(&format!("attention_{}", dtype.name())).unwrap());
            let c = cache(&mut g, dtype, slots, latent, &mut rng);
            let pe = cache(&mut g, dtype, slots, rope, &mut rng);
            let width = heads * (nope + rope);
            let absorbed = fill(&mut rng, rows * heads * latent);
            let (q, q2) = (fill(&mut rng, rows * width), fill(&mut rng, rows * width));
            let (da, dq, dq2) = (g.floats(&absorbed), g.floats(&q), g.floats(&q2));
            let l = lists(&mut g, &v);
            let splits = l.2.div_ceil(SPLIT);
            let scale = 2.0 / ((latent + rope) as f32).sqrt();
            let parts = g.room(rows * heads * splits * (latent + 2));
            let params = [
                p(da),
                p(dq),
                p(dq2),
                n(width),
                p(c.at),
                p(c.row as u64),
                p(pe.at),
                p(pe.row as u64),
                n(heads),
                n(latent),
                n(nope),
                n(rope),
                Param::F32(scale),
                p(l.0),
                p(l.1),
                n(SPLIT),
                n(0),
                p(parts),
            ];
            let grid = [splits, heads.div_ceil(8), rows];
            g.run_shared("attend_mla", grid, 128, 16 * (latent + rope + 1), &params);
            let got = merge(&mut g, parts, l, heads, rows, latent);
            let want = mla(&v, [&absorbed, &q, &q2], [&c, &pe], (heads, nope, rope), scale);
            close(&got, &want, &format!("{dtype}, {heads} heads, latent {latent}, depth {depth}"));
        }
    }
}
