//! Q8_K: 256 values as signed bytes times one f32 scale, with the sums of 16; 292 bytes. A format of intermediate results: ggml
//! stores activations so beside K-quant weights, and files rarely hold it.
//!
//! ```text
//! byte    0..4    d      f32
//!         4..260  qs     i8, value order
//!       260..292  bsums  i16: sums of qs, 16 at a time; redundant, not read back
//!
//! value = d * qs
//! ```

use super::QK_K;
use bytemuck::{Pod, Zeroable};

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8K {
    /// Scale: a little-endian f32.
    pub d: [u8; 4],
    /// Levels.
    pub qs: [i8; QK_K],
    /// Sums of 16 levels each: little-endian i16.
    pub bsums: [[u8; 2]; QK_K / 16],
}

const _: () = assert!(size_of::<BlockQ8K>() == 292 && align_of::<BlockQ8K>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ8K>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let d = f32::from_le_bytes(b.d);
        for (y, &q) in y.iter_mut().zip(&b.qs) {
            *y = d * f32::from(q);
        }
    }
}

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize). The largest value sets the scale,
/// which is f32: nothing is searched, and importance has no say.
pub fn quantize(src: &[f32], dst: &mut [u8], _importance: Option<&[f32]>) {
    super::blocks_in::<BlockQ8K>(dst.len(), src.len(), QK_K);
    let dst: &mut [BlockQ8K] = bytemuck::cast_slice_mut(dst);
    for (x, out) in src.chunks_exact(QK_K).zip(dst) {
        *out = BlockQ8K::zeroed();
        if !x.iter().all(|x| x.is_finite()) {
            out.d = f32::NAN.to_le_bytes();
            continue;
        }
        let max = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let d = max / 127.0;
        out.d = d.to_le_bytes();
        if d > 0.0 {
            // In f64, where neither 1/d nor the quotient can overflow.
            let inv = 1.0 / f64::from(d);
            for (q, x) in out.qs.iter_mut().zip(x) {
                *q = (f64::from(*x) * inv).round_ties_even().clamp(-127.0, 127.0) as i8;
            }
        }
        for (sum, q) in out.bsums.iter_mut().zip(out.qs.chunks_exact(16)) {
            *sum = q.iter().map(|&q| i16::from(q)).sum::<i16>().to_le_bytes();
        }
    }
}
