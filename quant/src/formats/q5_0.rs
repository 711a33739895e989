//! Q5_0: 32 values as signed 5-bit levels times one f16 scale; 22 bytes, 5.5 bits a value.
//!
//! ```text
//! byte  0..2   d      f16
//!       2..6   qh     little-endian u32: bit i = fifth (highest) bit of value i's level
//!       6..22  qs     qs[j] = low four bits of value j (low nibble) | of value j + 16 (high nibble)
//!
//! value = d * (level - 16)        level 0..=31
//! ```

use super::F16Le;
use crate::search::{Levels, symmetric_f16};
use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale.
    pub d: F16Le,
    /// The levels' highest bits: a little-endian u32, bit i for value i.
    pub qh: [u8; 4],
    /// The levels' low four bits: values 0..16 in the low nibbles, 16..32 in the high ones.
    pub qs: [u8; LEN / 2],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22 && align_of::<BlockQ5_0>() == 1);

/// The 32 levels (0..=31) of a Q5_0 or Q5_1 block, in order.
#[inline]
pub fn unpack_levels(qh: [u8; 4], qs: &[u8; LEN / 2]) -> [u8; LEN] {
    let qh = u32::from_le_bytes(qh);
    std::array::from_fn(|i| {
        let low = if i < LEN / 2 { qs[i] & 15 } else { qs[i - LEN / 2] >> 4 };
        low | ((qh >> i & 1) as u8) << 4
    })
}

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ5_0>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let d = b.d.to_f32();
        for (y, q) in y.iter_mut().zip(unpack_levels(b.qh, &b.qs)) {
            *y = d * (f32::from(q) - 16.0);
        }
    }
}

const LEVELS: Levels = Levels { lo: -16.0, hi: 15.0 };

/// The inverse of [`unpack_levels`].
#[inline]
pub fn pack_levels(levels: &[u8; LEN]) -> ([u8; 4], [u8; LEN / 2]) {
    let qh = levels.iter().enumerate().fold(0u32, |qh, (i, &q)| qh | u32::from(q >> 4 & 1) << i);
    (qh.to_le_bytes(), super::pack_nibbles(levels))
}

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ5_0 { d: F16Le::NAN, ..BlockQ5_0::zeroed() };
    super::pack::<_, LEN>(src, dst, importance, broken, |block| {
        let d = symmetric_f16(block.group(), LEVELS);
        let mut levels = [0; LEN];
        levels
            .iter_mut()
            .zip(LEVELS.of(block.group().values(), d, 0.0))
            .for_each(|(l, q)| *l = (q + 16) as u8);
        let (qh, qs) = pack_levels(&levels);
        BlockQ5_0 { d: F16Le::from_f32(d), qh, qs }
    });
}
