//! AVX-512 (F, BW, VL, DQ, VNNI): weights as unsigned bytes against signed activations with `vpdpbusd`.

mod float;
mod formats;
mod four;
pub mod lanes;
mod many;
mod one;
mod peak;
mod runs;
mod several;
mod tile;

pub use float::{few as float_few, many as float_many};
pub use formats::Unpack;
pub use many::many;
pub use one::one;
pub use peak::{FLOAT_ROUND, INT8_ROUND, float_peak, int8_peak};
pub use several::several;
pub use tile::turned;

use crate::KernelError;
use crate::cpu::quantized::BLOCK;
use std::arch::x86_64::*;

/// Bytes that a thread keeps for weights with rows of at most `max_in` values.
pub fn scratch_bytes(max_in: usize) -> usize {
    let groups = max_in.div_ceil(BLOCK);
    many::scratch_bytes(groups) + several::scratch_bytes(groups) + float::SCRATCH_BYTES
}

/// Allocates them, for the calling thread.
pub fn reserve(max_in: usize) -> Result<(), KernelError> {
    let groups = max_in.div_ceil(BLOCK);
    many::reserve(groups)?;
    several::reserve(groups)?;
    float::reserve()
}

/// The final sum of eight lanes.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn tree(a: __m256) -> f32 {
    let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
}
