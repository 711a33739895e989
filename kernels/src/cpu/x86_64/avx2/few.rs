//! A few columns: every byte of the weights is read once, several rows at a time so that enough loads are in flight.

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

/// Adds a group's products with `C` columns to the lanes of one row.
///
/// # Safety
/// `p` points to `F::BYTES` bytes.
#[inline(always)]
unsafe fn group<F: Unpack, const C: usize>(p: *const u8, x: [&Block; C], acc: &mut [__m256; C]) {
    // SAFETY: the caller's promise.
    unsafe {
        let (q, s) = { (F::bytes(p), F::scales(p)) };
        // Shift that turns -128 sum(a) into -OFFSET sum(a).
        let shift = _mm_cvtsi32_si128(if F::OFFSET == 0 { 0 } else { 7 - F::OFFSET.trailing_zeros() as i32 });
        for (x, acc) in x.into_iter().zip(acc) {
            let a = |b: usize| _mm256_load_si256(x.q.as_ptr().add(32 * b).cast());
            let two = |b: usize| _mm256_hadd_epi32(dot::<F>(q[b], a(b)), dot::<F>(q[b + 1], a(b + 1)));
            // Each half of a register holds a run of 16, four sub-blocks side by side.
            let (low, high) = (_mm256_hadd_epi32(two(0), two(2)), _mm256_hadd_epi32(two(4), two(6)));
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
}

/// `R` rows, `apart` bytes from one to the next, by `C` columns.
///
/// # Safety
/// `w` points to the first row; each has `row_bytes`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<F: Unpack, const R: usize, const C: usize>(
    w: *const u8,
    apart: usize,
    row_bytes: usize,
    x: [&[Block]; C],
) -> [[f32; C]; R] {
    let mut acc = [[_mm256_setzero_ps(); C]; R];
    let (whole, rest) = (row_bytes / F::BYTES, row_bytes % F::BYTES);
    let mut x = x;
    for x in &mut x {
        *x = &x[..whole + usize::from(rest > 0)];
    }
    for i in 0..whole {
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: group i of row r, block i of each column; fetching ahead of the rows' end is harmless.
            unsafe {
                let p = w.add(r * apart + i * F::BYTES);
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(1024 + ahead).cast());
                    ahead += 64;
                }
                let mut blocks = [&x[0][0]; C];
                for c in 0..C {
                    blocks[c] = x[c].get_unchecked(i);
                }
                group::<F, C>(p, blocks, acc);
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
                let mut blocks = [&x[0][whole]; C];
                for c in 0..C {
                    blocks[c] = &x[c][whole];
                }
                group::<F, C>(padded.as_ptr(), blocks, acc);
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            out[r][c] = tree(acc[r][c]);
        }
    }
    out
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns<F: Unpack, const R: usize, const C: usize>(
    w: &[u8],
    row_bytes: usize,
    x: [&[Block]; C],
    y: &mut [f32],
    at: usize,
) {
    let n = w.len() / row_bytes;
    let mut put = |r: usize, c: usize, v: f32| y[(at + c) * n + r] = v;
    // Rows read at once lie far apart: streams without gaps are what the processor's prefetchers follow best.
    let part = n / R;
    for r in 0..part {
        // SAFETY: rows r, r + part, ... are there.
        let t = unsafe { tile::<F, R, C>(w.as_ptr().add(r * row_bytes), part * row_bytes, row_bytes, x) };
        for (i, t) in t.iter().enumerate() {
            t.iter().enumerate().for_each(|(c, v)| put(r + i * part, c, *v));
        }
    }
    for r in R * part..n {
        // SAFETY: row r is there.
        let t = unsafe { tile::<F, 1, C>(w.as_ptr().add(r * row_bytes), 0, row_bytes, x) };
        t[0].iter().enumerate().for_each(|(c, v)| put(r, c, *v));
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn few<F: Unpack>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let mut at = 0;
    while at < x.len() {
        // SAFETY: the caller's promise; `columns` stays inside `w` and checks `y`.
        unsafe {
            match x.len() - at {
                1 => columns::<F, 4, 1>(w, row_bytes, [x[at]], y, at),
                2 => columns::<F, 2, 2>(w, row_bytes, [x[at], x[at + 1]], y, at),
                _ => columns::<F, 2, 3>(w, row_bytes, [x[at], x[at + 1], x[at + 2]], y, at),
            }
        }
        at += 3;
    }
}
