//! Attention of single queries on tensor cores: grouped heads over f16, q8_0 and q4_0 caches. Up to eight heads that share keys are held to the
//! formula, more to what f16 makes of their queries and weights; all to what caches hold as f16.

use crate::attention::{SPLIT, Shape, attend_params, cache, close, exact, fill, lists, span, visible};
use crate::prompt_half::{TYPES, in_half, near, number, rounded, row_bytes};
use crate::{Gpu, n};
use kernels::Visible;
use kernels::cuda::modules::text_for;
use kernels::testing::{Rng, assert_bits};
use quant::DType;

/// What the device makes of random queries, in multiples of `loud`, over random caches; and what it should be.
fn run(
    types: [DType; 2],
    s: Shape,
    v: &Visible,
    slots: usize,
    (scale, loud): (f32, f32),
    seed: u64,
) -> (Vec<f32>, Vec<f64>) {
    let mut rng = Rng(seed);
    let Shape { heads, kv_heads, key, value } = s;
    let (rows, group) = (v.rows(), heads / kv_heads);
    let mut g = Gpu::new(text_for("attend_half", 80).unwrap());
    let keys = cache(&mut g, types[0], slots, kv_heads * key, &mut rng);
    let values = cache(&mut g, types[1], slots, kv_heads * value, &mut rng);
    let mut query = || fill(&mut rng, 3 * heads * key).iter().map(|x| loud * x).collect::<Vec<_>>();
    let all = [query(), query()];
    let q = all.each_ref().map(|q| &q[..rows * heads * key]);
    let [dq, dq2] = q.map(|q| g.floats(q));
    let l = lists(&mut g, v);
    let splits = l.2.div_ceil(SPLIT);
    let parts = g.room(rows * heads * splits * (value + 2));
    let mut params = attend_params(s, [dq, dq2], [&keys, &values], scale, l, parts);
    params.extend(types.map(|t| n(number(t))));
    let dims = *[64, 128, 256].iter().find(|d| **d >= key.max(value)).unwrap();
    let (half, packed) = row_bytes(types, dims);
    let many = group > 8 && dims <= 128;
    let (per, warps) = (if many { 16 } else { 8 }, if dims > 128 { 2 } else { 4 });
    let plain = types == [DType::F16; 2];
    let name = match (plain, many) {
        (true, false) => "attend",
        (true, true) => "attend_many",
        (false, false) => "packed",
        (false, true) => "packed_many",
    };
    let shared = 16 * warps * if plain { 3 * half } else { 3 * packed + half };
    let grid = [splits, kv_heads * group.div_ceil(per), rows];
    g.run_shared(&format!("{name}_{dims}"), grid, 32 * warps as u32, shared / 4, &params);
    // Put together in f64: `merge` is another module's.
    let mut got = Vec::new();
    for job in 0..rows * heads {
        let at = |i: usize| parts + (4 * (job * splits + i) * (value + 2)) as u64;
        let all: Vec<Vec<f32>> =
            (0..v.seen(job / heads).div_ceil(SPLIT)).map(|i| g.read(at(i), value + 2)).collect();
        let max = all.iter().fold(f32::MIN, |m, part| m.max(part[0]));
        let sum = |i: usize| -> f64 {
            all.iter().map(|part| f64::from(part[i]) * f64::from(part[0] - max).exp()).sum()
        };
        got.extend((2..value + 2).map(|i| (sum(i) / sum(1)) as f32));
    }
    let formula = if many { rounded } else { exact };
    (got, formula(v, s, q, [&in_half(&keys), &in_half(&values)], scale))
}

fn check(s: Shape, (got, want): (Vec<f32>, Vec<f64>), what: &str) {
    let what = format!("{s:?}, {what}");
    match s.heads / s.kv_heads {
        9.. if s.key.max(s.value) <= 128 => near(&got, &want, &what),
        _ => close(&got, &want, &what),
    }
}

#[test]
fn parts_of_every_shape() {
    let shapes = [
        (1, 1, 64, 64),
        (8, 2, 32, 64),
        (9, 1, 96, 32),
        (14, 2, 128, 128),
        (2, 1, 256, 256),
        (20, 1, 64, 48),
        (10, 1, 160, 136),
    ];
    let depths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130];
    for (i, depth) in depths.into_iter().enumerate() {
        let (heads, kv_heads, key, value) = shapes[i % shapes.len()];
        let s = Shape { heads, kv_heads, key, value };
        let slots = depth + 12;
        let v = visible(1 + i % 3, depth, slots, i % 2 == 1);
        let scale = 4.0 / (key as f32).sqrt();
        let both = run([DType::F16; 2], s, &v, slots, (scale, 1.0), i as u64);
        check(s, both, &format!("depth {depth}"));
    }
}

/// Both types, each with each other, heads whose scales lie anywhere in a word.
#[test]
fn packed_caches_are_unpacked() {
    let shapes = [
        (2, 2, 64, 64),
        (6, 3, 96, 32),
        (4, 2, 128, 96),
        (10, 1, 128, 64),
        (2, 2, 224, 160),
        (27, 3, 32, 64),
    ];
    let pairs = TYPES.into_iter().flat_map(|a| TYPES.map(|b| [a, b])).filter(|t| *t != [DType::F16; 2]);
    for (i, types) in pairs.enumerate() {
        for (j, (heads, kv_heads, key, value)) in shapes.into_iter().enumerate().skip(i % 2).step_by(2) {
            let s = Shape { heads, kv_heads, key, value };
            let depth = [33, 1, 80, 47, 16][(i + j) % 5];
            let v = visible(2, depth, depth + 12, j % 2 == 1);
            let scale = 4.0 / (key as f32).sqrt();
            let both = run(types, s, &v, depth + 12, (scale, 1.0), i as u64);
            check(s, both, &format!("{types:?}, depth {depth}"));
        }
    }
}

/// The same entries cut into other spans and next to other rows give the same bits.
#[test]
fn bits_depend_on_the_row_alone() {
    let s = Shape { heads: 8, kv_heads: 2, key: 32, value: 32 };
    for types in [[DType::F16; 2], [DType::Q8_0; 2]] {
        let first = |lists: &[&[(usize, usize, bool)]]| -> Vec<f32> {
            let mut v = Visible::default();
            lists.iter().for_each(|l| v.push(l.iter().map(|s| span(s.0, s.1, s.2))));
            run(types, s, &v, 128, (0.5, 1.0), 9).0[..s.heads * s.value].to_vec()
        };
        let alone = first(&[&[(5, 100, false)]]);
        let what = || format!("{types:?}");
        assert_bits(&first(&[&[(5, 100, false)], &[(0, 3, true), (20, 90, false)]]), &alone, what);
        assert_bits(&first(&[&[(5, 1, false), (6, 40, false), (46, 59, false)]]), &alone, what);
        let sinks = first(&[&[(5, 4, true), (9, 96, false)]]);
        assert_bits(&first(&[&[(5, 3, true), (8, 1, true), (9, 96, false)], &[(0, 1, false)]]), &sinks, what);
        assert_ne!(sinks, alone);
    }
}

/// Queries of every size, scores far apart, and infinite ones, which count as the largest there are.
#[test]
fn loud_and_quiet_queries() {
    let v = visible(2, 70, 90, true);
    for heads in [4, 12] {
        let s = Shape { heads, kv_heads: 1, key: 64, value: 64 };
        for (i, loud) in [1e-12f32, 1e-3, 3e4, 1e20].into_iter().enumerate() {
            let both = run([DType::F16; 2], s, &v, 90, (0.5 / loud, loud), i as u64);
            check(s, both, &format!("queries of {loud:e}"));
        }
        check(s, run([DType::F16; 2], s, &v, 90, (3.0, 1.0), 5), "scores far apart");
        let (got, _) = run([DType::F16; 2], s, &v, 90, (1.0, f32::INFINITY), 5);
        assert!(got.iter().all(|x| x.abs() <= 1.0));
    }
}
