//! 256 weights of each format turned: dword b of register k holds values 4k..4k+4 of sub-block b, so that products need no sums
//! across lanes. Where a format's bits are packed, they are turned before they are spread. The bytes are those of
//! [`Unpack::bytes`], in another order.

use super::Unpack;
use crate::cpu::scalar::{self, E2M1, IQ4};
use std::arch::x86_64::*;

/// A format that can be read in this order.
pub trait Turned: Unpack {
    /// # Safety
    /// `p` points to `BYTES` bytes; the CPU has AVX2.
    #[inline(always)]
    unsafe fn turned(p: *const u8) -> [__m256i; 8] {
        // SAFETY: the caller's promise.
        unsafe { transpose(Self::bytes(p)) }
    }
}

/// Dword k of register b to dword b of register k.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set; what `p` names can be read.
#[inline(always)]
pub unsafe fn transpose(x: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: no memory is read.
    unsafe {
        let u = quarters([x[0], x[1], x[2], x[3]]);
        let v = quarters([x[4], x[5], x[6], x[7]]);
        let mut q = [_mm256_setzero_si256(); 8];
        each!(k < 4, {
            q[k] = _mm256_permute2x128_si256::<0x20>(u[k], v[k]);
            q[k + 4] = _mm256_permute2x128_si256::<0x31>(u[k], v[k]);
        });
        q
    }
}

/// Dword k of register b to dword b of register k, in each half.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn quarters(x: [__m256i; 4]) -> [__m256i; 4] {
    // SAFETY: no memory is read.
    unsafe {
        let (a, b) = (_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpacklo_epi32(x[2], x[3]));
        let (c, d) = (_mm256_unpackhi_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[2], x[3]));
        [
            _mm256_unpacklo_epi64(a, b),
            _mm256_unpackhi_epi64(a, b),
            _mm256_unpacklo_epi64(c, d),
            _mm256_unpackhi_epi64(c, d),
        ]
    }
}

/// 16 bytes at `p` and 16 at `q`.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn two(p: *const u8, q: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let a = _mm256_castsi128_si256(_mm_loadu_si128(p.cast()));
        _mm256_inserti128_si256::<1>(a, _mm_loadu_si128(q.cast()))
    }
}

/// Eight blocks of 16 bytes, `STRIDE` apart: low nibbles are the first half of a block's values, high ones the second.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn nibbles<const STRIDE: usize>(p: *const u8) -> [__m256i; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let block = |b: usize| two(p.add(b * STRIDE), p.add((b + 4) * STRIDE));
        let t = quarters([block(0), block(1), block(2), block(3)]);
        let four = _mm256_set1_epi8(15);
        let mut q = [four; 8];
        each!(k < 4, {
            q[k] = _mm256_and_si256(t[k], four);
            q[k + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(t[k]), four);
        });
        q
    }
}

/// Table entries, plus `offset`.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn look(t: &[i8; 16], offset: i8, q: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: sixteen bytes.
    unsafe {
        let t = _mm_add_epi8(_mm_loadu_si128(t.as_ptr().cast()), _mm_set1_epi8(offset));
        let t = _mm256_broadcastsi128_si256(t);
        let mut q = q;
        each!(k < 8, { q[k] = _mm256_shuffle_epi8(t, q[k]) });
        q
    }
}

/// 64 bytes in which 32 bytes hold 128 values, two bits each.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn crumbs(p: *const u8) -> [__m256i; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (two(p, p.add(32)), two(p.add(16), p.add(48)));
        let by = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
        let mut q = [
            _mm256_shuffle_epi32::<0b00_00_00_00>(a),
            _mm256_shuffle_epi32::<0b01_01_01_01>(a),
            _mm256_shuffle_epi32::<0b10_10_10_10>(a),
            _mm256_shuffle_epi32::<0b11_11_11_11>(a),
            _mm256_shuffle_epi32::<0b00_00_00_00>(b),
            _mm256_shuffle_epi32::<0b01_01_01_01>(b),
            _mm256_shuffle_epi32::<0b10_10_10_10>(b),
            _mm256_shuffle_epi32::<0b11_11_11_11>(b),
        ];
        each!(k < 8, { q[k] = _mm256_and_si256(_mm256_srlv_epi32(q[k], by), _mm256_set1_epi8(3)) });
        q
    }
}

/// Adds 4 where bit b of the 32 bytes at `h`, which belongs to sub-block b, is set.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn plane(h: *const u8, q: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = q;
        let by = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        each!(k < 8, {
            let h = _mm256_set1_epi32(h.add(4 * k).cast::<i32>().read_unaligned());
            let bit = _mm256_and_si256(_mm256_srlv_epi32(h, by), _mm256_set1_epi8(1));
            q[k] = _mm256_or_si256(q[k], _mm256_slli_epi16::<2>(bit));
        });
        q
    }
}

macro_rules! turned {
    ($($name:ident $(: |$p:ident| $body:expr)?;)*) => {$(
        impl Turned for scalar::$name {
            $(
                #[inline(always)]
                unsafe fn turned($p: *const u8) -> [__m256i; 8] {
                    // SAFETY: every read is inside the group's `BYTES` bytes.
                    unsafe { $body }
                }
            )?
        }
    )*};
}

turned! {
    Q4_0: |p| nibbles::<18>(p.add(2));
    Q4_1: |p| nibbles::<20>(p.add(4));
    Q5_0;
    Q5_1;
    Q8_0;
    Q8_K;
    IQ4_NL: |p| look(&IQ4, 0, nibbles::<18>(p.add(2)));
    IQ4_XS: |p| look(&IQ4, 0, nibbles::<16>(p.add(8)));
    MXFP4: |p| look(&E2M1, 16, nibbles::<17>(p.add(1)));
    Q2_K: |p| crumbs(p.add(16));
    Q3_K: |p| plane(p, crumbs(p.add(32)));
    Q4_K;
    Q5_K;
    Q6_K;
}
