//! One column, the product of every decode step: four rows at a time, so that enough loads are in flight.

use super::{Unpack, tree};
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use std::arch::x86_64::*;

/// Eight sums of four products each.
#[inline(always)]
unsafe fn dot<F: Unpack>(q: __m256i, a: __m256i) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let pairs = if F::SIGNED {
            _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q))
        } else {
            _mm256_maddubs_epi16(q, a)
        };
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    }
}

/// Those of sub-blocks `b` and `b + 1`, neighbours added.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn two<F: Unpack>(q: &[__m256i; 8], x: &Block, b: usize) -> __m256i {
    // SAFETY: two sub-blocks of the block.
    unsafe {
        let a = x.q.as_ptr().cast::<__m256i>().add(b);
        let first = dot::<F>(q[b], _mm256_load_si256(a));
        _mm256_hadd_epi32(first, dot::<F>(q[b + 1], _mm256_load_si256(a.add(1))))
    }
}

/// Rows multiplied at once.
const ROWS: usize = 4;

/// Adds a group's products to the lanes of one row.
///
/// # Safety
/// `p` points to `F::BYTES` bytes.
#[inline(always)]
unsafe fn group<F: Unpack>(p: *const u8, x: &Block, acc: &mut __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        let (q, s) = { (F::bytes(p), F::scales(p)) };
        // Shift that turns -128 sum(a) into -OFFSET sum(a).
        let shift = _mm_cvtsi32_si128(if F::OFFSET == 0 { 0 } else { 7 - F::OFFSET.trailing_zeros() as i32 });
        // Each half of a register holds a run of 16, four sub-blocks side by side.
        let low = _mm256_hadd_epi32(two::<F>(&q, x, 0), two::<F>(&q, x, 2));
        let high = _mm256_hadd_epi32(two::<F>(&q, x, 4), two::<F>(&q, x, 6));
        let mut lo = _mm256_permute2x128_si256::<0x20>(low, high);
        let mut hi = _mm256_permute2x128_si256::<0x31>(low, high);
        let f = |v: &[f32; 8]| _mm256_load_ps(v.as_ptr());
        if matches!(F::KIND, Kind::Scale16 | Kind::Min16) {
            if F::OFFSET != 0 {
                let off = |i: usize| _mm256_load_ps(x.off16.as_ptr().add(i).cast());
                let order = |v| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_castps_si256(v));
                let even = order(_mm256_shuffle_ps::<0b10_00_10_00>(off(0), off(8)));
                let odd = order(_mm256_shuffle_ps::<0b11_01_11_01>(off(0), off(8)));
                lo = _mm256_add_epi32(lo, _mm256_sra_epi32(even, shift));
                hi = _mm256_add_epi32(hi, _mm256_sra_epi32(odd, shift));
            }
            let even = _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(s.sc));
            lo = _mm256_mullo_epi32(lo, _mm256_cvtepi16_epi32(even));
            hi = _mm256_mullo_epi32(hi, _mm256_cvtepi16_epi32(_mm_srai_epi16::<8>(s.sc)));
        }
        let mut dot = _mm256_add_epi32(lo, hi);
        if matches!(F::KIND, Kind::Plain) && F::OFFSET != 0 {
            let off = { _mm256_load_si256(x.off.as_ptr().cast()) };
            dot = _mm256_add_epi32(dot, _mm256_sra_epi32(off, shift));
        }
        *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(s.d, f(&x.scale)), *acc);
        match F::KIND {
            Kind::Plain | Kind::Scale16 => {}
            Kind::Min => *acc = _mm256_fmadd_ps(s.m, f(&x.sum), *acc),
            Kind::Min16 => {
                *acc = _mm256_fmadd_ps(s.m, f(&x.sum_lo), *acc);
                *acc = _mm256_fmadd_ps(s.m_hi, f(&x.sum_hi), *acc);
            }
        }
    }
}

/// `R` rows, `apart` bytes from one to the next.
///
/// # Safety
/// `w` points to the first row; each has `row_bytes`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<F: Unpack, const R: usize>(
    w: *const u8,
    apart: usize,
    row_bytes: usize,
    x: &[Block],
) -> [f32; R] {
    let mut acc = [_mm256_setzero_ps(); R];
    let (whole, rest) = (row_bytes / F::BYTES, row_bytes % F::BYTES);
    let x = &x[..whole + usize::from(rest > 0)];
    for (i, x) in x[..whole].iter().enumerate() {
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: group i of row r; fetching ahead of the rows' end is harmless.
            unsafe {
                let p = w.add(r * apart + i * F::BYTES);
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(1024 + ahead).cast());
                    ahead += 64;
                }
                group::<F>(p, x, acc);
            }
        }
    }
    if rest > 0 {
        let mut padded = [0u8; MAX_GROUP_BYTES];
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the last `rest` bytes of row r, and a buffer that holds any group.
            unsafe {
                let p = w.add(r * apart + whole * F::BYTES);
                std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), rest);
                group::<F>(padded.as_ptr(), &x[whole], acc);
            }
        }
    }
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = tree(acc[r]);
    }
    out
}

/// See `table::Rows`; `x` is a single column.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn one<F: Unpack>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    assert!(x.len() == 1 && y.len() == n);
    // Rows read at once lie far apart: streams without gaps are what the processor's prefetchers follow best.
    let part = n / ROWS;
    for r in 0..part {
        // SAFETY: rows r, r + part, ... are there.
        let t = unsafe { rows::<F, ROWS>(w.as_ptr().add(r * row_bytes), part * row_bytes, row_bytes, x[0]) };
        t.iter().enumerate().for_each(|(i, v)| y[r + i * part] = *v);
    }
    for r in ROWS * part..n {
        // SAFETY: row r is there.
        [y[r]] = unsafe { rows::<F, 1>(w.as_ptr().add(r * row_bytes), 0, row_bytes, x[0]) };
    }
}
