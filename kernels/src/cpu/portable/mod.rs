//! Kernels in portable vectors (the `wide` crate: SSE2 or NEON as the target has them). Same formats and order as the
//! specification, but multiply and add may round separately, so results agree to a tolerance and not to the bit.

use super::quantized::Block;
use super::scalar::{Float, Format, Group, Kind, groups, tree, tree32};
use wide::{f32x8, i8x16, i16x16, i32x8};

#[inline(always)]
fn dot16(w: &[i8], a: &[i8]) -> i32x8 {
    let load = |s: &[i8]| i16x16::from(i8x16::new(s.try_into().expect("16 values")));
    load(w).dot(load(a))
}

/// One column per accumulator; a group is unpacked once for `C` columns.
#[inline(always)]
fn row<F: Format, const C: usize>(row: &[u8], x: &[&[Block]]) -> [f32; C] {
    let mut acc = [f32x8::ZERO; C];
    let mut g = Group::ZERO;
    groups::<F>(row, |i, src| {
        F::unpack(src, &mut g);
        for (x, acc) in x.iter().zip(&mut acc) {
            let x = &x[i];
            let mut dots = [0i32; 8];
            for (b, dot) in dots.iter_mut().enumerate() {
                let (at, mid, end) = (32 * b, 32 * b + 16, 32 * b + 32);
                let (lo, hi) = (dot16(&g.q[at..mid], &x.q[at..mid]), dot16(&g.q[mid..end], &x.q[mid..end]));
                *dot = match F::KIND {
                    Kind::Plain | Kind::Min => (lo + hi).reduce_add(),
                    Kind::Scale16 | Kind::Min16 => {
                        g.sc[2 * b] * lo.reduce_add() + g.sc[2 * b + 1] * hi.reduce_add()
                    }
                };
            }
            let dots = f32x8::from_i32x8(i32x8::new(dots));
            *acc = dots.mul_add(f32x8::new(g.d) * f32x8::new(x.scale), *acc);
            match F::KIND {
                Kind::Plain | Kind::Scale16 => {}
                Kind::Min => {
                    let m: [f32; 8] = g.m[..8].try_into().expect("8 minima");
                    *acc = f32x8::new(m).mul_add(f32x8::new(x.sum), *acc);
                }
                Kind::Min16 => {
                    let even = std::array::from_fn(|b| g.m[2 * b]);
                    let odd = std::array::from_fn(|b| g.m[2 * b + 1]);
                    *acc = f32x8::new(even).mul_add(f32x8::new(x.sum_lo), *acc);
                    *acc = f32x8::new(odd).mul_add(f32x8::new(x.sum_hi), *acc);
                }
            }
        }
    });
    acc.map(|a| tree(&a.to_array()))
}

/// `y[c * rows + r] = row r of w . x[c]`; `w` holds `y.len() / x.len()` rows of `row_bytes`.
pub fn rows<F: Format>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    for (r, w) in w.chunks_exact(row_bytes).enumerate() {
        let fours = x.chunks_exact(4);
        let rest = fours.remainder();
        let single = x.len() - rest.len();
        for (c, x) in fours.enumerate() {
            for (k, v) in row::<F, 4>(w, x).into_iter().enumerate() {
                y[(4 * c + k) * n + r] = v;
            }
        }
        for (c, x) in rest.chunks(1).enumerate() {
            y[(single + c) * n + r] = row::<F, 1>(w, x)[0];
        }
    }
}

/// The same for floating-point weights.
pub fn float_rows<F: Float>(w: &[u8], row_bytes: usize, x: &[&[f32]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    for (r, row) in w.chunks_exact(row_bytes).enumerate() {
        for (c, x) in x.iter().enumerate() {
            let mut acc = [f32x8::ZERO; 4];
            let (whole, rest) = (row.chunks_exact(32 * F::BYTES), x.len() / 32 * 32);
            for (w, x) in whole.zip(x.chunks_exact(32)) {
                for (l, acc) in acc.iter_mut().enumerate() {
                    let w: [f32; 8] =
                        std::array::from_fn(|i| F::read(&w[(8 * l + i) * F::BYTES..][..F::BYTES]));
                    let x: [f32; 8] = x[8 * l..][..8].try_into().expect("8 values");
                    *acc = f32x8::new(w).mul_add(f32x8::new(x), *acc);
                }
            }
            let mut lanes = [0.0; 32];
            for (l, a) in acc.iter().enumerate() {
                lanes[8 * l..][..8].copy_from_slice(&a.to_array());
            }
            for (i, w) in row[rest * F::BYTES..].chunks_exact(F::BYTES).enumerate() {
                lanes[i] += F::read(w) * x[rest + i];
            }
            y[c * n + r] = tree32(&lanes);
        }
    }
}
