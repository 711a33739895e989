//! Rows of prompts in f16, as GPUs since compute capability 8.0 take them for all weights but F32: close to the CPU, whatever the call holds besides; rows that are decoded keep the CPU's bits.

use crate::models::{eval, load, options};
use crate::ops::{all, buf, cache, vector, weight};
use engine::Session;
use kernels::testing::{Rng, assert_bits};
use kernels::*;
use quant::DType;
use ref_tests::gpu::Interpreted;
use ref_tests::{compare, fixture, read_npy, read_tokens};

fn newer() -> Device {
    Interpreted::like((8, 0), 1 << 30).device().expect("the kernels load")
}

/// Of each row the tokens of its prompt: decoded, a prompt's, one too short for f16.
fn prompts() -> Vec<u32> {
    [vec![0; 3], vec![15; 15], vec![8; 3]].concat()
}

/// Of the largest result, against the CPU: where activations round to f16 here and not at all there (by 2^-11 at most, and errors add up as
/// products do), and where they round to int8 there, weights of any size.
const HALF: f32 = 1.0 / 2048.0;
const ROUNDED: f32 = 1e-1;

/// What `run` makes of all rows in one call, of those of the prompt in pieces, and of all rows decoded.
fn check(what: &str, d: usize, bar: f32, run: impl Fn(&Device, &[f32], &[u32]) -> Vec<f32>) {
    let prompts = prompts();
    let n = prompts.len();
    let x = Rng(4).activations(n * d);
    let (dev, cpu) = (newer(), Device::new(cpu::CpuBackend::new(1)));
    let (got, want) = (run(&dev, &x, &prompts), run(&cpu, &x, &vec![0; n]));
    let cols = got.len() / n;
    let size = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= bar * size, "{what}: value {i} is {g:e}, {w:e} on the CPU");
    }
    let decoded = run(&dev, &x, &vec![0; n]);
    for rows in [0..3, 18..21] {
        let part = rows.start * cols..rows.end * cols;
        assert_bits(&got[part.clone()], &decoded[part.clone()], || format!("{what}: rows not of prompts"));
    }
    assert!(got != decoded, "{what}: prompts take kernels of their own");
    for rows in [3..4, 4..14, 14..18] {
        let piece = run(&dev, &x[rows.start * d..rows.end * d], &prompts[rows.clone()]);
        assert_bits(&piece, &got[rows.start * cols..rows.end * cols], || {
            format!("{what}: rows {rows:?} alone")
        });
    }
}

#[test]
fn products() {
    // Formats that share an input: rows go in every way that one of them asks for.
    for (dtype, other, third, cols, bar) in [
        (DType::F16, DType::BF16, DType::F32, 96, HALF),
        (DType::BF16, DType::F32, DType::F32, 513, HALF),
        (DType::F16, DType::F32, DType::F32, 4128, HALF),
        (DType::Q8_0, DType::F16, DType::BF16, 96, ROUNDED),
        (DType::Q4_K, DType::F32, DType::Q6_K, 512, ROUNDED),
    ] {
        check(&format!("{dtype}, {cols} columns"), cols, bar, |dev, x, prompts| {
            let n = prompts.len();
            let (w, u) = (weight(dev, dtype, 1, 9, cols, 5), weight(dev, other, 1, 4, cols, 6));
            let q = weight(dev, third, 1, 3, cols, 7);
            let (x, bias) = (buf(dev, x, cols), vector(dev, 9, 7));
            let mut out = buf(dev, &vec![0.5; 16 * n], 16);
            let mut other = buf(dev, &vec![0.5; 4 * n], 4);
            let mut third = dev.alloc(n, 3).unwrap();
            let products = &mut [
                Product { weight: &w, bias: Some(&bias), out: out.part_mut(n, 2..11), write: Write::Set },
                Product { weight: &u, bias: None, out: other.view_mut(n), write: Write::Add },
                Product { weight: &q, bias: None, out: third.view_mut(n), write: Write::Set },
            ];
            dev.for_rows(prompts).matmul(x.view(n), products).unwrap();
            dev.copy(other.view(n), out.part_mut(n, 11..15)).unwrap();
            dev.copy(third.part(n, 0..1), out.part_mut(n, 0..1)).unwrap();
            all(dev, &out)
        });
    }
}

/// Of a hidden value gate and up are off, and it is rounded itself.
#[test]
fn feed_forward_layers_and_experts() {
    let (experts, used) = (5, 2);
    for (inner, down, act, d, hidden, bar) in [
        (DType::F16, DType::F16, Activation::Silu, 96, 70, 3.0 * HALF),
        (DType::BF16, DType::F16, Activation::GeluTanh, 64, 96, 3.0 * HALF),
        (DType::F16, DType::BF16, Activation::Silu, 4128, 7, 3.0 * HALF),
        (DType::Q4_K, DType::Q5_0, Activation::Silu, 256, 96, ROUNDED),
        (DType::Q8_0, DType::F16, Activation::GeluTanh, 64, 96, ROUNDED),
        (DType::F16, DType::MXFP4, Activation::Silu, 64, 32, ROUNDED),
    ] {
        check(&format!("{inner}, {down}, {d}"), d, bar, |dev, x, prompts| {
            let n = prompts.len();
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
            // What a row chooses is its own affair.
            let ids =
                x.chunks_exact(d).flat_map(|x| [0, 1].map(|k| (x[k].abs() * 1e4) as u32 % experts as u32));
            let routes =
                Routes::new(used, ids.collect(), x.chunks_exact(d).flat_map(|x| [x[2], x[3]]).collect());
            let (x, dev) = (buf(dev, x, d), dev.for_rows(prompts));
            let mut out = dev.alloc(n, d).unwrap();
            dev.ffn(f, x.view(n), out.view_mut(n), Write::Set).unwrap();
            dev.moe(e, &routes, Some(f), x.view(n), out.view_mut(n), Write::Add).unwrap();
            all(&dev, &out)
        });
    }
}

/// MLA's products by head: within the bars of the CPU, the same bits in pieces and alone, for heads of which a tile of 32 columns takes
/// all rows and for more.
#[test]
fn heads() {
    let (heads, nope, rope, value, latent, slots) = (3, 32, 16, 40, 64, 60);
    // Scales that keep scores small though weights may be large.
    for (joint, kind, n, scale, bar) in [
        (false, DType::F16, 35, 1e-5, 3.0 * HALF),
        (true, DType::BF16, 12, 0.05, 3.0 * HALF),
        (false, DType::Q8_0, 12, 1e-6, 2e-2),
        (true, DType::Q4_0, 35, 1e-6, 2e-2),
    ] {
        // Decoded, of a prompt, of one too short for f16.
        let prompts = [vec![0; 2], vec![n as u32; n], vec![8; 2]].concat();
        let q = Rng(1).activations(prompts.len() * heads * (nope + rope));
        let run = |dev: &Device, some: std::ops::Range<usize>| {
            let width = heads * (nope + rope);
            let q = buf(dev, &q[some.start * width..some.end * width], width);
            let (c, k_pe) =
                (cache(dev, DType::F16, slots, latent, 2), cache(dev, DType::F16, slots, rope, 3));
            let k_b = weight(dev, kind, heads, latent, nope, 4);
            let v_b = weight(dev, kind, heads, value, latent, 5);
            let kv_b = weight(dev, kind, 1, heads * (nope + value), latent, 6);
            let up = if joint { MlaUp::Joint { kv_b: &kv_b } } else { MlaUp::Split { k_b: &k_b, v_b: &v_b } };
            let mut visible = Visible::default();
            for i in some.clone() {
                visible.set_prompt(prompts[i] as usize);
                visible.push([Span { start: i as u32 % 5, len: 9 + i as u32, sink: false }]);
            }
            let (q, visible) = (q.view(some.len()), &visible);
            let m = Mla {
                heads,
                nope,
                rope,
                value,
                scale,
                q,
                q_sink: None,
                latent: &c,
                k_pe: &k_pe,
                up,
                visible,
            };
            let mut out = dev.alloc(some.len(), heads * value).unwrap();
            dev.mla(m, out.view_mut(some.len())).unwrap();
            all(dev, &out)
        };
        let what = |of: &str| format!("{kind}, joint {joint}: {of}");
        let (cpu, rows) = (Device::new(cpu::CpuBackend::new(1)), prompts.len());
        let (got, want) = (run(&newer(), 0..rows), run(&cpu, 0..rows));
        let size = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let worst = got.iter().zip(&want).fold(0.0f32, |m, (g, w)| m.max((g - w).abs() / size));
        println!("{}", what(&format!("{worst:.1e} from the CPU")));
        assert!(worst <= bar, "{}", what(&format!("{worst:e} from the CPU")));
        for some in [0..2, 2..3, 3..rows - 2, rows - 2..rows] {
            let part = some.start * heads * value..some.end * heads * value;
            assert_bits(&run(&newer(), some.clone()), &got[part], || what(&format!("rows {some:?} alone")));
        }
    }
}

/// So many rows and columns that the largest blocks are taken: the bits of smaller ones.
#[test]
fn large_products() {
    for (dtype, rows, n) in [(DType::F16, 4096, 512), (DType::Q8_0, 12_288, 256), (DType::Q4_K, 8192, 33)] {
        let cols = if dtype == DType::Q4_K { 256 } else { 32 };
        let dev = newer();
        let w = weight(&dev, dtype, 1, rows, cols, 3);
        let x = buf(&dev, &Rng(8).activations(n * cols), cols);
        let run = |some: std::ops::Range<usize>| {
            let prompts = vec![n as u32; some.len()];
            let mut to = dev.alloc(some.len(), rows).unwrap();
            let mut from = dev.alloc(some.len(), cols).unwrap();
            let ids: Vec<u32> = some.clone().map(|i| i as u32).collect();
            dev.gather(x.view(n), &ids, from.view_mut(some.len())).unwrap();
            let product = Product { weight: &w, bias: None, out: to.view_mut(some.len()), write: Write::Set };
            dev.for_rows(&prompts).matmul(from.view(some.len()), &mut [product]).unwrap();
            all(&dev, &to)
        };
        let whole = run(0..n);
        for some in [0..20, n - 3..n] {
            let part = run(some.clone());
            assert_bits(&part, &whole[some.start * rows..some.end * rows], || {
                format!("{dtype}, rows {some:?}")
            });
        }
    }
}

/// So many jobs that experts take larger tiles: the bits of the layer of each alone.
#[test]
fn experts_of_many_rows() {
    let (d, hidden, experts, n) = (64, 32, 2, 70);
    let dev = newer();
    let [gate, up] = [1, 2].map(|seed| weight(&dev, DType::Q8_0, experts, hidden, d, seed));
    let down = weight(&dev, DType::Q8_0, experts, d, hidden, 3);
    let e = Ffn { gate: &gate, up: &up, down: &down, act: Activation::Silu };
    let x = Rng(8).activations(n * d);
    let run = |some: std::ops::Range<usize>| {
        let ids = some.clone().map(|i| u32::from(i % 9 == 0)).collect();
        let routes = Routes::new(1, ids, vec![0.5; some.len()]);
        let from = buf(&dev, &x[some.start * d..some.end * d], d);
        let mut to = dev.alloc(some.len(), d).unwrap();
        let dev = dev.for_rows(&vec![n as u32; some.len()]);
        dev.moe(e, &routes, None, from.view(some.len()), to.view_mut(some.len()), Write::Set).unwrap();
        all(&dev, &to)
    };
    let whole = run(0..n);
    for some in [0..5, 50..n] {
        assert_bits(&run(some.clone()), &whole[some.start * d..some.end * d], || format!("rows {some:?}"));
    }
}

/// Whole models of block formats: nearer to Hugging Face's logits than by activations in int8, by the square of the steps' ratio of 28 for
/// weights and activations each; a quarter of that is asked for. Whatever the batches.
#[test]
fn quantised_models() {
    for (name, n) in
        [("q-llama-q4_k_m", 16), ("q-gemma3-qat", 11), ("q-deepseek2-q4_k_m", 11), ("q-deepseek2-mxfp4", 9)]
    {
        let name = &format!("quantised/{name}");
        let (_, vocab, reference) = read_npy(&fixture(name).join("logits.npy"));
        let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..n];
        let run = |capability, batch: usize| {
            let dev = Interpreted::like(capability, 1 << 30).device().expect("the kernels load");
            let model = load(name, Some(dev.clone().into()));
            let mut session = Session::new(&model, &options(n, batch, DType::F32)).expect("a session");
            let held = dev.held();
            let got = eval(&mut session, tokens);
            assert_eq!(held, dev.held(), "{name}: working memory stays as it was reserved");
            got
        };
        let whole = run((9, 0), n);
        let [half, int8] = [&whole, &run((7, 5), n)].map(|got| compare(&reference[..n * vocab], got, vocab));
        println!("{name}: {half:?}, by int8 {int8:?}");
        assert!(
            half.mean_kl <= 0.01 * int8.mean_kl && half.top1 == 1.0,
            "{name}: {half:?}, by int8 {int8:?}"
        );
        assert_bits(&run((9, 0), 7), &whole, || format!("{name}: batches of 7"));
    }
}

/// Whole models of F16 and of BF16 with experts: Hugging Face's logits, but for the rounding of activations to f16. Its error is a 28th of that
/// of int8, which costs 5e-4 to 9e-4 in the mean, and the distance goes by the square: some 1e-6, and rows scatter. The same bits for every
/// cut of the prompt, and no memory but what was reserved.
#[test]
fn models() {
    for (name, n) in [("mistral", 20), ("deepseek2-v2-lite", 11)] {
        let (_, vocab, reference) = read_npy(&fixture(name).join("logits.npy"));
        let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..n];
        let run = |batch: usize| {
            let dev = newer();
            let model = load(name, Some(dev.clone().into()));
            let before = dev.held();
            let mut session = Session::new(&model, &options(n, batch, DType::F32)).expect("a session");
            let held = dev.held();
            let got = eval(&mut session, tokens);
            assert!(before < held && held == dev.held(), "{name}: working memory stays as it was reserved");
            got
        };
        let whole = run(n);
        let d = compare(&reference[..n * vocab], &whole, vocab);
        println!("{name}: {d:?}");
        assert!(d.mean_kl <= 4e-6 && d.max_kl <= 1e-5 && d.top1 == 1.0, "{name}: {d:?}");
        for batch in [1, 7] {
            assert_bits(&run(batch), &whole, || format!("{name}: batches of {batch}"));
        }
    }
}
