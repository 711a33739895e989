//! Four rows at a time, one from each quarter of a piece of work: four streams that each run through memory without a gap are
//! what the processor's prefetchers follow best (four neighbouring rows restart in the same page every time). Which rows those
//! are, their scales, the ends of rows that are not whole groups, their final sums: shared by the kernels for one column (`one`)
//! and for several (`several`).

use super::Unpack;
use crate::cpu::scalar::{self, MAX_GROUP_BYTES};
use std::arch::x86_64::*;

/// Rows multiplied at once.
pub const ROWS: usize = 4;

/// How far ahead of each row's reading the next bytes are fetched.
const AHEAD: usize = 1024;

/// Scales of a group of four rows: rows 0 and 1 in the halves of the first register, 2 and 3 in those of the second.
pub struct Scales4 {
    pub d: [__m512; 2],
    /// The negated minima of sub-blocks, or of their first halves; not looked at where the kind has none.
    pub m: [__m512; 2],
    /// Those of second halves.
    pub m_hi: [__m512; 2],
}

impl Scales4 {
    /// Zeros in the lanes outside `mask`.
    ///
    /// # Safety
    /// As for all helpers here: inlined only into functions that have the instruction set.
    #[inline(always)]
    pub unsafe fn cut(&mut self, mask: __mmask16) {
        // SAFETY: no memory is read.
        unsafe {
            each!(h < 2, {
                self.d[h] = _mm512_maskz_mov_ps(mask, self.d[h]);
                self.m[h] = _mm512_maskz_mov_ps(mask, self.m[h]);
                self.m_hi[h] = _mm512_maskz_mov_ps(mask, self.m_hi[h]);
            });
        }
    }
}

/// A format whose scales can be read so.
pub trait Four: Unpack {
    /// Lane i of all scales is that of sub-block `ORDER[i]`: the order in which unpacking leaves them.
    const ORDER: [usize; 8];

    /// Scales of four rows.
    ///
    /// # Safety
    /// `p` point to `BYTES` bytes; inlined only into functions that have the instruction set.
    unsafe fn scales4(p: [*const u8; ROWS]) -> Scales4;
}

/// The rows of `n` that are multiplied at once as number `i`, the last of which is the highest.
pub fn rows(i: usize, n: usize) -> [usize; ROWS] {
    let quarter = n / ROWS;
    match i < quarter {
        true => [i, i + quarter, i + 2 * quarter, i + 3 * quarter],
        // The last row stands in for those past the end.
        false => [0, 1, 2, 3].map(|r| (ROWS * quarter + r).min(n - 1)),
    }
}

/// Asks for what follows [`AHEAD`] bytes after the groups at `p`.
///
/// # Safety
/// As above; it reads nothing.
#[inline(always)]
pub unsafe fn fetch<F: Four>(p: [*const u8; ROWS]) {
    for p in p {
        let mut at = 0;
        while at < F::BYTES {
            // SAFETY: every address is allowed.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + at).cast()) };
            at += 64;
        }
    }
}

/// Rows that end inside a group: where their last groups, of `rest` bytes, can be read whole, and the lanes that count. What
/// follows a row are numbers like any others: with scales of 0 they count as the zeros they stand for. They are read where they
/// lie if bytes follow (`beyond`), else from `copy`.
///
/// # Safety
/// `w` point to `rest` bytes, or to whole groups if `beyond`.
#[inline(always)]
pub unsafe fn end<F: Four>(
    w: [*const u8; ROWS],
    rest: usize,
    beyond: bool,
    copy: &mut [[u8; MAX_GROUP_BYTES]; ROWS],
) -> ([*const u8; ROWS], __mmask16) {
    let blocks = rest / F::BLOCK_BYTES;
    let mask = (0..16).filter(|i| F::ORDER[i % 8] < blocks).fold(0, |m, i| m | 1 << i);
    if beyond {
        return (w, mask);
    }
    for (w, copy) in w.iter().zip(&mut *copy) {
        // SAFETY: the caller's promise, and buffers that hold any group.
        unsafe { std::ptr::copy_nonoverlapping(*w, copy.as_mut_ptr(), rest) };
    }
    ([0, 1, 2, 3].map(|r| copy[r].as_ptr()), mask)
}

/// The final sums of two columns' lanes, each in two registers of two rows: row r's of the first in float 4r, of the second in
/// float 4r + 2.
///
/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn sums<F: Four>(a: [__m512; 2], b: [__m512; 2]) -> [f32; 16] {
    // SAFETY: sixteen values are read and written.
    unsafe {
        let mut back = [0; 16];
        for (i, b) in F::ORDER.into_iter().enumerate() {
            (back[b], back[8 + b]) = (i as i32, 8 + i as i32);
        }
        let back = _mm512_loadu_si512(back.as_ptr().cast());
        let halves = |v: [__m512; 2]| {
            let (a, b) = (_mm512_permutexvar_ps(back, v[0]), _mm512_permutexvar_ps(back, v[1]));
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
            )
        };
        let (a, b) = (halves(a), halves(b));
        let pairs =
            _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b));
        let mut out = [0.0; 16];
        let all = _mm512_add_ps(pairs, _mm512_permute_ps::<0b10_11_00_01>(pairs));
        _mm512_storeu_ps(out.as_mut_ptr(), all);
        out
    }
}

/// Sub-blocks in the order of the file.
const PLAIN: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// Registers that hold neighbours.
const NEIGHBOURS: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Where nibbles of 64 bytes hold four sub-blocks: low ones 0 and 2, high ones 1 and 3.
const NIBBLES: [usize; 8] = [0, 1, 4, 5, 2, 3, 6, 7];

/// Bytes of a shuffle that spreads eight bytes at `at`, in all lanes, to dwords in the order of the lanes.
const fn widen(order: [usize; 8], at: usize) -> [u8; 64] {
    let mut c = [0x80; 64];
    let mut i = 0;
    while i < 16 {
        c[4 * i] = (at + order[i % 8]) as u8;
        i += 1;
    }
    c
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn constant(c: &'static [u8; 64]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(c.as_ptr().cast()) }
}

/// Two rows' eight lanes in one register.
#[inline(always)]
unsafe fn two(a: __m256, b: __m256) -> __m512 {
    // SAFETY: no memory is read.
    unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b) }
}

/// Scales in the order of the file, one row at a time, from the reader that all kernels share.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn each_row<F: Four>(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b, c, d) = (F::scales(p[0]), F::scales(p[1]), F::scales(p[2]), F::scales(p[3]));
        Scales4 {
            d: [two(a.d, b.d), two(c.d, d.d)],
            m: [two(a.m, b.m), two(c.m, d.m)],
            m_hi: [two(a.m_hi, b.m_hi), two(c.m_hi, d.m_hi)],
        }
    }
}

/// Two halves of each of four rows, `AT` bytes into the group, as floats: the first of all rows, then the second, each in
/// every lane of its row.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn halves4<const AT: usize>(p: [*const u8; ROWS]) -> [[__m512; 2]; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let h = |i: usize| p[i].add(AT).cast::<i32>().read_unaligned();
        let f = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_setr_epi32(h(0), h(1), h(2), h(3))));
        let two = |a: i32, b: i32| {
            _mm512_permutexvar_ps(_mm512_setr_epi32(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b), f)
        };
        [[two(0, 2), two(4, 6)], [two(1, 3), two(5, 7)]]
    }
}

/// The scale in the two bytes after `AT`.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn only_d<const AT: usize>(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = [_mm512_setzero_ps(); 2];
        Scales4 { d: halves4::<AT>(p)[1], m: zero, m_hi: zero }
    }
}

/// Eight halves of each of four rows, one row a lane, as floats.
#[inline(always)]
unsafe fn float4(h: __m512i) -> Scales4 {
    // SAFETY: no memory is read.
    unsafe {
        let zero = [_mm512_setzero_ps(); 2];
        let low = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
        let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(h));
        Scales4 { d: [low, high], m: zero, m_hi: zero }
    }
}

/// Scales of blocks of 18 bytes: scale j is word j of the row's 16 bytes number j, so that a mask picks them.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn every_18(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise: 128 bytes of a group of 144 are read.
    unsafe {
        const MASK: u32 = 1 | 1 << 9 | 1 << 18 | 1 << 27;
        let row = |i: usize| {
            let a = _mm512_maskz_loadu_epi16(MASK, p[i].cast());
            _mm512_or_si512(a, _mm512_maskz_loadu_epi16(MASK << 4, p[i].add(64).cast()))
        };
        let both = |a, b| {
            let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            _mm512_or_si512(even, _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
        };
        float4(both(both(row(0), row(1)), both(row(2), row(3))))
    }
}

/// Scales of blocks of 34 bytes: scale j is word j of the row's 32 bytes number j.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn every_34(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise: 256 bytes of a group of 272 are read.
    unsafe {
        const MASK: u32 = 1 | 1 << 17;
        let row = |i: usize| {
            let z = _mm512_maskz_loadu_epi16(MASK, p[i].cast());
            let z = _mm512_or_si512(z, _mm512_maskz_loadu_epi16(MASK << 2, p[i].add(64).cast()));
            let y = _mm512_maskz_loadu_epi16(MASK << 4, p[i].add(128).cast());
            let y = _mm512_or_si512(y, _mm512_maskz_loadu_epi16(MASK << 6, p[i].add(192).cast()));
            _mm512_or_si512(z, y)
        };
        // The even scales are in lane 0, the odd ones in lane 2.
        let both = |a, b| _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let (ab, cd) = (both(row(0), row(1)), both(row(2), row(3)));
        let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab, cd);
        float4(_mm512_or_si512(even, _mm512_shuffle_i32x4::<0b11_01_11_01>(ab, cd)))
    }
}

/// Scales and minima of Q4_K and Q5_K, the 6-bit numbers of four rows unpacked together.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn k4(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise: 16 bytes of each row are read.
    unsafe {
        let h = _mm512_castsi128_si512(_mm_loadu_si128(p[0].cast()));
        let h = _mm512_inserti32x4::<1>(h, _mm_loadu_si128(p[1].cast()));
        let h = _mm512_inserti32x4::<2>(h, _mm_loadu_si128(p[2].cast()));
        let h = _mm512_inserti32x4::<3>(h, _mm_loadu_si128(p[3].cast()));
        // A lane is d and dmin, then three words of scales; it becomes eight scales, then eight minima.
        let low = _mm512_srlv_epi32(
            _mm512_shuffle_epi32::<0b11_10_11_01>(h),
            _mm512_setr_epi32(0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4),
        );
        let (six, four) = (0x3f3f_3f3f, 0x0f0f_0f0f);
        let mask = _mm512_set4_epi32(four, six, four, six);
        let high = _mm512_srli_epi32::<2>(_mm512_shuffle_epi32::<0b10_10_01_01>(h));
        let high = _mm512_and_si512(high, _mm512_set4_epi32(0x3030_3030, 0, 0x3030_3030, 0));
        // high | (low & mask)
        let six = _mm512_ternarylogic_epi32::<0xf8>(high, low, mask);
        let widen_d = constant(const { &widen(NIBBLES, 0) });
        let widen_m = constant(const { &widen(NIBBLES, 8) });
        let (ab, cd) = (
            _mm512_shuffle_i32x4::<0b01_01_00_00>(six, six),
            _mm512_shuffle_i32x4::<0b11_11_10_10>(six, six),
        );
        let f = |v, c, d| _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_shuffle_epi8(v, c)));
        let [d, dmin] = halves4::<0>(p);
        let sign = _mm512_set1_ps(-0.0);
        let dmin = [_mm512_xor_ps(dmin[0], sign), _mm512_xor_ps(dmin[1], sign)];
        Scales4 {
            d: [f(ab, widen_d, d[0]), f(cd, widen_d, d[1])],
            m: [f(ab, widen_m, dmin[0]), f(cd, widen_m, dmin[1])],
            m_hi: [_mm512_setzero_ps(); 2],
        }
    }
}

/// The minima of Q2_K's runs of 16 of two rows: of first halves of sub-blocks, then of second ones.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn q2_minima(a: *const u8, b: *const u8, dmin: __m512) -> (__m512, __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        let negative = _mm512_xor_ps(dmin, _mm512_set1_ps(-0.0));
        let s = _mm256_inserti128_si256::<1>(
            _mm256_castsi128_si256(_mm_loadu_si128(a.cast())),
            _mm_loadu_si128(b.cast()),
        );
        let even = _mm256_and_si256(_mm256_srli_epi16::<4>(s), _mm256_set1_epi16(15));
        let odd = _mm256_srli_epi16::<12>(s);
        (
            _mm512_mul_ps(negative, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(even))),
            _mm512_mul_ps(negative, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(odd))),
        )
    }
}

/// # Safety
/// As above.
#[inline(always)]
unsafe fn q2(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise.
    unsafe {
        let [d, dmin] = halves4::<80>(p);
        let (m0, h0) = q2_minima(p[0], p[1], dmin[0]);
        let (m1, h1) = q2_minima(p[2], p[3], dmin[1]);
        Scales4 { d, m: [m0, m1], m_hi: [h0, h1] }
    }
}

macro_rules! four {
    ($($name:ident: $order:ident, |$p:ident| $scales:expr;)*) => {$(
        impl Four for scalar::$name {
            const ORDER: [usize; 8] = $order;
            #[inline(always)]
            unsafe fn scales4($p: [*const u8; ROWS]) -> Scales4 {
                // SAFETY: every read is inside the groups' `BYTES` bytes.
                unsafe { $scales }
            }
        }
    )*};
}

four! {
    Q4_0: PLAIN, |p| every_18(p);
    Q4_1: PLAIN, |p| each_row::<Self>(p);
    Q5_0: PLAIN, |p| each_row::<Self>(p);
    Q5_1: PLAIN, |p| each_row::<Self>(p);
    Q8_0: PLAIN, |p| every_34(p);
    Q8_K: PLAIN, |p| each_row::<Self>(p);
    IQ4_NL: PLAIN, |p| every_18(p);
    IQ4_XS: PLAIN, |p| each_row::<Self>(p);
    MXFP4: PLAIN, |p| each_row::<Self>(p);
    Q2_K: PLAIN, |p| q2(p);
    Q3_K: PLAIN, |p| only_d::<106>(p);
    Q4_K: NIBBLES, |p| k4(p);
    Q5_K: NIBBLES, |p| k4(p);
    Q6_K: NEIGHBOURS, |p| only_d::<206>(p);
}
