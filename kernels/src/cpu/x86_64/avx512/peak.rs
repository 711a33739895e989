//! The multiply-add instructions alone, for `cpu::machine`.

use std::arch::x86_64::*;
use std::hint::black_box;

/// Multiply-adds of a round.
pub const INT8_ROUND: usize = 16 * 64;
/// Multiply-adds of a round.
pub const FLOAT_ROUND: usize = 16 * 16;

/// Sixteen independent chains of `vpdpbusd`.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn int8_peak(rounds: usize) {
    let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(-5)));
    let mut acc = [_mm512_setzero_si512(); 16];
    for _ in 0..rounds {
        for v in &mut acc {
            *v = _mm512_dpbusd_epi32(*v, a, b);
        }
    }
    black_box(acc);
}

/// Sixteen independent chains of fused multiply-adds.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx512f")]
pub unsafe fn float_peak(rounds: usize) {
    let (a, b) = black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(-0.25)));
    let mut acc = [_mm512_setzero_ps(); 16];
    for _ in 0..rounds {
        for v in &mut acc {
            *v = _mm512_fmadd_ps(*v, a, b);
        }
    }
    black_box(acc);
}
