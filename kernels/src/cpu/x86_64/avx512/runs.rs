//! 256 weights of each format as four registers that need no sums across lanes afterwards: lane `8h + 4r + s` of register j holds
//! values 4j..4j+4 of run r (of two runs of 16) of sub-block `ORDER[4h + s]` ([`Four`]), so that four multiplications in a chain
//! leave each run's sum in its lane. The bytes are those of `Unpack::bytes`, in another order.

use super::four::Four;
use crate::cpu::scalar::{self, E2M1, IQ4};
use std::arch::x86_64::*;

/// A format that can be read in this order.
pub trait Runs: Four {
    /// # Safety
    /// `p` points to `BYTES` bytes; the CPU has AVX-512.
    unsafe fn runs(p: *const u8) -> [__m512i; 4];
}

macro_rules! runs {
    ($($name:ident: |$p:ident| $body:expr;)*) => {$(
        impl Runs for scalar::$name {
            #[inline(always)]
            unsafe fn runs($p: *const u8) -> [__m512i; 4] {
                // SAFETY: every read is inside the group's `BYTES` bytes.
                unsafe { $body }
            }
        }
    )*};
}

/// Dword j of quarter i of register s to dword s of quarter i of register j: sub-blocks s and 4 + s in register s become runs.
///
/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set; what `p` names can be read.
#[inline(always)]
pub unsafe fn transpose(x: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3]));
        let (c, d) = (_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3]));
        [
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ]
    }
}

/// 32 bytes at `p` and 32 at `q`.
///
/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn two(p: *const u8, q: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let a = _mm512_castsi256_si512(_mm256_loadu_si256(p.cast()));
        _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(q.cast()))
    }
}

/// 16 bytes of each of four blocks, `STRIDE` bytes apart.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn four<const STRIDE: usize>(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        if STRIDE == 16 {
            return _mm512_loadu_si512(p.cast());
        }
        let z = _mm512_castsi128_si512(_mm_loadu_si128(p.cast()));
        let z = _mm512_mask_broadcast_i32x4(z, 0x00f0, _mm_loadu_si128(p.add(STRIDE).cast()));
        let z = _mm512_mask_broadcast_i32x4(z, 0x0f00, _mm_loadu_si128(p.add(2 * STRIDE).cast()));
        _mm512_mask_broadcast_i32x4(z, 0xf000, _mm_loadu_si128(p.add(3 * STRIDE).cast()))
    }
}

/// Eight blocks of 16 bytes: low nibbles are the first run, high nibbles the second.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn nibbles<const STRIDE: usize>(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (four::<STRIDE>(p), four::<STRIDE>(p.add(4 * STRIDE)));
        let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 16, 20, 24, 28, 16, 20, 24, 28);
        let mut q = [first; 4];
        each!(j < 4, {
            let from = _mm512_add_epi32(first, _mm512_set1_epi32(j as i32));
            let v = _mm512_permutex2var_epi32(a, from, b);
            let shift = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4);
            q[j] = _mm512_and_si512(_mm512_srlv_epi32(v, shift), _mm512_set1_epi8(15));
        });
        q
    }
}

/// Table entries, plus `offset`.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn look(t: &[i8; 16], offset: i8, q: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let t = _mm_add_epi8(_mm_loadu_si128(t.as_ptr().cast()), _mm_set1_epi8(offset));
        let t = _mm512_broadcast_i32x4(t);
        [
            _mm512_shuffle_epi8(t, q[0]),
            _mm512_shuffle_epi8(t, q[1]),
            _mm512_shuffle_epi8(t, q[2]),
            _mm512_shuffle_epi8(t, q[3]),
        ]
    }
}

/// The fifth bits of eight blocks whose masks are `STRIDE` bytes apart.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn fifths<const STRIDE: usize>(h: *const u8, q: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut m = _mm512_set1_epi32(h.cast::<i32>().read_unaligned());
        each!(b < 8, {
            if b > 0 {
                let lanes = (0x0011 << (b % 4)) << (8 * (b / 4));
                m = _mm512_mask_set1_epi32(m, lanes, h.add(b * STRIDE).cast::<i32>().read_unaligned());
            }
        });
        // The second run's bits are the upper half; byte k of a lane is then to see bit 4j + k.
        let m =
            _mm512_srlv_epi32(m, _mm512_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16, 0, 0, 0, 0, 16, 16, 16, 16));
        let low = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
        let m0 = _mm512_shuffle_epi8(m, low);
        let m1 = _mm512_shuffle_epi8(m, _mm512_add_epi8(low, _mm512_set1_epi8(1)));
        let (even, odd) = (_mm512_set1_epi32(0x0804_0201), _mm512_set1_epi32(0x8040_2010_u32 as i32));
        let five = _mm512_set1_epi8(16);
        [
            _mm512_mask_add_epi8(q[0], _mm512_test_epi8_mask(m0, even), q[0], five),
            _mm512_mask_add_epi8(q[1], _mm512_test_epi8_mask(m0, odd), q[1], five),
            _mm512_mask_add_epi8(q[2], _mm512_test_epi8_mask(m1, even), q[2], five),
            _mm512_mask_add_epi8(q[3], _mm512_test_epi8_mask(m1, odd), q[3], five),
        ]
    }
}

/// One dword of each quarter, in all four.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn spread(v: __m512i) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm512_shuffle_epi32::<0b00_00_00_00>(v),
            _mm512_shuffle_epi32::<0b01_01_01_01>(v),
            _mm512_shuffle_epi32::<0b10_10_10_10>(v),
            _mm512_shuffle_epi32::<0b11_11_11_11>(v),
        ]
    }
}

/// `v[4h + s]` in lane `8h + 4r + s`.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn shifts(v: [i32; 8]) -> __m512i {
    let [a, b, c, d, e, f, g, h] = v;
    // SAFETY: no memory is read.
    unsafe { _mm512_setr_epi32(a, b, c, d, a, b, c, d, e, f, g, h, e, f, g, h) }
}

/// 64 bytes in which 32 bytes hold 128 values, two bits each.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn crumbs(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = spread(_mm512_loadu_si512(p.cast()));
        each!(j < 4, {
            q[j] = _mm512_and_si512(
                _mm512_srlv_epi32(q[j], shifts([0, 2, 4, 6, 0, 2, 4, 6])),
                _mm512_set1_epi8(3),
            )
        });
        q
    }
}

/// Adds `1 << BIT` where bit b of the 32 bytes at `h`, which belongs to sub-block b, is set.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn plane<F: Four, const BIT: i32>(h: *const u8, q: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = q;
        let h = spread(_mm512_broadcast_i64x4(_mm256_loadu_si256(h.cast())));
        each!(j < 4, {
            // A rotation moves bits to other bytes too, but not the one that is kept.
            let bit = _mm512_rolv_epi32(h[j], shifts(F::ORDER.map(|b| 32 + BIT - b as i32)));
            q[j] = _mm512_ternarylogic_epi32::<0xf8>(q[j], bit, _mm512_set1_epi8(1 << BIT));
        });
        q
    }
}

/// Dword j of each quarter of `a` twice, then that of `b`, in register j.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn doubled(a: __m512i, b: __m512i) -> [__m512i; 4] {
    // SAFETY: no memory is read.
    unsafe {
        let (lo, hi) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        [
            _mm512_shuffle_epi32::<0b01_01_00_00>(lo),
            _mm512_shuffle_epi32::<0b11_11_10_10>(lo),
            _mm512_shuffle_epi32::<0b01_01_00_00>(hi),
            _mm512_shuffle_epi32::<0b11_11_10_10>(hi),
        ]
    }
}

/// 128 bytes of nibbles, each 32 of them two sub-blocks, low and high.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn pairs(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = doubled(_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast()));
        let shift = _mm512_set4_epi32(4, 0, 4, 0);
        each!(j < 4, { q[j] = _mm512_and_si512(_mm512_srlv_epi32(q[j], shift), _mm512_set1_epi8(15)) });
        q
    }
}

/// Eight sub-blocks of 32 bytes, `STRIDE` apart, 128 added.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn eights<const STRIDE: usize>(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = transpose([
            two(p, p.add(4 * STRIDE)),
            two(p.add(STRIDE), p.add(5 * STRIDE)),
            two(p.add(2 * STRIDE), p.add(6 * STRIDE)),
            two(p.add(3 * STRIDE), p.add(7 * STRIDE)),
        ]);
        each!(j < 4, { q[j] = _mm512_xor_si512(q[j], _mm512_set1_epi8(-128)) });
        q
    }
}

runs! {
    Q4_0: |p| nibbles::<18>(p.add(2));
    Q4_1: |p| nibbles::<20>(p.add(4));
    Q5_0: |p| fifths::<22>(p.add(2), nibbles::<22>(p.add(6)));
    Q5_1: |p| fifths::<24>(p.add(4), nibbles::<24>(p.add(8)));
    Q8_0: |p| eights::<34>(p.add(2));
    Q8_K: |p| eights::<32>(p.add(4));
    IQ4_NL: |p| look(&IQ4, -128, nibbles::<18>(p.add(2)));
    IQ4_XS: |p| look(&IQ4, -128, nibbles::<16>(p.add(8)));
    MXFP4: |p| look(&E2M1, 16, nibbles::<17>(p.add(1)));
    Q2_K: |p| crumbs(p.add(16));
    Q3_K: |p| plane::<Self, 2>(p, crumbs(p.add(32)));
    Q4_K: |p| pairs(p.add(16));
    Q5_K: |p| plane::<Self, 4>(p.add(16), pairs(p.add(48)));
    Q6_K: |p| {
        let mut q = pairs(p);
        let h = |i: usize| _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(128 + 32 * i).cast()));
        let high = doubled(h(0), h(1));
        each!(j < 4, {
            let bits = _mm512_rolv_epi32(high[j], shifts([4, 0, 4, 0, 2, 30, 2, 30]));
            q[j] = _mm512_ternarylogic_epi32::<0xf8>(q[j], bits, _mm512_set1_epi8(48));
        });
        q
    };
}
