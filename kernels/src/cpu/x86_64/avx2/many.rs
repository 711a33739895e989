//! Many columns: 16 rows of weights at a time are unpacked to bytes, interleaved so that a register holds four values of
//! each of 8 rows, and multiplied by four columns at once. The eight lanes of the canonical order stay in the first-level
//! cache, the unpacked tile in the second.

use super::Unpack;
use crate::KernelError;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{Kind, MAX_GROUP_BYTES};
use crate::cpu::scratch::grow;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Rows of a tile: two registers of 8.
const ROWS: usize = 16;
/// Columns multiplied at once.
const COLUMNS: usize = 4;

/// Whether the scales of runs of 16 are multiplied into the bytes: Q2_K (at most 45) and Q3_K (negated, signed).
const fn folds<F: Unpack>() -> bool {
    matches!(F::KIND, Kind::Min16) || (matches!(F::KIND, Kind::Scale16) && F::OFFSET == 4)
}

/// Whether the bytes are signed once unpacked.
const fn signed<F: Unpack>() -> bool {
    F::SIGNED || (folds::<F>() && F::OFFSET != 0)
}

/// Scales of a sub-block: d; d, m; the two integer scales, d; d, the two minima.
const fn scales<F: Unpack>() -> usize {
    match F::KIND {
        Kind::Plain => 1,
        Kind::Min => 2,
        Kind::Scale16 if folds::<F>() => 1,
        Kind::Scale16 | Kind::Min16 => 3,
    }
}

/// Cache lines of a tile's sub-block: 8 of bytes (16 rows by 4 values), then one per scale.
const fn lines<F: Unpack>() -> usize {
    8 + scales::<F>()
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

/// Cache lines of the tile buffer for rows of `groups` groups, of any format, and of the lanes.
const fn sizes(groups: usize) -> [usize; 2] {
    [groups * 8 * (8 + 3), 8 * COLUMNS]
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

/// `sc * (q - offset)` for 32 bytes with one scale per 16.
#[target_feature(enable = "avx2")]
#[inline]
fn fold(q: __m256i, sc: __m128i, b: i8, offset: i16) -> __m256i {
    let half = |q: __m128i, i: i8| {
        let s = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sc, _mm_set1_epi8(i)));
        _mm256_mullo_epi16(_mm256_sub_epi16(_mm256_cvtepu8_epi16(q), _mm256_set1_epi16(offset)), s)
    };
    let lo = half(_mm256_castsi256_si128(q), 2 * b);
    let hi = half(_mm256_extracti128_si256::<1>(q), 2 * b + 1);
    // The products fit a byte, signed or not; packing wants them unsigned.
    let byte = _mm256_set1_epi16(255);
    let packed = _mm256_packus_epi16(_mm256_and_si256(lo, byte), _mm256_and_si256(hi, byte));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
}

/// Unpacks group `i` of 16 rows (the last one repeated past the end) into eight sub-blocks of the tile.
///
/// # Safety
/// `w` holds the rows; `tile` has room for eight sub-blocks.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<F: Unpack>(w: &[u8], row_bytes: usize, i: usize, tile: *mut Line) {
    let step = lines::<F>();
    let last = w.len() / row_bytes - 1;
    let mut bytes = [Line([0; 64]); 8 * 4];
    let mut padded = [0u8; MAX_GROUP_BYTES];
    for v in 0..2 {
        for r in 0..8 {
            let row = (8 * v + r).min(last);
            let at = row * row_bytes + i * F::BYTES;
            let left = (row + 1) * row_bytes - at;
            // SAFETY: a whole group of the row, or what is left of it in a buffer that holds any group.
            unsafe {
                let mut p = w.as_ptr().add(at);
                if left < F::BYTES {
                    std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), left);
                    p = padded.as_ptr();
                }
                let mut q = F::bytes(p);
                let mut s = F::scales(p);
                if folds::<F>() {
                    let mut sc = s.sc;
                    if F::OFFSET != 0 {
                        // -sc * q lies in -128..=124; sc * q would not fit.
                        sc = _mm_sub_epi8(_mm_setzero_si128(), sc);
                        s.d = _mm256_xor_ps(s.d, _mm256_set1_ps(-0.0));
                    }
                    for (b, q) in q.iter_mut().enumerate() {
                        *q = fold(*q, sc, b as i8, F::OFFSET as i16);
                    }
                }
                for (b, q) in q.into_iter().enumerate() {
                    _mm256_store_si256(bytes.as_mut_ptr().cast::<__m256i>().add(8 * r + b), q);
                }
                // Scale number m of sub-block b and row 8v + r: that float of line 8 + m.
                let put = |m: usize, v8: __m256| {
                    let mut f = [0.0f32; 8];
                    _mm256_storeu_ps(f.as_mut_ptr(), v8);
                    for (b, f) in f.into_iter().enumerate() {
                        tile.add(b * step + 8 + m).cast::<f32>().add(8 * v + r).write(f);
                    }
                };
                match F::KIND {
                    Kind::Scale16 if !folds::<F>() => {
                        let even = _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(s.sc));
                        put(0, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(even)));
                        put(1, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_srai_epi16::<8>(s.sc))));
                        put(2, s.d);
                    }
                    Kind::Plain | Kind::Scale16 => put(0, s.d),
                    Kind::Min => {
                        put(0, s.d);
                        put(1, s.m);
                    }
                    Kind::Min16 => {
                        put(0, s.d);
                        put(1, s.m);
                        put(2, s.m_hi);
                    }
                }
            }
        }
        // 16 bytes of 8 rows at a time, as four registers of 4 bytes of 8 rows.
        for c in 0..16 {
            // SAFETY: `bytes` holds 8 rows of 256 bytes; each sub-block takes eight lines.
            unsafe {
                let p = bytes.as_ptr().cast::<u8>().add(16 * c);
                let two = |r: usize| {
                    let at = |r: usize| _mm_load_si128(p.add(256 * r).cast());
                    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(at(r)), at(r + 4))
                };
                let (a, b, c2, d) = (two(0), two(1), two(2), two(3));
                let (ab, ab2) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                let (cd, cd2) = (_mm256_unpacklo_epi32(c2, d), _mm256_unpackhi_epi32(c2, d));
                let to = |k: usize| tile.add(c / 2 * step + 4 * (c % 2) + k).cast::<__m256i>().add(v);
                _mm256_store_si256(to(0), _mm256_unpacklo_epi64(ab, cd));
                _mm256_store_si256(to(1), _mm256_unpackhi_epi64(ab, cd));
                _mm256_store_si256(to(2), _mm256_unpacklo_epi64(ab2, cd2));
                _mm256_store_si256(to(3), _mm256_unpackhi_epi64(ab2, cd2));
            }
        }
    }
}

/// Multiplies a tile of `groups` groups by `T` columns; lane j of row r and column t ends in float r of
/// `lanes[j * T + t]`.
///
/// # Safety
/// `tile` holds the groups; each column has `groups` blocks.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<F: Unpack, const T: usize>(
    tile: *const Line,
    groups: usize,
    x: [*const Block; T],
    lanes: *mut Line,
) {
    let step = lines::<F>();
    let one = _mm256_set1_epi16(1);
    // -128 sum(a) to -OFFSET sum(a).
    let shift = if F::OFFSET == 0 { 0 } else { 7 - F::OFFSET.trailing_zeros() };
    // SAFETY: the whole body has indices below `groups`, 8 sub-blocks, 8 steps, T columns, 2 registers, as laid out above.
    unsafe {
        for i in 0..16 * T {
            _mm256_store_si256(lanes.cast::<__m256i>().add(i), _mm256_setzero_si256());
        }
        for g in 0..groups {
            for j in 0..8 {
                let p = tile.add((8 * g + j) * step);
                let scale = |m: usize, v: usize| _mm256_load_ps(p.add(8 + m).cast::<f32>().add(8 * v));
                let lane = |t: usize, v: usize| lanes.add(j * T + t).cast::<f32>().add(8 * v);
                let weights = |k: usize, v: usize| _mm256_load_si256(p.add(k).cast::<__m256i>().add(v));
                let run = |from: usize, to: usize, mut d: [[__m256i; 2]; T]| {
                    for k in (from..to).step_by(2) {
                        for t in 0..T {
                            let a = |k: usize| {
                                let a = (*x[t].add(g)).q.as_ptr().add(32 * j + 4 * k);
                                _mm256_set1_epi32(a.cast::<i32>().read())
                            };
                            let (a, b) = (a(k), a(k + 1));
                            for v in 0..2 {
                                let (w, u) = (weights(k, v), weights(k + 1, v));
                                if signed::<F>() {
                                    let m = |w, a| {
                                        let s = _mm256_sign_epi8(a, w);
                                        _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), s), one)
                                    };
                                    let both = _mm256_add_epi32(m(w, a), m(u, b));
                                    d[t][v] = _mm256_add_epi32(d[t][v], both);
                                } else {
                                    // At most 63 * 127 * 4: two steps fit 16 bits.
                                    let m = _mm256_add_epi16(
                                        _mm256_maddubs_epi16(w, a),
                                        _mm256_maddubs_epi16(u, b),
                                    );
                                    d[t][v] = _mm256_add_epi32(d[t][v], _mm256_madd_epi16(m, one));
                                }
                            }
                        }
                    }
                    d
                };
                if matches!(F::KIND, Kind::Scale16) && !folds::<F>() {
                    // Integers below 2^24 throughout: the floats are exact.
                    let mut start = [[_mm256_setzero_si256(); 2]; T];
                    for t in 0..T {
                        start[t] = [_mm256_set1_epi32((*x[t].add(g)).off16[2 * j] >> shift); 2];
                    }
                    let d = run(0, 4, start);
                    let mut lo = [[_mm256_setzero_ps(); 2]; T];
                    for t in 0..T {
                        for v in 0..2 {
                            lo[t][v] = _mm256_mul_ps(_mm256_cvtepi32_ps(d[t][v]), scale(0, v));
                        }
                    }
                    for t in 0..T {
                        start[t] = [_mm256_set1_epi32((*x[t].add(g)).off16[2 * j + 1] >> shift); 2];
                    }
                    let d = run(4, 8, start);
                    for t in 0..T {
                        for v in 0..2 {
                            let dot = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d[t][v]), scale(1, v), lo[t][v]);
                            let by = _mm256_mul_ps(scale(2, v), _mm256_set1_ps((*x[t].add(g)).scale[j]));
                            _mm256_store_ps(lane(t, v), _mm256_fmadd_ps(dot, by, _mm256_load_ps(lane(t, v))));
                        }
                    }
                    continue;
                }
                let mut start = [[_mm256_setzero_si256(); 2]; T];
                if !signed::<F>() && F::OFFSET != 0 {
                    for t in 0..T {
                        start[t] = [_mm256_set1_epi32((*x[t].add(g)).off[j] >> shift); 2];
                    }
                }
                let d = run(0, 8, start);
                for t in 0..T {
                    let b = &*x[t].add(g);
                    for v in 0..2 {
                        let by = _mm256_mul_ps(scale(0, v), _mm256_set1_ps(b.scale[j]));
                        let mut acc = _mm256_load_ps(lane(t, v));
                        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d[t][v]), by, acc);
                        if matches!(F::KIND, Kind::Min) {
                            acc = _mm256_fmadd_ps(scale(1, v), _mm256_set1_ps(b.sum[j]), acc);
                        }
                        if matches!(F::KIND, Kind::Min16) {
                            acc = _mm256_fmadd_ps(scale(1, v), _mm256_set1_ps(b.sum_lo[j]), acc);
                            acc = _mm256_fmadd_ps(scale(2, v), _mm256_set1_ps(b.sum_hi[j]), acc);
                        }
                        _mm256_store_ps(lane(t, v), acc);
                    }
                }
            }
        }
    }
}

/// Sums the lanes of `T` columns and hands over the first `rows` rows of each.
///
/// # Safety
/// `lanes` is what `multiply` left.
#[target_feature(enable = "avx2,fma")]
unsafe fn finish<const T: usize>(lanes: *const Line, rows: usize, mut y: impl FnMut(usize, &[f32])) {
    for t in 0..T {
        let mut out = [0.0f32; ROWS];
        for v in 0..2 {
            // SAFETY: see `multiply`.
            unsafe {
                let a = |j: usize| _mm256_load_ps(lanes.add(j * T + t).cast::<f32>().add(8 * v));
                let even = _mm256_add_ps(_mm256_add_ps(a(0), a(4)), _mm256_add_ps(a(2), a(6)));
                let odd = _mm256_add_ps(_mm256_add_ps(a(1), a(5)), _mm256_add_ps(a(3), a(7)));
                _mm256_storeu_ps(out.as_mut_ptr().add(8 * v), _mm256_add_ps(even, odd));
            }
        }
        y(t, &out[..rows]);
    }
}

/// See `table::Rows`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn many<F: Unpack>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    let groups = row_bytes.div_ceil(F::BYTES);
    let step = 8 * lines::<F>();
    let mut s = SCRATCH.replace(Scratch { tile: vec![], lanes: vec![] });
    if s.tile.len() < groups * step {
        s.tile.resize(groups * step, Line([0; 64]));
    }
    s.lanes.resize(8 * COLUMNS, Line([0; 64]));
    for r0 in (0..n).step_by(ROWS) {
        let rows = ROWS.min(n - r0);
        let part = &w[r0 * row_bytes..(r0 + rows) * row_bytes];
        for g in 0..groups {
            // SAFETY: the tile has room for every group.
            unsafe { unpack::<F>(part, row_bytes, g, s.tile.as_mut_ptr().add(g * step)) };
        }
        let mut c = 0;
        while c < x.len() {
            macro_rules! run {
                ($t:literal) => {{
                    let cols: [*const Block; $t] = std::array::from_fn(|t| x[c + t][..groups].as_ptr());
                    // SAFETY: the tile holds `groups` groups, and so do the columns.
                    unsafe {
                        multiply::<F, $t>(s.tile.as_ptr(), groups, cols, s.lanes.as_mut_ptr());
                        finish::<$t>(s.lanes.as_ptr(), rows, |t, v| {
                            y[(c + t) * n + r0..][..rows].copy_from_slice(v);
                        });
                    }
                    c += $t;
                }};
            }
            match x.len() - c {
                1 => run!(1),
                2 | 3 => run!(2),
                _ => run!(4),
            }
        }
    }
    SCRATCH.set(s);
}
