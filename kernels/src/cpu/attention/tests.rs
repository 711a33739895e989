//! Attention against a plain f64 oracle, over cache types, shapes, spans and ISAs; and its promises about bits.

use super::super::Pool;
use super::super::isa::Isa;
use super::{Memory, attention, mla};
use crate::backend::{Attention, Mla, MlaUp, Span, Visible};
use crate::{HostBytes, KvBuf, View, ViewMut, Weight};
use quant::DType;

mod mass;

/// A small generator: values in -1..1.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub fn fill(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }
}

fn types() -> impl Iterator<Item = DType> {
    KvBuf::TYPES.into_iter()
}

fn cache(dtype: DType, slots: usize, width: usize, rng: &mut Rng) -> KvBuf {
    let mut c = KvBuf::host(dtype, slots, width).unwrap();
    for i in 0..slots {
        let row = rng.fill(width);
        (dtype.format().quantize.unwrap())(&row, c.row_mut(i), None);
    }
    c
}

fn values(c: &KvBuf, slot: usize) -> Vec<f64> {
    let mut row = vec![0.0; c.width()];
    (c.dtype().format().dequantize)(c.row(slot), &mut row);
    row.into_iter().map(f64::from).collect()
}

fn entries(spans: &[Span]) -> Vec<(usize, bool)> {
    spans.iter().flat_map(|s| (s.start..s.start + s.len).map(|i| (i as usize, s.sink))).collect()
}

fn softmax(scores: &mut [f64]) {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    scores.iter_mut().for_each(|s| *s = (*s - max).exp());
    let sum: f64 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// The formula of `Device::attention`, in f64.
fn oracle(a: &Attention<'_>) -> Vec<f64> {
    oracle_with(a, |_, _, _, _| ())
}

/// The same; `f` gets row, head, slot and probability of every entry.
fn oracle_with(a: &Attention<'_>, mut f: impl FnMut(usize, usize, usize, f64)) -> Vec<f64> {
    let (kd, vd, group) = (a.k.width() / a.kv_heads, a.v.width() / a.kv_heads, a.heads / a.kv_heads);
    let mut out = Vec::new();
    for i in 0..a.q.rows() {
        let seen = entries(a.visible.row(i));
        let rows: Vec<_> = seen.iter().map(|s| (values(a.k, s.0), values(a.v, s.0), s.1)).collect();
        for h in 0..a.heads {
            let q = wide(&a.q.row(i)[h * kd..][..kd]);
            let q2 = wide(&a.q_sink.unwrap_or(a.q).row(i)[h * kd..][..kd]);
            let g = h / group;
            let mut p: Vec<f64> = rows
                .iter()
                .map(|(k, _, sink)| {
                    f64::from(a.scale) * dot(if *sink { &q2 } else { &q }, &k[g * kd..][..kd])
                })
                .collect();
            softmax(&mut p);
            p.iter().zip(&seen).for_each(|(p, s)| f(i, h, s.0, *p));
            out.extend((0..vd).map(|d| p.iter().zip(&rows).map(|(p, r)| p * r.1[g * vd + d]).sum::<f64>()));
        }
    }
    out
}

fn run(isa: Isa, threads: usize, a: Attention<'_>) -> Vec<f32> {
    let cols = a.heads * a.v.width() / a.kv_heads;
    let mut out = vec![f32::NAN; a.q.rows() * cols];
    let mut mem = Memory::new(threads);
    attention(&Pool::new(threads), isa, &mut mem, a, ViewMut::from_host(&mut out, cols), None).unwrap();
    out
}

fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= tolerance, "{what}: element {i} is {g}, not {w}");
    }
}

fn span(start: usize, len: usize, sink: bool) -> Span {
    Span { start: start as u32, len: len as u32, sink }
}

/// What every row sees: `depth + i + 1` entries, with sinks and a wrapped ring where asked.
fn visible(rows: usize, depth: usize, slots: usize, ring: bool, prompt: usize) -> Visible {
    let mut v = Visible::default();
    v.set_prompt(prompt);
    for i in 0..rows {
        let n = (depth + i + 1).min(slots - 8);
        if ring {
            // Four sinks, then a ring whose oldest entry lies near its end.
            let (ring, first) = (slots - 4, slots - 4 - 5 + i);
            let a = (first % ring, n.min(ring - first % ring));
            v.push([span(0, 4, true), span(4 + a.0, a.1, false), span(4, n - a.1, false)]);
        } else {
            v.push([span(3, n, false)]);
        }
    }
    v
}

#[test]
fn grouped_query_attention_matches_f64() {
    let shapes = [
        (1, 1, 64, 64),
        (4, 1, 256, 256),
        (8, 2, 64, 64),
        (6, 2, 80, 80),
        (7, 1, 32, 48),
        (5, 5, 40, 24),
        (71, 1, 64, 64),
        (2, 2, 128, 96),
        (8, 1, 100, 36),
    ];
    let depths =
        [1usize, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1025];
    let mut rng = Rng::new(1);
    let mut covered = 0;
    for isa in Isa::available() {
        for (i, &depth) in depths.iter().enumerate() {
            for (j, &(heads, kv_heads, kd, vd)) in shapes.iter().enumerate() {
                for (t, dtype) in types().enumerate() {
                    let block = dtype.format().block_len;
                    let fits = kv_heads * kd % block == 0 && kv_heads * vd % block == 0;
                    // Every pair of (depth, shape) and (shape, type) turns up; all triples would take minutes.
                    if !fits || (i + j + t) % 5 != 0 {
                        continue;
                    }
                    let (ring, prompt) = ((i + j) % 2 == 0 && depth > 8, [0, 100][(i + t) % 2]);
                    let slots = depth + 24;
                    let n = 1 + (i + j) % 4;
                    let (k, v) = (
                        cache(dtype, slots, kv_heads * kd, &mut rng),
                        cache(dtype, slots, kv_heads * vd, &mut rng),
                    );
                    let (q, q2) = (rng.fill(n * heads * kd), rng.fill(n * heads * kd));
                    let visible = visible(n, depth - 1, slots, ring, prompt);
                    let a = Attention {
                        heads,
                        kv_heads,
                        scale: 4.0 / (kd as f32).sqrt(),
                        q: View::from_host(&q, heads * kd),
                        q_sink: ring.then(|| View::from_host(&q2, heads * kd)),
                        k: &k,
                        v: &v,
                        visible: &visible,
                    };
                    let what = format!("{dtype}, {heads}/{kv_heads} heads of {kd}/{vd}, depth {depth}");
                    close(&run(isa, 2, a), &oracle(&a), 3e-6, &what);
                    covered += 1;
                }
            }
        }
    }
    assert!(covered > 200);
}

/// Threads, neighbours and the cutting of a prompt leave a row's bits alone.
#[test]
fn bits_depend_on_the_row_alone() {
    let mut rng = Rng::new(2);
    let (heads, kv_heads, hd, n, slots) = (6, 2, 80, 150, 700);
    let k = cache(DType::F32, slots, kv_heads * hd, &mut rng);
    let v = cache(DType::F32, slots, kv_heads * hd, &mut rng);
    let (q, q2) = (rng.fill(n * heads * hd), rng.fill(n * heads * hd));
    let all = |range: std::ops::Range<usize>| {
        let mut view = Visible::default();
        for i in range {
            // A prompt with a window over a ring and sinks; rows of decoding of another sequence in between.
            view.set_prompt(if i % 50 == 49 { 0 } else { 150 });
            if i % 50 == 49 {
                view.push([span(400, 1 + i * 2, false)]);
            } else {
                let first = i + 300;
                let (from, len) = (4 + first % 320, 280usize);
                let a = len.min(324 - from);
                view.push([span(0, 4, true), span(from, a, false), span(4, len - a, false)]);
            }
        }
        view
    };
    let cols = heads * hd;
    for isa in Isa::available() {
        let go = |threads: usize, rows: std::ops::Range<usize>| {
            let visible = all(rows.clone());
            let part = |x| View::from_host(&(x as &Vec<f32>)[rows.start * cols..rows.end * cols], cols);
            run(
                isa,
                threads,
                Attention {
                    heads,
                    kv_heads,
                    scale: 0.7,
                    q: part(&q),
                    q_sink: Some(part(&q2)),
                    k: &k,
                    v: &v,
                    visible: &visible,
                },
            )
        };
        let whole = go(1, 0..n);
        for threads in [2, 3] {
            assert_eq!(whole, go(threads, 0..n), "{threads} threads");
        }
        for step in [1, 7, 64, 149] {
            let mut parts = Vec::new();
            for from in (0..n).step_by(step) {
                parts.extend(go(2, from..n.min(from + step)));
            }
            assert!(whole == parts, "in steps of {step}");
        }
    }
}

/// Where slots lie in the cache does not change a bit: the ring may stand anywhere.
#[test]
fn bits_do_not_depend_on_slots() {
    let mut rng = Rng::new(3);
    let (hd, n) = (64, 333);
    let (rows_k, rows_v, q) = (rng.fill(n * hd), rng.fill(n * hd), rng.fill(2 * hd));
    for isa in Isa::available() {
        for prompt in [0, 9] {
            let mut results = Vec::new();
            for shift in [0, 1, 63, 200] {
                let mut k = KvBuf::host(DType::F32, n, hd).unwrap();
                let mut v = KvBuf::host(DType::F32, n, hd).unwrap();
                for i in 0..n {
                    let slot = (i + shift) % n;
                    let copy = DType::F32.format().quantize.unwrap();
                    copy(&rows_k[i * hd..][..hd], k.row_mut(slot), None);
                    copy(&rows_v[i * hd..][..hd], v.row_mut(slot), None);
                }
                let mut visible = Visible::default();
                visible.set_prompt(prompt);
                visible.push([span(shift, n - shift, false), span(0, shift, false)]);
                let a = Attention {
                    heads: 2,
                    kv_heads: 1,
                    scale: 1.0,
                    q: View::from_host(&q, 2 * hd),
                    q_sink: None,
                    k: &k,
                    v: &v,
                    visible: &visible,
                };
                results.push(run(isa, 2, a));
            }
            assert!(results.windows(2).all(|w| w[0] == w[1]));
        }
    }
}

#[test]
fn huge_and_infinite_scores_give_numbers() {
    let hd = 16;
    for isa in Isa::available() {
        for prompt in [0, 50] {
            for (value, scale) in
                [(1e30f32, 1.0), (3e4, 3e4), (f32::INFINITY, 1.0), (f32::NAN, 1.0), (-1e38, 1e30)]
            {
                let n = 70;
                let mut rng = Rng::new(4);
                let (mut k, v) = (cache(DType::F32, n, hd, &mut rng), cache(DType::F32, n, hd, &mut rng));
                let mut row = vec![0.0; hd];
                row[0] = value;
                (DType::F32.format().quantize.unwrap())(&row, k.row_mut(40), None);
                let q = vec![1.0; hd];
                let mut visible = Visible::default();
                visible.set_prompt(prompt);
                visible.push([span(0, n, false)]);
                let q = View::from_host(&q, hd);
                let a = Attention {
                    heads: 1,
                    kv_heads: 1,
                    scale,
                    q,
                    q_sink: None,
                    k: &k,
                    v: &v,
                    visible: &visible,
                };
                let out = run(isa, 1, a);
                assert!(out.iter().all(|x| x.abs() <= 1.0), "{value}: {out:?}");
                if value > 0.0 {
                    close(&out, &values(&v, 40), 1e-6, "the huge score takes all");
                }
            }
        }
    }
}

/// A stack of f32 matrices.
fn weight(count: usize, rows: usize, cols: usize, data: &[f32]) -> Weight {
    let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    Weight::host(DType::F32, count, rows, cols, HostBytes::from_vec(bytes)).unwrap()
}

struct MlaCase {
    heads: usize,
    latent: usize,
    k_b: Weight,
    v_b: Weight,
    kv_b: Weight,
}

impl MlaCase {
    fn new(heads: usize, nope: usize, value: usize, latent: usize, rng: &mut Rng) -> Self {
        let joint = rng.fill(heads * (nope + value) * latent);
        let at = |h: usize, r: usize, l: usize| joint[(h * (nope + value) + r) * latent + l];
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for h in 0..heads {
            for l in 0..latent {
                k.extend((0..nope).map(|d| at(h, d, l)));
            }
            for d in 0..value {
                v.extend((0..latent).map(|l| at(h, nope + d, l)));
            }
        }
        Self {
            heads,
            latent,
            k_b: weight(heads, latent, nope, &k),
            v_b: weight(heads, value, latent, &v),
            kv_b: weight(1, heads * (nope + value), latent, &joint),
        }
    }

    fn up(&self, joint: bool) -> MlaUp<'_> {
        if joint {
            MlaUp::Joint { kv_b: &self.kv_b }
        } else {
            MlaUp::Split { k_b: &self.k_b, v_b: &self.v_b }
        }
    }
}

fn mla_oracle(m: &Mla<'_>, case: &MlaCase) -> Vec<f64> {
    mla_oracle_with(m, case, |_, _, _, _| ())
}

/// The same; `f` gets row, head, slot and probability of every entry.
fn mla_oracle_with(m: &Mla<'_>, case: &MlaCase, mut f: impl FnMut(usize, usize, usize, f64)) -> Vec<f64> {
    let (hd, latent) = (m.nope + m.rope, case.latent);
    let mut w = vec![0.0f32; case.heads * (m.nope + m.value) * latent];
    (DType::F32.format().dequantize)(case.kv_b.matrix(0), &mut w);
    let w = wide(&w);
    let mut out = Vec::new();
    for i in 0..m.q.rows() {
        let seen = entries(m.visible.row(i));
        let rows: Vec<_> = seen.iter().map(|s| (values(m.latent, s.0), values(m.k_pe, s.0), s.1)).collect();
        for h in 0..m.heads {
            let up = |r: usize| &w[(h * (m.nope + m.value) + r) * latent..][..latent];
            let q = wide(&m.q.row(i)[h * hd..][..hd]);
            let q2 = wide(&m.q_sink.unwrap_or(m.q).row(i)[h * hd..][..hd]);
            let mut absorbed = vec![0.0; latent];
            for (d, q) in q[..m.nope].iter().enumerate() {
                absorbed.iter_mut().zip(up(d)).for_each(|(a, w)| *a += q * w);
            }
            let mut p: Vec<f64> = rows
                .iter()
                .map(|(c, pe, sink)| {
                    let k = dot(&absorbed, c);
                    let q = if *sink { &q2 } else { &q };
                    f64::from(m.scale) * (k + dot(&q[m.nope..], pe))
                })
                .collect();
            softmax(&mut p);
            p.iter().zip(&seen).for_each(|(p, s)| f(i, h, s.0, *p));
            let mut mix = vec![0.0; latent];
            for (p, r) in p.iter().zip(&rows) {
                mix.iter_mut().zip(&r.0).for_each(|(m, c)| *m += p * c);
            }
            out.extend((0..m.value).map(|d| dot(up(m.nope + d), &mix)));
        }
    }
    out
}

fn run_mla(isa: Isa, threads: usize, m: Mla<'_>) -> Vec<f32> {
    let cols = m.heads * m.value;
    let mut out = vec![f32::NAN; m.q.rows() * cols];
    let mut mem = Memory::new(threads);
    mla(&Pool::new(threads), isa, &mut mem, m, ViewMut::from_host(&mut out, cols), None).unwrap();
    out
}

#[test]
fn latent_attention_matches_f64_in_both_forms() {
    let mut rng = Rng::new(5);
    let shapes = [(16, 32, 16, 32, 64), (3, 24, 8, 20, 96), (70, 16, 16, 16, 32), (1, 128, 64, 128, 512)];
    for (s, &(heads, nope, rope, value, latent)) in shapes.iter().enumerate() {
        let case = MlaCase::new(heads, nope, value, latent, &mut rng);
        for (t, dtype) in types().enumerate() {
            for (d, depth) in [1usize, 17, 64, 65, 129, 300].into_iter().enumerate() {
                let pe_type = if rope % dtype.format().block_len == 0 { dtype } else { DType::F32 };
                if (s + t + d) % 3 != 0 {
                    continue;
                }
                let slots = depth + 80;
                let n = [1, 3, 70][d % 3];
                let (c, pe) = (cache(dtype, slots, latent, &mut rng), cache(pe_type, slots, rope, &mut rng));
                let hd = nope + rope;
                let (q, mut q2) = (rng.fill(n * heads * hd), rng.fill(n * heads * hd));
                for (q, q2) in q.chunks_exact(hd).zip(q2.chunks_exact_mut(hd)) {
                    q2[..nope].copy_from_slice(&q[..nope]);
                }
                let ring = depth > 8 && d % 2 == 0;
                for (prompt, joint) in [(0, false), (0, true), (1, false), (100_000, false), (100_000, true)]
                {
                    let visible = visible(n, depth - 1, slots, ring, prompt);
                    let m = Mla {
                        heads,
                        nope,
                        rope,
                        value,
                        scale: 1.5 / ((nope * latent) as f32).sqrt(),
                        q: View::from_host(&q, heads * hd),
                        q_sink: ring.then(|| View::from_host(&q2, heads * hd)),
                        latent: &c,
                        k_pe: &pe,
                        up: case.up(joint),
                        visible: &visible,
                    };
                    let want = mla_oracle(&m, &case);
                    let size = want.iter().fold(0.0f64, |a, x| a.max(x.abs()));
                    let what =
                        format!("{dtype}, {heads} heads, depth {depth}, prompt {prompt}, joint {joint}");
                    for isa in Isa::available() {
                        close(&run_mla(isa, 2, m), &want, 2e-5 * size, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn latent_attention_s_bits_depend_on_the_row_alone() {
    let mut rng = Rng::new(6);
    let case = MlaCase::new(3, 24, 20, 96, &mut rng);
    let (n, slots, cols) = (140, 500, 3 * 32);
    let (c, pe) = (cache(DType::F32, slots, 96, &mut rng), cache(DType::F32, slots, 8, &mut rng));
    let q = rng.fill(n * cols);
    for isa in Isa::available() {
        let go = |threads: usize, rows: std::ops::Range<usize>| {
            let mut visible = Visible::default();
            for i in rows.clone() {
                visible.set_prompt([140, 140, 140, 0, 30][i / 10 % 5]);
                visible.push([span(0, 300 + i, false)]);
            }
            let q = View::from_host(&q[rows.start * cols..rows.end * cols], cols);
            let (latent, k_pe, up) = (&c, &pe, case.up(false));
            let m = Mla {
                heads: 3,
                nope: 24,
                rope: 8,
                value: 20,
                scale: 0.2,
                q,
                q_sink: None,
                latent,
                k_pe,
                up,
                visible: &visible,
            };
            run_mla(isa, threads, m)
        };
        let whole = go(1, 0..n);
        for threads in [2, 3] {
            assert!(whole == go(threads, 0..n), "{threads} threads");
        }
        for step in [1, 9, 64] {
            let mut parts = Vec::new();
            for from in (0..n).step_by(step) {
                parts.extend(go(2, from..n.min(from + step)));
            }
            assert!(whole == parts, "in steps of {step}");
        }
    }
}

#[test]
fn calls_beyond_the_reserve_are_refused() {
    let hd = 64;
    let mut mem = Memory::new(1);
    mem.store.reserve(100).unwrap();
    let mut rng = Rng::new(7);
    let k = cache(DType::F32, 300, hd, &mut rng);
    let q = rng.fill(hd);
    let mut visible = Visible::default();
    visible.push([span(0, 300, false)]);
    let q = View::from_host(&q, hd);
    let a = Attention { heads: 1, kv_heads: 1, scale: 1.0, q, q_sink: None, k: &k, v: &k, visible: &visible };
    let mut out = vec![0.0; hd];
    let isa = Isa::available()[0];
    let e = attention(&Pool::new(1), isa, &mut mem, a, ViewMut::from_host(&mut out, hd), None).unwrap_err();
    assert!(e.to_string().contains("reserve"), "{e}");
}
