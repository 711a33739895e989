//! 256 weights of each format as eight registers of bytes, a sub-block each.

use super::super::scales::ReadScales;
use crate::cpu::scalar::{self, E2M1, IQ4};
use std::arch::x86_64::*;

/// A format these kernels can read.
pub trait Unpack: ReadScales {
    /// Bytes are `q`, signed (large magnitudes), or else `q + OFFSET`, unsigned and at most 63.
    const SIGNED: bool;
    /// What unsigned bytes have too much of: 0 or a power of two.
    const OFFSET: i32;
    /// How many bits unsigned bytes have, at most 6; 8 if they are signed.
    const BITS: u32;

    /// Value i in byte i % 32 of register i / 32.
    ///
    /// # Safety
    /// `p` points to `BYTES` bytes; the CPU has AVX2.
    unsafe fn bytes(p: *const u8) -> [__m256i; 8];
}

macro_rules! unpack {
    ($($name:ident: $signed:literal, $offset:literal, $bits:literal, |$p:ident, $b:ident| $body:expr;)*) => {$(
        impl Unpack for scalar::$name {
            const SIGNED: bool = $signed;
            const OFFSET: i32 = $offset;
            const BITS: u32 = $bits;
            #[inline(always)]
            unsafe fn bytes($p: *const u8) -> [__m256i; 8] {
                // No closure: one that is called so often may stay a call, without the instruction set.
                /// # Safety
                /// As above.
                #[inline(always)]
                unsafe fn f($p: *const u8, $b: usize) -> __m256i {
                    // SAFETY: every read is inside the group's `BYTES` bytes.
                    unsafe { $body }
                }
                // SAFETY: the caller's promise.
                unsafe { [f($p, 0), f($p, 1), f($p, 2), f($p, 3), f($p, 4), f($p, 5), f($p, 6), f($p, 7)] }
            }
        }
    )*};
}

/// 16 bytes as 32 values: low nibbles, then high nibbles.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
        _mm256_and_si256(_mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15))
    }
}

/// 16 where bit i of the 4 bytes at `h` is set, in byte i.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn fifth(h: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let h = _mm256_set1_epi32(h.cast::<i32>().read_unaligned());
        let spread =
            _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(h, spread), bit), bit);
        _mm256_and_si256(set, _mm256_set1_epi8(16))
    }
}

/// A table's entries for 32 nibbles.
#[inline(always)]
unsafe fn look(t: &[i8; 16], offset: i8, q: __m256i) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let t = _mm_add_epi8(_mm_loadu_si128(t.as_ptr().cast()), _mm_set1_epi8(offset));
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), q)
    }
}

/// Bits `shift..shift + width` of 32 bytes.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn bits(p: *const u8, shift: usize, mask: i8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let v = { _mm256_loadu_si256(p.cast()) };
        _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi8(mask))
    }
}

/// `value` in each of 32 bytes whose bit `b` is set.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn plane(p: *const u8, b: usize, value: i8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let bit = _mm256_set1_epi8((1u8 << b) as i8);
        let h = _mm256_and_si256(_mm256_loadu_si256(p.cast()), bit);
        _mm256_and_si256(_mm256_cmpeq_epi8(h, bit), _mm256_set1_epi8(value))
    }
}

unpack! {
    Q4_0: false, 8, 4, |p, b| nibbles(p.add(18 * b + 2));
    Q4_1: false, 0, 4, |p, b| nibbles(p.add(20 * b + 4));
    Q5_0: false, 16, 5, |p, b| _mm256_or_si256(nibbles(p.add(22 * b + 6)), fifth(p.add(22 * b + 2)));
    Q5_1: false, 0, 5, |p, b| _mm256_or_si256(nibbles(p.add(24 * b + 8)), fifth(p.add(24 * b + 4)));
    Q8_0: true, 0, 8, |p, b| _mm256_loadu_si256(p.add(34 * b + 2).cast());
    Q8_K: true, 0, 8, |p, b| _mm256_loadu_si256(p.add(32 * b + 4).cast());
    IQ4_NL: true, 0, 8, |p, b| look(&IQ4, 0, nibbles(p.add(18 * b + 2)));
    IQ4_XS: true, 0, 8, |p, b| look(&IQ4, 0, nibbles(p.add(16 * b + 8)));
    MXFP4: false, 16, 5, |p, b| look(&E2M1, 16, nibbles(p.add(17 * b + 1)));
    Q2_K: false, 0, 2, |p, b| bits(p.add(16 + 32 * (b / 4)), 2 * (b % 4), 3);
    Q3_K: false, 4, 3, |p, b| _mm256_or_si256(bits(p.add(32 + 32 * (b / 4)), 2 * (b % 4), 3), plane(p, b, 4));
    Q4_K: false, 0, 4, |p, b| bits(p.add(16 + 32 * (b / 2)), 4 * (b % 2), 15);
    Q5_K: false, 0, 5, |p, b| {
        _mm256_or_si256(bits(p.add(48 + 32 * (b / 2)), 4 * (b % 2), 15), plane(p.add(16), b, 16))
    };
    Q6_K: false, 32, 6, |p, b| {
        let low = bits(p.add(64 * (b / 4) + 32 * (b % 2)), 4 * (b % 4 / 2), 15);
        let high = bits(p.add(128 + 32 * (b / 4)), 2 * (b % 4), 3);
        _mm256_or_si256(low, _mm256_slli_epi16::<4>(high))
    };
}
