//! Attention of prompts on tensor cores: grouped heads over f16 caches against the formula in f64, on a machine that cuts what tensor cores
//! cut; what a row gets depends neither on its neighbours nor on blocks of 32 slots having other places.

use crate::attention::{Shape, cache, close, exact, fill, span};
use crate::prompt::{plan, prompt};
use crate::{Gpu, n, p};
use kernels::Visible;
use kernels::cuda::modules::text_for;
use kernels::cuda::plan::HALF_LANES;
use kernels::testing::{Rng, assert_bits};
use ptx::Param;
use quant::DType;

/// What goes in: queries in multiples of `loud`.
struct Case<'a> {
    s: Shape,
    slots: usize,
    loud: f32,
    scale: f32,
    seed: u64,
    /// Of which rows, and the queries' first row.
    v: &'a Visible,
    first: usize,
}

/// What the device makes of it, and what it should be.
fn run(c: &Case<'_>, moved: impl Fn(usize) -> usize) -> (Vec<f32>, Vec<f64>) {
    let mut rng = Rng(c.seed);
    let Shape { heads, kv_heads, key, value } = c.s;
    let (rows, group) = (c.v.rows(), heads / kv_heads);
    let mut g = Gpu::new(text_for("prompt_half_f16", 80).unwrap());
    let keys = cache(&mut g, DType::F16, c.slots, kv_heads * key, &mut rng);
    let values = cache(&mut g, DType::F16, c.slots, kv_heads * value, &mut rng);
    let mut query = || fill(&mut rng, 64 * heads * key).iter().map(|x| c.loud * x).collect::<Vec<_>>();
    let all = [query(), query()];
    let [q, q2] = all.each_ref().map(|q| &q[c.first * heads * key..][..rows * heads * key]);
    // The same entries in other slots.
    let mut place = |at: u64, row: usize| {
        let bytes = g.machine.read(at, c.slots * row).unwrap();
        let mut there = vec![0; 2 * c.slots * row];
        for i in 0..c.slots {
            there[moved(i) * row..][..row].copy_from_slice(&bytes[i * row..][..row]);
        }
        g.bytes(&there)
    };
    let (dk, dv) = (place(keys.at, keys.row), place(values.at, values.row));
    let mut elsewhere = Visible::default();
    elsewhere.set_prompt(rows);
    for i in 0..rows {
        let slots = c.v.row(i).iter().flat_map(|s| (s.start..s.start + s.len).map(|x| (x as usize, s.sink)));
        elsewhere.push(slots.map(|(x, sink)| span(moved(x), 1, sink)));
    }
    let (lists, tiles) = plan(&mut g, &elsewhere, group, HALF_LANES);
    let (dq, dq2, out) = (g.floats(q), g.floats(q2), g.room(rows * heads * value));
    let per = group.min(HALF_LANES);
    let params = [
        p(dq),
        p(dq2),
        n(heads * key),
        p(dk),
        p(keys.row as u64),
        p(dv),
        p(values.row as u64),
        n(kv_heads),
        n(group),
        n(per),
        n(key),
        n(value),
        Param::F32(c.scale),
        p(lists[0]),
        p(lists[1]),
        p(lists[2]),
        p(out),
        n(heads * value),
    ];
    let dims = *[64, 96, 128].iter().find(|d| **d >= key.max(value)).unwrap();
    let grid = [tiles, kv_heads * group.div_ceil(per), 1];
    g.run_shared(&format!("prompt_{dims}"), grid, 256, 3 * 32 * 2 * (2 * dims + 16) / 4, &params);
    let got = g.read(out, rows * heads * value);
    (got, exact(c.v, c.s, [q, q2], [&keys, &values], c.scale))
}

#[test]
fn prompts_are_close_to_f64() {
    let shapes = [
        (4, 2, 64, 64),
        (3, 3, 80, 80),
        (8, 1, 128, 128),
        (6, 2, 96, 40),
        (70, 1, 8, 64),
        (130, 1, 64, 24),
        (2, 1, 112, 128),
    ];
    for (i, (heads, kv_heads, key, value)) in shapes.into_iter().enumerate() {
        let s = Shape { heads, kv_heads, key, value };
        let (rows, depth) = [(5, 1), (33, 60), (3, 130), (9, 63)][i % 4];
        let ring = i % 3 == 1;
        let v = &prompt(rows, depth, ring);
        let slots = if ring { 44 } else { depth + rows + 3 };
        let c = Case { s, slots, loud: 1.0, scale: 4.0 / (key as f32).sqrt(), seed: i as u64, v, first: 0 };
        let (got, want) = run(&c, |i| i);
        close(&got, &want, &format!("{s:?}, {rows} rows at {depth}"));
    }
}

/// Rows of two requests in one call, a row alone, a prompt cut anywhere, and blocks of 32 slots elsewhere: the same bits.
#[test]
fn rows_are_on_their_own() {
    let s = Shape { heads: 6, kv_heads: 3, key: 72, value: 88 };
    let mut all = prompt(37, 20, false);
    all.set_prompt(5);
    (0..5).for_each(|i| all.push([span(64, 66 + i, false)]));
    fn case(s: Shape, v: &Visible, first: usize) -> Case<'_> {
        Case { s, slots: 140, loud: 1.0, scale: 0.4, seed: 1, v, first }
    }
    let (whole, want) = run(&case(s, &all, 0), |i| i);
    close(&whole, &want, "rows of two requests");
    let each = s.heads * s.value;
    for part in [0..1, 1..9, 9..40, 36..37, 40..42] {
        let mut v = Visible::default();
        v.set_prompt(37);
        part.clone().for_each(|i| v.push(all.row(i).iter().copied()));
        let want = &whole[part.start * each..part.end * each];
        for block in [1, 3] {
            // 3 is prime to 5: blocks of 32 are dealt out anew.
            let (got, _) = run(&case(s, &v, part.start), |i| i / 32 * block % 5 * 32 + i % 32);
            assert_bits(&got, want, || format!("rows {part:?}, blocks by {block}"));
        }
    }
}

/// Scores that grow along the cache, so that the maximum moves, and queries of every size.
#[test]
fn loud_and_quiet_queries() {
    let s = Shape { heads: 2, kv_heads: 1, key: 64, value: 64 };
    let v = &prompt(7, 150, false);
    for (i, loud) in [1e-30f32, 1e-3, 3e4, 1e20].into_iter().enumerate() {
        let c = Case { s, slots: 160, loud, scale: 0.5 / loud, seed: i as u64, v, first: 0 };
        let (got, want) = run(&c, |i| i);
        close(&got, &want, &format!("queries of {loud:e}"));
    }
    // Weights down to nothing: only the largest scores count.
    let c = Case { s, slots: 160, loud: 40.0, scale: 1.0, seed: 9, v, first: 0 };
    let (got, want) = run(&c, |i| i);
    let worst = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
    assert!(worst <= 1e-4, "scores of hundreds: {worst:e}");
}
