//! Q4_0: 32 values as signed 4-bit levels times one f16 scale; 18 bytes, 4.5 bits a value.
//!
//! ```text
//! byte  0..2   d      f16
//!       2..18  qs     qs[j] = level of value j (low nibble) | level of value j + 16 (high nibble)
//!
//! value = d * (level - 8)        level 0..=15
//! ```

use super::F16Le;
use crate::search::{Levels, symmetric_f16};
use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale.
    pub d: F16Le,
    /// Levels, two a byte: values 0..16 in the low nibbles, 16..32 in the high ones.
    pub qs: [u8; LEN / 2],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18 && align_of::<BlockQ4_0>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ4_0>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let d = b.d.to_f32();
        for (j, &q) in b.qs.iter().enumerate() {
            y[j] = d * (f32::from(q & 15) - 8.0);
            y[j + LEN / 2] = d * (f32::from(q >> 4) - 8.0);
        }
    }
}

const LEVELS: Levels = Levels { lo: -8.0, hi: 7.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ4_0 { d: F16Le::NAN, ..BlockQ4_0::zeroed() };
    super::pack::<_, LEN>(src, dst, importance, broken, |block| {
        let d = symmetric_f16(block.group(), LEVELS);
        let mut codes = [0; LEN];
        codes.iter_mut().zip(LEVELS.of(block.group().values(), d, 0.0)).for_each(|(c, q)| *c = (q + 8) as u8);
        BlockQ4_0 { d: F16Le::from_f32(d), qs: super::pack_nibbles(&codes) }
    });
}
