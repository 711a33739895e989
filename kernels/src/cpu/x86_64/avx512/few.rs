//! Two or three columns (for one see `one`): every byte of the weights is read once, several rows at a time so that enough loads are in flight.

use super::one::{One, column};
use super::{Unpack, tree};
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use std::arch::x86_64::*;

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
        for c in 0..C {
            let (x, acc) = (x[c], &mut acc[c]);
            let zero = _mm512_setzero_si512();
            let a = x.q.as_ptr().cast::<__m512i>();
            let d0 = _mm512_dpbusd_epi32(zero, q[0], _mm512_load_si512(a));
            let d1 = _mm512_dpbusd_epi32(zero, q[1], _mm512_load_si512(a.add(1)));
            let d2 = _mm512_dpbusd_epi32(zero, q[2], _mm512_load_si512(a.add(2)));
            let d3 = _mm512_dpbusd_epi32(zero, q[3], _mm512_load_si512(a.add(3)));
            // Four lanes hold a run of 16. Sum them; lane 4k + i of the result is then run 4i + (0, 1, 2, 3)[k].
            let d01 = _mm512_add_epi32(_mm512_unpacklo_epi32(d0, d1), _mm512_unpackhi_epi32(d0, d1));
            let d23 = _mm512_add_epi32(_mm512_unpacklo_epi32(d2, d3), _mm512_unpackhi_epi32(d2, d3));
            let mut runs = _mm512_add_epi32(_mm512_unpacklo_epi64(d01, d23), _mm512_unpackhi_epi64(d01, d23));
            if matches!(F::KIND, Kind::Scale16 | Kind::Min16) {
                if F::OFFSET != 0 {
                    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                    let off = { _mm512_load_si512(x.off16.as_ptr().cast()) };
                    let off = _mm512_permutexvar_epi32(order, _mm512_sra_epi32(off, shift));
                    runs = _mm512_add_epi32(runs, off);
                }
                let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                runs = _mm512_mullo_epi32(runs, _mm512_cvtepi8_epi32(_mm_shuffle_epi8(s.sc, order)));
            }
            let both = _mm512_add_epi32(runs, _mm512_shuffle_i32x4::<0b10_11_00_01>(runs, runs));
            let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11);
            let mut dot = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, both));
            if matches!(F::KIND, Kind::Plain) && F::OFFSET != 0 {
                let off = { _mm256_load_si256(x.off.as_ptr().cast()) };
                dot = _mm256_add_epi32(dot, _mm256_sra_epi32(off, shift));
            }
            *acc = _mm256_fmadd_ps(
                _mm256_cvtepi32_ps(dot),
                _mm256_mul_ps(s.d, _mm256_load_ps(x.scale.as_ptr())),
                *acc,
            );
            match F::KIND {
                Kind::Plain | Kind::Scale16 => {}
                Kind::Min => *acc = _mm256_fmadd_ps(s.m, _mm256_load_ps(x.sum.as_ptr()), *acc),
                Kind::Min16 => {
                    *acc = _mm256_fmadd_ps(s.m, _mm256_load_ps(x.sum_lo.as_ptr()), *acc);
                    *acc = _mm256_fmadd_ps(s.m_hi, _mm256_load_ps(x.sum_hi.as_ptr()), *acc);
                }
            }
        }
    }
}

/// `R` rows by `C` columns.
///
/// # Safety
/// `w` points to `R` rows of `row_bytes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn tile<F: Unpack, const R: usize, const C: usize>(
    w: *const u8,
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
        for r in 0..R {
            // SAFETY: group i of row r; fetching ahead of the rows' end is harmless.
            unsafe {
                let p = w.add(r * row_bytes + i * F::BYTES);
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(1024 + ahead).cast());
                    ahead += 64;
                }
                let mut blocks = [&x[0][0]; C];
                for c in 0..C {
                    blocks[c] = x[c].get_unchecked(i);
                }
                group::<F, C>(p, blocks, &mut acc[r]);
            }
        }
    }
    if rest > 0 {
        let mut padded = [0u8; MAX_GROUP_BYTES];
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the last `rest` bytes of row r, and a buffer that holds any group.
            unsafe {
                let p = w.add(r * row_bytes + whole * F::BYTES);
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn columns<F: Unpack, const R: usize, const C: usize>(
    w: &[u8],
    row_bytes: usize,
    x: [&[Block]; C],
    y: &mut [f32],
    at: usize,
) {
    let n = w.len() / row_bytes;
    let mut r = 0;
    while r + R <= n {
        // SAFETY: rows r..r + R are there.
        let t = unsafe { tile::<F, R, C>(w.as_ptr().add(r * row_bytes), row_bytes, x) };
        for (i, t) in t.iter().enumerate() {
            for (c, v) in t.iter().enumerate() {
                y[(at + c) * n + r + i] = *v;
            }
        }
        r += R;
    }
    while r < n {
        // SAFETY: row r is there.
        let t = unsafe { tile::<F, 1, C>(w.as_ptr().add(r * row_bytes), row_bytes, x) };
        for (c, v) in t[0].iter().enumerate() {
            y[(at + c) * n + r] = *v;
        }
        r += 1;
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn few<F: One>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    let mut at = 0;
    while at < x.len() {
        // SAFETY: the caller's promise; `columns` stays inside `w` and checks `y`.
        unsafe {
            match x.len() - at {
                1 => column::<F>(w, row_bytes, x[at], &mut y[at * n..]),
                2 => columns::<F, 2, 2>(w, row_bytes, [x[at], x[at + 1]], y, at),
                _ => columns::<F, 2, 3>(w, row_bytes, [x[at], x[at + 1], x[at + 2]], y, at),
            }
        }
        at += 3;
    }
}
