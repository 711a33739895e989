//! Q5_K: 256 values as 5-bit levels in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum; 176 bytes, 5.5 bits a
//! value.
//!
//! ```text
//! byte   0..2    d       f16, scale of the scales
//!        2..4    dmin    f16, scale of the minimums
//!        4..16   scales  8 scales and 8 minimums of 6 bits, as in Q4_K
//!       16..48   qh      bit s of qh[l], l < 32 = fifth (highest) bit of value 32 s + l
//!       48..176  qs      qs[32 p + l], l < 32, p < 4 = value 64 p + l (low nibble) | value 64 p + 32 + l (high nibble)
//!
//! value = (d * scale) * level - (dmin * minimum)        level 0..=31
//! ```

use super::q4_k::{pack_scales, unpack_scales};
use super::{F16Le, QK_K};
use crate::search::{Levels, fit_affine_super};
use bytemuck::{Pod, Zeroable};

/// Values in a sub-block.
pub const SUB: usize = 32;

/// A super-block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// Scale of the scales.
    pub d: F16Le,
    /// Scale of the minimums.
    pub dmin: F16Le,
    /// 8 scales and 8 minimums of 6 bits: see [`unpack_scales`].
    pub scales: [u8; 12],
    /// The levels' highest bits: bit s of byte l is value 32 s + l's.
    pub qh: [u8; QK_K / 8],
    /// The levels' low four bits, two a byte; the file's head says in which order.
    pub qs: [u8; QK_K / 2],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176 && align_of::<BlockQ5K>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ5K>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let (d, dmin) = (b.d.to_f32(), b.dmin.to_f32());
        let (scales, mins) = unpack_scales(&b.scales);
        for (s, y) in y.chunks_exact_mut(SUB).enumerate() {
            let (scale, min) = (d * f32::from(scales[s]), dmin * f32::from(mins[s]));
            let (qs, shift) = (&b.qs[s / 2 * SUB..], s % 2 * 4);
            for ((y, &q), &h) in y.iter_mut().zip(qs).zip(&b.qh) {
                let level = q >> shift & 15 | (h >> s & 1) << 4;
                *y = scale * f32::from(level) - min;
            }
        }
    }
}

const LEVELS: Levels = Levels { lo: 0.0, hi: 31.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ5K { d: F16Le::NAN, ..BlockQ5K::zeroed() };
    super::pack::<_, QK_K>(src, dst, importance, broken, |block| {
        let fit = fit_affine_super::<8>(block, LEVELS.hi, 63);
        let (d, dmin) = (fit.d.to_f32(), fit.dmin.to_f32());
        let scales = pack_scales(&fit.scales, &fit.mins);
        let mut out = BlockQ5K { d: fit.d, dmin: fit.dmin, scales, ..BlockQ5K::zeroed() };
        for s in 0..QK_K / SUB {
            let levels = LEVELS.of(
                block.sub(s, SUB).values(),
                d * f32::from(fit.scales[s]),
                -(dmin * f32::from(fit.mins[s])),
            );
            let (qs, shift) = (&mut out.qs[s / 2 * SUB..], s % 2 * 4);
            for ((b, h), q) in qs.iter_mut().zip(&mut out.qh).zip(levels) {
                *b |= (q as u8 & 15) << shift;
                *h |= (q as u8 >> 4) << s;
            }
        }
        out
    });
}
