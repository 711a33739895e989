//! Several columns: each group of weights is unpacked once, in an order in which four multiplications in a chain leave the sum
//! of each run of 16 in a lane of its own, and multiplied by the columns at hand, two rows at a time.

use super::runs::{Runs, transpose, two};
use super::tree;
use crate::KernelError;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Columns multiplied at once.
const COLUMNS: usize = 8;

/// A group of a column in the order of [`Runs`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Group {
    q: [i8; 256],
    /// What unsigned weights have too much of, for each run.
    off: [i32; 16],
    scale: [f32; 8],
    /// Sums to go with the minima: of sub-blocks, or of their first halves.
    sum: [f32; 8],
    /// Of their second halves.
    sum_hi: [f32; 8],
    pad: [f32; 8],
}

impl Group {
    const ZERO: Self =
        Self { q: [0; 256], off: [0; 16], scale: [0.0; 8], sum: [0.0; 8], sum_hi: [0.0; 8], pad: [0.0; 8] };
}

thread_local! {
    static SCRATCH: RefCell<Vec<Group>> = const { RefCell::new(vec![]) };
}

/// Bytes that a thread keeps for rows of `groups` groups.
pub const fn scratch_bytes(groups: usize) -> usize {
    groups * COLUMNS * size_of::<Group>()
}

/// Allocates them.
pub fn reserve(groups: usize) -> Result<(), KernelError> {
    SCRATCH.with_borrow_mut(|s| grow(s, groups * COLUMNS, Group::ZERO))
}

/// Where run i of 16 (in order) has its lane.
const RUN: [i32; 16] = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15];

/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn arrange<R: Runs>(x: &Block, to: &mut Group) {
    let q = x.q.as_ptr().cast::<u8>();
    let shift = _mm_cvtsi32_si128(if R::OFFSET == 0 { 0 } else { 7 - R::OFFSET.trailing_zeros() as i32 });
    // SAFETY: all inside the two blocks.
    unsafe {
        let t = transpose([
            two(q, q.add(128)),
            two(q.add(32), q.add(160)),
            two(q.add(64), q.add(192)),
            two(q.add(96), q.add(224)),
        ]);
        let into = to.q.as_mut_ptr().cast::<__m512i>();
        each!(j < 4, { _mm512_store_si512(into.add(j), t[j]) });
        if R::OFFSET != 0 {
            let order = _mm512_loadu_si512(RUN.as_ptr().cast());
            let off = _mm512_sra_epi32(_mm512_load_si512(x.off16.as_ptr().cast()), shift);
            _mm512_store_si512(to.off.as_mut_ptr().cast(), _mm512_permutexvar_epi32(order, off));
        }
    }
    to.scale = x.scale;
    (to.sum, to.sum_hi) = if matches!(R::KIND, Kind::Min16) { (x.sum_lo, x.sum_hi) } else { (x.sum, x.sum) };
}

/// Two rows' eight floats in a register.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn join(a: __m256, b: __m256) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b) }
}

/// Integer scales in the order of the lanes.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn ordered(sc: __m128i) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        _mm512_cvtepi8_epi32(_mm_shuffle_epi8(sc, order))
    }
}

/// Adds a group of two rows times `C` columns to their lanes.
///
/// # Safety
/// `p0` and `p1` point to `F::BYTES` bytes, `x` to `C` groups.
#[inline(always)]
unsafe fn group<F: Runs, const C: usize>(
    p0: *const u8,
    p1: *const u8,
    x: *const Group,
    acc: &mut [__m512; C],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (s0, s1) = (F::scales(p0), F::scales(p1));
        let (q0, q1) = (F::runs(p0), F::runs(p1));
        let d = join(s0.d, s1.d);
        let scaled = matches!(F::KIND, Kind::Scale16 | Kind::Min16);
        // Sums of 16 products fit 16 bits, and with them a multiplication that takes one step, where q is below 16.
        let small = F::OFFSET < 16;
        let zero = _mm512_setzero_si512();
        let (mut i0, mut i1) = (zero, zero);
        if scaled {
            (i0, i1) = (ordered(s0.sc), ordered(s1.sc));
            if small {
                let low = _mm512_set1_epi32(0xffff);
                (i0, i1) = (_mm512_and_si512(i0, low), _mm512_and_si512(i1, low));
            }
        }
        let (f0, f1) = (_mm512_cvtepi32_ps(i0), _mm512_cvtepi32_ps(i1));
        let (m, m_hi) = (join(s0.m, s1.m), join(s0.m_hi, s1.m_hi));
        each!(c < C, {
            let x = x.add(c);
            let a = (*x).q.as_ptr().cast::<__m512i>();
            let start = if F::OFFSET == 0 { zero } else { _mm512_load_si512((*x).off.as_ptr().cast()) };
            let (mut r0, mut r1) = (start, start);
            each!(j < 4, {
                let a = _mm512_load_si512(a.add(j));
                r0 = _mm512_dpbusd_epi32(r0, q0[j], a);
                r1 = _mm512_dpbusd_epi32(r1, q1[j], a);
            });
            let wide = |v: *const f32| _mm512_broadcast_f32x8(_mm256_load_ps(v));
            let dot = if scaled && !small {
                // Integers below 2^24 throughout: the floats are exact.
                let r0 = _mm512_mul_ps(_mm512_cvtepi32_ps(r0), f0);
                let r1 = _mm512_mul_ps(_mm512_cvtepi32_ps(r1), f1);
                _mm512_add_ps(
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(r0, r1),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(r0, r1),
                )
            } else {
                if scaled {
                    (r0, r1) = (_mm512_madd_epi16(r0, i0), _mm512_madd_epi16(r1, i1));
                }
                _mm512_cvtepi32_ps(_mm512_add_epi32(
                    _mm512_shuffle_i32x4::<0b10_00_10_00>(r0, r1),
                    _mm512_shuffle_i32x4::<0b11_01_11_01>(r0, r1),
                ))
            };
            let by = _mm512_mul_ps(d, wide((*x).scale.as_ptr()));
            acc[c] = _mm512_fmadd_ps(dot, by, acc[c]);
            if matches!(F::KIND, Kind::Min | Kind::Min16) {
                acc[c] = _mm512_fmadd_ps(m, wide((*x).sum.as_ptr()), acc[c]);
            }
            if matches!(F::KIND, Kind::Min16) {
                acc[c] = _mm512_fmadd_ps(m_hi, wide((*x).sum_hi.as_ptr()), acc[c]);
            }
        });
    }
}

/// All rows by `C` columns.
///
/// # Safety
/// `x` holds `C` groups for each group of a row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn columns<F: Runs, const C: usize>(
    w: &[u8],
    row_bytes: usize,
    x: &[Group],
    (at, used): (usize, usize),
    y: &mut [f32],
) {
    let n = w.len() / row_bytes;
    let (whole, rest) = (row_bytes / F::BYTES, row_bytes % F::BYTES);
    assert!(x.len() == C * (whole + usize::from(rest > 0)));
    let mut r = 0;
    while r < n {
        // A last row without a partner is its own.
        let r1 = (r + 1).min(n - 1);
        let mut acc = [_mm512_setzero_ps(); C];
        // SAFETY: groups of rows r and r1; fetching ahead of the rows' end is harmless.
        unsafe {
            let (mut p0, mut p1) = (w.as_ptr().add(r * row_bytes), w.as_ptr().add(r1 * row_bytes));
            let mut x = x.as_ptr();
            for _ in 0..whole {
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p0.wrapping_add(1024 + ahead).cast());
                    _mm_prefetch::<_MM_HINT_T0>(p1.wrapping_add(1024 + ahead).cast());
                    ahead += 64;
                }
                group::<F, C>(p0, p1, x, &mut acc);
                (p0, p1, x) = (p0.add(F::BYTES), p1.add(F::BYTES), x.add(C));
            }
            if rest > 0 {
                let mut padded = [[0u8; MAX_GROUP_BYTES]; 2];
                std::ptr::copy_nonoverlapping(p0, padded[0].as_mut_ptr(), rest);
                std::ptr::copy_nonoverlapping(p1, padded[1].as_mut_ptr(), rest);
                group::<F, C>(padded[0].as_ptr(), padded[1].as_ptr(), x, &mut acc);
            }
        }
        for c in 0..used {
            y[(at + c) * n + r] = tree(_mm512_castps512_ps256(acc[c]));
            y[(at + c) * n + r1] = tree(_mm512_extractf32x8_ps::<1>(acc[c]));
        }
        r += 2;
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn several<F: Runs>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let groups = row_bytes.div_ceil(F::BYTES);
    let mut s = SCRATCH.take();
    s.resize(s.len().max(groups * COLUMNS), Group::ZERO);
    for (i, x) in x.chunks(COLUMNS).enumerate() {
        let n = if x.len() <= 4 { 4 } else { COLUMNS };
        for g in 0..groups {
            for c in 0..n {
                // SAFETY: the caller's promise. Columns that are missing are the last one again.
                unsafe { arrange::<F>(&x[c.min(x.len() - 1)][g], &mut s[g * n + c]) };
            }
        }
        let arranged = &s[..groups * n];
        let at = (COLUMNS * i, x.len());
        // SAFETY: `n` groups for each group of a row.
        unsafe {
            if n == 4 {
                columns::<F, 4>(w, row_bytes, arranged, at, y);
            } else {
                columns::<F, COLUMNS>(w, row_bytes, arranged, at, y);
            }
        }
    }
    SCRATCH.set(s);
}
