//! Attention of prompts: grouped heads against the CPU's tiles, to the bit; absorbed MLA against the formula in f64.

use crate::attention::{Cache, cache, close, fill, mla, span, visible};
use crate::{Gpu, n, p};
use kernels::cpu::CpuBackend;
use kernels::cpu::isa::Isa;
use kernels::cuda::layout::{pack_row, row_bytes};
use kernels::cuda::modules::module;
use kernels::cuda::plan::{LANES, Plan};
use kernels::testing::{Rng, assert_bits};
use kernels::{Attention, Device, KvBuf, View, ViewMut, Visible};
use ptx::Param;
use quant::DType;

/// Tiles, segments, ranges on the device, and how many tiles.
pub(crate) fn plan(g: &mut Gpu, visible: &Visible, group: usize, lanes: usize) -> ([u64; 3], usize) {
    let mut plan = Plan::default();
    plan.set(visible, 0..visible.rows(), group, lanes);
    let lists = [plan.tiles.concat(), plan.segments.concat(), plan.ranges.concat()];
    (lists.each_ref().map(|l| g.words(l)), plan.tiles.len())
}

/// The same rows of a cache on the host and on the device.
fn both(
    g: &mut Gpu,
    dev: &Device,
    dtype: DType,
    slots: usize,
    width: usize,
    rng: &mut Rng,
) -> (KvBuf, u64, usize) {
    let mut host = dev.alloc_kv(dtype, slots, width).unwrap();
    let ids: Vec<u32> = (0..slots as u32).collect();
    dev.kv_write(View::from_host(&fill(rng, slots * width), width), &mut host, &ids).unwrap();
    let mut bytes = vec![0; slots * host.row_bytes()];
    dev.kv_save(&host, &ids, &mut bytes).unwrap();
    let row = row_bytes(dtype, width);
    let mut device = vec![0; slots * row];
    for (to, from) in device.chunks_exact_mut(row).zip(bytes.chunks_exact(host.row_bytes())) {
        pack_row(dtype, from, to);
    }
    let at = g.bytes(&device);
    (host, at, row)
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    key: usize,
    value: usize,
}

/// What the device and the CPU make of a prompt's rows.
fn grouped(dtype: DType, s: Shape, v: &Visible, slots: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut rng = Rng(seed);
    let Shape { heads, kv_heads, key, value } = s;
    let (rows, group) = (v.rows(), heads / kv_heads);
    let dev = Device::new(CpuBackend::new(1));
    let mut g = Gpu::new(module(&format!("prompt_{}", dtype.name())).unwrap());
    let (k, dk, k_row) = both(&mut g, &dev, dtype, slots, kv_heads * key, &mut rng);
    let (values, dv, v_row) = both(&mut g, &dev, dtype, slots, kv_heads * value, &mut rng);
    let (q, q2) = (fill(&mut rng, rows * heads * key), fill(&mut rng, rows * heads * key));
    let scale = 4.0 / (key as f32).sqrt();
    let (lists, tiles) = plan(&mut g, v, group, LANES);
    let per = group.min(LANES);
    let out = g.room(rows * heads * value);
    let (dq, dq2) = (g.floats(&q), g.floats(&q2));
    let params = [
        p(dq),
        p(dq2),
        n(heads * key),
        p(dk),
        p(k_row as u64),
        p(dv),
        p(v_row as u64),
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
    ];
    let entry = if value <= 128 { "prompt_2" } else { "prompt_4" };
    g.run(entry, [tiles, kv_heads * group.div_ceil(per)], 256, &params);
    let got = g.read(out, rows * heads * value);
    let mut want = vec![0.0; rows * heads * value];
    let (q, q_sink) = (View::from_host(&q, heads * key), Some(View::from_host(&q2, heads * key)));
    let a = Attention { heads, kv_heads, scale, q, q_sink, k: &k, v: &values, visible: v };
    dev.attention(a, ViewMut::from_host(&mut want, heads * value)).unwrap();
    (got, want)
}

fn check(got: &[f32], want: &[f32], what: &str) {
    // To the bit where the CPU fuses multiply-adds as a GPU does.
    if Isa::current().name().starts_with("avx") {
        assert_bits(got, want, || what.into());
    } else {
        close(got, &want.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), what);
    }
}

/// Rows `first..` of a prompt that see `depth`, `depth + 1`, ... entries; with `ring`, four sinks and a ring of 40 slots.
pub(crate) fn prompt(rows: usize, depth: usize, ring: bool) -> Visible {
    let mut v = Visible::default();
    v.set_prompt(rows);
    for i in 0..rows {
        let t = depth + i;
        if !ring {
            v.push([span(3, t, false)]);
            continue;
        }
        let (first, end) = (t.saturating_sub(31), t);
        let (a, b) = (4 + first % 40, 4 + end % 40 + 1);
        let rest = if a < b {
            vec![span(a, b - a, false)]
        } else {
            vec![span(a, 44 - a, false), span(4, b - 4, false)]
        };
        v.push([span(0, 4, true)].into_iter().chain(rest));
    }
    v
}

#[test]
fn prompts_have_the_bits_of_the_cpus_tiles() {
    let shapes =
        [(4, 2, 32, 64), (3, 3, 96, 32), (8, 1, 64, 160), (2, 1, 128, 128), (6, 2, 32, 256), (70, 1, 32, 32)];
    for (t, dtype) in KvBuf::TYPES.into_iter().enumerate() {
        for (i, (rows, depth)) in [(5, 1), (17, 60), (2, 130), (9, 63)].into_iter().enumerate() {
            let (heads, kv_heads, key, value) = shapes[(i + t) % shapes.len()];
            let s = Shape { heads, kv_heads, key, value };
            let ring = i % 2 == 1;
            let slots = if ring { 44 } else { depth + rows + 3 };
            let (got, want) = grouped(dtype, s, &prompt(rows, depth, ring), slots, i as u64);
            check(&got, &want, &format!("{dtype}, {s:?}, {rows} rows at {depth}"));
        }
    }
}

/// Odd dimensions, and rows of two requests in one call.
#[test]
fn rows_of_several_requests() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut v = prompt(7, 20, true);
        v.set_prompt(3);
        (0..3).for_each(|i| v.push([span(60, 66 + i, false)]));
        let s = Shape { heads: 6, kv_heads: 3, key: 7, value: 37 };
        let (got, want) = grouped(dtype, s, &v, 140, 1);
        check(&got, &want, dtype.name());
    }
}

/// Scores that pass every bound on the way: the maximum moves, infinite scores and NaN count as the CPU counts them.
#[test]
fn extreme_scores() {
    let mut rng = Rng(3);
    let (rows, slots, width) = (4, 200, 32);
    let dev = Device::new(CpuBackend::new(1));
    let mut k = dev.alloc_kv(DType::F32, slots, width).unwrap();
    let mut x = fill(&mut rng, slots * width);
    // Ever larger, then too large for any score, then no number.
    x.chunks_exact_mut(width)
        .enumerate()
        .for_each(|(i, row)| row.iter_mut().for_each(|v| *v *= 1.0 + i as f32));
    x[150 * width..151 * width].fill(f32::MAX);
    x[170 * width] = f32::NAN;
    let ids: Vec<u32> = (0..slots as u32).collect();
    dev.kv_write(View::from_host(&x, width), &mut k, &ids).unwrap();
    let y = fill(&mut rng, slots * width);
    let mut values = dev.alloc_kv(DType::F32, slots, width).unwrap();
    dev.kv_write(View::from_host(&y, width), &mut values, &ids).unwrap();
    let q = fill(&mut rng, rows * width);
    let mut v = Visible::default();
    v.set_prompt(rows);
    (0..rows).for_each(|i| v.push([span(0, 140 + 20 * i, false)]));
    let mut g = Gpu::new(module("prompt_f32").unwrap());
    let (dk, dv, dq, out) = (g.floats(&x), g.floats(&y), g.floats(&q), g.room(rows * width));
    let (lists, tiles) = plan(&mut g, &v, 1, LANES);
    let row = 4 * width as u64;
    let ends = [
        n(1),
        n(1),
        n(1),
        n(width),
        n(width),
        Param::F32(3.0),
        p(lists[0]),
        p(lists[1]),
        p(lists[2]),
        p(out),
        n(width),
    ];
    let params: Vec<Param> =
        [p(dq), p(0), n(width), p(dk), p(row), p(dv), p(row)].into_iter().chain(ends).collect();
    g.run("prompt_2", [tiles, 1], 256, &params);
    let mut want = vec![0.0; rows * width];
    let q = View::from_host(&q, width);
    let a = Attention { heads: 1, kv_heads: 1, scale: 3.0, q, q_sink: None, k: &k, v: &values, visible: &v };
    dev.attention(a, ViewMut::from_host(&mut want, width)).unwrap();
    check(&g.read(out, rows * width), &want, "extreme scores");
}

#[test]
fn absorbed_prompts_share_the_latent() {
    let shapes = [(3, 32, 16, 32), (16, 512, 128, 64), (70, 64, 32, 32), (4, 160, 24, 64)];
    for (t, dtype) in KvBuf::TYPES.into_iter().enumerate() {
        for (i, (heads, latent, nope, rope)) in shapes.into_iter().enumerate() {
            if latent == 512 && !matches!(dtype, DType::F16 | DType::Q8_0) {
                continue;
            }
            let mut rng = Rng((10 * t + i) as u64);
            let (rows, depth) = (3, [17, 66, 40, 90][(i + t) % 4]);
            let slots = depth + 12;
            let v = visible(rows, depth, slots, i % 2 == 1);
            let mut g = Gpu::new(module(&format!("prompt_{}", dtype.name())).unwrap());
            let c: Cache = cache(&mut g, dtype, slots, latent, &mut rng);
            let pe = cache(&mut g, dtype, slots, rope, &mut rng);
            let width = heads * (nope + rope);
            let absorbed = fill(&mut rng, rows * heads * latent);
            let (q, q2) = (fill(&mut rng, rows * width), fill(&mut rng, rows * width));
            let (da, dq, dq2) = (g.floats(&absorbed), g.floats(&q), g.floats(&q2));
            let (lists, tiles) = plan(&mut g, &v, heads, LANES);
            let per = heads.min(LANES);
            let scale = 2.0 / ((latent + rope) as f32).sqrt();
            let out = g.room(rows * heads * latent);
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
                n(per),
                n(latent),
                n(nope),
                n(rope),
                Param::F32(scale),
                p(lists[0]),
                p(lists[1]),
                p(lists[2]),
                p(out),
            ];
            g.run("prompt_mla", [tiles, heads.div_ceil(per)], 256, &params);
            let got = g.read(out, rows * heads * latent);
            let want = mla(&v, [&absorbed, &q, &q2], [&c, &pe], (heads, nope, rope), scale);
            close(&got, &want, &format!("{dtype}, {heads} heads, latent {latent}, depth {depth}"));
        }
    }
}
