//! Several columns: each group of weights is unpacked once, turned so that lane b of a register holds four values of sub-block b,
//! and multiplied by the columns at hand: no sums across lanes are left. Products are added in 16 bits as long as they fit.

use super::turned::{Turned, transpose};
use super::{Unpack, tree};
use crate::KernelError;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Columns multiplied at once, at most.
const COLUMNS: usize = 4;

/// A group of a column: values 4k..4k+4 of each sub-block in register k.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Group {
    q: [i8; 256],
    scale: [f32; 8],
    /// What unsigned weights have too much of, for each sub-block.
    off: [i32; 8],
    /// Minus the sums of q over the runs of 16, two to a lane, for formats with scales of runs.
    runs: [i16; 16],
    /// Sums to go with the minima: of sub-blocks, or of their first halves.
    sum: [f32; 8],
    /// Of their second halves.
    sum_hi: [f32; 8],
    pad: [f32; 8],
}

impl Group {
    const ZERO: Self = Self {
        q: [0; 256],
        scale: [0.0; 8],
        off: [0; 8],
        runs: [0; 16],
        sum: [0.0; 8],
        sum_hi: [0.0; 8],
        pad: [0.0; 8],
    };
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

/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn arrange<F: Unpack>(x: &Block, to: &mut Group) {
    // SAFETY: 256 bytes each.
    unsafe {
        let mut q = [_mm256_setzero_si256(); 8];
        each!(b < 8, { q[b] = _mm256_load_si256(x.q.as_ptr().cast::<__m256i>().add(b)) });
        let q = transpose(q);
        each!(k < 8, { _mm256_store_si256(to.q.as_mut_ptr().cast::<__m256i>().add(k), q[k]) });
    }
    to.scale = x.scale;
    if F::OFFSET != 0 {
        let shift = 7 - F::OFFSET.trailing_zeros();
        to.off = x.off.map(|v| v >> shift);
        // At most 127 * 16 each.
        to.runs = x.off16.map(|v| (v >> 7) as i16);
    }
    (to.sum, to.sum_hi) = if matches!(F::KIND, Kind::Min16) { (x.sum_lo, x.sum_hi) } else { (x.sum, x.sum) };
}

/// How many sums of two products fit 16 bits together.
const fn depth<F: Unpack>() -> usize {
    if F::SIGNED { 1 } else { [8, 4, 2][(F::BITS.saturating_sub(4)) as usize] }
}

/// Adds a group of a row times `C` columns to their lanes.
///
/// # Safety
/// `p` points to `F::BYTES` bytes, `x` to `C` groups; inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn group<F: Turned, const C: usize>(p: *const u8, x: *const Group, acc: &mut [__m256; C]) {
    // SAFETY: the caller's promise.
    unsafe {
        let s = F::scales(p);
        let q = F::turned(p);
        let one = _mm256_set1_epi16(1);
        let scaled = matches!(F::KIND, Kind::Scale16 | Kind::Min16);
        // Scales of the first and second runs of each sub-block, twice each, as products are added in pairs.
        let (mut lo, mut hi) = (one, one);
        let mut sum = [_mm256_setzero_si256(); C];
        if scaled {
            // Two scales a sub-block as 16-bit integers, then each twice.
            let both = _mm256_cvtepi8_epi16(s.sc);
            let first = _mm256_setr_epi8(
                0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13, 0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12,
                13, 12, 13,
            );
            lo = _mm256_shuffle_epi8(both, first);
            hi = _mm256_shuffle_epi8(both, _mm256_add_epi8(first, _mm256_set1_epi8(2)));
            if F::OFFSET != 0 {
                let both = _mm256_mullo_epi16(both, _mm256_set1_epi16(F::OFFSET as i16));
                each!(c < C, {
                    let runs = _mm256_load_si256((*x.add(c)).runs.as_ptr().cast());
                    sum[c] = _mm256_madd_epi16(both, runs);
                });
            }
        } else if F::OFFSET != 0 {
            each!(c < C, { sum[c] = _mm256_load_si256((*x.add(c)).off.as_ptr().cast()) });
        }
        // Columns inside: a register of weights is loaded once for all of them, and nothing else need stay in registers.
        let mut pairs = sum;
        each!(k < 8, {
            let size = if F::SIGNED { _mm256_abs_epi8(q[k]) } else { q[k] };
            let at = if scaled { k % 4 } else { k };
            let last = (at + 1).is_multiple_of(depth::<F>()) || at + 1 == if scaled { 4 } else { 8 };
            each!(c < C, {
                let a = _mm256_load_si256((*x.add(c)).q.as_ptr().cast::<__m256i>().add(k));
                let a = if F::SIGNED { _mm256_sign_epi8(a, q[k]) } else { a };
                let p = _mm256_maddubs_epi16(size, a);
                let first = at.is_multiple_of(depth::<F>());
                pairs[c] = if first { p } else { _mm256_add_epi16(pairs[c], p) };
                if last {
                    let by = if k < 4 { lo } else { hi };
                    sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(pairs[c], by));
                }
            });
        });
        each!(c < C, {
            let x = x.add(c);
            let by = _mm256_mul_ps(s.d, _mm256_load_ps((*x).scale.as_ptr()));
            acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), by, acc[c]);
            if matches!(F::KIND, Kind::Min | Kind::Min16) {
                acc[c] = _mm256_fmadd_ps(s.m, _mm256_load_ps((*x).sum.as_ptr()), acc[c]);
            }
            if matches!(F::KIND, Kind::Min16) {
                acc[c] = _mm256_fmadd_ps(s.m_hi, _mm256_load_ps((*x).sum_hi.as_ptr()), acc[c]);
            }
        });
    }
}

/// All rows by `C` columns.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns<F: Turned, const C: usize>(
    w: &[u8],
    row_bytes: usize,
    x: &[Group],
    (at, used): (usize, usize),
    y: &mut [f32],
) {
    let n = w.len() / row_bytes;
    let (whole, rest) = (row_bytes / F::BYTES, row_bytes % F::BYTES);
    assert!(x.len() == C * (whole + usize::from(rest > 0)));
    let half = n.div_ceil(2);
    for r in 0..half {
        // A row of each half: two streams. A last one without a partner is its own.
        let rows = [r, (r + half).min(n - 1)];
        let mut acc = [[_mm256_setzero_ps(); C]; 2];
        // SAFETY: groups of rows below n, `C` arranged ones for each; fetching ahead of the rows' end is harmless.
        unsafe {
            let mut p = rows.map(|r| w.as_ptr().add(r * row_bytes));
            let mut x = x.as_ptr();
            for _ in 0..whole {
                each!(i < 2, {
                    let mut ahead = 0;
                    while ahead < F::BYTES {
                        _mm_prefetch::<_MM_HINT_T0>(p[i].wrapping_add(1024 + ahead).cast());
                        ahead += 64;
                    }
                    group::<F, C>(p[i], x, &mut acc[i]);
                });
                (p, x) = (p.map(|p| p.add(F::BYTES)), x.add(C));
            }
            if rest > 0 {
                each!(i < 2, {
                    let mut padded = [0u8; MAX_GROUP_BYTES];
                    std::ptr::copy_nonoverlapping(p[i], padded.as_mut_ptr(), rest);
                    group::<F, C>(padded.as_ptr(), x, &mut acc[i]);
                });
            }
        }
        for (r, acc) in rows.into_iter().zip(acc) {
            for c in 0..used {
                y[(at + c) * n + r] = tree(acc[c]);
            }
        }
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn several<F: Turned>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let groups = row_bytes.div_ceil(F::BYTES);
    let mut s = SCRATCH.take();
    s.resize(s.len().max(groups * COLUMNS), Group::ZERO);
    for (i, x) in x.chunks(COLUMNS).enumerate() {
        let n = x.len().max(2);
        for g in 0..groups {
            for c in 0..n {
                // SAFETY: the caller's promise. A column that is missing is the last one again.
                unsafe { arrange::<F>(&x[c.min(x.len() - 1)][g], &mut s[g * n + c]) };
            }
        }
        let (arranged, at) = (&s[..groups * n], (COLUMNS * i, x.len()));
        // SAFETY: as above.
        unsafe {
            match n {
                2 => columns::<F, 2>(w, row_bytes, arranged, at, y),
                3 => columns::<F, 3>(w, row_bytes, arranged, at, y),
                _ => columns::<F, COLUMNS>(w, row_bytes, arranged, at, y),
            }
        }
    }
    SCRATCH.set(s);
}
