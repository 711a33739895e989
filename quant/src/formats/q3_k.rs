//! Q3_K: 256 values as signed 3-bit levels in 16 sub-blocks of 16, each with a signed 6-bit scale; 110 bytes, 3.4375 bits a
//! value.
//!
//! ```text
//! byte   0..32   hmask   bit 4 h + k of hmask[l]: high bit of value 128 h + 32 k + l, *inverted* (0 subtracts 4)
//!       32..96   qs      values 128 h + 32 k + l, l < 32: low two bits in bits 2k..2k+2 of qs[32 h + l]   h < 2, k < 4
//!       96..108  scales  16 scales of 6 bits, +32:
//!                        scales[i], i < 8      = low four bits of scale i (low nibble) | of scale i + 8 (high nibble)
//!                        scales[8 + i], i < 4  = high two bits of scales i, i + 4, i + 8, i + 12, from bit 0 up
//!      108..110  d       f16, scale of the scales
//!
//! value = (d * (scale - 32)) * level        level -4..=3
//! ```

use super::{F16Le, QK_K};
use crate::search::{Levels, fit_symmetric_super};
use bytemuck::{Pod, Zeroable};

/// Values in a sub-block.
pub const SUB: usize = 16;

/// A super-block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// The levels' high bits, inverted.
    pub hmask: [u8; QK_K / 8],
    /// The levels' low two bits, four a byte; the file's head says in which order.
    pub qs: [u8; QK_K / 4],
    /// 16 scales of 6 bits: see [`unpack_scales`].
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: F16Le,
}

const _: () = assert!(size_of::<BlockQ3K>() == 110 && align_of::<BlockQ3K>() == 1);

/// The 16 signed scales, -32..=31.
#[inline]
pub fn unpack_scales(packed: &[u8; 12]) -> [i8; 16] {
    std::array::from_fn(|s| {
        let low = if s < 8 { packed[s] & 15 } else { packed[s - 8] >> 4 };
        let high = packed[8 + s % 4] >> (s / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ3K>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let (d, scales) = (b.d.to_f32(), unpack_scales(&b.scales));
        for (s, y) in y.chunks_exact_mut(SUB).enumerate() {
            let scale = d * f32::from(scales[s]);
            let (qs, shift) = (&b.qs[s / 8 * 32 + s % 2 * SUB..], s % 8 / 2 * 2);
            let (hmask, bit) = (&b.hmask[s % 2 * SUB..], s / 2);
            for ((y, &q), &h) in y.iter_mut().zip(qs).zip(hmask) {
                let level = (q >> shift & 3 | (h >> bit & 1) << 2) as i8 - 4;
                *y = scale * f32::from(level);
            }
        }
    }
}

const LEVELS: Levels = Levels { lo: -4.0, hi: 3.0 };

/// The inverse of [`unpack_scales`].
#[inline]
pub fn pack_scales(scales: &[i8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (s, &scale) in scales.iter().enumerate() {
        let scale = (scale + 32) as u8;
        packed[s % 8] |= (scale & 15) << (s / 8 * 4);
        packed[8 + s % 4] |= (scale >> 4) << (s / 4 * 2);
    }
    packed
}

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ3K { d: F16Le::NAN, ..BlockQ3K::zeroed() };
    super::pack::<_, QK_K>(src, dst, importance, broken, |block| {
        let fit = fit_symmetric_super::<16>(block, LEVELS, 32);
        let d = fit.d.to_f32();
        let mut out = BlockQ3K { d: fit.d, scales: pack_scales(&fit.scales), ..BlockQ3K::zeroed() };
        for s in 0..QK_K / SUB {
            let levels = LEVELS.of(block.sub(s, SUB).values(), d * f32::from(fit.scales[s]), 0.0);
            let (qs, shift) = (&mut out.qs[s / 8 * 32 + s % 2 * SUB..], s % 8 / 2 * 2);
            let (hmask, bit) = (&mut out.hmask[s % 2 * SUB..], s / 2);
            for ((b, h), q) in qs.iter_mut().zip(hmask).zip(levels) {
                let level = (q + 4) as u8;
                *b |= (level & 3) << shift;
                *h |= (level >> 2) << bit;
            }
        }
        out
    });
}
