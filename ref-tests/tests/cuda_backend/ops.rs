//! Every operation against the CPU backend on random shapes: windows into wider buffers, more rows than a kernel takes at once, all
//! formats and cache types. Same bits where the CPU fuses multiply-adds as a GPU does; attention, whose order is its own, to a bar.

use crate::{asked, gpu};
use kernels::cpu::CpuBackend;
use kernels::cpu::isa::Isa;
use kernels::testing::{Fill, Rng, weights};
use kernels::*;
use quant::{DType, FORMATS};
use ref_tests::gpu::Interpreted;

/// Results on the CPU and on the GPU of the same calls.
fn both(what: &str, bar: f32, run: impl Fn(&Device) -> Vec<f32>) {
    on(&gpu(), what, bar, run);
}

/// The same on a GPU of the caller's.
fn on(gpu: &Device, what: &str, bar: f32, run: impl Fn(&Device) -> Vec<f32>) {
    let (want, got) = (run(&Device::new(CpuBackend::new(1))), run(gpu));
    assert_eq!(want.len(), got.len(), "{what}");
    let bar = if bar == 0.0 && !Isa::current().name().starts_with("avx") { 1e-5 } else { bar };
    let size = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (w, g)) in want.iter().zip(&got).enumerate() {
        let same = w.to_bits() == g.to_bits() || (w - g).abs() <= bar * size;
        assert!(same, "{what}: value {i} is {g:e} on the GPU, {w:e} on the CPU");
    }
}

fn fill(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.unit()).collect()
}

/// A buffer `[rows, cols]` that holds `x`.
pub(crate) fn buf(dev: &Device, x: &[f32], cols: usize) -> Buf {
    let mut b = dev.alloc(x.len() / cols, cols).unwrap();
    dev.write(b.view_mut(x.len() / cols), x).unwrap();
    b
}

pub(crate) fn all(dev: &Device, b: &Buf) -> Vec<f32> {
    let mut out = vec![0.0; b.rows() * b.cols()];
    dev.read(b.view(b.rows()), &mut out).unwrap();
    out
}

pub(crate) fn weight(
    dev: &Device,
    dtype: DType,
    count: usize,
    rows: usize,
    cols: usize,
    seed: u64,
) -> Weight {
    let bytes = weights(dtype, count * rows, cols, Fill::Even, &mut Rng(seed));
    dev.upload(Weight::host(dtype, count, rows, cols, HostBytes::from_vec(bytes)).unwrap()).unwrap()
}

pub(crate) fn vector(dev: &Device, n: usize, seed: u64) -> Vector {
    dev.upload_vector(Vector::new(fill(&mut Rng(seed), n))).unwrap()
}

#[test]
fn rows_in_windows() {
    let (n, cols, wide) = (5, 70, 96);
    let x = fill(&mut Rng(1), n * wide);
    both("norm, copy, add, gather", 0.0, |dev| {
        let (a, mut b) = (buf(dev, &x, wide), buf(dev, &x, wide));
        let w = vector(dev, cols, 2);
        dev.rms_norm(a.part(n, 7..7 + cols), &w, 1e-5, b.part_mut(n, 20..20 + cols)).unwrap();
        dev.copy(a.part(n, 0..9), b.part_mut(n, 3..12)).unwrap();
        dev.add(a.part(3, 5..25), b.part_mut(3, 50..70)).unwrap();
        dev.gather(a.part(n, 90..96), &[4, 0, 4], b.part_mut(3, 12..18)).unwrap();
        let heads = vector(dev, 16, 3);
        dev.rms_norm_heads(b.part_mut(n, 0..48), &heads, 1e-6).unwrap();
        let mut part = vec![0.0; 2 * 10];
        dev.read(b.part(2, 40..50), &mut part).unwrap();
        dev.write(b.part_mut(2, 60..70), &part).unwrap();
        all(dev, &b)
    });
    for style in [RopeStyle::Adjacent, RopeStyle::Halves] {
        both("rope", 0.0, |dev| {
            let (mut a, cs) = (buf(dev, &x, wide), buf(dev, &x[..n * 8], 8));
            let h = RopeHeads { head_dim: 20, offset: 6, dims: 8, style };
            dev.rope(a.part_mut(n, 10..70), h, cs.view(n)).unwrap();
            all(dev, &a)
        });
    }
}

/// A norm's rounding serves what multiplies it next, and only as long as it is that of the rows.
#[test]
fn norms_are_rounded_once() {
    let (n, cols) = (3, 300);
    let (x, y) = (fill(&mut Rng(1), n * cols), fill(&mut Rng(2), n * cols));
    both("products of norms", 0.0, |dev| {
        let (w, norm) = (weight(dev, DType::Q8_0, 1, 6, 320, 3), vector(dev, 320, 4));
        let wide = |v: &[f32]| v.chunks(cols).flat_map(|r| [r, &r[..20]].concat()).collect::<Vec<f32>>();
        let (mut x, y) = (buf(dev, &wide(&x), 320), buf(dev, &wide(&y), 320));
        let (mut h, mut out) = (dev.alloc(n, 320).unwrap(), dev.alloc(n, 6).unwrap());
        let mut all_of = Vec::new();
        let mut product = |h: &Buf, rows: usize| {
            dev.linear(&w, h.view(rows), out.view_mut(rows), Write::Set).unwrap();
            all_of.extend(all(dev, &out));
        };
        // Areas have no room before the first product.
        product(&x, n);
        for change in 0..6 {
            dev.rms_norm(x.view(n), &norm, 1e-5, h.view_mut(n)).unwrap();
            match change {
                0 => {}
                1 => dev.add(y.part(n, 7..8), h.part_mut(n, 319..320)).unwrap(),
                2 => dev.write(h.part_mut(1, 0..2), &[3.0, -3.0]).unwrap(),
                3 => dev.copy(y.view(1), h.view_mut(1)).unwrap(),
                4 => dev.rms_norm_heads(h.view_mut(n), &norm, 1e-5).unwrap(),
                // Another's memory where the norms were.
                _ => {
                    drop(std::mem::replace(&mut h, dev.alloc(1, 1).unwrap()));
                    h = dev.alloc(n, 320).unwrap();
                }
            }
            product(&h, n);
            product(&h, 1);
            product(&h, n);
        }
        // In place there is no rounding beside it.
        dev.rms_norm_heads(x.view_mut(n), &norm, 1e-5).unwrap();
        product(&x, n);
        all_of
    });
}

#[test]
fn the_best_of_rows() {
    // Rows of one part and of several, a window of them, and more rows than are found at a time.
    for (n, cols, k) in [(1, 3, 3), (2, 700, 40), (3, 5000, 128), (20, 2100, 2)] {
        let mut x = fill(&mut Rng(cols as u64), n * (cols + 3));
        x.iter_mut().step_by(3).for_each(|v| *v = (*v * 3.0).round());
        x.iter_mut().skip(5).step_by(11).for_each(|v| *v = f32::NEG_INFINITY);
        if n == 3 {
            (x[9], x[cols + 300]) = (f32::NAN, f32::INFINITY);
        }
        both(&format!("the {k} best of {cols}"), 0.0, |dev| {
            let b = buf(dev, &x, cols + 3);
            let mut best = Vec::new();
            dev.best(b.part(n, 2..cols + 2), k, &mut best).unwrap();
            best.into_iter().flat_map(|(id, v)| [id as f32, v]).collect()
        });
        assert!(gpu().best(buf(&gpu(), &x, cols + 3).view(n), cols + 4, &mut Vec::new()).is_err());
    }
}

#[test]
fn products_of_any_number_of_rows() {
    for (i, f) in FORMATS.iter().enumerate() {
        let cols = if f.block_len == 256 { 512 } else { 160 };
        let n = [1, 3, 8, 20, 40][i % 5];
        let x = Rng(i as u64).activations(n * cols);
        both(&format!("{} times {n} rows", f.name), 0.0, |dev| {
            let (w, u) = (weight(dev, f.dtype, 1, 9, cols, 5), weight(dev, DType::F32, 1, 4, cols, 6));
            let (x, bias) = (buf(dev, &x, cols), vector(dev, 9, 7));
            let mut out = dev.alloc(n, 16).unwrap();
            let mut other = buf(dev, &vec![0.5; 4 * n], 4);
            let first =
                Product { weight: &w, bias: Some(&bias), out: out.part_mut(n, 2..11), write: Write::Set };
            let second = Product { weight: &u, bias: None, out: other.view_mut(n), write: Write::Add };
            dev.matmul(x.view(n), &mut [first, second]).unwrap();
            let mut all_of = all(dev, &out);
            all_of.extend(all(dev, &other));
            all_of
        });
    }
}

#[test]
fn embeddings_from_host_and_device() {
    for f in FORMATS {
        let cols = f.block_len.max(64);
        both(f.name, 0.0, |dev| {
            let bytes = weights(f.dtype, 7, cols, Fill::Random, &mut Rng(3));
            let host = Weight::host(f.dtype, 1, 7, cols, HostBytes::from_vec(bytes)).unwrap();
            let there = dev.upload(host.clone()).unwrap();
            // A few are sent as others' results are; the rows of a prompt straight from where they are made.
            let (few, prompt) = (vec![6, 0, 6], (0..40).map(|i| i * 5 % 7).collect::<Vec<u32>>());
            let mut found = Vec::new();
            for ids in [few, prompt] {
                let n = ids.len();
                let (mut a, mut b) = (dev.alloc(n, cols + 8).unwrap(), dev.alloc(n, cols).unwrap());
                dev.embed(&host, &ids, 1.5, a.part_mut(n, 8..8 + cols)).unwrap();
                dev.embed(&host, &ids, 1.5, b.view_mut(n)).unwrap();
                let within: Vec<f32> = all(dev, &a).chunks(cols + 8).flat_map(|r| r[8..].to_vec()).collect();
                assert_eq!(within, all(dev, &b), "{}", f.name);
                dev.embed(&there, &ids, 1.5, a.part_mut(n, 8..8 + cols)).unwrap();
                found.extend(all(dev, &a));
                found.extend(all(dev, &b));
            }
            found
        });
    }
}

#[test]
fn feed_forward_layers_and_experts() {
    let (d, hidden, experts, used) = (256, 96, 7, 3);
    let kinds = [
        (DType::F32, DType::F32, Activation::Silu),
        (DType::Q4_K, DType::Q5_0, Activation::GeluTanh),
        (DType::F16, DType::Q8_0, Activation::Silu),
    ];
    for (i, (inner, down, act)) in kinds.into_iter().enumerate() {
        for n in [1, 11] {
            let x = Rng(i as u64).activations(n * d);
            both(&format!("{inner}, {down}, {n} rows"), 2e-6, |dev| {
                let layer = |count: usize, seed: u64| {
                    [
                        weight(dev, inner, count, hidden, d, seed),
                        weight(dev, inner, count, hidden, d, seed + 1),
                        weight(dev, down, count, d, hidden, seed + 2),
                    ]
                };
                let (one, many) = (layer(1, 10), layer(experts, 20));
                let f = Ffn { gate: &one[0], up: &one[1], down: &one[2], act };
                let e = Ffn { gate: &many[0], up: &many[1], down: &many[2], act };
                let router = weight(dev, DType::F32, 1, experts, d, 30);
                let correction = vector(dev, experts, 31);
                let x = buf(dev, &x, d);
                let (mut a, mut b) = (dev.alloc(n, d).unwrap(), dev.alloc(n, d).unwrap());
                dev.ffn(f, x.view(n), a.view_mut(n), Write::Set).unwrap();
                let r = Router {
                    weight: &router,
                    gating: Gating::Sigmoid,
                    correction: Some(&correction),
                    groups: None,
                    used,
                    normalize: true,
                    scale: 1.5,
                };
                let mut routes = Routes::default();
                dev.route(r, x.view(n), &mut routes).unwrap();
                dev.moe(e, &routes, Some(f), x.view(n), a.view_mut(n), Write::Add).unwrap();
                // Routes made elsewhere are taken too.
                let ids = (0..n * used).map(|i| (i * 3 % experts) as u32).collect();
                let given = Routes::new(used, ids, fill(&mut Rng(9), n * used));
                dev.moe(e, &given, None, x.view(n), b.view_mut(n), Write::Set).unwrap();
                let mut out = all(dev, &a);
                out.extend(all(dev, &b));
                out
            });
        }
    }
}

/// Routes are the device's until it routes again.
#[test]
fn old_routes_are_refused() {
    let dev = gpu();
    let (w, x) = (weight(&dev, DType::F32, 1, 4, 32, 1), buf(&dev, &[1.0; 32], 32));
    let e: Vec<Weight> = (0..3).map(|i| weight(&dev, DType::F32, 4, 32, 32, i)).collect();
    let r = Router {
        weight: &w,
        gating: Gating::Softmax,
        correction: None,
        groups: None,
        used: 2,
        normalize: false,
        scale: 1.0,
    };
    let (mut first, mut second) = (Routes::default(), Routes::default());
    dev.route(r, x.view(1), &mut first).unwrap();
    dev.route(r, x.view(1), &mut second).unwrap();
    let f = Ffn { gate: &e[0], up: &e[1], down: &e[2], act: Activation::Silu };
    let mut out = dev.alloc(1, 32).unwrap();
    assert!(dev.moe(f, &second, None, x.view(1), out.view_mut(1), Write::Set).is_ok());
    assert!(dev.moe(f, &first, None, x.view(1), out.view_mut(1), Write::Set).is_err());
}

/// Rows that see sinks, a turned ring and different depths; some are a prompt's.
fn visible(rows: usize, slots: usize) -> Visible {
    let mut v = Visible::default();
    for i in 0..rows as u32 {
        let span = |start, len, sink| Span { start, len, sink };
        v.set_prompt(if (2..6).contains(&i) { 4 } else { 0 });
        let back = slots as u32 - 9;
        match i % 3 {
            0 => v.push([span(0, 2, true), span(back, 9, false), span(4, 3 + i, false)]),
            1 => v.push([span(i, 1, false)]),
            _ => v.push([span(1, slots as u32 - 2, false)]),
        }
    }
    v
}

pub(crate) fn cache(dev: &Device, dtype: DType, slots: usize, width: usize, seed: u64) -> KvBuf {
    let mut c = dev.alloc_kv(dtype, slots, width).unwrap();
    let x = buf(dev, &fill(&mut Rng(seed), slots * width), width);
    let ids: Vec<u32> = (0..slots as u32).rev().collect();
    dev.kv_write(x.view(slots), &mut c, &ids).unwrap();
    c
}

#[test]
fn attention_over_every_cache_type() {
    let small = [DType::F16, DType::Q8_0, DType::Q4_0];
    let mixed = small.into_iter().flat_map(|a| small.map(|b| (a, b))).filter(|(a, b)| a != b);
    for (i, (dtype, second)) in KvBuf::TYPES.map(|t| (t, t)).into_iter().chain(mixed).enumerate() {
        let (heads, kv_heads, key, value) = [(4, 2, 32, 64), (9, 1, 64, 32), (2, 2, 96, 32)][i % 3];
        let (rows, slots) = (7, 150);
        let q = fill(&mut Rng(1), 2 * rows * heads * key);
        let v = visible(rows, slots);
        let run = |dev: &Device| {
            let (q, q_sink) = q.split_at(rows * heads * key);
            let (q, q_sink) = (buf(dev, q, heads * key), buf(dev, q_sink, heads * key));
            let k = cache(dev, dtype, slots, kv_heads * key, 2);
            let values = cache(dev, second, slots, kv_heads * value, 3);
            let a = Attention {
                heads,
                kv_heads,
                scale: 0.2,
                q: q.view(rows),
                q_sink: Some(q_sink.view(rows)),
                k: &k,
                v: &values,
                visible: &v,
            };
            let mut out = dev.alloc(rows, heads * value + 5).unwrap();
            let mut mass = buf(dev, &vec![0.25; kv_heads * slots], slots);
            let m = Mass { out: mass.view_mut(kv_heads), rows: 2..6 };
            dev.attention_mass(a, out.part_mut(rows, 5..heads * value + 5), Some(m)).unwrap();
            let plain = all(dev, &out);
            dev.attention(a, out.part_mut(rows, 5..heads * value + 5)).unwrap();
            assert_eq!(plain, all(dev, &out), "masses change no bit");
            [plain, all(dev, &mass)].concat()
        };
        let what = format!("attention over {dtype} and {second}");
        // On tensor cores queries, weights and what caches hold are rounded to f16.
        let halves = small.contains(&dtype) && small.contains(&second);
        let newer = if halves { 1e-3 } else { 1e-5 };
        both(&what, if asked().is_some() { newer } else { 1e-5 }, run);
        if halves {
            on(&Interpreted::like((9, 0), 1 << 30).device().unwrap(), &what, newer, run);
        }
    }
}

#[test]
fn mla_with_both_forms_of_weights() {
    let (heads, nope, rope, value, latent) = (5, 32, 16, 48, 64);
    for (i, dtype) in KvBuf::TYPES.into_iter().enumerate() {
        // A row of 16 is no block; block types go with f16, as they do by default.
        let second = if i < 3 { dtype } else { DType::F16 };
        let (rows, slots) = (4, 140);
        let q = fill(&mut Rng(1), 2 * rows * heads * (nope + rope));
        let v = visible(rows, slots);
        for (joint, kind, bar) in [
            (false, DType::F32, 1e-5),
            (true, DType::F16, 1e-5),
            (false, DType::Q8_0, 2e-2),
            (true, DType::Q5_0, 2e-2),
        ] {
            let run = |dev: &Device| {
                let width = heads * (nope + rope);
                let (q, q_sink) = q.split_at(rows * width);
                let (q, q_sink) = (buf(dev, q, width), buf(dev, q_sink, width));
                let (c, pe) = (cache(dev, dtype, slots, latent, 2), cache(dev, second, slots, rope, 3));
                let k_b = weight(dev, kind, heads, latent, nope, 4);
                let v_b = weight(dev, kind, heads, value, latent, 5);
                let kv_b = weight(dev, kind, 1, heads * (nope + value), latent, 6);
                let up = match joint {
                    true => MlaUp::Joint { kv_b: &kv_b },
                    false => MlaUp::Split { k_b: &k_b, v_b: &v_b },
                };
                let (q, q_sink) = (q.view(rows), Some(q_sink.view(rows)));
                let scale = 0.05;
                let (latent, k_pe, visible) = (&c, &pe, &v);
                let m = Mla { heads, nope, rope, value, scale, q, q_sink, latent, k_pe, up, visible };
                let (mut out, mut mass) =
                    (dev.alloc(rows, heads * value).unwrap(), dev.alloc(1, slots).unwrap());
                let counted = Mass { out: mass.view_mut(1), rows: 0..rows };
                dev.mla_mass(m, out.view_mut(rows), Some(counted)).unwrap();
                let mut all_of = all(dev, &out);
                if bar < 1e-3 {
                    all_of.extend(all(dev, &mass));
                }
                all_of
            };
            let what = format!("mla over {dtype} and {second}, weights {kind}, joint {joint}");
            both(&what, bar, run);
            if dtype == DType::F16 {
                let newer = Interpreted::like((9, 0), 1 << 30).device().unwrap();
                on(&newer, &format!("{what}, tensor cores"), bar, run);
            }
        }
    }
}

/// More heads than 16 go to kernels that round queries and weights to f16, in blocks of 16, 32 or 64 heads as there are rows: within 2^-10 of
/// the CPU's, and a row alone has the bits it has beside others.
#[test]
fn mla_of_many_heads() {
    let (nope, rope, value, latent, slots) = (16, 16, 8, 64, 50);
    for (capability, heads, rows) in [((8, 9), 20, 4), ((9, 0), 32, 5), ((9, 0), 128, 33)] {
        let dev = Interpreted::like(capability, 1 << 30).device().unwrap();
        let width = heads * (nope + rope);
        let q = fill(&mut Rng(1), 2 * rows * width);
        let (q, q_sink) = q.split_at(rows * width);
        let run = |dev: &Device, rows: usize| {
            let (q, q_sink) = (buf(dev, &q[..rows * width], width), buf(dev, &q_sink[..rows * width], width));
            let (c, pe) = (cache(dev, DType::F16, slots, latent, 2), cache(dev, DType::F16, slots, rope, 3));
            let k_b = weight(dev, DType::F32, heads, latent, nope, 4);
            let v_b = weight(dev, DType::F32, heads, value, latent, 5);
            let up = MlaUp::Split { k_b: &k_b, v_b: &v_b };
            let (q, q_sink) = (q.view(rows), Some(q_sink.view(rows)));
            // One decoded row sees what it sees beside the others.
            let mut visible = Visible::default();
            for i in 0..rows as u32 {
                let span = |start, len, sink| Span { start, len, sink };
                visible.push([span(0, 2, true), span(3 + i % 4, 9 + i, false)]);
            }
            let (scale, visible) = (0.2, &visible);
            let m = Mla { heads, nope, rope, value, scale, q, q_sink, latent: &c, k_pe: &pe, up, visible };
            let mut out = dev.alloc(rows, heads * value).unwrap();
            dev.mla(m, out.view_mut(rows)).unwrap();
            all(dev, &out)
        };
        let (want, got) = (run(&Device::new(CpuBackend::new(1)), rows), run(&dev, rows));
        let size = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let worst = want.iter().zip(&got).fold(0.0f32, |m, (w, g)| m.max((w - g).abs()));
        assert!(worst <= size / 1024.0, "{heads} heads: {worst:e} from the CPU's, of {size:e}");
        let alone = run(&dev, 1);
        assert!(
            alone.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{heads} heads: a row alone"
        );
    }
}

/// Writing, moving in order, saving and loading are exact; rotation and reading go through the host's own code.
#[test]
fn caches_keep_their_bytes() {
    for dtype in KvBuf::TYPES {
        let (slots, width) = (12, 96);
        let mut rng = Rng(7);
        let (x, angles) = (fill(&mut rng, 5 * width), fill(&mut rng, 3 * 16));
        both(&format!("cache of {dtype}"), 0.0, |dev| {
            let mut c = cache(dev, dtype, slots, width, 1);
            let x = buf(dev, &x, width);
            // The later of two rows for one slot stays.
            dev.kv_write(x.view(5), &mut c, &[3, 4, 9, 4, 0]).unwrap();
            // A chain: each reads what the one before wrote.
            dev.kv_move(&mut c, &[(3, 7), (7, 8), (4, 3), (0, 4)], 32..96).unwrap();
            dev.kv_move(&mut c, &[(9, 10)], 0..width).unwrap();
            let mut bytes = vec![0; 6 * c.row_bytes()];
            dev.kv_save(&c, &[3, 4, 5, 8, 10, 7], &mut bytes).unwrap();
            let row = c.row_bytes();
            dev.kv_load(&mut c, &[1, 2], &bytes[..2 * row]).unwrap();
            let cs = buf(dev, &angles, 16);
            let h = RopeHeads { head_dim: 32, offset: 8, dims: 16, style: RopeStyle::Halves };
            dev.kv_rotate(&mut c, &[2, 11, 5], 32..96, h, cs.view(3)).unwrap();
            let mut out = vec![0.0; slots * width];
            let ids: Vec<u32> = (0..slots as u32).collect();
            dev.kv_read(&c, &ids, 0..width, &mut out).unwrap();
            let mut part = vec![0.0; 2 * 10];
            dev.kv_read(&c, &[1, 8], 35..45, &mut part).unwrap();
            [out, part, bytes.iter().map(|b| f32::from(*b)).collect()].concat()
        });
    }
}
