//! Q4_K: 256 values as 4-bit levels in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum; 144 bytes, 4.5 bits a
//! value.
//!
//! ```text
//! byte   0..2    d       f16, scale of the scales
//!        2..4    dmin    f16, scale of the minimums
//!        4..16   scales  8 scales and 8 minimums of 6 bits, i < 4:
//!                        scales[i]     = scale i   (bits 0..6) | high two bits of scale i + 4   (bits 6..8)
//!                        scales[4 + i] = minimum i (bits 0..6) | high two bits of minimum i + 4 (bits 6..8)
//!                        scales[8 + i] = low four bits of scale i + 4 (low nibble) | of minimum i + 4 (high nibble)
//!       16..144  qs      qs[32 p + l], l < 32, p < 4 = value 64 p + l (low nibble) | value 64 p + 32 + l (high nibble)
//!
//! value = (d * scale) * level - (dmin * minimum)        level 0..=15
//! ```

use super::{F16Le, QK_K};
use crate::search::{Levels, fit_affine_super};
use bytemuck::{Pod, Zeroable};

/// Values in a sub-block.
pub const SUB: usize = 32;

/// A super-block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales.
    pub d: F16Le,
    /// Scale of the minimums.
    pub dmin: F16Le,
    /// 8 scales and 8 minimums of 6 bits: see [`unpack_scales`].
    pub scales: [u8; 12],
    /// Levels, two a byte; the file's head says in which order.
    pub qs: [u8; QK_K / 2],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144 && align_of::<BlockQ4K>() == 1);

/// Scales and minimums (0..=63) of the 8 sub-blocks of a Q4_K or Q5_K block.
#[inline]
pub fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for i in 0..4 {
        let (s, m, low) = (packed[i], packed[4 + i], packed[8 + i]);
        scales[i] = s & 63;
        mins[i] = m & 63;
        scales[i + 4] = low & 15 | s >> 6 << 4;
        mins[i + 4] = low >> 4 | m >> 6 << 4;
    }
    (scales, mins)
}

/// The inverse of [`unpack_scales`]; every entry must be below 64.
#[inline]
pub fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for i in 0..4 {
        packed[i] = scales[i] | scales[i + 4] >> 4 << 6;
        packed[4 + i] = mins[i] | mins[i + 4] >> 4 << 6;
        packed[8 + i] = scales[i + 4] & 15 | (mins[i + 4] & 15) << 4;
    }
    packed
}

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ4K>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let (d, dmin) = (b.d.to_f32(), b.dmin.to_f32());
        let (scales, mins) = unpack_scales(&b.scales);
        for (s, y) in y.chunks_exact_mut(SUB).enumerate() {
            let (scale, min) = (d * f32::from(scales[s]), dmin * f32::from(mins[s]));
            let (qs, shift) = (&b.qs[s / 2 * SUB..], s % 2 * 4);
            for (y, &q) in y.iter_mut().zip(qs) {
                *y = scale * f32::from(q >> shift & 15) - min;
            }
        }
    }
}

const LEVELS: Levels = Levels { lo: 0.0, hi: 15.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ4K { d: F16Le::NAN, ..BlockQ4K::zeroed() };
    super::pack::<_, QK_K>(src, dst, importance, broken, |block| {
        let fit = fit_affine_super::<8>(block, LEVELS.hi, 63);
        let (d, dmin) = (fit.d.to_f32(), fit.dmin.to_f32());
        let scales = pack_scales(&fit.scales, &fit.mins);
        let mut out = BlockQ4K { d: fit.d, dmin: fit.dmin, scales, ..BlockQ4K::zeroed() };
        for s in 0..QK_K / SUB {
            let levels = LEVELS.of(
                block.sub(s, SUB).values(),
                d * f32::from(fit.scales[s]),
                -(dmin * f32::from(fit.mins[s])),
            );
            let (qs, shift) = (&mut out.qs[s / 2 * SUB..], s % 2 * 4);
            qs.iter_mut().zip(levels).for_each(|(b, q)| *b |= (q as u8) << shift);
        }
        out
    });
}
