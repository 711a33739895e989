//! Several columns: each group of weights is unpacked once, in an order in which four multiplications in a chain leave the sum
//! of each run of 16 in a lane of its own, and multiplied by the columns at hand; four rows are read at a time (`four`).

use super::four::{ROWS, Scales4, end, fetch, rows, sums};
use super::runs::{Runs, transpose, two};
use crate::KernelError;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Columns multiplied at once, at most.
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

/// Which run of 16, in the order of the file, each lane holds.
const fn run_order(order: [usize; 8]) -> [i32; 16] {
    let mut c = [0; 16];
    let mut i = 0;
    while i < 16 {
        c[i] = (2 * order[4 * (i / 8) + i % 4] + i / 4 % 2) as i32;
        i += 1;
    }
    c
}

/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn arrange<F: Runs>(x: &Block, to: &mut Group) {
    let shift = _mm_cvtsi32_si128(if F::OFFSET == 0 { 0 } else { 7 - F::OFFSET.trailing_zeros() as i32 });
    // SAFETY: all inside the two blocks.
    unsafe {
        let part = |i: usize| {
            let q = x.q.as_ptr().cast::<u8>();
            two(q.add(32 * F::ORDER[i]), q.add(32 * F::ORDER[4 + i]))
        };
        let t = transpose([part(0), part(1), part(2), part(3)]);
        let into = to.q.as_mut_ptr().cast::<__m512i>();
        each!(j < 4, { _mm512_store_si512(into.add(j), t[j]) });
        if F::OFFSET != 0 {
            let order = _mm512_loadu_si512(const { &run_order(F::ORDER) }.as_ptr().cast());
            let off = _mm512_sra_epi32(_mm512_load_si512(x.off16.as_ptr().cast()), shift);
            _mm512_store_si512(to.off.as_mut_ptr().cast(), _mm512_permutexvar_epi32(order, off));
        }
    }
    to.scale = F::ORDER.map(|b| x.scale[b]);
    if matches!(F::KIND, Kind::Min16) {
        (to.sum, to.sum_hi) = (F::ORDER.map(|b| x.sum_lo[b]), F::ORDER.map(|b| x.sum_hi[b]));
    } else {
        to.sum = F::ORDER.map(|b| x.sum[b]);
    }
}

/// Integer scales in the order of the lanes.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn ordered<F: Runs>(sc: __m128i) -> __m512i {
    // SAFETY: sixteen bytes.
    unsafe {
        let order = const { &run_order(F::ORDER) };
        let order = _mm512_cvtepi32_epi8(_mm512_loadu_si512(order.as_ptr().cast()));
        _mm512_cvtepi8_epi32(_mm_shuffle_epi8(sc, order))
    }
}

/// Adds a group of rows `2 * H` and `2 * H + 1` times `C` columns to their lanes.
///
/// # Safety
/// `p` point to `F::BYTES` bytes, `x` to `C` groups.
#[inline(always)]
unsafe fn pair<F: Runs, const H: usize, const C: usize>(
    p: [*const u8; ROWS],
    s: &Scales4,
    x: *const Group,
    acc: &mut [__m512; C],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (p0, p1) = (p[2 * H], p[2 * H + 1]);
        let (q0, q1) = (F::runs(p0), F::runs(p1));
        let scaled = matches!(F::KIND, Kind::Scale16 | Kind::Min16);
        // Sums of 16 products fit 16 bits, and with them a multiplication that takes one step, where q is below 16.
        let small = F::OFFSET < 16;
        let zero = _mm512_setzero_si512();
        let (mut i0, mut i1) = (zero, zero);
        if scaled {
            (i0, i1) = (ordered::<F>(F::scales(p0).sc), ordered::<F>(F::scales(p1).sc));
            if small {
                let low = _mm512_set1_epi32(0xffff);
                (i0, i1) = (_mm512_and_si512(i0, low), _mm512_and_si512(i1, low));
            }
        }
        let (f0, f1) = (_mm512_cvtepi32_ps(i0), _mm512_cvtepi32_ps(i1));
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
            let by = _mm512_mul_ps(s.d[H], wide((*x).scale.as_ptr()));
            acc[c] = _mm512_fmadd_ps(dot, by, acc[c]);
            if matches!(F::KIND, Kind::Min | Kind::Min16) {
                acc[c] = _mm512_fmadd_ps(s.m[H], wide((*x).sum.as_ptr()), acc[c]);
            }
            if matches!(F::KIND, Kind::Min16) {
                acc[c] = _mm512_fmadd_ps(s.m_hi[H], wide((*x).sum_hi.as_ptr()), acc[c]);
            }
        });
    }
}

/// All rows by `C` columns, of which `used` have places in `y`, from column `at` on.
///
/// # Safety
/// The CPU has the set.
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
    for i in 0..n.div_ceil(ROWS) {
        let rows = rows(i, n);
        let mut acc = [[_mm512_setzero_ps(); C]; 2];
        // SAFETY: groups of rows below n, the last of which is rows[3], and `C` arranged ones for each.
        unsafe {
            let mut p = rows.map(|r| w.as_ptr().add(r * row_bytes));
            let mut x = x.as_ptr();
            for _ in 0..whole {
                fetch::<F>(p);
                let s = F::scales4(p);
                pair::<F, 0, C>(p, &s, x, &mut acc[0]);
                pair::<F, 1, C>(p, &s, x, &mut acc[1]);
                (p, x) = (p.map(|p| p.add(F::BYTES)), x.add(C));
            }
            if rest > 0 {
                let beyond = rows[3] * row_bytes + row_bytes.next_multiple_of(F::BYTES) <= w.len();
                let mut copy = [[0u8; MAX_GROUP_BYTES]; ROWS];
                let (p, mask) = end::<F>(p, rest, beyond, &mut copy);
                let mut s = F::scales4(p);
                s.cut(mask);
                pair::<F, 0, C>(p, &s, x, &mut acc[0]);
                pair::<F, 1, C>(p, &s, x, &mut acc[1]);
            }
            each!(c < C, {
                if c.is_multiple_of(2) {
                    let next = if c + 1 < C { c + 1 } else { c };
                    let s = sums::<F>([acc[0][c], acc[1][c]], [acc[0][next], acc[1][next]]);
                    each!(k < 2, {
                        if c + k < used {
                            let y = &mut y[(at + c + k) * n..][..n];
                            each!(r < ROWS, { y[rows[r]] = s[4 * r + 2 * k] });
                        }
                    });
                }
            });
        }
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
    let mut at = 0;
    while at < x.len() {
        // As few passes over the weights as there can be, of about as many columns each.
        let left = x.len() - at;
        let passes = left.div_ceil(COLUMNS);
        let n = [0, 2, 2, 3, 4, 6, 6, 8, 8][left.div_ceil(passes)];
        let used = n.min(left);
        for g in 0..groups {
            for c in 0..n {
                // SAFETY: the caller's promise. Columns that are missing are the last one again.
                unsafe { arrange::<F>(&x[at + c.min(used - 1)][g], &mut s[g * n + c]) };
            }
        }
        let arranged = &s[..groups * n];
        // SAFETY: the caller's promise.
        unsafe {
            match n {
                2 => columns::<F, 2>(w, row_bytes, arranged, (at, used), y),
                3 => columns::<F, 3>(w, row_bytes, arranged, (at, used), y),
                4 => columns::<F, 4>(w, row_bytes, arranged, (at, used), y),
                6 => columns::<F, 6>(w, row_bytes, arranged, (at, used), y),
                _ => columns::<F, COLUMNS>(w, row_bytes, arranged, (at, used), y),
            }
        }
        at += used;
    }
    SCRATCH.set(s);
}
