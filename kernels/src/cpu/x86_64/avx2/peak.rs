//! The multiply-add instructions alone, for `cpu::machine`.

use std::arch::x86_64::*;
use std::hint::black_box;

/// Multiply-adds of a round.
pub const INT8_ROUND: usize = 10 * 32;
/// Multiply-adds of a round.
pub const FLOAT_ROUND: usize = 10 * 8;

/// Ten independent chains of the three instructions that multiply and add bytes.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2")]
pub unsafe fn int8_peak(rounds: usize) {
    let (a, one) = black_box((_mm256_set1_epi8(3), _mm256_set1_epi16(1)));
    let mut acc = [_mm256_setzero_si256(); 10];
    for _ in 0..rounds {
        for v in &mut acc {
            // The sum so far is one factor, lest the product be computed once for all rounds.
            *v = _mm256_add_epi32(*v, _mm256_madd_epi16(_mm256_maddubs_epi16(a, *v), one));
        }
    }
    black_box(acc);
}

/// Ten independent chains of fused multiply-adds.
///
/// # Safety
/// The CPU has the set.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn float_peak(rounds: usize) {
    let (a, b) = black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(-0.25)));
    let mut acc = [_mm256_setzero_ps(); 10];
    for _ in 0..rounds {
        for v in &mut acc {
            *v = _mm256_fmadd_ps(*v, a, b);
        }
    }
    black_box(acc);
}
