//! Row operations against plain formulas: in f64 with a bar, or to the bit where nothing is summed.

use crate::{Gpu, n, p};
use kernels::cuda::modules::module;
use kernels::testing::{Rng, assert_bits, assert_close};
use ptx::Param;

fn gpu() -> Gpu {
    Gpu::new(module("rows").unwrap())
}

fn fill(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.unit()).collect()
}

/// Squares in 64 lanes with fused multiply-adds, then a tree: the order of docs/numerics.md, written out.
fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let whole = x.len() / 16 * 16;
    let mut lanes = [0.0f32; 64];
    for (i, v) in x[..whole].iter().enumerate() {
        lanes[i % 64] = v.mul_add(*v, lanes[i % 64]);
    }
    let mut sixteen: [f32; 16] =
        std::array::from_fn(|l| (lanes[l] + lanes[16 + l]) + (lanes[32 + l] + lanes[48 + l]));
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            sixteen[l] += sixteen[l + half];
        }
    }
    let squares = x[whole..].iter().fold(sixteen[0], |s, v| s + v * v);
    let inv = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    x.iter().zip(w).map(|(x, w)| x * inv * w).collect()
}

#[test]
fn rms_norm_has_the_cpus_order() {
    for (i, len) in [1, 15, 16, 17, 63, 64, 65, 128, 300, 1030].into_iter().enumerate() {
        let mut rng = Rng(i as u64);
        let (rows, heads) = (2, 1 + i % 3);
        let (x, w) = (fill(&mut rng, rows * heads * len), fill(&mut rng, len));
        let mut g = gpu();
        let (dx, dw) = (g.floats(&x), g.floats(&w));
        // Both into another buffer and in place.
        let out = if i % 2 == 0 { g.room(x.len()) } else { dx };
        let stride = n(heads * len);
        g.run(
            "rms_norm",
            [heads, rows],
            256,
            &[p(dx), stride, p(dw), n(len), Param::F32(1e-6), p(out), stride],
        );
        let want: Vec<f32> = x.chunks_exact(len).flat_map(|x| rms_norm(x, &w, 1e-6)).collect();
        assert_bits(&g.read(out, x.len()), &want, || format!("rms_norm of {len}"));
        // And the formula itself.
        let exact: Vec<f64> = x
            .chunks_exact(len)
            .flat_map(|x| {
                let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
                let inv = 1.0 / (squares / len as f64 + f64::from(1e-6f32)).sqrt();
                x.iter().zip(&w).map(move |(x, w)| f64::from(*x) * inv * f64::from(*w)).collect::<Vec<_>>()
            })
            .collect();
        let size: Vec<f64> = exact.iter().map(|v| v.abs()).collect();
        assert_close(&g.read(out, x.len()), &exact, &size, 1e-6, || format!("rms_norm of {len}"));
    }
}

#[test]
fn rope_turns_both_kinds_of_pairs() {
    for halves in [false, true] {
        for (heads, head_dim, offset, half) in
            [(1, 2, 0, 1), (3, 10, 4, 3), (4, 64, 0, 32), (5, 192, 128, 32)]
        {
            let mut rng = Rng(half as u64);
            let rows = 2;
            // Queries, and one key of other dimensions.
            let sides = [(heads, head_dim, offset), (1, 2 * half + 2, 1)];
            let x = sides.map(|(heads, head_dim, _)| fill(&mut rng, rows * heads * head_dim));
            let cs = fill(&mut rng, rows * 2 * half);
            for both in [false, true] {
                let mut g = gpu();
                let (dx, dcs) = (x.each_ref().map(|x| g.floats(x)), g.floats(&cs));
                let mut params = Vec::new();
                for (i, (heads, head_dim, offset)) in sides.into_iter().enumerate() {
                    let heads = if i == 1 && !both { 0 } else { heads };
                    params.extend([p(dx[i]), n(heads * head_dim), n(heads), n(head_dim), n(offset)]);
                }
                params.extend([n(half), n(usize::from(halves)), p(dcs), n(2 * half)]);
                let all = heads + usize::from(both);
                g.run("rope", [(all * half).div_ceil(128), rows], 128, &params);
                for (i, (heads, head_dim, offset)) in sides.into_iter().enumerate() {
                    let mut want = x[i].clone();
                    let turned = i == 0 || both;
                    let rows = want.chunks_exact_mut(heads * head_dim).zip(cs.chunks_exact(2 * half));
                    for (row, cs) in rows.filter(|_| turned) {
                        for head in row.chunks_exact_mut(head_dim) {
                            for i in 0..half {
                                let (a, b) = if halves { (i, i + half) } else { (2 * i, 2 * i + 1) };
                                let (u, v) = (head[offset + a], head[offset + b]);
                                head[offset + a] = u * cs[i] - v * cs[half + i];
                                head[offset + b] = u * cs[half + i] + v * cs[i];
                            }
                        }
                    }
                    let what = || format!("rope, {heads} heads of {head_dim}, both: {both}");
                    assert_bits(&g.read(dx[i], want.len()), &want, what);
                }
            }
        }
    }
}

#[test]
fn gated_activations_are_within_a_few_units() {
    let mut rng = Rng(3);
    let mut gate: Vec<f32> = (0..300).map(|_| 12.0 * rng.unit()).collect();
    gate[..8].copy_from_slice(&[0.0, -0.0, 100.0, -100.0, -88.0, 88.9, -104.0, 1e-30]);
    let up = fill(&mut rng, 300);
    for act in [0, 1] {
        let mut g = gpu();
        let (dg, du) = (g.floats(&gate), g.floats(&up));
        g.run("glu", [2, 1], 256, &[p(dg), n(300), p(du), n(300), n(300), n(act)]);
        let exact: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(x, u)| {
                let x = f64::from(*x);
                let y = if act == 0 {
                    x / (1.0 + (-x).exp())
                } else {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                    0.5 * x * (1.0 + inner.tanh())
                };
                y * f64::from(*u)
            })
            .collect();
        // GELU far to the left is a difference of nearly equal numbers in the oracle, too: measure against x there.
        let size: Vec<f64> = gate
            .iter()
            .zip(&exact)
            .map(|(x, y)| if act == 0 { y.abs() + 1e-37 } else { y.abs() + 1e-2 * f64::from(x.abs()) })
            .collect();
        assert_close(&g.read(dg, 300), &exact, &size, 2e-6, || format!("activation {act}"));
    }
}

#[test]
fn rows_are_gathered_added_and_mixed() {
    let mut rng = Rng(5);
    let (cols, used) = (300, 3);
    let (x, before) = (fill(&mut rng, 4 * cols), fill(&mut rng, 2 * cols));
    let rows = [3u32, 1];
    for (add, by_id) in [(false, true), (true, true), (true, false)] {
        let mut g = gpu();
        let (dx, out) = (g.floats(&x), if add { g.floats(&before) } else { g.room(2 * cols) });
        let ids = if by_id { g.words(&rows) } else { 0 };
        let params = [p(dx), n(cols), p(ids), n(cols), p(out), n(cols), n(usize::from(add))];
        g.run("gather", [2, 2], 256, &params);
        let want: Vec<f32> = (0..2 * cols)
            .map(|i| {
                let row = if by_id { rows[i / cols] as usize } else { i / cols };
                x[row * cols + i % cols] + if add { before[i] } else { 0.0 }
            })
            .collect();
        assert_bits(&g.read(out, 2 * cols), &want, || format!("gather, add {add}"));
    }
    let (experts, weights) = (fill(&mut rng, 2 * used * cols), fill(&mut rng, 2 * used));
    for shared in [false, true] {
        let mut g = gpu();
        let (de, dw, out) = (g.floats(&experts), g.floats(&weights), g.floats(&before));
        let ds = if shared { g.floats(&x) } else { 0 };
        let params = [p(de), p(dw), n(used), p(ds), n(cols), p(out), n(cols), n(1)];
        g.run("mix_experts", [2, 2], 256, &params);
        let want: Vec<f32> = (0..2 * cols)
            .map(|i| {
                let (r, c) = (i / cols, i % cols);
                let start = if shared { x[i] } else { 0.0 };
                let y = (0..used)
                    .fold(start, |y, k| y + weights[r * used + k] * experts[(r * used + k) * cols + c]);
                before[i] + y
            })
            .collect();
        assert_bits(&g.read(out, 2 * cols), &want, || format!("experts, shared {shared}"));
    }
}

/// In two calls, as for long rows: parts, then what the parts gave.
#[test]
fn the_best_logits_come_in_order() {
    for (len, per, k) in [(1, 1, 3), (300, 100, 5), (1000, 256, 40), (513, 512, 1), (90, 32, 90), (31, 31, 1)]
    {
        let rows = 3;
        let mut x = fill(&mut Rng(len as u64), rows * len);
        // Row 1: few different values. Row 2: NaN, infinities and both zeros.
        x[len..2 * len].iter_mut().for_each(|v| *v = (*v * 3.0).round());
        x[2 * len..].iter_mut().step_by(7).for_each(|v| *v = f32::NAN);
        x[2 * len..].iter_mut().skip(1).step_by(5).for_each(|v| *v = f32::NEG_INFINITY);
        x[2 * len..]
            .iter_mut()
            .skip(3)
            .step_by(4)
            .for_each(|v| *v = if v.to_bits() & 1 == 0 { 0.0 } else { -0.0 });
        let mut g = gpu();
        let parts = len.div_ceil(per);
        let dx = g.floats(&x);
        let [some, best] = [parts * k, k].map(|n| [g.room(rows * n), g.room(rows * n)]);
        let params = [p(dx), n(len), p(0), n(len), n(per), n(k), p(some[0]), p(some[1])];
        g.run("top_k", [parts, rows], 256, &params);
        let all = parts * k;
        let params = [p(some[0]), n(all), p(some[1]), n(all), n(all), n(k), p(best[0]), p(best[1])];
        g.run("top_k", [1, rows], 256, &params);
        let ids: Vec<u32> = g.read(best[1], rows * k).iter().map(|v| v.to_bits()).collect();
        let values = g.read(best[0], rows * k);
        for (r, x) in x.chunks_exact(len).enumerate() {
            let mut order: Vec<usize> = (0..len).collect();
            let key = |i: &usize| if x[*i].is_nan() { (1, 0.0) } else { (0, x[*i] + 0.0) };
            order.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap().then(a.cmp(b)));
            let want: Vec<u32> = (0..k).map(|j| order.get(j).map_or(u32::MAX, |i| *i as u32)).collect();
            assert_eq!(ids[r * k..][..k], want, "row {r} of {len}");
            for (v, i) in values[r * k..][..k].iter().zip(&want) {
                let want = x.get(*i as usize).copied().unwrap_or(f32::NEG_INFINITY);
                assert_eq!(v.to_bits(), want.to_bits());
            }
        }
    }
}
