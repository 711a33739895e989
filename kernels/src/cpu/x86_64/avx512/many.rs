//! Many columns: 32 rows of weights at a time are unpacked to bytes, interleaved so that a register holds four values of
//! each of 16 rows, and multiplied by eight columns at once. The eight lanes of the canonical order stay in the first-level
//! cache, a few unpacked tiles in the second: all of them meet eight columns before the next eight are fetched.

use super::Unpack;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Rows of a tile: two registers of 16.
const ROWS: usize = 32;
/// Columns multiplied at once.
const COLUMNS: usize = 8;

/// Rows that are unpacked at once, at most: columns come from afar once for all of them.
const ROWS_AT_ONCE: usize = 128;
/// Bytes that they may take once unpacked: together with some columns they fit the second-level cache.
const UNPACKED: usize = 640 << 10;

/// What a format looks like once unpacked: all that the multiplication knows of it, as the value of a generic parameter, so
/// that formats of one shape share its code. Scales of runs of 16 are multiplied into the bytes where they fit.
mod shape {
    /// Bytes `q + 128`; d.
    pub const SIGNED: usize = 0;
    /// Bytes `q`; d, m.
    pub const MIN: usize = 1;
    /// Bytes `q + 128`; the two integer scales, d.
    pub const SCALE16: usize = 2;
    /// Bytes `sc * q`; d, the two minima.
    pub const MIN16: usize = 3;
}

const fn shape<F: Unpack>() -> usize {
    match F::KIND {
        Kind::Plain => shape::SIGNED,
        Kind::Min => shape::MIN,
        Kind::Scale16 if folds::<F>() => shape::SIGNED,
        Kind::Scale16 => shape::SCALE16,
        Kind::Min16 => shape::MIN16,
    }
}

/// Cache lines of a tile's sub-block: 16 of bytes, then two per scale.
const fn lines(shape: usize) -> usize {
    16 + 2 * [1, 2, 3, 3][shape]
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

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
pub fn reserve(groups: usize) {
    let [tile, lanes] = sizes(groups);
    SCRATCH.with_borrow_mut(|s| {
        s.tile.reserve_exact(tile.saturating_sub(s.tile.len()));
        s.tile.resize(tile.max(s.tile.len()), Line([0; 64]));
        s.lanes.resize(lanes, Line([0; 64]));
    });
}

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

/// Scale number `m` of row `r`, one per sub-block, into the sub-blocks of the tile: float `r` of line 16 + 2m of each.
///
/// # Safety
/// As above; `tile` has room for eight sub-blocks.
#[inline(always)]
unsafe fn put(tile: *mut Line, step: usize, m: usize, r: usize, v: __m256) {
    let mut f = [0.0f32; 8];
    // SAFETY: the caller's promise.
    unsafe {
        _mm256_storeu_ps(f.as_mut_ptr(), v);
        let to = tile.cast::<f32>().add(16 * (16 + 2 * m) + r);
        for (b, f) in f.into_iter().enumerate() {
            to.add(16 * b * step).write(f);
        }
    }
}

/// 16 bytes of rows r, r + 4, r + 8, r + 12 of 256 bytes.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn four_rows(p: *const u8, r: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let p = p.add(256 * r);
        let z = _mm512_castsi128_si512(_mm_load_si128(p.cast()));
        let z = _mm512_inserti32x4::<1>(z, _mm_load_si128(p.add(1024).cast()));
        let z = _mm512_inserti32x4::<2>(z, _mm_load_si128(p.add(2048).cast()));
        _mm512_inserti32x4::<3>(z, _mm_load_si128(p.add(3072).cast()))
    }
}

/// Unpacks group `i` of 32 rows (the last one repeated past the end) into eight sub-blocks of the tile.
///
/// # Safety
/// `w` holds the rows; `tile` has room for eight sub-blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn unpack<F: Unpack>(w: &[u8], row_bytes: usize, i: usize, tile: *mut Line) {
    let s = const { shape::<F>() };
    let step = lines(s);
    let last = w.len() / row_bytes - 1;
    let mut bytes = [Line([0; 64]); 16 * 4];
    let mut padded = [0u8; MAX_GROUP_BYTES];
    for v in 0..2 {
        for r in 0..16 {
            let row = (16 * v + r).min(last);
            let at = row * row_bytes + i * F::BYTES;
            let left = (row + 1) * row_bytes - at;
            // SAFETY: a whole group of the row, or what is left of it in a buffer that holds any group.
            unsafe {
                let mut p = w.as_ptr().add(at);
                let mut ahead = 0;
                while ahead < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(2 * F::BYTES + ahead).cast());
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
                let to = bytes.as_mut_ptr().add(4 * r).cast::<__m512i>();
                _mm512_store_si512(to, q0);
                _mm512_store_si512(to.add(1), q1);
                _mm512_store_si512(to.add(2), q2);
                _mm512_store_si512(to.add(3), q3);
                // The second register's lines follow the first's.
                let tile = tile.add(v);
                if s == shape::SCALE16 {
                    let runs = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sc.sc));
                    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
                    let runs = _mm512_permutexvar_ps(even, runs);
                    put(tile, step, 0, r, _mm512_castps512_ps256(runs));
                    put(tile, step, 1, r, _mm512_extractf32x8_ps::<1>(runs));
                    put(tile, step, 2, r, sc.d);
                } else {
                    put(tile, step, 0, r, sc.d);
                    if s == shape::MIN || s == shape::MIN16 {
                        put(tile, step, 1, r, sc.m);
                    }
                    if s == shape::MIN16 {
                        put(tile, step, 2, r, sc.m_hi);
                    }
                }
            }
        }
        // 16 bytes of 16 rows at a time, as four registers of 4 bytes of 16 rows.
        for c in 0..16 {
            // SAFETY: `bytes` holds 16 rows of 256 bytes; each sub-block takes eight pairs of lines.
            unsafe {
                let p = bytes.as_ptr().cast::<u8>().add(16 * c);
                let (a, b, c2, d) = (four_rows(p, 0), four_rows(p, 1), four_rows(p, 2), four_rows(p, 3));
                let (ab, ab2) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
                let (cd, cd2) = (_mm512_unpacklo_epi32(c2, d), _mm512_unpackhi_epi32(c2, d));
                let to = tile.add(c / 2 * step + 8 * (c % 2) + v).cast::<__m512i>();
                _mm512_store_si512(to, _mm512_unpacklo_epi64(ab, cd));
                _mm512_store_si512(to.add(2), _mm512_unpackhi_epi64(ab, cd));
                _mm512_store_si512(to.add(4), _mm512_unpacklo_epi64(ab2, cd2));
                _mm512_store_si512(to.add(6), _mm512_unpackhi_epi64(ab2, cd2));
            }
        }
    }
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
                        for t in 0..$t.min(x.len() - c) {
                            let mut out = [0.0f32; ROWS];
                            let from = lanes.as_ptr().add(2 * t);
                            _mm512_storeu_ps(out.as_mut_ptr(), tree16(from, 2 * $t));
                            _mm512_storeu_ps(out.as_mut_ptr().add(16), tree16(from.add(1), 2 * $t));
                            y[(c + t) * n + r0..][..rows].copy_from_slice(&out[..rows]);
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
