//! Q4_1: 32 values as 4-bit levels times an f16 scale plus an f16 minimum; 20 bytes, 5 bits a value.
//!
//! ```text
//! byte  0..2   d      f16
//!       2..4   m      f16
//!       4..20  qs     qs[j] = level of value j (low nibble) | level of value j + 16 (high nibble)
//!
//! value = d * level + m        level 0..=15
//! ```

use super::F16Le;
use crate::search::{Levels, affine_f16};
use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// Scale.
    pub d: F16Le,
    /// Minimum, added.
    pub m: F16Le,
    /// Levels, two a byte: values 0..16 in the low nibbles, 16..32 in the high ones.
    pub qs: [u8; LEN / 2],
}

const _: () = assert!(size_of::<BlockQ4_1>() == 20 && align_of::<BlockQ4_1>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ4_1>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let (d, m) = (b.d.to_f32(), b.m.to_f32());
        for (j, &q) in b.qs.iter().enumerate() {
            y[j] = d * f32::from(q & 15) + m;
            y[j + LEN / 2] = d * f32::from(q >> 4) + m;
        }
    }
}

const LEVELS: Levels = Levels { lo: 0.0, hi: 15.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ4_1 { d: F16Le::NAN, ..BlockQ4_1::zeroed() };
    super::pack::<_, LEN>(src, dst, importance, broken, |block| {
        let (d, m) = affine_f16(block.group(), LEVELS);
        let mut levels = [0; LEN];
        levels.iter_mut().zip(LEVELS.of(block.group().values(), d, m)).for_each(|(l, q)| *l = q as u8);
        BlockQ4_1 { d: F16Le::from_f32(d), m: F16Le::from_f32(m), qs: super::pack_nibbles(&levels) }
    });
}
