//! Q5_1: 32 values as 5-bit levels times an f16 scale plus an f16 minimum; 24 bytes, 6 bits a value.
//!
//! ```text
//! byte  0..2   d      f16
//!       2..4   m      f16
//!       4..8   qh     little-endian u32: bit i = fifth (highest) bit of value i's level
//!       8..24  qs     qs[j] = low four bits of value j (low nibble) | of value j + 16 (high nibble)
//!
//! value = d * level + m        level 0..=31
//! ```

use super::F16Le;
use super::q5_0::{pack_levels, unpack_levels};
use crate::search::{Levels, affine_f16};
use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale.
    pub d: F16Le,
    /// Minimum, added.
    pub m: F16Le,
    /// The levels' highest bits: a little-endian u32, bit i for value i.
    pub qh: [u8; 4],
    /// The levels' low four bits: values 0..16 in the low nibbles, 16..32 in the high ones.
    pub qs: [u8; LEN / 2],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24 && align_of::<BlockQ5_1>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ5_1>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let (d, m) = (b.d.to_f32(), b.m.to_f32());
        for (y, q) in y.iter_mut().zip(unpack_levels(b.qh, &b.qs)) {
            *y = d * f32::from(q) + m;
        }
    }
}

const LEVELS: Levels = Levels { lo: 0.0, hi: 31.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ5_1 { d: F16Le::NAN, ..BlockQ5_1::zeroed() };
    super::pack::<_, LEN>(src, dst, importance, broken, |block| {
        let (d, m) = affine_f16(block.group(), LEVELS);
        let mut levels = [0; LEN];
        levels.iter_mut().zip(LEVELS.of(block.group().values(), d, m)).for_each(|(l, q)| *l = q as u8);
        let (qh, qs) = pack_levels(&levels);
        BlockQ5_1 { d: F16Le::from_f32(d), m: F16Le::from_f32(m), qh, qs }
    });
}
