//! One column, the product of every decode step: four rows at a time, so that the activations are loaded and the scales of
//! four rows converted together, and the horizontal sums of two rows share one register of sixteen lanes.
//!
//! The bound is arithmetic on two ports, hence the count of instructions, as long as it is above the memory's time. Three
//! things keep it low. Sub-blocks stand where unpacking leaves them ([`One::ORDER`]); activations are put in that order once
//! per four rows. What unsigned weights have too much of is subtracted by the sums' starting values. And sums of four products
//! fit 16 bits for all but 8-bit weights: packed, one instruction adds pairs and multiplies them with integer scales.

use super::super::scales::ReadScales;
use super::{Unpack, tree};
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{self, Kind, MAX_GROUP_BYTES};
use std::arch::x86_64::*;

/// Rows multiplied at once.
const ROWS: usize = 4;

/// Scales of a group of four rows: rows 0 and 1 in the halves of the first register, 2 and 3 in those of the second.
pub struct Scales4 {
    d: [__m512; 2],
    /// The negated minima of sub-blocks, or of their first halves; not looked at where the kind has none.
    m: [__m512; 2],
    /// Those of second halves.
    m_hi: [__m512; 2],
}

/// A format as this kernel reads it.
pub trait One: Unpack {
    /// Register k of [`One::bytes`] holds sub-blocks `ORDER[k]` and `ORDER[4 + k]`; lane i of all scales is that of `ORDER[i]`.
    const ORDER: [usize; 8];

    /// 256 weights as unsigned bytes, `q + OFFSET`.
    ///
    /// # Safety
    /// As for all methods here: pointers to `BYTES` bytes, inlined only into functions that have the instruction set.
    unsafe fn bytes(p: *const u8) -> [__m512i; 4];

    /// Scales of four rows.
    ///
    /// # Safety
    /// As above.
    unsafe fn scales4(p: [*const u8; ROWS]) -> Scales4;

    /// The integer scales of runs of 16, each where [`runs`] leaves the run's sums: ones where a format has none.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    unsafe fn run_scales(_: *const u8) -> [__m512i; 2] {
        // SAFETY: no memory is read.
        unsafe { [_mm512_set1_epi16(1); 2] }
    }
}

/// Sub-blocks in the order of the file.
const PLAIN: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// Registers that hold neighbours.
const NEIGHBOURS: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Where nibbles of 64 bytes hold four sub-blocks: low ones 0 and 2, high ones 1 and 3.
const NIBBLES: [usize; 8] = [0, 1, 4, 5, 2, 3, 6, 7];

/// Bytes of a shuffle that spreads 16 bytes of scales, in all lanes, to words: the scale of the run that lane L of register
/// `k` holds, four times, then that of register k + 1. The byte goes to the upper half of the word if `upper`.
const fn spread(order: [usize; 8], k: usize, upper: bool) -> [u8; 64] {
    let mut c = [0x80; 64];
    let mut i = 0;
    while i < 32 {
        let (lane, k) = (i / 8, k + i % 8 / 4);
        c[2 * i + upper as usize] = (2 * order[k + 4 * (lane / 2)] + lane % 2) as u8;
        i += 1;
    }
    c
}

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
unsafe fn constant(c: &'static [u8; 64]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(c.as_ptr().cast()) }
}

/// Two rows' eight lanes in one register.
#[inline(always)]
unsafe fn two(a: __m256, b: __m256) -> __m512 {
    // SAFETY: no memory is read.
    unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(a), b) }
}

/// Eight values in the order of the lanes, for both rows.
#[inline(always)]
unsafe fn lanes<F: One>(v: __m256) -> __m512 {
    // SAFETY: no memory is read.
    unsafe {
        let o = F::ORDER.map(|b| b as i32);
        let order = _mm256_setr_epi32(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]);
        let v = if o[1] == 1 && o[2] == 2 { v } else { _mm256_permutevar8x32_ps(v, order) };
        _mm512_broadcast_f32x8(v)
    }
}

/// Scales one row at a time, from the reader that all kernels share.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn each_row<F: One>(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b, c, d) = (F::scales(p[0]), F::scales(p[1]), F::scales(p[2]), F::scales(p[3]));
        let o = F::ORDER.map(|b| b as i32);
        let order = _mm256_setr_epi32(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]);
        let f = |a, b| two(_mm256_permutevar8x32_ps(a, order), _mm256_permutevar8x32_ps(b, order));
        Scales4 {
            d: [f(a.d, b.d), f(c.d, d.d)],
            m: [f(a.m, b.m), f(c.m, d.m)],
            m_hi: [f(a.m_hi, b.m_hi), f(c.m_hi, d.m_hi)],
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

/// The minima of Q2_K's runs of 16.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn q2(p: [*const u8; ROWS]) -> Scales4 {
    // SAFETY: the caller's promise.
    unsafe {
        let [d, dmin] = halves4::<80>(p);
        let sign = _mm512_set1_ps(-0.0);
        let f = |a: *const u8, b: *const u8, dmin| {
            let dmin = _mm512_xor_ps(dmin, sign);
            let s = _mm256_inserti128_si256::<1>(
                _mm256_castsi128_si256(_mm_loadu_si128(a.cast())),
                _mm_loadu_si128(b.cast()),
            );
            let even = _mm256_and_si256(_mm256_srli_epi16::<4>(s), _mm256_set1_epi16(15));
            let odd = _mm256_srli_epi16::<12>(s);
            let g = |v| _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(v)));
            (g(even), g(odd))
        };
        let ((m0, h0), (m1, h1)) = (f(p[0], p[1], dmin[0]), f(p[2], p[3], dmin[1]));
        Scales4 { d, m: [m0, m1], m_hi: [h0, h1] }
    }
}

/// 16 bytes of signed scales as words.
#[inline(always)]
unsafe fn signed_runs<F: One>(sc: __m512i) -> [__m512i; 2] {
    // SAFETY: no memory is read.
    unsafe {
        let (low, high) =
            (constant(const { &spread(F::ORDER, 0, true) }), constant(const { &spread(F::ORDER, 2, true) }));
        [
            _mm512_srai_epi16::<8>(_mm512_shuffle_epi8(sc, low)),
            _mm512_srai_epi16::<8>(_mm512_shuffle_epi8(sc, high)),
        ]
    }
}

/// # Safety
/// The 16 bytes at `a` and at `b` can be read.
#[inline(always)]
unsafe fn nibbles(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast()));
        let both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(a), 0xff00, b);
        let shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
        _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15))
    }
}

/// 128 bytes of nibbles in [`NIBBLES`] order.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn nibbles_k(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let four = _mm512_set1_epi8(15);
        let (a, b) = (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast()));
        [
            _mm512_and_si512(a, four),
            _mm512_and_si512(_mm512_srli_epi16::<4>(a), four),
            _mm512_and_si512(b, four),
            _mm512_and_si512(_mm512_srli_epi16::<4>(b), four),
        ]
    }
}

/// 64 bytes of crumbs in the order of the file.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn crumbs(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let two = _mm512_set1_epi8(3);
        let v = _mm512_loadu_si512(p.cast());
        [
            _mm512_and_si512(v, two),
            _mm512_and_si512(_mm512_srli_epi16::<2>(v), two),
            _mm512_and_si512(_mm512_srli_epi16::<4>(v), two),
            _mm512_and_si512(_mm512_srli_epi16::<6>(v), two),
        ]
    }
}

/// `q` with the bits of `mask` from `h`, rotated right by `low` in the lower half and by `high` in the upper. Bits that come
/// from a neighbouring byte are not in the mask.
#[inline(always)]
unsafe fn bits(q: __m512i, h: __m512i, low: i64, high: i64, mask: i8) -> __m512i {
    // SAFETY: no memory is read.
    unsafe {
        let by = _mm512_setr_epi64(low, low, low, low, high, high, high, high);
        _mm512_ternarylogic_epi32::<0xf8>(q, _mm512_rorv_epi64(h, by), _mm512_set1_epi8(mask))
    }
}

macro_rules! one {
    ($($name:ident: $order:ident, |$p:ident| $bytes:expr, |$rows:ident| $scales:expr $(, |$r:ident| $runs:expr)?;)*) => {$(
        impl One for scalar::$name {
            const ORDER: [usize; 8] = $order;
            #[inline(always)]
            unsafe fn bytes($p: *const u8) -> [__m512i; 4] {
                // SAFETY: every read is inside the group's `BYTES` bytes.
                unsafe { $bytes }
            }
            #[inline(always)]
            unsafe fn scales4($rows: [*const u8; ROWS]) -> Scales4 {
                // SAFETY: as above.
                unsafe { $scales }
            }
            $(
                #[inline(always)]
                unsafe fn run_scales($r: *const u8) -> [__m512i; 2] {
                    // SAFETY: as above.
                    unsafe { $runs }
                }
            )?
        }
    )*};
}

one! {
    Q4_0: PLAIN, |p| {
        let q = |b: usize| nibbles(p.add(18 * b + 2), p.add(18 * b + 74));
        [q(0), q(1), q(2), q(3)]
    }, |p| every_18(p);
    Q4_1: NEIGHBOURS, |p| <Self as Unpack>::bytes(p), |p| each_row::<Self>(p);
    Q5_0: NEIGHBOURS, |p| <Self as Unpack>::bytes(p), |p| each_row::<Self>(p);
    Q5_1: NEIGHBOURS, |p| <Self as Unpack>::bytes(p), |p| each_row::<Self>(p);
    Q8_0: PLAIN, |p| {
        let q = |b: usize| {
            let low = _mm256_loadu_si256(p.add(34 * b + 2).cast());
            let high = _mm256_loadu_si256(p.add(34 * b + 138).cast());
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            _mm512_xor_si512(both, _mm512_set1_epi8(-128))
        };
        [q(0), q(1), q(2), q(3)]
    }, |p| every_34(p);
    Q8_K: NEIGHBOURS, |p| <Self as Unpack>::bytes(p), |p| each_row::<Self>(p);
    IQ4_NL: PLAIN, |p| {
        let t = _mm_add_epi8(_mm_loadu_si128(scalar::IQ4.as_ptr().cast()), _mm_set1_epi8(-128));
        let t = _mm512_broadcast_i32x4(t);
        let q = |b: usize| _mm512_shuffle_epi8(t, nibbles(p.add(18 * b + 2), p.add(18 * b + 74)));
        [q(0), q(1), q(2), q(3)]
    }, |p| every_18(p);
    IQ4_XS: NEIGHBOURS, |p| <Self as Unpack>::bytes(p), |p| each_row::<Self>(p);
    MXFP4: NEIGHBOURS, |p| <Self as Unpack>::bytes(p), |p| each_row::<Self>(p);
    Q2_K: PLAIN, |p| crumbs(p.add(16)), |p| q2(p), |p| {
        let sc = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
        let sc = _mm512_and_si512(sc, _mm512_set1_epi8(15));
        [
            _mm512_shuffle_epi8(sc, constant(const { &spread(PLAIN, 0, false) })),
            _mm512_shuffle_epi8(sc, constant(const { &spread(PLAIN, 2, false) })),
        ]
    };
    Q3_K: PLAIN, |p| {
        let q = crumbs(p.add(32));
        let h = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()));
        [bits(q[0], h, -2, 2, 4), bits(q[1], h, -1, 3, 4), bits(q[2], h, 0, 4, 4), bits(q[3], h, 1, 5, 4)]
    }, |p| only_d::<106>(p), |p| {
        let s = <Self as ReadScales>::scales(p).sc;
        signed_runs::<Self>(_mm512_broadcast_i32x4(s))
    };
    Q4_K: NIBBLES, |p| nibbles_k(p.add(16)), |p| k4(p);
    Q5_K: NIBBLES, |p| {
        let q = nibbles_k(p.add(48));
        let h = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(16).cast()));
        [bits(q[0], h, -4, -2, 16), bits(q[1], h, -3, -1, 16), bits(q[2], h, 0, 2, 16), bits(q[3], h, 1, 3, 16)]
    }, |p| k4(p);
    Q6_K: NEIGHBOURS, |p| {
        let four = _mm512_set1_epi8(15);
        let part = |i: usize| {
            let v = _mm512_loadu_si512(p.add(64 * i).cast());
            let h = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(128 + 32 * i).cast()));
            let up = _mm512_and_si512(_mm512_srli_epi16::<4>(v), four);
            [bits(_mm512_and_si512(v, four), h, -4, -2, 0x30), bits(up, h, 0, 2, 0x30)]
        };
        let ([a, b], [c, d]) = (part(0), part(1));
        [a, b, c, d]
    }, |p| only_d::<206>(p), |p| signed_runs::<Self>(_mm512_broadcast_i32x4(_mm_loadu_si128(p.add(192).cast())));
}

/// A group's activations as the weights stand, and what the sums start with.
struct Activations {
    q: [__m512i; 4],
    start: [__m512i; 4],
}

/// # Safety
/// As above.
#[inline(always)]
unsafe fn activations<F: One>(x: &Block) -> Activations {
    // SAFETY: sub-blocks of the block.
    unsafe {
        let part = |k: usize| {
            let half = |b: usize| _mm256_load_si256(x.q.as_ptr().add(32 * F::ORDER[b]).cast());
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(k)), half(4 + k))
        };
        let q = [part(0), part(1), part(2), part(3)];
        let zero = _mm512_setzero_si512();
        let excess = _mm512_set1_epi8(F::OFFSET as u8 as i8);
        let start = |q| {
            if F::OFFSET == 0 { zero } else { _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, excess, q)) }
        };
        Activations { q, start: [start(q[0]), start(q[1]), start(q[2]), start(q[3])] }
    }
}

/// The sums of a group's runs of 16 values, times their integer scales: of lane L, register k's in dword k.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn runs<F: One>(p: *const u8, a: &Activations) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let w = <F as One>::bytes(p);
        let d0 = _mm512_dpbusd_epi32(a.start[0], w[0], a.q[0]);
        let d1 = _mm512_dpbusd_epi32(a.start[1], w[1], a.q[1]);
        let d2 = _mm512_dpbusd_epi32(a.start[2], w[2], a.q[2]);
        let d3 = _mm512_dpbusd_epi32(a.start[3], w[3], a.q[3]);
        if F::OFFSET == 128 {
            let d01 = _mm512_add_epi32(_mm512_unpacklo_epi32(d0, d1), _mm512_unpackhi_epi32(d0, d1));
            let d23 = _mm512_add_epi32(_mm512_unpacklo_epi32(d2, d3), _mm512_unpackhi_epi32(d2, d3));
            _mm512_add_epi32(_mm512_unpacklo_epi64(d01, d23), _mm512_unpackhi_epi64(d01, d23))
        } else {
            // Sums of four products of at most 32 * 127: they fit 16 bits.
            let sc = F::run_scales(p);
            let low = _mm512_castsi512_ps(_mm512_madd_epi16(_mm512_packs_epi32(d0, d1), sc[0]));
            let high = _mm512_castsi512_ps(_mm512_madd_epi16(_mm512_packs_epi32(d2, d3), sc[1]));
            _mm512_add_epi32(
                _mm512_castps_si512(_mm512_shuffle_ps::<0b10_00_10_00>(low, high)),
                _mm512_castps_si512(_mm512_shuffle_ps::<0b11_01_11_01>(low, high)),
            )
        }
    }
}

/// Adds a group's products to the lanes of four rows; of a group that is `CUT`, only lanes in `mask` count.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn group<F: One, const CUT: bool>(
    p: [*const u8; ROWS],
    x: &Block,
    mask: __mmask16,
    acc: &mut [__m512; 2],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let a = activations::<F>(x);
        let mut s = F::scales4(p);
        if CUT {
            // What follows a row are numbers like any others; with scales of 0 they count as the zeros they stand for.
            let cut = |v| _mm512_maskz_mov_ps(mask, v);
            (s.d, s.m) = ([cut(s.d[0]), cut(s.d[1])], [cut(s.m[0]), cut(s.m[1])]);
        }
        let f = |v: &[f32; 8]| lanes::<F>(_mm256_load_ps(v.as_ptr()));
        let scale = f(&x.scale);
        // Sub-blocks of a row: its two runs, which lie in neighbouring lanes.
        let sums = |a, b| {
            let first = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            let second = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
            _mm512_cvtepi32_ps(_mm512_add_epi32(first, second))
        };
        let ab = sums(runs::<F>(p[0], &a), runs::<F>(p[1], &a));
        let cd = sums(runs::<F>(p[2], &a), runs::<F>(p[3], &a));
        acc[0] = _mm512_fmadd_ps(ab, _mm512_mul_ps(s.d[0], scale), acc[0]);
        acc[1] = _mm512_fmadd_ps(cd, _mm512_mul_ps(s.d[1], scale), acc[1]);
        match F::KIND {
            Kind::Plain | Kind::Scale16 => {}
            Kind::Min => {
                let sum = f(&x.sum);
                acc[0] = _mm512_fmadd_ps(s.m[0], sum, acc[0]);
                acc[1] = _mm512_fmadd_ps(s.m[1], sum, acc[1]);
            }
            Kind::Min16 => {
                let (lo, hi) = (f(&x.sum_lo), f(&x.sum_hi));
                acc[0] = _mm512_fmadd_ps(s.m_hi[0], hi, _mm512_fmadd_ps(s.m[0], lo, acc[0]));
                acc[1] = _mm512_fmadd_ps(s.m_hi[1], hi, _mm512_fmadd_ps(s.m[1], lo, acc[1]));
            }
        }
    }
}

/// Four rows by one column.
///
/// # Safety
/// `w` points to rows of `row_bytes`, after which whole groups can be read if `beyond`; the CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn four<F: One>(w: [*const u8; ROWS], row_bytes: usize, beyond: bool, x: &[Block]) -> [f32; ROWS] {
    let mut acc = [_mm512_setzero_ps(); 2];
    let (whole, rest) = (row_bytes / F::BYTES, row_bytes % F::BYTES);
    let x = &x[..whole + usize::from(rest > 0)];
    for (i, x) in x[..whole].iter().enumerate() {
        // SAFETY: group i of each row; fetching from beyond the weights is harmless.
        unsafe {
            let p = w.map(|w| w.add(i * F::BYTES));
            for p in p {
                let mut at = 0;
                while at < F::BYTES {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + at).cast());
                    at += 64;
                }
            }
            group::<F, false>(p, x, 0, &mut acc);
        }
    }
    if rest > 0 && beyond {
        let blocks = rest / F::BLOCK_BYTES;
        let mask = (0..16).filter(|i| F::ORDER[i % 8] < blocks).fold(0, |m, i| m | 1 << i);
        // SAFETY: the caller's promise.
        unsafe { group::<F, true>(w.map(|w| w.add(whole * F::BYTES)), &x[whole], mask, &mut acc) };
    } else if rest > 0 {
        let mut padded = [[0u8; MAX_GROUP_BYTES]; ROWS];
        // SAFETY: the last `rest` bytes of each row, and buffers that hold any group.
        unsafe {
            for (w, padded) in w.iter().zip(&mut padded) {
                std::ptr::copy_nonoverlapping(w.add(whole * F::BYTES), padded.as_mut_ptr(), rest);
            }
            group::<F, false>([0, 1, 2, 3].map(|r| padded[r].as_ptr()), &x[whole], 0, &mut acc);
        }
    }
    let order = F::ORDER;
    let mut back = [0; 16];
    for (i, b) in order.into_iter().enumerate() {
        (back[b], back[8 + b]) = (i as i32, 8 + i as i32);
    }
    // SAFETY: 16 values.
    let back = unsafe { _mm512_loadu_si512(back.as_ptr().cast()) };
    let sums = |acc| {
        let acc = _mm512_permutexvar_ps(back, acc);
        (tree(_mm512_castps512_ps256(acc)), tree(_mm512_extractf32x8_ps::<1>(acc)))
    };
    let ((a, b), (c, d)) = (sums(acc[0]), sums(acc[1]));
    [a, b, c, d]
}

/// How far ahead of each row's reading the next bytes are fetched.
const AHEAD: usize = 1024;

/// `y[r]` = row r of `w` times `x`.
///
/// The four rows multiplied at once come from four quarters of `w`: four streams that each run through memory without a gap
/// are what the processor's prefetchers follow best (four neighbouring rows restart in the same page every time).
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn column<F: One>(w: &[u8], row_bytes: usize, x: &[Block], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    assert_eq!(y.len(), n);
    let quarter = n / ROWS;
    for i in 0..n.div_ceil(ROWS) {
        let rows = if i < quarter {
            [i, i + quarter, i + 2 * quarter, i + 3 * quarter]
        } else {
            // The last row stands in for those past the end.
            [0, 1, 2, 3].map(|r| (ROWS * quarter + r).min(n - 1))
        };
        let beyond = rows[3] * row_bytes + row_bytes.next_multiple_of(F::BYTES) <= w.len();
        // SAFETY: rows below n, the last of which is rows[3], and the CPU has the set.
        let t = unsafe { four::<F>(rows.map(|r| w.as_ptr().add(r * row_bytes)), row_bytes, beyond, x) };
        for (r, t) in rows.into_iter().zip(t) {
            y[r] = t;
        }
    }
}
