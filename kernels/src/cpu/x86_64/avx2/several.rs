//! Several columns: each group of weights is unpacked once, turned so that lane b of a register holds four values of sub-block b,
//! and multiplied by the columns at hand: no sums across lanes are left. Products are added in 16 bits as long as they fit.

use super::{Unpack, few, tree};
use crate::KernelError;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Columns multiplied at once.
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

/// Dword k of register b to dword b of register k.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn transpose(x: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = _mm256_setzero_si256();
        let mut t = [zero; 8];
        // Pairs of registers, then fours, then halves.
        each!(i < 4, {
            t[2 * i] = _mm256_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
        });
        let mut u = [zero; 8];
        each!(i < 2, {
            each!(k < 2, {
                u[4 * i + 2 * k] = _mm256_unpacklo_epi64(t[4 * i + k], t[4 * i + k + 2]);
                u[4 * i + 2 * k + 1] = _mm256_unpackhi_epi64(t[4 * i + k], t[4 * i + k + 2]);
            });
        });
        let mut q = [zero; 8];
        each!(k < 4, {
            q[k] = _mm256_permute2x128_si256::<0x20>(u[k], u[k + 4]);
            q[k + 4] = _mm256_permute2x128_si256::<0x31>(u[k], u[k + 4]);
        });
        q
    }
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

/// Sums of registers `FROM..TO`, each result lane in 32 bits, times `scale` (two equal 16-bit integers a lane).
///
/// # Safety
/// As above; `a` points to the column's eight registers.
#[inline(always)]
unsafe fn dot<F: Unpack, const FROM: usize, const TO: usize>(
    q: &[__m256i; 8],
    size: &[__m256i; 8],
    a: *const __m256i,
    scale: __m256i,
    start: __m256i,
) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = start;
        let mut pairs = _mm256_setzero_si256();
        each!(k < 8, {
            if k >= FROM && k < TO {
                let a = _mm256_load_si256(a.add(k));
                let p = if F::SIGNED {
                    _mm256_maddubs_epi16(size[k], _mm256_sign_epi8(a, q[k]))
                } else {
                    _mm256_maddubs_epi16(q[k], a)
                };
                let first = (k - FROM).is_multiple_of(depth::<F>());
                pairs = if first { p } else { _mm256_add_epi16(pairs, p) };
                if (k - FROM + 1).is_multiple_of(depth::<F>()) || k + 1 == TO {
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, scale));
                }
            }
        });
        sum
    }
}

/// Adds a group of a row times `C` columns to their lanes.
///
/// # Safety
/// `p` points to `F::BYTES` bytes, `x` to `C` groups.
#[inline(always)]
unsafe fn group<F: Unpack, const C: usize>(p: *const u8, x: *const Group, acc: &mut [__m256; C]) {
    // SAFETY: the caller's promise.
    unsafe {
        let s = F::scales(p);
        let q = transpose(F::bytes(p));
        let mut size = q;
        if F::SIGNED {
            each!(k < 8, { size[k] = _mm256_abs_epi8(q[k]) });
        }
        let zero = _mm256_setzero_si256();
        let one = _mm256_set1_epi16(1);
        let scaled = matches!(F::KIND, Kind::Scale16 | Kind::Min16);
        let (mut lo, mut hi, mut both) = (one, one, zero);
        if scaled {
            // Two scales a sub-block as 16-bit integers, then each twice.
            both = _mm256_cvtepi8_epi16(s.sc);
            let first = _mm256_setr_epi8(
                0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13, 0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12,
                13, 12, 13,
            );
            lo = _mm256_shuffle_epi8(both, first);
            hi = _mm256_shuffle_epi8(both, _mm256_add_epi8(first, _mm256_set1_epi8(2)));
            if F::OFFSET != 0 {
                both = _mm256_mullo_epi16(both, _mm256_set1_epi16(F::OFFSET as i16));
            }
        }
        each!(c < C, {
            let x = x.add(c);
            let a = (*x).q.as_ptr().cast::<__m256i>();
            let dot = if scaled {
                let start = if F::OFFSET == 0 {
                    zero
                } else {
                    _mm256_madd_epi16(both, _mm256_load_si256((*x).runs.as_ptr().cast()))
                };
                let first = dot::<F, 0, 4>(&q, &size, a, lo, start);
                dot::<F, 4, 8>(&q, &size, a, hi, first)
            } else {
                let start = if F::OFFSET == 0 { zero } else { _mm256_load_si256((*x).off.as_ptr().cast()) };
                dot::<F, 0, 8>(&q, &size, a, one, start)
            };
            let by = _mm256_mul_ps(s.d, _mm256_load_ps((*x).scale.as_ptr()));
            acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), by, acc[c]);
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
unsafe fn columns<F: Unpack, const C: usize>(
    w: &[u8],
    row_bytes: usize,
    x: &[Group],
    (at, used): (usize, usize),
    y: &mut [f32],
) {
    let n = w.len() / row_bytes;
    let (whole, rest) = (row_bytes / F::BYTES, row_bytes % F::BYTES);
    assert!(x.len() == C * (whole + usize::from(rest > 0)));
    for r in 0..n {
        let mut acc = [_mm256_setzero_ps(); C];
        // SAFETY: groups of row r, `C` arranged ones for each; fetching ahead of the rows' end is harmless.
        unsafe {
            let mut p = w.as_ptr().add(r * row_bytes);
            let mut x = x.as_ptr();
            for _ in 0..whole {
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(1024 + ahead).cast());
                    ahead += 64;
                }
                group::<F, C>(p, x, &mut acc);
                (p, x) = (p.add(F::BYTES), x.add(C));
            }
            if rest > 0 {
                let mut padded = [0u8; MAX_GROUP_BYTES];
                std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), rest);
                group::<F, C>(padded.as_ptr(), x, &mut acc);
            }
        }
        for c in 0..used {
            y[(at + c) * n + r] = tree(acc[c]);
        }
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn several<F: Unpack>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    if x.len() < COLUMNS {
        // SAFETY: the caller's promise.
        return unsafe { few::<F>(w, row_bytes, x, y) };
    }
    let groups = row_bytes.div_ceil(F::BYTES);
    let mut s = SCRATCH.take();
    s.resize(s.len().max(groups * COLUMNS), Group::ZERO);
    for (i, x) in x.chunks(COLUMNS).enumerate() {
        for g in 0..groups {
            for c in 0..COLUMNS {
                // SAFETY: the caller's promise. Columns that are missing are the last one again.
                unsafe { arrange::<F>(&x[c.min(x.len() - 1)][g], &mut s[g * COLUMNS + c]) };
            }
        }
        // SAFETY: as above.
        unsafe { columns::<F, COLUMNS>(w, row_bytes, &s[..groups * COLUMNS], (COLUMNS * i, x.len()), y) };
    }
    SCRATCH.set(s);
}
