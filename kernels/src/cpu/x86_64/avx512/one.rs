//! One column, the product of every decode step: four rows at a time, so that the activations are loaded and the scales of
//! four rows converted together, and the horizontal sums of two rows share one register of sixteen lanes.
//!
//! The bound is arithmetic on two ports, hence the count of instructions, as long as it is above the memory's time. Three
//! things keep it low. Sub-blocks stand where unpacking leaves them ([`Four::ORDER`]); activations are put in that order once
//! per four rows. What unsigned weights have too much of is subtracted by the sums' starting values. And sums of four products
//! fit 16 bits for all but 8-bit weights: packed, one instruction adds pairs and multiplies them with integer scales.

use super::super::scales::ReadScales;
use super::four::{Four, ROWS, constant, end, fetch, rows, sums};
use super::runs::two;
use crate::cpu::quantized::Block;
use crate::cpu::scalar::{self, E2M1, IQ4, Kind, MAX_GROUP_BYTES};
use std::arch::x86_64::*;

/// A format as this kernel reads it.
pub trait One: Four {
    /// 256 weights as unsigned bytes, `q + OFFSET`: register k holds sub-blocks `ORDER[k]` and `ORDER[4 + k]`.
    ///
    /// # Safety
    /// As for all methods here: `p` points to `BYTES` bytes, inlined only into functions that have the instruction set.
    unsafe fn bytes(p: *const u8) -> [__m512i; 4];

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

/// Eight values in the order of the lanes, for both rows.
#[inline(always)]
unsafe fn lanes<F: Four>(v: __m256) -> __m512 {
    // SAFETY: no memory is read.
    unsafe {
        let o = F::ORDER.map(|b| b as i32);
        let order = _mm256_setr_epi32(o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]);
        let v = if o[1] == 1 && o[2] == 2 { v } else { _mm256_permutevar8x32_ps(v, order) };
        _mm512_broadcast_f32x8(v)
    }
}

/// 16 bytes of signed scales as words.
#[inline(always)]
unsafe fn signed_runs<F: Four>(sc: __m512i) -> [__m512i; 2] {
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

/// 128 bytes of nibbles: those of 64 bytes, low and high, then of the others.
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

/// Eight blocks' nibbles, `STRIDE` bytes apart, in the order of the file.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn blocks<const STRIDE: usize>(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let q = |b: usize| nibbles(p.add(STRIDE * b), p.add(STRIDE * (b + 4)));
        [q(0), q(1), q(2), q(3)]
    }
}

/// The same with fifth bits, whose masks are `STRIDE` bytes apart at `h`.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn fives<const STRIDE: usize>(h: *const u8, p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut q = blocks::<STRIDE>(p);
        each!(b < 4, {
            let mask = |b: usize| u64::from(h.add(STRIDE * b).cast::<u32>().read_unaligned());
            let set = mask(b) | mask(b + 4) << 32;
            q[b] = _mm512_mask_add_epi8(q[b], set, q[b], _mm512_set1_epi8(16));
        });
        q
    }
}

/// Sub-blocks of 32 signed bytes, `STRIDE` apart, in the order of the file, 128 added.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn eights<const STRIDE: usize>(p: *const u8) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let q = |b: usize| {
            let both = two(p.add(STRIDE * b), p.add(STRIDE * (b + 4)));
            _mm512_xor_si512(both, _mm512_set1_epi8(-128))
        };
        [q(0), q(1), q(2), q(3)]
    }
}

/// A table's entries for nibbles, `offset` added.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn look(t: &[i8; 16], offset: i8, q: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: sixteen bytes.
    unsafe {
        let t = _mm_add_epi8(_mm_loadu_si128(t.as_ptr().cast()), _mm_set1_epi8(offset));
        let t = _mm512_broadcast_i32x4(t);
        let f = |q| _mm512_shuffle_epi8(t, q);
        [f(q[0]), f(q[1]), f(q[2]), f(q[3])]
    }
}

macro_rules! one {
    ($($name:ident: |$p:ident| $bytes:expr $(, |$r:ident| $runs:expr)?;)*) => {$(
        impl One for scalar::$name {
            #[inline(always)]
            unsafe fn bytes($p: *const u8) -> [__m512i; 4] {
                // SAFETY: every read is inside the group's `BYTES` bytes.
                unsafe { $bytes }
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
    Q4_0: |p| blocks::<18>(p.add(2));
    Q4_1: |p| blocks::<20>(p.add(4));
    Q5_0: |p| fives::<22>(p.add(2), p.add(6));
    Q5_1: |p| fives::<24>(p.add(4), p.add(8));
    Q8_0: |p| eights::<34>(p.add(2));
    Q8_K: |p| eights::<32>(p.add(4));
    IQ4_NL: |p| look(&IQ4, -128, blocks::<18>(p.add(2)));
    IQ4_XS: |p| look(&IQ4, -128, blocks::<16>(p.add(8)));
    MXFP4: |p| look(&E2M1, 16, blocks::<17>(p.add(1)));
    Q2_K: |p| crumbs(p.add(16)), |p| {
        let sc = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
        let sc = _mm512_and_si512(sc, _mm512_set1_epi8(15));
        [
            _mm512_shuffle_epi8(sc, constant(const { &spread(Self::ORDER, 0, false) })),
            _mm512_shuffle_epi8(sc, constant(const { &spread(Self::ORDER, 2, false) })),
        ]
    };
    Q3_K: |p| {
        let q = crumbs(p.add(32));
        let h = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()));
        [bits(q[0], h, -2, 2, 4), bits(q[1], h, -1, 3, 4), bits(q[2], h, 0, 4, 4), bits(q[3], h, 1, 5, 4)]
    }, |p| {
        let s = <Self as ReadScales>::scales(p).sc;
        signed_runs::<Self>(_mm512_broadcast_i32x4(s))
    };
    Q4_K: |p| nibbles_k(p.add(16));
    Q5_K: |p| {
        let q = nibbles_k(p.add(48));
        let h = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(16).cast()));
        [bits(q[0], h, -4, -2, 16), bits(q[1], h, -3, -1, 16), bits(q[2], h, 0, 2, 16), bits(q[3], h, 1, 3, 16)]
    };
    Q6_K: |p| {
        let q = nibbles_k(p);
        let h0 = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(128).cast()));
        let h1 = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(160).cast()));
        [
            bits(q[0], h0, -4, -2, 0x30),
            bits(q[1], h0, 0, 2, 0x30),
            bits(q[2], h1, -4, -2, 0x30),
            bits(q[3], h1, 0, 2, 0x30),
        ]
    }, |p| signed_runs::<Self>(_mm512_broadcast_i32x4(_mm_loadu_si128(p.add(192).cast())));
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
            s.cut(mask);
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
    // SAFETY: groups of each row.
    unsafe {
        for (i, x) in x[..whole].iter().enumerate() {
            let p = w.map(|w| w.add(i * F::BYTES));
            fetch::<F>(p);
            group::<F, false>(p, x, 0, &mut acc);
        }
        if rest > 0 {
            let mut copy = [[0u8; MAX_GROUP_BYTES]; ROWS];
            let (p, mask) = end::<F>(w.map(|w| w.add(whole * F::BYTES)), rest, beyond, &mut copy);
            group::<F, true>(p, &x[whole], mask, &mut acc);
        }
        let s = sums::<F>(acc, acc);
        [s[0], s[4], s[8], s[12]]
    }
}

/// `y[r]` = row r of `w` times the only column of `x`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn one<F: One>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    assert!(x.len() == 1 && y.len() == n);
    for i in 0..n.div_ceil(ROWS) {
        let rows = rows(i, n);
        let beyond = rows[3] * row_bytes + row_bytes.next_multiple_of(F::BYTES) <= w.len();
        // SAFETY: rows below n, the last of which is rows[3], and the CPU has the set.
        let t = unsafe { four::<F>(rows.map(|r| w.as_ptr().add(r * row_bytes)), row_bytes, beyond, x[0]) };
        for (r, t) in rows.into_iter().zip(t) {
            y[r] = t;
        }
    }
}
