//! Scales and minima of a group of 256 weights as vectors of eight sub-blocks: the same for AVX2 and AVX-512.

use super::super::scalar::{self, Format};
use std::arch::x86_64::*;

/// What `scalar::Group` holds beside `q`, in registers. Fields that a format's `Kind` does not use are zero.
pub struct Scales {
    /// Scale of each sub-block.
    pub d: __m256,
    /// Minimum of each sub-block, or of its first half.
    pub m: __m256,
    /// Minimum of its second half.
    pub m_hi: __m256,
    /// Integer scale of each run of 16.
    pub sc: __m128i,
}

/// A format whose scales can be read.
pub trait ReadScales: Format {
    /// # Safety
    /// `p` points to `BYTES` bytes; the CPU has AVX2, FMA and F16C.
    unsafe fn scales(p: *const u8) -> Scales;
}

#[inline(always)]
unsafe fn only_d(d: __m256) -> Scales {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = _mm256_setzero_ps();
        Scales { d, m: zero, m_hi: zero, sc: _mm_setzero_si128() }
    }
}

/// Eight halves, `STRIDE` bytes apart.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn halves<const STRIDE: usize>(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let h = |i: usize| i32::from(p.add(i * STRIDE).cast::<u16>().read_unaligned());
        let v = _mm_cvtsi32_si128(h(0));
        let v = _mm_insert_epi16::<1>(v, h(1));
        let v = _mm_insert_epi16::<2>(v, h(2));
        let v = _mm_insert_epi16::<3>(v, h(3));
        let v = _mm_insert_epi16::<4>(v, h(4));
        let v = _mm_insert_epi16::<5>(v, h(5));
        let v = _mm_insert_epi16::<6>(v, h(6));
        let v = _mm_insert_epi16::<7>(v, h(7));
        _mm256_cvtph_ps(v)
    }
}

/// Eight pairs of halves, `STRIDE` bytes apart.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn pairs<const STRIDE: usize>(p: *const u8) -> (__m256, __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        let h = |i: usize| p.add(i * STRIDE).cast::<i32>().read_unaligned();
        let a = _mm_setr_epi32(h(0), h(1), h(2), h(3));
        let b = _mm_setr_epi32(h(4), h(5), h(6), h(7));
        let split = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        let (a, b) = (_mm_shuffle_epi8(a, split), _mm_shuffle_epi8(b, split));
        (_mm256_cvtph_ps(_mm_unpacklo_epi64(a, b)), _mm256_cvtph_ps(_mm_unpackhi_epi64(a, b)))
    }
}

/// One half in all lanes.
///
/// # Safety
/// It can be read.
#[inline(always)]
unsafe fn half(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let h = { p.cast::<u16>().read_unaligned() };
        _mm256_cvtph_ps(_mm_set1_epi16(h as i16))
    }
}

/// Eight unsigned bytes as floats.
#[inline(always)]
unsafe fn bytes(b: u64) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(b as i64))) }
}

/// Q4_K's and Q5_K's head of 16 bytes.
///
/// # Safety
/// It can be read.
#[inline(always)]
unsafe fn k4(p: *const u8) -> Scales {
    // SAFETY: the caller's promise.
    unsafe {
        let word = |i: usize| p.add(i).cast::<u32>().read_unaligned();
        let (s, m, high) = (word(4), word(8), word(12));
        let join = |lo: u32, hi: u32| u64::from(lo) | u64::from(hi) << 32;
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
        let sc = join(s & six, high & four | (s >> 6 & two) << 4);
        let mins = join(m & six, high >> 4 & four | (m >> 6 & two) << 4);
        let (d, dmin) = { (half(p), half(p.add(2))) };
        let zero = _mm256_setzero_ps();
        let negative = _mm256_xor_ps(dmin, _mm256_set1_ps(-0.0));
        Scales {
            d: _mm256_mul_ps(d, bytes(sc)),
            m: _mm256_mul_ps(negative, bytes(mins)),
            m_hi: zero,
            sc: _mm_setzero_si128(),
        }
    }
}

macro_rules! scales {
    ($($name:ident: |$p:ident| $body:expr;)*) => {$(
        impl ReadScales for scalar::$name {
            #[inline(always)]
            unsafe fn scales($p: *const u8) -> Scales {
                // SAFETY: every read is inside the group's `BYTES` bytes.
                unsafe { $body }
            }
        }
    )*};
}

scales! {
    Q4_0: |p| only_d(halves::<18>(p));
    Q4_1: |p| { let (d, m) = pairs::<20>(p); Scales { m, ..only_d(d) } };
    Q5_0: |p| only_d(halves::<22>(p));
    Q5_1: |p| { let (d, m) = pairs::<24>(p); Scales { m, ..only_d(d) } };
    Q8_0: |p| only_d(halves::<34>(p));
    IQ4_NL: |p| only_d(halves::<18>(p));
    MXFP4: |p| {
        let e = |i: usize| i64::from(*p.add(17 * i)) << (8 * (i % 8));
        let e = e(0) | e(1) | e(2) | e(3) | e(4) | e(5) | e(6) | e(7);
        let e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(e));
        // As `scalar::e8m0_half`: the two smallest are subnormal.
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
        let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
        let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
        only_d(_mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, is_small)))
    };
    Q2_K: |p| {
        let s = _mm_loadu_si128(p.cast());
        let four = _mm_set1_epi8(15);
        let mins = _mm_and_si128(_mm_srli_epi16::<4>(s), four);
        let even = _mm_and_si128(mins, _mm_set1_epi16(255));
        let odd = _mm_srli_epi16::<8>(mins);
        let negative = _mm256_xor_ps(half(p.add(82)), _mm256_set1_ps(-0.0));
        let m = |v| _mm256_mul_ps(negative, _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(v)));
        Scales { d: half(p.add(80)), m: m(even), m_hi: m(odd), sc: _mm_and_si128(s, four) }
    };
    Q3_K: |p| {
        let s = _mm_loadl_epi64(p.add(96).cast());
        let low = _mm_and_si128(_mm_unpacklo_epi64(s, _mm_srli_epi16::<4>(s)), _mm_set1_epi8(15));
        let h = _mm_set1_epi32(p.add(104).cast::<i32>().read_unaligned());
        let h = _mm_and_si128(_mm_srlv_epi32(h, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
        let sc = _mm_sub_epi8(_mm_or_si128(low, _mm_slli_epi16::<4>(h)), _mm_set1_epi8(32));
        Scales { sc, ..only_d(half(p.add(108))) }
    };
    Q4_K: |p| k4(p);
    Q5_K: |p| k4(p);
    Q6_K: |p| Scales { sc: _mm_loadu_si128(p.add(192).cast()), ..only_d(half(p.add(208))) };
    Q8_K: |p| only_d(_mm256_set1_ps(p.cast::<f32>().read_unaligned()));
    IQ4_XS: |p| {
        let low = p.add(4).cast::<u32>().read_unaligned();
        let high = p.add(2).cast::<u16>().read_unaligned();
        let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        let low = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(low as i32), shifts), _mm256_set1_epi32(15));
        let shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        let high = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from(high)), shifts);
        let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
        let ls = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
        only_d(_mm256_mul_ps(half(p), _mm256_cvtepi32_ps(ls)))
    };
}
