//! 256 weights of each format as four registers of bytes, in order. Signed formats come as `q + OFFSET`, unsigned ones
//! (those with minima) as they are.

use super::super::scales::ReadScales;
use crate::cpu::scalar::{self, E2M1, IQ4};
use std::arch::x86_64::*;

/// A format these kernels can read.
pub trait Unpack: ReadScales {
    /// What the bytes have too much of: 0 or a power of two.
    const OFFSET: i32;

    /// Value i in byte i % 64 of register i / 64.
    ///
    /// # Safety
    /// `p` points to `BYTES` bytes; the CPU has AVX-512.
    unsafe fn bytes(p: *const u8) -> [__m512i; 4];
}

macro_rules! unpack {
    ($($name:ident: $offset:literal, |$p:ident| $body:expr;)*) => {$(
        impl Unpack for scalar::$name {
            const OFFSET: i32 = $offset;
            #[inline(always)]
            unsafe fn bytes($p: *const u8) -> [__m512i; 4] {
                // SAFETY: every read is inside the group's `BYTES` bytes.
                unsafe { $body }
            }
        }
    )*};
}

/// The 16 bytes at `p` and those `STRIDE` after, each as 32 values: low nibbles, then high nibbles.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn nibbles<const STRIDE: usize>(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = { (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(STRIDE).cast())) };
        let both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(a), 0xff00, b);
        let shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
        _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15))
    }
}

/// Four times [`nibbles`]: the eight blocks of a group of small blocks.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn nibbles4<const STRIDE: usize>(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        {
            [
                nibbles::<STRIDE>(p),
                nibbles::<STRIDE>(p.add(2 * STRIDE)),
                nibbles::<STRIDE>(p.add(4 * STRIDE)),
                nibbles::<STRIDE>(p.add(6 * STRIDE)),
            ]
        }
    }
}

/// A table of 16 bytes, in all lanes.
#[inline(always)]
unsafe fn table(t: &[i8; 16], offset: i8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let t = { _mm_loadu_si128(t.as_ptr().cast()) };
        _mm512_broadcast_i32x4(_mm_add_epi8(t, _mm_set1_epi8(offset)))
    }
}

/// Table entries.
#[inline(always)]
unsafe fn look(t: __m512i, q: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let f = |q| _mm512_shuffle_epi8(t, q);
        [f(q[0]), f(q[1]), f(q[2]), f(q[3])]
    }
}

/// Sets bit 4 of byte i where bit i of the masks (8 bytes, four of each of two blocks) is set.
#[inline(always)]
unsafe fn fifth(q: __m512i, low: u32, high: u32) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let set = u64::from(low) | u64::from(high) << 32;
        _mm512_mask_add_epi8(q, set, q, _mm512_set1_epi8(16))
    }
}

/// The fifth bits of a group of Q5_0 or Q5_1, their masks `STRIDE` bytes apart.
///
/// # Safety
/// The masks can be read.
#[inline(always)]
unsafe fn fifths<const STRIDE: usize>(h: *const u8, q: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let m = |i: usize| h.add(i * STRIDE).cast::<u32>().read_unaligned();
        [fifth(q[0], m(0), m(1)), fifth(q[1], m(2), m(3)), fifth(q[2], m(4), m(5)), fifth(q[3], m(6), m(7))]
    }
}

/// 128 bytes in which 32 bytes hold 64 values: low nibbles, then high nibbles.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn k4(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let shift = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
        let four = _mm512_set1_epi8(15);
        let part = |i: usize| {
            let v = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(32 * i).cast()));
            _mm512_and_si512(_mm512_srlv_epi64(v, shift), four)
        };
        [part(0), part(1), part(2), part(3)]
    }
}

/// 64 bytes in which 32 bytes hold 128 values, two bits each.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn crumbs(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let two = _mm512_set1_epi8(3);
        let (s0, s1) = (_mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0), _mm512_set_epi64(6, 6, 6, 6, 4, 4, 4, 4));
        let part = |i: usize| _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(32 * i).cast()));
        let (a, b) = (part(0), part(1));
        [
            _mm512_and_si512(_mm512_srlv_epi64(a, s0), two),
            _mm512_and_si512(_mm512_srlv_epi64(a, s1), two),
            _mm512_and_si512(_mm512_srlv_epi64(b, s0), two),
            _mm512_and_si512(_mm512_srlv_epi64(b, s1), two),
        ]
    }
}

/// Adds `value` where bit j of the 32 bytes at `h` belongs to sub-block j.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn plane(h: *const u8, q: [__m512i; 4], value: i8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let h = { _mm512_broadcast_i64x4(_mm256_loadu_si256(h.cast())) };
        let v = _mm512_set1_epi8(value);
        let bits = |lo: i64, hi: i64| {
            let (lo, hi) = (lo * 0x0101_0101_0101_0101, hi.wrapping_mul(0x0101_0101_0101_0101));
            _mm512_set_epi64(hi, hi, hi, hi, lo, lo, lo, lo)
        };
        let add = |q, b| _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(h, b), q, v);
        [add(q[0], bits(1, 2)), add(q[1], bits(4, 8)), add(q[2], bits(16, 32)), add(q[3], bits(64, 128))]
    }
}

unpack! {
    Q4_0: 8, |p| nibbles4::<18>(p.add(2));
    Q4_1: 0, |p| nibbles4::<20>(p.add(4));
    Q5_0: 16, |p| fifths::<22>(p.add(2), nibbles4::<22>(p.add(6)));
    Q5_1: 0, |p| fifths::<24>(p.add(4), nibbles4::<24>(p.add(8)));
    Q8_0: 128, |p| {
        let pair = |i: usize| {
            let a = _mm256_loadu_si256(p.add(34 * i + 2).cast());
            let b = _mm256_loadu_si256(p.add(34 * i + 36).cast());
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            _mm512_xor_si512(both, _mm512_set1_epi8(-128))
        };
        [pair(0), pair(2), pair(4), pair(6)]
    };
    Q8_K: 128, |p| {
        let part = |i: usize| {
            _mm512_xor_si512(_mm512_loadu_si512(p.add(4 + 64 * i).cast()), _mm512_set1_epi8(-128))
        };
        [part(0), part(1), part(2), part(3)]
    };
    IQ4_NL: 128, |p| {
        let t = table(&IQ4, -128);
        look(t, nibbles4::<18>(p.add(2)))
    };
    IQ4_XS: 128, |p| {
        let t = table(&IQ4, -128);
        look(t, nibbles4::<16>(p.add(8)))
    };
    MXFP4: 16, |p| {
        let t = table(&E2M1, 16);
        look(t, nibbles4::<17>(p.add(1)))
    };
    Q2_K: 0, |p| crumbs(p.add(16));
    Q3_K: 4, |p| plane(p, crumbs(p.add(32)), 4);
    Q4_K: 0, |p| k4(p.add(16));
    Q5_K: 0, |p| plane(p.add(16), k4(p.add(48)), 16);
    Q6_K: 32, |p| {
        let high = crumbs(p.add(128));
        let low = |i: usize| _mm512_loadu_si512(p.add(64 * i).cast());
        let (a, b) = (low(0), low(1));
        let four = _mm512_set1_epi8(15);
        let up = |q| _mm512_and_si512(_mm512_srli_epi16::<4>(q), four);
        let join = |l, h| _mm512_or_si512(l, _mm512_slli_epi16::<4>(h));
        [
            join(_mm512_and_si512(a, four), high[0]),
            join(up(a), high[1]),
            join(_mm512_and_si512(b, four), high[2]),
            join(up(b), high[3]),
        ]
    };
}
