//! Attention mass against the same f64 oracle, and its promises about bits.

use super::*;
use crate::KernelError;
use crate::Limits;
use crate::backend::Mass;
use std::ops::Range;

/// What the buffer holds before a call: mass is added to it.
const BEFORE: f32 = 0.25;

fn with_mass(
    isa: Isa,
    threads: usize,
    a: Attention<'_>,
    rows: Range<usize>,
    mass: &mut [f32],
) -> Result<Vec<f32>, KernelError> {
    let cols = a.heads * a.v.width() / a.kv_heads;
    let mut out = vec![f32::NAN; a.q.rows() * cols];
    let l = Limits {
        tokens: a.q.rows(),
        max_heads_out: cols,
        slots: a.k.slots(),
        heads: a.heads,
        mass: true,
        ..Default::default()
    };
    let mut mem = Memory::new(threads);
    mem.store.reserve(Memory::floats(&l))?;
    let mass = Mass { out: ViewMut::from_host(mass, a.k.slots()), rows };
    attention(&Pool::new(threads), isa, &mut mem, a, ViewMut::from_host(&mut out, cols), Some(mass))?;
    Ok(out)
}

fn with_mla_mass(
    isa: Isa,
    threads: usize,
    m: Mla<'_>,
    rows: Range<usize>,
    mass: &mut [f32],
) -> Result<Vec<f32>, KernelError> {
    let cols = m.heads * m.value;
    let mut out = vec![f32::NAN; m.q.rows() * cols];
    let l = Limits {
        tokens: m.q.rows(),
        max_heads_out: m.heads * m.latent.width().max(m.value),
        slots: m.latent.slots(),
        heads: m.heads,
        mass: true,
        ..Default::default()
    };
    let mut mem = Memory::new(threads);
    mem.store.reserve(Memory::floats(&l))?;
    let mass = Mass { out: ViewMut::from_host(mass, m.latent.slots()), rows };
    mla(&Pool::new(threads), isa, &mut mem, m, ViewMut::from_host(&mut out, cols), Some(mass))?;
    Ok(out)
}

/// Compares mass `[heads][slots]` with the oracle's; untouched slots must keep their bits, and every counted row must have
/// given `group` to each head of the cache.
fn check(got: &[f32], want: &[f64], slots: usize, given: usize, what: &str) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        if *w == 0.0 {
            assert_eq!(*g, BEFORE, "{what}: nobody sees entry {i}");
        }
        let w = w + f64::from(BEFORE);
        assert!((f64::from(*g) - w).abs() <= 3e-6 * w.max(1.0), "{what}: mass of entry {i} is {g}, not {w}");
    }
    for (g, head) in got.chunks_exact(slots).enumerate() {
        let sum: f64 = head.iter().map(|x| f64::from(*x) - f64::from(BEFORE)).sum();
        let off = (sum - given as f64).abs();
        assert!(off <= 1e-5 * given as f64 + 1e-7 * slots as f64, "{what}: head {g} got {sum}, not {given}");
    }
}

#[test]
fn mass_matches_f64() {
    let shapes =
        [(1, 1, 64, 64), (4, 1, 256, 256), (8, 2, 64, 64), (6, 2, 80, 48), (71, 1, 64, 64), (130, 2, 16, 32)];
    let mut rng = Rng::new(11);
    for (s, &(heads, kv_heads, kd, vd)) in shapes.iter().enumerate() {
        for (d, &depth) in [1usize, 31, 64, 129, 513].iter().enumerate() {
            let dtype = [DType::F32, DType::F16, DType::Q8_0][(s + d) % 3];
            if kv_heads * kd % dtype.format().block_len != 0 || kv_heads * vd % dtype.format().block_len != 0
            {
                continue;
            }
            let ring = (s + d) % 2 == 0 && depth > 8;
            let (n, slots) = ([1, 3, 70][d % 3], depth + 80);
            let k = cache(dtype, slots, kv_heads * kd, &mut rng);
            let v = cache(dtype, slots, kv_heads * vd, &mut rng);
            let (q, q2) = (rng.fill(n * heads * kd), rng.fill(n * heads * kd));
            for prompt in [0, 100] {
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
                // All rows, and the last one or two thirds.
                for rows in [0..n, n - n.div_ceil(3)..n] {
                    let mut want = vec![0.0; kv_heads * slots];
                    oracle_with(&a, |row, h, slot, p| {
                        if rows.contains(&row) {
                            want[h / (heads / kv_heads) * slots + slot] += p;
                        }
                    });
                    for isa in Isa::available() {
                        let mut mass = vec![BEFORE; kv_heads * slots];
                        let out = with_mass(isa, 2, a, rows.clone(), &mut mass).unwrap();
                        let what = format!(
                            "{}, {dtype}, {heads}/{kv_heads} heads, depth {depth}, prompt {prompt}",
                            isa.name()
                        );
                        assert!(out == run(isa, 2, a), "{what}: outputs change");
                        check(&mass, &want, slots, rows.len() * heads / kv_heads, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn latent_mass_matches_f64_in_both_forms() {
    let mut rng = Rng::new(12);
    let shapes = [(16, 32, 16, 32, 64), (3, 24, 8, 20, 96), (70, 16, 16, 16, 32)];
    for (s, &(heads, nope, rope, value, latent)) in shapes.iter().enumerate() {
        let case = MlaCase::new(heads, nope, value, latent, &mut rng);
        for (d, depth) in [1usize, 65, 129, 300].into_iter().enumerate() {
            let dtype = if (s + d) % 2 == 0 { DType::F32 } else { DType::F16 };
            let (n, slots) = ([1, 3, 70][(s + d) % 3], depth + 80);
            let (c, pe) = (cache(dtype, slots, latent, &mut rng), cache(dtype, slots, rope, &mut rng));
            let hd = nope + rope;
            let (q, mut q2) = (rng.fill(n * heads * hd), rng.fill(n * heads * hd));
            for (q, q2) in q.chunks_exact(hd).zip(q2.chunks_exact_mut(hd)) {
                q2[..nope].copy_from_slice(&q[..nope]);
            }
            let ring = depth > 8 && d % 2 == 1;
            for (prompt, joint) in [(0, false), (1, true), (100_000, false), (100_000, true)] {
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
                for rows in [0..n, n - n.div_ceil(3)..n] {
                    let mut want = vec![0.0; slots];
                    mla_oracle_with(&m, &case, |row, _, slot, p| {
                        if rows.contains(&row) {
                            want[slot] += p;
                        }
                    });
                    for isa in Isa::available() {
                        let mut mass = vec![BEFORE; slots];
                        let out = with_mla_mass(isa, 2, m, rows.clone(), &mut mass).unwrap();
                        let what = format!(
                            "{}, {dtype}, {heads} heads, depth {depth}, prompt {prompt}, joint {joint}",
                            isa.name()
                        );
                        assert!(out == run_mla(isa, 2, m), "{what}: outputs change");
                        check(&mass, &want, slots, rows.len() * heads, &what);
                    }
                }
            }
        }
    }
}

/// Kinds of rows, mixed: mostly a prompt, some decoding.
fn mixed(rows: Range<usize>, first: usize) -> Visible {
    let mut v = Visible::default();
    for i in rows {
        v.set_prompt([150, 150, 150, 0, 30][i / 10 % 5]);
        v.push([span(0, 4, true), span(4 + i / 3, first + i - i / 3, false)]);
    }
    v
}

#[test]
fn mass_depends_neither_on_threads_nor_on_the_cut() {
    let mut rng = Rng::new(13);
    let (heads, kv_heads, hd, n, slots) = (6, 2, 80, 150, 700);
    let k = cache(DType::F16, slots, kv_heads * hd, &mut rng);
    let v = cache(DType::F16, slots, kv_heads * hd, &mut rng);
    let q = rng.fill(n * heads * hd);
    let case = MlaCase::new(6, 24, 20, 96, &mut rng);
    let (c, pe) = (cache(DType::F16, slots, 96, &mut rng), cache(DType::F16, slots, 56, &mut rng));
    let cols = heads * hd;
    for isa in Isa::available() {
        let go = |latent: bool, threads: usize, step: usize| {
            let mut mass = vec![0.0; if latent { slots } else { kv_heads * slots }];
            for from in (0..n).step_by(step) {
                let rows = from..n.min(from + step);
                let counted = 0..rows.len();
                let visible = mixed(rows.clone(), 520);
                let q = View::from_host(&q[rows.start * cols..rows.end * cols], cols);
                if latent {
                    let (heads, nope, rope, value, up) = (6, 24, 56, 20, case.up(false));
                    let (latent, k_pe, visible) = (&c, &pe, &visible);
                    let m = Mla {
                        heads,
                        nope,
                        rope,
                        value,
                        scale: 0.2,
                        q,
                        q_sink: None,
                        latent,
                        k_pe,
                        up,
                        visible,
                    };
                    with_mla_mass(isa, threads, m, counted, &mut mass).unwrap();
                } else {
                    let (k, v, visible) = (&k, &v, &visible);
                    let a = Attention { heads, kv_heads, scale: 0.7, q, q_sink: None, k, v, visible };
                    with_mass(isa, threads, a, counted, &mut mass).unwrap();
                }
            }
            mass
        };
        for latent in [false, true] {
            let whole = go(latent, 1, n);
            for (threads, step) in [(2, n), (3, n), (2, 1), (2, 7), (2, 64), (3, 149)] {
                assert!(whole == go(latent, threads, step), "{threads} threads, steps of {step}");
            }
        }
    }
}

#[test]
fn mass_without_its_reserve_is_refused() {
    let (hd, slots) = (16, 6000);
    let mut rng = Rng::new(14);
    let k = cache(DType::F32, slots, hd, &mut rng);
    let q = rng.fill(32 * hd);
    let mut visible = Visible::default();
    visible.push([span(0, slots, false)]);
    let (heads, kv_heads, q) = (32, 1, View::from_host(&q, 32 * hd));
    let (k, v, visible) = (&k, &k, &visible);
    let a = Attention { heads, kv_heads, scale: 1.0, q, q_sink: None, k, v, visible };
    let mut out = vec![0.0; 32 * hd];
    let mut mass = vec![0.0; slots];
    let l = Limits { tokens: 1, max_heads_out: 32 * hd, slots, heads, ..Default::default() };
    let mut mem = Memory::new(1);
    mem.store.reserve(1000 + Memory::floats(&Limits { slots: 1, ..l })).unwrap();
    let mass = Mass { out: ViewMut::from_host(&mut mass, slots), rows: 0..1 };
    let out = ViewMut::from_host(&mut out, 32 * hd);
    let isa = Isa::available()[0];
    let e = attention(&Pool::new(1), isa, &mut mem, a, out, Some(mass)).unwrap_err();
    assert!(matches!(e, KernelError::Scratch { .. }), "{e}");
    assert!(Memory::floats(&Limits { mass: true, ..l }) > Memory::floats(&l) + 32 * slots);
}
