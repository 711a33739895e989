//! Attention of prompts on tensor cores: grouped heads over f16, q8_0 and q4_0 caches, on a machine that cuts what tensor cores cut. Held to
//! the formula with queries, weights and what caches hold in f16, and what that costs to what f16 inputs cost. What a row gets depends
//! neither on its neighbours nor on blocks of 32 slots having other places.

use crate::attention::{Cache, Shape, cache, cache_of, dot, entries, exact, fill, span, weighed};
use crate::prompt::{plan, prompt};
use crate::{Gpu, n, p};
use kernels::Visible;
use kernels::cuda::modules::text_for;
use kernels::cuda::plan::HALF_LANES;
use kernels::testing::{Rng, assert_bits};
use ptx::Param;
use quant::DType;

/// Cache types as kernels count them.
pub(crate) const TYPES: [DType; 3] = [DType::F16, DType::Q8_0, DType::Q4_0];

pub(crate) fn number(dtype: DType) -> usize {
    TYPES.iter().position(|t| *t == dtype).unwrap()
}

/// Bytes of `rows` rows in shared memory: in f16, and packed.
pub(crate) fn row_bytes(types: [DType; 2], dims: usize) -> (usize, usize) {
    (4 * dims + 16, types.iter().map(|t| (2 * dims) >> number(*t)).sum::<usize>() + 32)
}

fn f16(x: f64) -> f64 {
    half::f16::from_f64(x).to_f64()
}

/// A cache as it comes to shared memory.
pub(crate) fn in_half(c: &Cache) -> Cache {
    Cache { values: c.values.iter().map(|r| r.iter().map(|x| f16(*x)).collect()).collect(), ..*c }
}

/// The formula with queries rounded to f16 under a power of two for each head, and the softmax's weights.
pub(crate) fn rounded(
    v: &Visible,
    s: Shape,
    [q, q2]: [&[f32]; 2],
    [keys, values]: [&Cache; 2],
    scale: f32,
) -> Vec<f64> {
    let Shape { heads, kv_heads, key, value } = s;
    let times = scale * std::f32::consts::LOG2_E;
    let round = |q: &[f32]| -> Vec<f32> {
        let mut q: Vec<f32> = q.iter().map(|x| x * times).collect();
        for head in q.chunks_exact_mut(key) {
            let most = head.iter().fold(0f32, |m, x| m.max(x.abs()));
            let power = (13.0 - most.log2().floor()).min(60.0).exp2();
            head.iter_mut().for_each(|x| *x = f16(f64::from(*x * power)) as f32 / power);
        }
        q
    };
    let queries = [round(q), round(q2)];
    let mut out = Vec::new();
    for job in 0..v.rows() * heads {
        let list = entries(v, job / heads);
        let kv = job % heads / (heads / kv_heads);
        let score = |slot: usize, sink: bool| {
            dot(&queries[usize::from(sink)][job * key..][..key], &keys.values[slot][kv * key..][..key])
        };
        let most = list.iter().map(|e| score(e.0, e.1)).fold(f64::MIN, f64::max).round();
        let weights: Vec<f64> = list.iter().map(|e| f16((score(e.0, e.1) - most + 14.0).exp2())).collect();
        out.extend(weighed(&list, &weights, |slot| values.values[slot][kv * value..][..value].to_vec()));
    }
    out
}

/// The root of the mean square of what two results differ by.
pub(crate) fn rms(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    (got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum::<f64>() / got.len() as f64).sqrt()
}

/// Within 4e-5 in the mean, and 2^-11 each: a weight beside a boundary of f16, itself found to 3e-6, may come to lie on the other side.
pub(crate) fn near(got: &[f32], want: &[f64], what: &str) {
    let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
    let worst = got.iter().zip(want).fold(0f64, |m, (g, w)| m.max((g - w).abs()));
    let all = rms(&got, want);
    assert!(all <= 4e-5 && worst <= 2f64.powi(-11), "{what}: {all:e}, at most {worst:e}");
}

/// What goes in: queries in multiples of `loud`.
struct Case<'a> {
    s: Shape,
    types: [DType; 2],
    slots: usize,
    loud: f32,
    scale: f32,
    seed: u64,
    /// Of which rows, and the queries' first row.
    v: &'a Visible,
    first: usize,
}

/// The kernel's launch.
fn launch(
    g: &mut Gpu,
    v: &Visible,
    s: Shape,
    types: [DType; 2],
    q: [&[f32]; 2],
    [keys, values]: [&Cache; 2],
    scale: f32,
) -> Vec<f32> {
    let Shape { heads, kv_heads, key, value } = s;
    let (rows, group) = (v.rows(), heads / kv_heads);
    let (lists, tiles) = plan(g, v, group, HALF_LANES);
    let [dq, dq2] = q.map(|q| g.floats(q));
    let (out, per) = (g.room(rows * heads * value), group.min(HALF_LANES));
    let params = [
        p(dq),
        p(dq2),
        n(heads * key),
        p(keys.at),
        p(keys.row as u64),
        p(values.at),
        p(values.row as u64),
        n(kv_heads),
        n(group),
        n(per),
        n(key),
        n(value),
        Param::F32(scale),
        p(lists[0]),
        p(lists[1]),
        p(lists[2]),
        p(out),
        n(heads * value),
        n(number(types[0])),
        n(number(types[1])),
    ];
    let dims = *[64, 96, 128, 256].iter().find(|d| **d >= key.max(value)).unwrap();
    let (half, packed) = row_bytes(types, dims);
    let (name, shared) = match types {
        [DType::F16, DType::F16] => ("prompt", 32 * 3 * half),
        _ => ("packed", 32 * 2 * (half + packed)),
    };
    let grid = [tiles, kv_heads * group.div_ceil(per), 1];
    g.run_shared(&format!("{name}_{dims}"), grid, 256, shared / 4, &params);
    g.read(out, rows * heads * value)
}

/// What the device makes of it, and what it should be.
fn run(c: &Case<'_>, moved: impl Fn(usize) -> usize) -> (Vec<f32>, Vec<f64>) {
    let mut rng = Rng(c.seed);
    let Shape { heads, kv_heads, key, value } = c.s;
    let rows = c.v.rows();
    let mut g = Gpu::new(text_for("prompt_half", 80).unwrap());
    let keys = cache(&mut g, c.types[0], c.slots, kv_heads * key, &mut rng);
    let values = cache(&mut g, c.types[1], c.slots, kv_heads * value, &mut rng);
    let mut query = || fill(&mut rng, 64 * heads * key).iter().map(|x| c.loud * x).collect::<Vec<_>>();
    let all = [query(), query()];
    let q = all.each_ref().map(|q| &q[c.first * heads * key..][..rows * heads * key]);
    // The same entries in other slots.
    let mut place = |of: &Cache| {
        let bytes = g.machine.read(of.at, c.slots * of.row).unwrap();
        let end = (0..c.slots).map(&moved).max().unwrap() + 1;
        let at = g.machine.alloc(end * of.row);
        for i in 0..c.slots {
            g.machine.write(at + (moved(i) * of.row) as u64, &bytes[i * of.row..][..of.row]).unwrap();
        }
        Cache { at, row: of.row, values: Vec::new() }
    };
    let there = [place(&keys), place(&values)];
    let mut elsewhere = Visible::default();
    elsewhere.set_prompt(rows);
    for i in 0..rows {
        let slots = c.v.row(i).iter().flat_map(|s| (s.start..s.start + s.len).map(|x| (x as usize, s.sink)));
        elsewhere.push(slots.map(|(x, sink)| span(moved(x), 1, sink)));
    }
    let got = launch(&mut g, &elsewhere, c.s, c.types, q, there.each_ref(), c.scale);
    (got, rounded(c.v, c.s, q, [&in_half(&keys), &in_half(&values)], c.scale))
}

#[test]
fn prompts_are_what_f16_makes_of_them() {
    let shapes = [
        (4, 2, 64, 64),
        (3, 3, 80, 80),
        (8, 1, 128, 128),
        (6, 2, 96, 40),
        (70, 1, 8, 64),
        (130, 1, 64, 24),
        (2, 1, 112, 128),
        (4, 2, 256, 256),
        (2, 2, 136, 200),
    ];
    for (i, (heads, kv_heads, key, value)) in shapes.into_iter().enumerate() {
        let s = Shape { heads, kv_heads, key, value };
        let (rows, depth) = [(5, 1), (33, 60), (3, 130), (9, 63)][i % 4];
        let ring = i % 3 == 1;
        let v = &prompt(rows, depth, ring);
        let slots = if ring { 44 } else { depth + rows + 3 };
        let types = [DType::F16; 2];
        let c = Case {
            s,
            types,
            slots,
            loud: 1.0,
            scale: 4.0 / (key as f32).sqrt(),
            seed: i as u64,
            v,
            first: 0,
        };
        let (got, want) = run(&c, |i| i);
        near(&got, &want, &format!("{s:?}, {rows} rows at {depth}"));
    }
}

/// Caches that are unpacked: both types, each with each other, heads whose scales lie anywhere in a word, windows with sinks.
#[test]
fn packed_caches_are_unpacked() {
    let shapes = [(2, 2, 64, 64), (6, 3, 96, 32), (4, 2, 128, 96), (2, 2, 224, 160), (3, 3, 32, 64)];
    let pairs = TYPES.into_iter().flat_map(|a| TYPES.map(|b| [a, b])).filter(|t| *t != [DType::F16; 2]);
    for (i, types) in pairs.enumerate() {
        for (j, (heads, kv_heads, key, value)) in shapes.into_iter().enumerate().skip(i % 2).step_by(2) {
            let s = Shape { heads, kv_heads, key, value };
            let (rows, depth, ring) = [(5, 1, false), (20, 31, true), (3, 97, false)][(i + j) % 3];
            let v = &prompt(rows, depth, ring);
            let slots = if ring { 44 } else { depth + rows + 3 };
            let scale = 4.0 / (key as f32).sqrt();
            let c = Case { s, types, slots, loud: 1.0, scale, seed: i as u64, v, first: 0 };
            let (got, want) = run(&c, |i| i);
            near(&got, &want, &format!("{types:?}, {s:?}, {rows} rows at {depth}"));
        }
    }
}

/// Rows of two requests in one call, a row alone, a prompt cut anywhere, and blocks of 32 slots elsewhere: the same bits.
#[test]
fn rows_are_on_their_own() {
    fn case((types, s): ([DType; 2], Shape), v: &Visible, first: usize) -> Case<'_> {
        Case { s, types, slots: 140, loud: 1.0, scale: 0.4, seed: 1, v, first }
    }
    let types = [[DType::F16; 2], [DType::Q8_0; 2]];
    for (types, s) in types.into_iter().zip([
        Shape { heads: 6, kv_heads: 3, key: 72, value: 88 },
        Shape { heads: 4, kv_heads: 2, key: 64, value: 32 },
    ]) {
        let mut all = prompt(37, 20, false);
        all.set_prompt(5);
        (0..5).for_each(|i| all.push([span(64, 66 + i, false)]));
        let (whole, want) = run(&case((types, s), &all, 0), |i| i);
        near(&whole, &want, "rows of two requests");
        let each = s.heads * s.value;
        for part in [0..1, 1..9, 9..40, 36..37, 40..42] {
            let mut v = Visible::default();
            v.set_prompt(37);
            part.clone().for_each(|i| v.push(all.row(i).iter().copied()));
            let want = &whole[part.start * each..part.end * each];
            for block in [1, 3] {
                // 3 is prime to 5: blocks of 32 are dealt out anew.
                let (got, _) = run(&case((types, s), &v, part.start), |i| i / 32 * block % 5 * 32 + i % 32);
                assert_bits(&got, want, || format!("rows {part:?}, blocks by {block}"));
            }
        }
    }
}

/// Scores that grow along the cache, so that the maximum moves, and queries of every size.
#[test]
fn loud_and_quiet_queries() {
    let (s, types) = (Shape { heads: 2, kv_heads: 1, key: 64, value: 64 }, [DType::F16; 2]);
    let v = &prompt(7, 150, false);
    for (i, loud) in [1e-12f32, 1e-3, 3e4, 1e20].into_iter().enumerate() {
        let c = Case { s, types, slots: 160, loud, scale: 0.5 / loud, seed: i as u64, v, first: 0 };
        let (got, want) = run(&c, |i| i);
        near(&got, &want, &format!("queries of {loud:e}"));
    }
    // Weights down to nothing: only the largest scores count.
    let c = Case { s, types, slots: 160, loud: 40.0, scale: 1.0, seed: 9, v, first: 0 };
    let (got, want) = run(&c, |i| i);
    near(&got, &want, "scores of hundreds");
    // Infinite scores count as the largest there are: entries on one side of the query weigh the same.
    let c = Case { loud: f32::INFINITY, ..c };
    assert!(run(&c, |i| i).0.iter().all(|x| x.abs() <= 1.0));
}

/// What f16 inputs cost, and what the kernels add: against f64 with nothing rounded, theirs is at most 1.6 times the error of f64 with queries
/// and cache in f16. Cached channels far above others, softmaxes that are flat and that are peaked.
#[test]
fn rounding_costs_what_f16_inputs_cost() {
    let s = Shape { heads: 4, kv_heads: 1, key: 128, value: 128 };
    for (depth, spread, large) in
        [(40, 1.0, 0), (300, 4.0, 4), (1100, 1.0, 0), (1100, 2.0, 4), (2100, 8.0, 2)]
    {
        let g = &mut Gpu::new(text_for("prompt_half", 80).unwrap());
        let mut rng = Rng(depth as u64);
        let mut normal = |n: usize| -> Vec<f32> {
            (0..n).map(|_| (0..12).map(|_| rng.unit()).sum::<f32>() / 2.0).collect()
        };
        let (mut k, values) = (normal(depth * s.key), normal(depth * s.value));
        for row in k.chunks_exact_mut(s.key) {
            row[..large].iter_mut().for_each(|x| *x = *x * 5.0 + 60.0);
        }
        let mut q = normal(s.heads * s.key);
        // Scores' deviation is `spread`, the large channels' share of it about a quarter.
        q.chunks_exact_mut(s.key).for_each(|q| q[..large].iter_mut().for_each(|x| *x *= 0.6));
        let scale = spread / 11.3;
        let wide = |x: &[f32], width: usize| Cache {
            at: 0,
            row: 0,
            values: x.chunks_exact(width).map(|r| r.iter().map(|x| f64::from(*x)).collect()).collect(),
        };
        let mut v = Visible::default();
        v.set_prompt(1);
        v.push([span(0, depth, false)]);
        let here = [cache_of(g, DType::F16, s.key, &k), cache_of(g, DType::F16, s.value, &values)];
        let wanted = exact(&v, s, [&q, &q], [&wide(&k, s.key), &wide(&values, s.value)], scale);
        let halves: Vec<f32> = q
            .chunks_exact(s.key)
            .flat_map(|q| {
                let power = (13.0 - q.iter().fold(0f32, |m, x| m.max(x.abs())).log2().floor()).exp2();
                q.iter().map(move |x| f16(f64::from(x * power)) as f32 / power)
            })
            .collect();
        let inputs = rms(&exact(&v, s, [&halves, &halves], here.each_ref(), scale), &wanted);
        let got = launch(g, &v, s, [DType::F16; 2], [&q, &q], here.each_ref(), scale);
        let ours = rms(&got.into_iter().map(f64::from).collect::<Vec<_>>(), &wanted);
        println!("{depth} entries, deviation {spread}, {large} large channels: {:.2}", ours / inputs);
        assert!(ours <= 1.6 * inputs, "{depth} entries: {ours:e}, not {inputs:e}");
    }
}
