//! IQ4_XS: 256 values as indices into IQ4_NL's code book in 8 sub-blocks of 32, each with a signed 6-bit scale; 136 bytes, 4.25
//! bits a value. Read only.
//!
//! ```text
//! byte  0..2    d         f16, scale of the scales
//!       2..4    scales_h  little-endian u16: bits 2s..2s+2 = high two bits of scale s
//!       4..8    scales_l  scales_l[i] = low four bits of scale 2i (low nibble) | of scale 2i + 1 (high nibble)
//!       8..136  qs        qs[16 s + j] = index of value 32 s + j (low nibble) | of value 32 s + 16 + j (high nibble)
//!
//! value = (d * (scale - 32)) * VALUES[index]
//! ```

use super::iq4_nl::VALUES;
use super::{F16Le, QK_K};
use bytemuck::{Pod, Zeroable};

/// Values in a sub-block.
pub const SUB: usize = 32;

/// A super-block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIq4Xs {
    /// Scale of the scales.
    pub d: F16Le,
    /// High two bits of the scales: a little-endian u16.
    pub scales_h: [u8; 2],
    /// Low four bits of the scales, two a byte.
    pub scales_l: [u8; 4],
    /// Indices, two a byte; in each sub-block as in IQ4_NL.
    pub qs: [u8; QK_K / 2],
}

const _: () = assert!(size_of::<BlockIq4Xs>() == 136 && align_of::<BlockIq4Xs>() == 1);

/// The 8 signed scales, -32..=31.
#[inline]
pub fn unpack_scales(scales_h: [u8; 2], scales_l: [u8; 4]) -> [i8; 8] {
    let high = u16::from_le_bytes(scales_h);
    std::array::from_fn(|s| {
        let low = scales_l[s / 2] >> (s % 2 * 4) & 15;
        (low | ((high >> (2 * s) & 3) as u8) << 4) as i8 - 32
    })
}

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockIq4Xs>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let (d, scales) = (b.d.to_f32(), unpack_scales(b.scales_h, b.scales_l));
        for (s, y) in y.chunks_exact_mut(SUB).enumerate() {
            let scale = d * f32::from(scales[s]);
            for (j, &q) in b.qs[s * SUB / 2..(s + 1) * SUB / 2].iter().enumerate() {
                y[j] = scale * f32::from(VALUES[usize::from(q & 15)]);
                y[j + SUB / 2] = scale * f32::from(VALUES[usize::from(q >> 4)]);
            }
        }
    }
}
