//! 256 weights of each format as bf16, in order: eight lines of 32. Formats of up to five bits look their values up in tables of
//! all that a scale (and minimum) can give; the others compute them. Knows nothing of tiles.

use super::super::avx512::Unpack;
use crate::cpu::scalar::{self, Kind};
use crate::cpu::tiles::Line;
use std::arch::x86_64::*;
use std::hint::black_box;

/// A format these kernels can read.
pub trait Widen: Unpack {
    /// How many codes there are, `Unpack::bytes` being one each; 0 where values are computed: bytes are `q + OFFSET` then.
    const CODES: usize;

    /// The codes as words, a register per 32, of formats that have them. Tables of fewer than 32 entries stand side by side: where
    /// in them a run's codes are looked up is added.
    ///
    /// # Safety
    /// `p` points to `BYTES` bytes; the CPU has AVX-512.
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> [[__m512i; 2]; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = Self::bytes(p);
            let mut codes = [[_mm512_setzero_si512(); 2]; 4];
            each!(j < 4, {
                let part = |run: i32| match Self::CODES {
                    4 => 16 * (j as i32 % 2) + 4 * run,
                    8 => 8 * run,
                    16 => 16 * (run / 2),
                    _ => 0,
                };
                let lane = |run: i32| part(run) * 0x0101_0101;
                let (a, b, c, d) = (lane(0), lane(1), lane(2), lane(3));
                let from = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
                let q = _mm512_or_si512(bytes[j], from);
                codes[j] = [
                    _mm512_cvtepu8_epi16(_mm512_castsi512_si256(q)),
                    _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64::<1>(q)),
                ];
            });
            codes
        }
    }
}

macro_rules! codes {
    ($($name:ident $codes:literal $(|$p:ident| $body:expr)?;)*) => {$(
        impl Widen for scalar::$name {
            const CODES: usize = $codes;
            $(
                #[inline(always)]
                unsafe fn codes($p: *const u8) -> [[__m512i; 2]; 4] {
                    // SAFETY: every read is inside the group's `BYTES` bytes.
                    unsafe { $body }
                }
            )?
        }
    )*};
}

/// Two blocks of 16 bytes, the second `STRIDE` after the first: low nibbles, then high nibbles of each.
///
/// # Safety
/// They can be read; as for all helpers here: inlined only into functions that have the instruction set.
#[inline(always)]
unsafe fn nibbles<const STRIDE: usize>(p: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        // Bytes 0 to 7 or 8 to 15 of a lane as words.
        let low = _mm_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1);
        let high = _mm_or_si128(low, _mm_set1_epi16(8));
        let spread = _mm512_broadcast_i64x4(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high));
        let shift = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(4));
        let block = |p: *const u8, from: i16| {
            let bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
            let q = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), shift);
            take(q, 15, _mm512_set1_epi16(from))
        };
        [block(p, 0), block(p.add(STRIDE), 16)]
    }
}

/// `q & mask | more`, word by word.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn take(q: __m512i, mask: i16, more: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_ternarylogic_epi64::<0xea>(q, _mm512_set1_epi16(mask), more) }
}

/// Nibbles of 32 bytes: low ones, high ones.
///
/// # Safety
/// As above; they can be read.
#[inline(always)]
unsafe fn halves(p: *const u8, high_from: i16) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let q = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast()));
        [
            _mm512_and_si512(q, _mm512_set1_epi16(15)),
            _mm512_or_si512(_mm512_srli_epi16::<4>(q), _mm512_set1_epi16(high_from)),
        ]
    }
}

codes! {
    Q4_0 16 |p| {
        let p = p.add(2);
        [nibbles::<18>(p), nibbles::<18>(p.add(36)), nibbles::<18>(p.add(72)), nibbles::<18>(p.add(108))]
    };
    Q4_1 16 |p| {
        let p = p.add(4);
        [nibbles::<20>(p), nibbles::<20>(p.add(40)), nibbles::<20>(p.add(80)), nibbles::<20>(p.add(120))]
    };
    Q5_0 32;
    Q5_1 32;
    Q8_0 0;
    IQ4_NL 0;
    MXFP4 0;
    Q2_K 4;
    Q3_K 8;
    Q4_K 16 |p| {
        let p = p.add(16);
        [halves(p, 16), halves(p.add(32), 16), halves(p.add(64), 16), halves(p.add(96), 16)]
    };
    Q5_K 32 |p| {
        let fifths = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.add(16).cast()));
        let mut codes = [[_mm512_setzero_si512(); 2]; 4];
        each!(j < 4, {
            let q = halves(p.add(48 + 32 * j), 0);
            each!(h < 2, {
                // Bit 2j + h, moved to bit 4.
                let (left, right) = (4i16 - 2 * j as i16 - h as i16, 2 * j as i16 + h as i16 - 4);
                let fifth = _mm512_sllv_epi16(fifths, _mm512_set1_epi16(left.max(0)));
                let fifth = _mm512_srlv_epi16(fifth, _mm512_set1_epi16(right.max(0)));
                codes[j][h] = take(fifth, 16, q[h]);
            });
        });
        codes
    };
    Q6_K 0;
    Q8_K 0;
    IQ4_XS 0;
}

/// What a group is computed from, in memory: scales and minima, one of each per run of 16 values, and integers. Read from there, a
/// scale comes to all lanes of a register by the load itself; the optimiser, who would rather shuffle, is kept from seeing it.
#[repr(C, align(64))]
struct Runs {
    d: [f32; 16],
    m: [f32; 16],
    q: [i8; 256],
}

/// # Safety
/// As for all helpers here: inlined only into functions that have the instruction set. `p` points to `F::BYTES` bytes.
#[inline(always)]
unsafe fn runs<F: Widen>(p: *const u8) -> (__m512, __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        let s = F::scales(p);
        let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        let d = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(s.d));
        match F::KIND {
            Kind::Plain => (d, _mm512_setzero_ps()),
            Kind::Min => (d, _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(s.m))),
            // At most 11 bits by 8: exact.
            Kind::Scale16 => {
                (_mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(s.sc))), _mm512_setzero_ps())
            }
            Kind::Min16 => {
                let both = _mm512_insertf32x8::<1>(_mm512_castps256_ps512(s.m), s.m_hi);
                let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
                let d = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(s.sc)));
                (d, _mm512_permutexvar_ps(order, both))
            }
        }
    }
}

/// `d * q (+ m)`, `q` the integers that codes stand for.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn value<F: Widen>(q: __m512, d: __m512, m: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match F::KIND {
            Kind::Plain | Kind::Scale16 => _mm512_mul_ps(q, d),
            Kind::Min | Kind::Min16 => _mm512_fmadd_ps(q, d, m),
        }
    }
}

/// Two vectors as 32 bf16.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn round(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the caller's promise; the types differ in name only.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// The values of codes 0.. for runs of 16 from `run` on, `F::CODES` lanes each; five-bit formats: of codes 16.. where `upper`.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn table<F: Widen>(s: &(__m512, __m512), scales: &Runs, run: usize, upper: bool) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let from = if upper { 16 } else { 0 } - F::OFFSET;
        let code = match F::CODES {
            4 => _mm512_and_si512(lanes, _mm512_set1_epi32(3)),
            8 => _mm512_and_si512(lanes, _mm512_set1_epi32(7)),
            _ => lanes,
        };
        let q = _mm512_cvtepi32_ps(_mm512_add_epi32(code, _mm512_set1_epi32(from)));
        let (d, m) = match F::CODES {
            4 | 8 => {
                let of =
                    if F::CODES == 4 { _mm512_srli_epi32::<2>(lanes) } else { _mm512_srli_epi32::<3>(lanes) };
                let of = _mm512_add_epi32(of, _mm512_set1_epi32(run as i32));
                (_mm512_permutexvar_ps(of, s.0), _mm512_permutexvar_ps(of, s.1))
            }
            _ => (_mm512_set1_ps(scales.d[run]), _mm512_set1_ps(scales.m[run])),
        };
        value::<F>(q, d, m)
    }
}

/// Writes value i of the group at `p` as bf16 i % 32 of line `16 * (i / 32)` of `to`.
///
/// # Safety
/// `p` points to `F::BYTES` bytes; `to` has room; the CPU has AVX-512 with VBMI and bf16.
#[inline(always)]
pub unsafe fn widen<F: Widen>(p: *const u8, to: *mut Line) {
    // SAFETY: the caller's promise.
    unsafe {
        let s = runs::<F>(p);
        let mut memory = Runs { d: [0.0; 16], m: [0.0; 16], q: [0; 256] };
        if !matches!(F::CODES, 4 | 8) {
            _mm512_store_ps(memory.d.as_mut_ptr(), s.0);
            if matches!(F::KIND, Kind::Min) {
                _mm512_store_ps(memory.m.as_mut_ptr(), s.1);
            }
        }
        let store = |b: usize, line| _mm512_store_si512(to.add(16 * b).cast(), line);
        if F::CODES == 0 {
            let bytes = F::bytes(p);
            let offset = _mm512_set1_epi8(F::OFFSET as u8 as i8);
            each!(j < 4, {
                _mm512_store_si512(
                    memory.q.as_mut_ptr().add(64 * j).cast(),
                    _mm512_sub_epi8(bytes[j], offset),
                );
            });
            let memory = black_box(&memory);
            each!(b < 8, {
                let mut v = [_mm512_setzero_ps(); 2];
                each!(h < 2, {
                    let q = _mm_load_si128(memory.q.as_ptr().add(32 * b + 16 * h).cast());
                    let q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
                    v[h] = value::<F>(q, _mm512_set1_ps(memory.d[2 * b + h]), _mm512_setzero_ps());
                });
                store(b, round(v[0], v[1]));
            });
            return;
        }
        let scales = black_box(&memory);
        let codes = F::codes(p);
        each!(j < 4, {
            // The runs of 16 whose values make up a table of 32 entries, and the upper codes of five bits.
            let of = |run, upper| table::<F>(&s, scales, run, upper);
            let (first, second) = match F::CODES {
                4 => {
                    let t = round(of(8 * (j / 2), false), of(8 * (j / 2) + 4, false));
                    (t, t)
                }
                8 | 16 => {
                    let t = round(of(4 * j, false), of(4 * j + 2, false));
                    (t, t)
                }
                _ => (
                    round(of(4 * j, false), of(4 * j, true)),
                    round(of(4 * j + 2, false), of(4 * j + 2, true)),
                ),
            };
            store(2 * j, _mm512_permutexvar_epi16(codes[j][0], first));
            store(2 * j + 1, _mm512_permutexvar_epi16(codes[j][1], second));
        });
    }
}
