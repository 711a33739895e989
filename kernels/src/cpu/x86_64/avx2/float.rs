//! Floating-point weights: 32 lanes in four registers per product.

use super::tree;
use crate::cpu::scalar::{self, Float};
use std::arch::x86_64::*;

/// A float format these kernels can read.
pub trait Load: Float {
    /// Eight elements.
    ///
    /// # Safety
    /// They can be read; the CPU has AVX2 and F16C.
    unsafe fn load(p: *const u8) -> __m256;
}

impl Load for scalar::F32 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }
}

impl Load for scalar::F16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
    }
}

impl Load for scalar::BF16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        let v = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(p.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v))
    }
}

/// Elements of a pass: the rows and columns of all passes over them stay in the first-level cache.
const LENGTH: usize = 512;

/// `R` rows by `C` columns. `L` of the four registers of lanes at a time: the lanes do not depend on each other, so with many
/// columns each pass over the row fills one.
///
/// # Safety
/// `w` points to `R` rows of `row_bytes`, which hold as many elements as each of `x`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn tile<F: Load, const R: usize, const C: usize, const L: usize>(
    w: *const u8,
    row_bytes: usize,
    x: [&[f32]; C],
) -> [[f32; C]; R] {
    let len = x[0].len();
    let whole = len / 32 * 32;
    let mut lanes = [[[_mm256_setzero_ps(); 4]; C]; R];
    for block in (0..whole).step_by(LENGTH) {
        for from in (0..4).step_by(L) {
            let mut acc = [[[_mm256_setzero_ps(); L]; C]; R];
            for r in 0..R {
                for c in 0..C {
                    acc[r][c].copy_from_slice(&lanes[r][c][from..from + L]);
                }
            }
            for i in (block..whole.min(block + LENGTH)).step_by(32) {
                for l in 0..L {
                    let at = i + 8 * (from + l);
                    let mut a = [_mm256_setzero_ps(); C];
                    for c in 0..C {
                        // SAFETY: eight elements from `at` < `whole` of every row and column.
                        a[c] = unsafe { _mm256_loadu_ps(x[c].as_ptr().add(at)) };
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: as above.
                        let b = unsafe { F::load(w.add(r * row_bytes + at * F::BYTES)) };
                        for c in 0..C {
                            acc[c][l] = _mm256_fmadd_ps(b, a[c], acc[c][l]);
                        }
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    lanes[r][c][from..from + L].copy_from_slice(&acc[r][c]);
                }
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            let l = &mut lanes[r][c];
            if whole < len {
                let mut f = [0.0f32; 32];
                // SAFETY: 32 floats; elements below `len` of row r.
                unsafe {
                    (0..4).for_each(|i| _mm256_storeu_ps(f.as_mut_ptr().add(8 * i), l[i]));
                    for i in whole..len {
                        let w = std::slice::from_raw_parts(w.add(r * row_bytes + i * F::BYTES), F::BYTES);
                        f[i - whole] = F::read(w).mul_add(x[c][i], f[i - whole]);
                    }
                    (0..4).for_each(|i| l[i] = _mm256_loadu_ps(f.as_ptr().add(8 * i)));
                }
            }
            out[r][c] = tree(_mm256_add_ps(_mm256_add_ps(l[0], l[2]), _mm256_add_ps(l[1], l[3])));
        }
    }
    out
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns<F: Load, const R: usize, const C: usize, const L: usize>(
    w: &[u8],
    row_bytes: usize,
    x: [&[f32]; C],
    y: &mut [f32],
    at: usize,
) {
    let n = w.len() / row_bytes;
    let x = x.map(|x| &x[..row_bytes / F::BYTES]);
    let mut put = |r: usize, c: usize, v: f32| y[(at + c) * n + r] = v;
    let mut r = 0;
    while r + R <= n {
        // SAFETY: rows r..r + R are there.
        let t = unsafe { tile::<F, R, C, L>(w.as_ptr().add(r * row_bytes), row_bytes, x) };
        for (i, t) in t.iter().enumerate() {
            t.iter().enumerate().for_each(|(c, v)| put(r + i, c, *v));
        }
        r += R;
    }
    while r < n {
        // SAFETY: row r is there.
        let t = unsafe { tile::<F, 1, C, L>(w.as_ptr().add(r * row_bytes), row_bytes, x) };
        t[0].iter().enumerate().for_each(|(c, v)| put(r, c, *v));
        r += 1;
    }
}

/// See `table::Rows`; for any number of columns.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn rows<F: Load>(w: &[u8], row_bytes: usize, x: &[&[f32]], y: &mut [f32]) {
    let mut at = 0;
    while at < x.len() {
        // SAFETY: the caller's promise; `columns` checks its slices.
        unsafe {
            match x.len() - at {
                1 => columns::<F, 3, 1, 4>(w, row_bytes, [x[at]], y, at),
                2 => columns::<F, 3, 2, 2>(w, row_bytes, [x[at], x[at + 1]], y, at),
                3 => columns::<F, 4, 3, 1>(w, row_bytes, [x[at], x[at + 1], x[at + 2]], y, at),
                _ => columns::<F, 3, 4, 1>(w, row_bytes, [x[at], x[at + 1], x[at + 2], x[at + 3]], y, at),
            }
        }
        at += 4;
    }
}
