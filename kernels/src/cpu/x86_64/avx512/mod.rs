//! AVX-512 (F, BW, VL, DQ, VNNI): weights as unsigned bytes against signed activations with `vpdpbusd`.

mod few;
mod float;
mod formats;
pub mod lanes;
mod many;
mod one;
mod peak;
mod runs;
mod several;

pub use few::few;
pub use float::{few as float_few, many as float_many};
pub use formats::Unpack;
pub use many::many;
pub use peak::{FLOAT_ROUND, INT8_ROUND, float_peak, int8_peak};
pub use several::several;

use std::arch::x86_64::*;

/// The final sum of eight lanes.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn tree(a: __m256) -> f32 {
    let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
}
