//! Weights for many columns: 32 rows at a time unpacked to bytes, interleaved so that a register holds four values of each of
//! 16 rows, with their scales beside them. Knows formats and their shapes; nothing of activations.

use super::Unpack;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Rows of a tile: two registers of 16.
pub const ROWS: usize = 32;

/// What a format looks like once unpacked: all that the multiplication knows of it, as the value of a generic parameter, so
/// that formats of one shape share its code. Scales of runs of 16 are multiplied into the bytes where they fit.
pub mod shape {
    /// Bytes `q + 128`; d.
    pub const SIGNED: usize = 0;
    /// Bytes `q`; d, m.
    pub const MIN: usize = 1;
    /// Bytes `q + 128`; the two integer scales, d.
    pub const SCALE16: usize = 2;
    /// Bytes `sc * q`; d, the two minima.
    pub const MIN16: usize = 3;
}

/// A format's shape.
pub const fn shape<F: Unpack>() -> usize {
    match F::KIND {
        Kind::Plain => shape::SIGNED,
        Kind::Min => shape::MIN,
        Kind::Scale16 if folds::<F>() => shape::SIGNED,
        Kind::Scale16 => shape::SCALE16,
        Kind::Min16 => shape::MIN16,
    }
}

/// Cache lines of a tile's sub-block: 16 of bytes, then two per scale.
pub const fn lines(shape: usize) -> usize {
    16 + 2 * [1, 2, 3, 3][shape]
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

/// Whether `sc * q` fits a byte: levels of at most 4 bits with sign by 6-bit scales (Q3_K, negated), or 2 by 4 bits (Q2_K).
const fn folds<F: Unpack>() -> bool {
    matches!(F::KIND, Kind::Min16) || (matches!(F::KIND, Kind::Scale16) && F::OFFSET == 4)
}

/// `sc * (q - offset) + plus` for part `part` of four, 64 bytes, with one scale per 16.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn fold(q: __m512i, sc: __m128i, part: i8, offset: i8, plus: i8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let lo = fold_half(_mm512_castsi512_si256(q), sc, 4 * part, offset);
        let hi = fold_half(_mm512_extracti64x4_epi64::<1>(q), sc, 4 * part + 2, offset);
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lo), hi);
        _mm512_add_epi8(both, _mm512_set1_epi8(plus))
    }
}

/// # Safety
/// As above.
#[inline(always)]
unsafe fn fold_half(q: __m256i, sc: __m128i, at: i8, offset: i8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let a = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sc, _mm_set1_epi8(at)));
        let b = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sc, _mm_set1_epi8(at + 1)));
        let s = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
        let q = _mm512_sub_epi16(_mm512_cvtepu8_epi16(q), _mm512_set1_epi16(i16::from(offset)));
        _mm512_cvtepi16_epi8(_mm512_mullo_epi16(q, s))
    }
}

/// Eight scales of rows `i` and `i + 8`.
///
/// # Safety
/// As above; `rows` are 16.
#[inline(always)]
unsafe fn two_rows(rows: *const __m256, i: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let z = _mm512_castps256_ps512(*rows.add(i));
        _mm512_insertf32x8::<1>(z, *rows.add(i + 8))
    }
}

/// Scales b and b + 4 of rows i, .., i + 3 and i + 8, .., i + 11 in register b.
///
/// # Safety
/// As above; `rows` are 16.
#[inline(always)]
unsafe fn eight_rows(rows: *const __m256, i: usize) -> [__m512d; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (two_rows(rows, i), two_rows(rows, i + 1));
        let (c, d) = (two_rows(rows, i + 2), two_rows(rows, i + 3));
        let (ab, ab2) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (cd, cd2) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, ab2) = (_mm512_castps_pd(ab), _mm512_castps_pd(ab2));
        let (cd, cd2) = (_mm512_castps_pd(cd), _mm512_castps_pd(cd2));
        [
            _mm512_unpacklo_pd(ab, cd),
            _mm512_unpackhi_pd(ab, cd),
            _mm512_unpacklo_pd(ab2, cd2),
            _mm512_unpackhi_pd(ab2, cd2),
        ]
    }
}

/// Eight scales of 16 rows, one per sub-block, to a line of each of eight sub-blocks, `step` lines apart.
///
/// # Safety
/// As above; `rows` are 16, `to` has room.
#[inline(always)]
unsafe fn turn(rows: *const __m256, to: *mut Line, step: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let (low, high) = (eight_rows(rows, 0), eight_rows(rows, 4));
        let first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        let second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        each!(b < 4, {
            let to = to.add(b * step).cast::<f64>();
            _mm512_store_pd(to, _mm512_permutex2var_pd(low[b], first, high[b]));
            _mm512_store_pd(to.add(4 * 8 * step), _mm512_permutex2var_pd(low[b], second, high[b]));
        });
    }
}

/// 16 bytes of rows r, r + 4, r + 8, r + 12, `STEP` bytes apart.
///
/// # Safety
/// As above; the rows from `p` on can be read, aligned to 16 bytes.
#[inline(always)]
unsafe fn four_rows<const STEP: usize>(p: *const u8, r: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let p = p.add(STEP * r);
        let z = _mm512_castsi128_si512(_mm_load_si128(p.cast()));
        let z = _mm512_inserti32x4::<1>(z, _mm_load_si128(p.add(4 * STEP).cast()));
        let z = _mm512_inserti32x4::<2>(z, _mm_load_si128(p.add(8 * STEP).cast()));
        _mm512_inserti32x4::<3>(z, _mm_load_si128(p.add(12 * STEP).cast()))
    }
}

/// 16 bytes of 16 rows, `STEP` bytes apart, as four registers of 4 bytes of 16 rows.
///
/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn turned<const STEP: usize>(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (four_rows::<STEP>(p, 0), four_rows::<STEP>(p, 1));
        let (c, d) = (four_rows::<STEP>(p, 2), four_rows::<STEP>(p, 3));
        let (ab, ab2) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd, cd2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab2, cd2),
            _mm512_unpackhi_epi64(ab2, cd2),
        ]
    }
}

/// Unpacks group `i` of 32 rows (the last one repeated past the end) into eight sub-blocks of the tile.
///
/// # Safety
/// `w` holds the rows; `tile` has room for eight sub-blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn unpack<F: Unpack>(w: &[u8], row_bytes: usize, i: usize, tile: *mut Line) {
    let s = const { shape::<F>() };
    let step = lines(s);
    let last = w.len() / row_bytes - 1;
    let mut bytes = MaybeUninit::<[Line; 16 * 4]>::uninit();
    // Rows' scales, up to three kinds.
    let mut scales = [[_mm256_setzero_ps(); 16]; 3];
    let mut padded = [0u8; MAX_GROUP_BYTES];
    for v in 0..2 {
        for r in 0..16 {
            let row = (16 * v + r).min(last);
            let at = row * row_bytes + i * F::BYTES;
            let left = (row + 1) * row_bytes - at;
            // SAFETY: a whole group of the row, or what is left of it in a buffer that holds any group.
            unsafe {
                let mut p = w.as_ptr().add(at);
                // A share of the next tile, in the order of memory, which the processor's prefetcher follows.
                let next = w.as_ptr().wrapping_add(w.len() + (ROWS * i + 16 * v + r) * F::BYTES);
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(ahead).cast());
                    ahead += 64;
                }
                if left < F::BYTES {
                    std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), left);
                    p = padded.as_ptr();
                }
                let [mut q0, mut q1, mut q2, mut q3] = F::bytes(p);
                let mut sc = F::scales(p);
                if s == shape::MIN16 {
                    q0 = fold(q0, sc.sc, 0, 0, 0);
                    q1 = fold(q1, sc.sc, 1, 0, 0);
                    q2 = fold(q2, sc.sc, 2, 0, 0);
                    q3 = fold(q3, sc.sc, 3, 0, 0);
                } else if s == shape::SIGNED && folds::<F>() {
                    // -sc * q lies in -128..=124; sc * q would not fit.
                    let negative = _mm_sub_epi8(_mm_setzero_si128(), sc.sc);
                    q0 = fold(q0, negative, 0, F::OFFSET as i8, -128);
                    q1 = fold(q1, negative, 1, F::OFFSET as i8, -128);
                    q2 = fold(q2, negative, 2, F::OFFSET as i8, -128);
                    q3 = fold(q3, negative, 3, F::OFFSET as i8, -128);
                    sc.d = _mm256_xor_ps(sc.d, _mm256_set1_ps(-0.0));
                } else if s != shape::MIN && F::OFFSET != 128 {
                    let plus = _mm512_set1_epi8((128 - F::OFFSET) as u8 as i8);
                    q0 = _mm512_add_epi8(q0, plus);
                    q1 = _mm512_add_epi8(q1, plus);
                    q2 = _mm512_add_epi8(q2, plus);
                    q3 = _mm512_add_epi8(q3, plus);
                }
                let to = bytes.as_mut_ptr().cast::<__m512i>().add(4 * r);
                _mm512_store_si512(to, q0);
                _mm512_store_si512(to.add(1), q1);
                _mm512_store_si512(to.add(2), q2);
                _mm512_store_si512(to.add(3), q3);
                if s == shape::SCALE16 {
                    let runs = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sc.sc));
                    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
                    let runs = _mm512_permutexvar_ps(even, runs);
                    scales[0][r] = _mm512_castps512_ps256(runs);
                    scales[1][r] = _mm512_extractf32x8_ps::<1>(runs);
                    scales[2][r] = sc.d;
                } else {
                    scales[0][r] = sc.d;
                    scales[1][r] = sc.m;
                    scales[2][r] = sc.m_hi;
                }
            }
        }
        for (m, rows) in scales.iter().enumerate().take((step - 16) / 2) {
            // SAFETY: 16 rows; the second register's lines follow the first's.
            unsafe { turn(rows.as_ptr(), tile.add(16 + 2 * m + v), step) };
        }
        for c in 0..16 {
            // SAFETY: `bytes` holds 16 rows of 256 bytes; each sub-block takes eight pairs of lines.
            unsafe {
                let v4 = turned::<256>(bytes.as_ptr().cast::<u8>().add(16 * c));
                let to = tile.add(c / 2 * step + 8 * (c % 2) + v).cast::<__m512i>();
                each!(j < 4, { _mm512_store_si512(to.add(2 * j), v4[j]) });
            }
        }
    }
}
