//! Q6_K: 256 values as signed 6-bit levels in 16 sub-blocks of 16, each with a signed 8-bit scale; 210 bytes, 6.5625 bits a value.
//!
//! ```text
//! byte    0..128  ql      ql[64 h + l], l < 64, h < 2 = low four bits of value 128 h + l (low nibble) | 128 h + 64 + l (high)
//!       128..192  qh      qh[32 h + l], l < 32: high two bits of values 128 h + 32 k + l in bits 2k..2k+2        k < 4
//!       192..208  scales  i8, one a sub-block
//!       208..210  d       f16, scale of the scales
//!
//! value = (d * scale) * (level - 32)        level 0..=63
//! ```

use super::{F16Le, QK_K};
use crate::search::{Levels, fit_symmetric_super};
use bytemuck::{Pod, Zeroable};

/// Values in a sub-block.
pub const SUB: usize = 16;

/// A super-block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// The levels' low four bits, two a byte; the file's head says in which order.
    pub ql: [u8; QK_K / 2],
    /// The levels' high two bits, four a byte.
    pub qh: [u8; QK_K / 4],
    /// Scale of each sub-block.
    pub scales: [i8; QK_K / SUB],
    /// Scale of the scales.
    pub d: F16Le,
}

const _: () = assert!(size_of::<BlockQ6K>() == 210 && align_of::<BlockQ6K>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockQ6K>(src, dst.len(), QK_K);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(QK_K)) {
        let d = b.d.to_f32();
        for (s, y) in y.chunks_exact_mut(SUB).enumerate() {
            let scale = d * f32::from(b.scales[s]);
            let (half, part) = (s / 8, s % 8);
            let (ql, low_shift) = (&b.ql[half * 64 + part % 4 * SUB..], part / 4 * 4);
            let (qh, high_shift) = (&b.qh[half * 32 + part % 2 * SUB..], part / 2 * 2);
            for ((y, &l), &h) in y.iter_mut().zip(ql).zip(qh) {
                let level = (l >> low_shift & 15 | (h >> high_shift & 3) << 4) as i8 - 32;
                *y = scale * f32::from(level);
            }
        }
    }
}

const LEVELS: Levels = Levels { lo: -32.0, hi: 31.0 };

/// Packs whole blocks; see [`Format::quantize`](crate::Format::quantize).
pub fn quantize(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>) {
    let broken = BlockQ6K { d: F16Le::NAN, ..BlockQ6K::zeroed() };
    super::pack::<_, QK_K>(src, dst, importance, broken, |block| {
        let fit = fit_symmetric_super::<16>(block, LEVELS, 128);
        let d = fit.d.to_f32();
        let mut out = BlockQ6K { d: fit.d, scales: fit.scales, ..BlockQ6K::zeroed() };
        for s in 0..QK_K / SUB {
            let levels = LEVELS.of(block.sub(s, SUB).values(), d * f32::from(fit.scales[s]), 0.0);
            let (half, part) = (s / 8, s % 8);
            let (ql, low_shift) = (&mut out.ql[half * 64 + part % 4 * SUB..], part / 4 * 4);
            let (qh, high_shift) = (&mut out.qh[half * 32 + part % 2 * SUB..], part / 2 * 2);
            for ((l, h), q) in ql.iter_mut().zip(qh).zip(levels) {
                let level = (q + 32) as u8;
                *l |= (level & 15) << low_shift;
                *h |= (level >> 4) << high_shift;
            }
        }
        out
    });
}
