//! Q8_0: 32 values as signed bytes times one f16 scale; 34 bytes, 8.5 bits a value.
//!
//! ```text
//! byte  0..2   d      f16
//!       2..34  qs     i8, value order
//!
//! value = d * qs
//! ```

use super::F16Le;
use crate::search::{Levels, f16_beside, least_error};
use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: F16Le,
    /// Levels.
    pub qs: [i8; LEN],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34 && align_of::<BlockQ8_0>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ8_0>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let d = b.d.to_f32();
        for (y, &q) in y.iter_mut().zip(&b.qs) {
            *y = d * f32::from(q);
        }
    }
}

// -128 is left out, as in ggml: kernels may negate a level.
const LEVELS: Levels = Levels { lo: -127.0, hi: 127.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize). With so many levels the largest
/// value sets the scale; only its rounding to f16 is chosen.
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ8_0 { d: F16Le::NAN, ..BlockQ8_0::zeroed() };
    super::pack::<_, LEN>(src, dst, importance, broken, |block| {
        let group = block.group();
        let d = group.extreme().abs() / 127.0;
        let (d, _) =
            least_error(group, LEVELS, [0, 1, -1].map(|ulps| (f16_beside(d, ulps), 0.0)).into_iter());
        let mut out = BlockQ8_0 { d: F16Le::from_f32(d), qs: [0; LEN] };
        out.qs.iter_mut().zip(LEVELS.of(group.values(), d, 0.0)).for_each(|(o, q)| *o = q as i8);
        out
    });
}
