//! Q2_K: 256 values as 2-bit levels in 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum; 84 bytes, 2.625 bits a
//! value.
//!
//! ```text
//! byte  0..16  scales  scales[s] = scale of sub-block s (low nibble) | minimum (high nibble)
//!      16..80  qs      values 128 h + 32 k + l, l < 32: bits 2k..2k+2 of qs[32 h + l]        h < 2, k < 4
//!      80..82  d       f16, scale of the scales
//!      82..84  dmin    f16, scale of the minimums
//!
//! value = (d * scale) * level - (dmin * minimum)        level 0..=3
//! ```

use super::{F16Le, QK_K};
use crate::search::{Levels, fit_affine_super};
use bytemuck::{Pod, Zeroable};

/// Values in a sub-block.
pub const SUB: usize = 16;

/// A super-block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Per sub-block: scale (low nibble) and minimum (high nibble).
    pub scales: [u8; QK_K / SUB],
    /// Levels, four a byte; the file's head says in which order.
    pub qs: [u8; QK_K / 4],
    /// Scale of the scales.
    pub d: F16Le,
    /// Scale of the minimums.
    pub dmin: F16Le,
}

const _: () = assert!(size_of::<BlockQ2K>() == 84 && align_of::<BlockQ2K>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ2K>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let (d, dmin) = (b.d.to_f32(), b.dmin.to_f32());
        for (s, y) in y.chunks_exact_mut(SUB).enumerate() {
            let scale = d * f32::from(b.scales[s] & 15);
            let min = dmin * f32::from(b.scales[s] >> 4);
            // Sub-blocks 2k and 2k + 1 of a half share a bit pair: first and second 16 bytes of its 32.
            let (qs, shift) = (&b.qs[s / 8 * 32 + s % 2 * SUB..], s % 8 / 2 * 2);
            for (y, &q) in y.iter_mut().zip(qs) {
                *y = scale * f32::from(q >> shift & 3) - min;
            }
        }
    }
}

const LEVELS: Levels = Levels { lo: 0.0, hi: 3.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ2K { d: F16Le::NAN, ..BlockQ2K::zeroed() };
    super::pack::<_, QK_K>(src, dst, importance, broken, |block| {
        let fit = fit_affine_super::<16>(block, LEVELS.hi, 15);
        let (d, dmin) = (fit.d.to_f32(), fit.dmin.to_f32());
        let mut out = BlockQ2K { d: fit.d, dmin: fit.dmin, ..BlockQ2K::zeroed() };
        for s in 0..QK_K / SUB {
            out.scales[s] = fit.scales[s] | fit.mins[s] << 4;
            let levels = LEVELS.of(
                block.sub(s, SUB).values(),
                d * f32::from(fit.scales[s]),
                -(dmin * f32::from(fit.mins[s])),
            );
            let (qs, shift) = (&mut out.qs[s / 8 * 32 + s % 2 * SUB..], s % 8 / 2 * 2);
            qs.iter_mut().zip(levels).for_each(|(b, q)| *b |= (q as u8) << shift);
        }
        out
    });
}
