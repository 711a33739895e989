//! Rounding activations to int8, one scale per 32 values, written once on lanes; the bits are the same on every ISA, for
//! no multiply-add is fused. Knows nothing of weights.

use super::isa::Isa;
use super::lanes::{Kernel, Simd, W};
use super::quantized::{BLOCK, Block};

/// How many steps the largest magnitude of a sub-block may become. The squared errors of 32 roundings scatter by a sixth
/// around their mean, so that the best of a few scales that hardly differ is clearly better than any one of them: with
/// these eight the squared error falls by a fifth (docs/numerics.md).
const LEVELS: [f32; 8] = [127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0];

/// Rounds a row: `out` is `x` in blocks of 256, the last filled up with zeros.
///
/// Each sub-block of 32 gets, of the scales that make its largest magnitude a whole number of `LEVELS` steps, the one of
/// least squared error, and then the least-squares scale for the integers found. Sub-blocks whose values are all below
/// 1e-30 become zeros; one with a NaN or an infinity gets the scale NaN, so that its products show it.
pub fn round(isa: Isa, x: &[f32], out: &mut [Block]) {
    assert_eq!(out.len(), x.len().div_ceil(BLOCK));
    isa.vectorize(Round { x, out });
}

struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [Block],
}

impl Kernel for Round<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, block) in self.x.chunks(BLOCK).zip(self.out) {
            match x.try_into() {
                Ok(x) => fill(s, x, block),
                Err(_) => {
                    let mut padded = [0.0; BLOCK];
                    padded[..x.len()].copy_from_slice(x);
                    fill(s, &padded, block);
                }
            }
        }
    }
}

#[inline(always)]
fn load<S: Simd>(s: S, x: &[f32; BLOCK], i: usize) -> S::V {
    let part: &[f32; W] = x[W * i..][..W].try_into().expect("16 values");
    // SAFETY: 16 values.
    unsafe { s.load(part.as_ptr()) }
}

#[inline(always)]
fn lanes<S: Simd>(s: S, v: S::V) -> [f32; W] {
    let mut a = [0.0; W];
    // SAFETY: 16 values.
    unsafe { s.store(v, a.as_mut_ptr()) };
    a
}

/// The sum of x - x over vectors `from..to`: 0, or NaN where a value is no number.
#[inline(always)]
fn differences<S: Simd>(s: S, x: &[f32; BLOCK], from: usize, to: usize) -> f32 {
    let mut sum = s.splat(0.0);
    for i in from..to {
        let v = load(s, x, i);
        sum = s.add(sum, s.sub(v, v));
    }
    s.sum(sum)
}

#[inline(always)]
fn fill<S: Simd>(s: S, x: &[f32; BLOCK], block: &mut Block) {
    // Steps per unit, and whether a sub-block is to be rounded at all, or has something that is not a number.
    let (mut ups, mut poison) = ([0.0f32; 8], [false; 8]);
    if differences(s, x, 0, BLOCK / W).is_nan() {
        for (b, p) in poison.iter_mut().enumerate() {
            *p = differences(s, x, 2 * b, 2 * b + 2).is_nan();
        }
    }
    for pair in 0..4 {
        let mut errors = [s.splat(0.0); W];
        for half in 0..2 {
            let b = 2 * pair + half;
            let (v0, v1) = (load(s, x, 2 * b), load(s, x, 2 * b + 1));
            let zero = s.splat(0.0);
            let max = s.hmax(s.max(s.max(v0, s.sub(zero, v0)), s.max(v1, s.sub(zero, v1))));
            if poison[b] || max <= 1e-30 {
                continue;
            }
            ups[b] = 1.0 / max;
            for (l, level) in LEVELS.iter().enumerate() {
                let (up, down) = (s.splat(level * ups[b]), s.splat(max * (1.0 / level)));
                let e0 = s.sub(v0, s.mul(s.round(s.mul(v0, up)), down));
                let e1 = s.sub(v1, s.mul(s.round(s.mul(v1, up)), down));
                errors[8 * half + l] = s.add(s.mul(e0, e0), s.mul(e1, e1));
            }
        }
        let errors = lanes(s, s.sums(&errors));
        for half in 0..2 {
            let e = &errors[8 * half..][..8];
            let best = (1..8).fold(0, |best, l| if e[l] < e[best] { l } else { best });
            ups[2 * pair + half] *= LEVELS[best];
        }
    }
    let (mut fits, mut sums) = ([s.splat(0.0); W], [s.splat(0.0); W]);
    for b in 0..8 {
        let up = s.splat(ups[b]);
        for half in 0..2 {
            let i = 2 * b + half;
            let clean = if ups[b] == 0.0 { s.splat(0.0) } else { load(s, x, i) };
            let r = s.round(s.mul(clean, up));
            fits[b] = s.add(fits[b], s.mul(clean, r));
            fits[8 + b] = s.add(fits[8 + b], s.mul(r, r));
            sums[8 * half + b] = r;
            let q: &mut [i8; W] = (&mut block.q[W * i..][..W]).try_into().expect("16 values");
            for (q, r) in q.iter_mut().zip(lanes(s, r)) {
                // With 1.5 2^23 added, the integer stands in the lowest bits.
                *q = (r + 12_582_912.0).to_bits() as i8;
            }
        }
    }
    let (fits, sums) = (lanes(s, s.sums(&fits)), lanes(s, s.sums(&sums)));
    for b in 0..8 {
        let (lo, hi) = (sums[b], sums[8 + b]);
        let scale = match (poison[b], ups[b] == 0.0) {
            (true, _) => f32::NAN,
            (_, true) => 0.0,
            _ => fits[b] / fits[8 + b],
        };
        block.scale[b] = scale;
        block.sum[b] = scale * (lo + hi);
        block.sum_lo[b] = scale * lo;
        block.sum_hi[b] = scale * hi;
        // Whole numbers below 2^24: exact.
        block.off16[2 * b] = -128 * lo as i32;
        block.off16[2 * b + 1] = -128 * hi as i32;
        block.off[b] = -128 * (lo + hi) as i32;
    }
}
