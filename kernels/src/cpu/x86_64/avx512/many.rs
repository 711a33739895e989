//! Many columns: tiles of 32 rows of weights (`tile`) are multiplied by eight columns at once. The eight lanes of the canonical
//! order stay in the first-level cache, a few unpacked tiles in the second: all of them meet eight columns before the next eight
//! are fetched.

use super::Unpack;
use super::tile::{Line, ROWS, lines, shape, unpack};
use crate::KernelError;
use crate::cpu::quantized::Block;
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Columns multiplied at once.
const COLUMNS: usize = 8;

/// Rows that are unpacked at once, at most: columns come from afar once for all of them.
const ROWS_AT_ONCE: usize = 128;
/// Bytes that they may take once unpacked: together with some columns they fit the second-level cache.
const UNPACKED: usize = 640 << 10;

struct Scratch {
    tile: Vec<Line>,
    lanes: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { tile: vec![], lanes: vec![] }) };
}

/// Cache lines of the tile buffer for rows of `groups` groups, of any shape, and of the lanes.
const fn sizes(groups: usize) -> [usize; 2] {
    let (tile, several) = (groups * 8 * lines(shape::MIN16), UNPACKED / size_of::<Line>());
    [if tile > several { tile } else { several }, 16 * COLUMNS]
}

/// Bytes that a thread keeps for rows of `groups` groups.
pub const fn scratch_bytes(groups: usize) -> usize {
    let [tile, lanes] = sizes(groups);
    (tile + lanes) * size_of::<Line>()
}

/// Allocates them.
pub fn reserve(groups: usize) -> Result<(), KernelError> {
    let [tile, lanes] = sizes(groups);
    SCRATCH.with_borrow_mut(|s| {
        grow(&mut s.tile, tile, Line([0; 64]))?;
        grow(&mut s.lanes, lanes, Line([0; 64]))
    })
}

/// Adds steps `FROM..TO` (four values each) of a sub-block to the sums: `w` its lines, `a` its activations.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn run<const T: usize, const FROM: usize, const TO: usize>(
    w: *const __m512i,
    a: &[*const i32; T],
    d: &mut [[__m512i; 2]; T],
) {
    for k in FROM..TO {
        // SAFETY: the caller's promise.
        unsafe {
            let (w0, w1) = (_mm512_load_si512(w.add(2 * k)), _mm512_load_si512(w.add(2 * k + 1)));
            each!(t < T, {
                let a = _mm512_set1_epi32(a[t].add(k).read());
                d[t][0] = _mm512_dpbusd_epi32(d[t][0], w0, a);
                d[t][1] = _mm512_dpbusd_epi32(d[t][1], w1, a);
            });
        }
    }
}

/// Multiplies a tile of `groups` groups by `T` columns; lane j of row 16v + r and column t ends in float r of
/// `lanes[(j * T + t) * 2 + v]`.
///
/// # Safety
/// `tile` holds the groups; each column has `groups` blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply<const S: usize, const T: usize>(
    tile: *const Line,
    groups: usize,
    x: [*const Block; T],
    ahead: [*const Block; T],
    lanes: *mut Line,
) {
    // SAFETY: the whole body has indices below `groups`, 8 sub-blocks, T columns, 2 registers, as laid out above; fetching
    // ahead reads nothing.
    unsafe {
        for i in 0..16 * T {
            _mm512_store_si512(lanes.add(i).cast(), _mm512_setzero_si512());
        }
        let mut p = tile;
        for g in 0..groups {
            let mut blocks = x;
            each!(t < T, {
                blocks[t] = x[t].add(g);
                let next = ahead[t].wrapping_add(g).cast::<i8>();
                each!(i < 5, { _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * i)) });
                if matches!(S, shape::SCALE16) {
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(384));
                }
            });
            for j in 0..8 {
                let mut a = [std::ptr::null::<i32>(); T];
                let mut d = [[_mm512_setzero_si512(); 2]; T];
                each!(t < T, {
                    a[t] = (*blocks[t]).q.as_ptr().add(32 * j).cast();
                    if S == shape::SIGNED {
                        d[t] = [_mm512_set1_epi32((*blocks[t]).off[j]); 2];
                    }
                    if S == shape::SCALE16 {
                        d[t] = [_mm512_set1_epi32((*blocks[t]).off16[2 * j]); 2];
                    }
                });
                let scales = p.add(16).cast::<f32>();
                let lane = lanes.add(j * T * 2).cast::<f32>();
                let s0 = [_mm512_load_ps(scales), _mm512_load_ps(scales.add(16))];
                if S == shape::SCALE16 {
                    // Integers below 2^24 throughout: the floats are exact.
                    run::<T, 0, 4>(p.cast(), &a, &mut d);
                    let mut lo = [[_mm512_setzero_ps(); 2]; T];
                    each!(t < T, {
                        let off = _mm512_set1_epi32((*blocks[t]).off16[2 * j + 1]);
                        each!(v < 2, {
                            lo[t][v] = _mm512_mul_ps(_mm512_cvtepi32_ps(d[t][v]), s0[v]);
                            d[t][v] = off;
                        });
                    });
                    run::<T, 4, 8>(p.cast(), &a, &mut d);
                    let s1 = [_mm512_load_ps(scales.add(32)), _mm512_load_ps(scales.add(48))];
                    let s2 = [_mm512_load_ps(scales.add(64)), _mm512_load_ps(scales.add(80))];
                    each!(t < T, {
                        let by = _mm512_set1_ps((*blocks[t]).scale[j]);
                        each!(v < 2, {
                            let at = lane.add(16 * (2 * t + v));
                            let dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d[t][v]), s1[v], lo[t][v]);
                            let acc = _mm512_fmadd_ps(dot, _mm512_mul_ps(s2[v], by), _mm512_load_ps(at));
                            _mm512_store_ps(at, acc);
                        });
                    });
                } else {
                    run::<T, 0, 8>(p.cast(), &a, &mut d);
                    each!(t < T, {
                        let b = &*blocks[t];
                        let by = _mm512_set1_ps(b.scale[j]);
                        each!(v < 2, {
                            let at = lane.add(16 * (2 * t + v));
                            let dot = _mm512_cvtepi32_ps(d[t][v]);
                            let mut acc = _mm512_fmadd_ps(dot, _mm512_mul_ps(s0[v], by), _mm512_load_ps(at));
                            if S == shape::MIN {
                                let m = _mm512_load_ps(scales.add(32 + 16 * v));
                                acc = _mm512_fmadd_ps(m, _mm512_set1_ps(b.sum[j]), acc);
                            }
                            if S == shape::MIN16 {
                                let m = _mm512_load_ps(scales.add(32 + 16 * v));
                                let m_hi = _mm512_load_ps(scales.add(64 + 16 * v));
                                acc = _mm512_fmadd_ps(m, _mm512_set1_ps(b.sum_lo[j]), acc);
                                acc = _mm512_fmadd_ps(m_hi, _mm512_set1_ps(b.sum_hi[j]), acc);
                            }
                            _mm512_store_ps(at, acc);
                        });
                    });
                }
                p = p.add(lines(S));
            }
        }
    }
}

/// Sums lane j of 16 rows over the lanes.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn tree16(lanes: *const Line, stride: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut a = [_mm512_setzero_ps(); 8];
        for (j, a) in a.iter_mut().enumerate() {
            *a = _mm512_load_ps(lanes.add(j * stride).cast());
        }
        let even = _mm512_add_ps(_mm512_add_ps(a[0], a[4]), _mm512_add_ps(a[2], a[6]));
        let odd = _mm512_add_ps(_mm512_add_ps(a[1], a[5]), _mm512_add_ps(a[3], a[7]));
        _mm512_add_ps(even, odd)
    }
}

/// Tiles of 32 rows by all columns, column blocks outside: `tiles` hold the `rows` rows from `r0` of the `n` of each column of
/// `y`.
///
/// # Safety
/// The CPU has the set; each tile holds `groups` groups; `lanes` has room for eight columns; each column `groups` blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn products<const S: usize>(
    tiles: &[Line],
    groups: usize,
    x: &[&[Block]],
    lanes: &mut [Line],
    (r0, rows, n): (usize, usize, usize),
    y: &mut [f32],
) {
    let mut c = 0;
    while c < x.len() {
        macro_rules! run {
            ($t:literal) => {{
                let mut cols = [std::ptr::null(); $t];
                let mut ahead = [std::ptr::null(); $t];
                for t in 0..$t {
                    // Where there are fewer, the last one again: its results are not taken.
                    cols[t] = x[(c + t).min(x.len() - 1)][..groups].as_ptr();
                    ahead[t] = x[(c + t + $t).min(x.len() - 1)].as_ptr();
                }
                for (i, tile) in tiles.chunks_exact(groups * 8 * lines(S)).enumerate() {
                    let r0 = r0 + i * ROWS;
                    let rows = ROWS.min(rows - i * ROWS);
                    // SAFETY: the tile holds `groups` groups, and so do the columns.
                    unsafe {
                        multiply::<S, $t>(tile.as_ptr(), groups, cols, ahead, lanes.as_mut_ptr());
                        // Once they are on their way, the next tiles need not ask for the next columns again.
                        ahead = cols;
                        for t in 0..$t.min(x.len() - c) {
                            let from = lanes.as_ptr().add(2 * t);
                            let sums = [tree16(from, 2 * $t), tree16(from.add(1), 2 * $t)];
                            let to = &mut y[(c + t) * n + r0..][..rows];
                            for (to, sums) in to.chunks_mut(16).zip(sums) {
                                _mm512_mask_storeu_ps(to.as_mut_ptr(), 0xffff >> (16 - to.len()), sums);
                            }
                        }
                    }
                }
                c += $t;
            }};
        }
        // A pass over few columns waits for its chains of sums: one more column costs less than another pass.
        match x.len() - c {
            1 => run!(1),
            2 => run!(2),
            3..=6 => run!(4),
            _ => run!(8),
        }
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
pub unsafe fn many<F: Unpack>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let products = match const { shape::<F>() } {
        shape::SIGNED => products::<{ shape::SIGNED }>,
        shape::MIN => products::<{ shape::MIN }>,
        shape::SCALE16 => products::<{ shape::SCALE16 }>,
        _ => products::<{ shape::MIN16 }>,
    };
    let n = w.len() / row_bytes;
    let groups = row_bytes.div_ceil(F::BYTES);
    let step = 8 * lines(const { shape::<F>() });
    let tile = groups * step;
    let at_once = (UNPACKED / (tile * size_of::<Line>())).clamp(1, ROWS_AT_ONCE / ROWS).min(n.div_ceil(ROWS));
    let mut s = SCRATCH.replace(Scratch { tile: vec![], lanes: vec![] });
    if s.tile.len() < at_once * tile {
        s.tile.resize(at_once * tile, Line([0; 64]));
    }
    s.lanes.resize(16 * COLUMNS, Line([0; 64]));
    for r0 in (0..n).step_by(at_once * ROWS) {
        let rows = (at_once * ROWS).min(n - r0);
        let tiles = rows.div_ceil(ROWS);
        for i in 0..tiles {
            let from = r0 + i * ROWS;
            let part = &w[from * row_bytes..(from + ROWS).min(n) * row_bytes];
            for g in 0..groups {
                // SAFETY: the tile has room for every group.
                unsafe { unpack::<F>(part, row_bytes, g, s.tile.as_mut_ptr().add(i * tile + g * step)) };
            }
        }
        // SAFETY: the groups just unpacked, of this shape; room for eight columns.
        unsafe { products(&s.tile[..tiles * tile], groups, x, &mut s.lanes, (r0, rows, n), y) };
    }
    SCRATCH.set(s);
}
