//! MXFP4: 32 values as E2M1 floats sharing one power of two (E8M0); 17 bytes, 4.25 bits a value. Read only.
//! Source: OCP Microscaling Formats (MX) Specification 1.0; the nibble order is ggml's.
//!
//! ```text
//! byte  0      e      u8: the shared exponent, 2^(e - 127)
//!       1..17  qs     qs[j] = code of value j (low nibble) | code of value j + 16 (high nibble)
//!
//! code  bit 3 sign | bits 2..1 exponent | bit 0 mantissa       value = 2^(e - 128) * VALUES[code]
//! ```
//!
//! `VALUES` holds twice the E2M1 value, so that it is an integer; the halved power of two makes up for it. The specification
//! calls e = 255 NaN; ggml and the `gguf` package read it as 2^127 (halved), and so does this file.

use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// Twice the value of each E2M1 code.
pub const VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMxfp4 {
    /// Shared exponent, biased by 127: see [`half_scale`].
    pub e: u8,
    /// Codes, two a byte: values 0..16 in the low nibbles, 16..32 in the high ones.
    pub qs: [u8; LEN / 2],
}

const _: () = assert!(size_of::<BlockMxfp4>() == 17 && align_of::<BlockMxfp4>() == 1);

/// 2^(e - 128): half the shared scale, to be multiplied with [`VALUES`]. Exact; subnormal for e < 2.
#[inline]
pub fn half_scale(e: u8) -> f32 {
    let bits = if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 };
    f32::from_bits(bits)
}

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockMxfp4>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let d = half_scale(b.e);
        for (j, &q) in b.qs.iter().enumerate() {
            y[j] = d * f32::from(VALUES[usize::from(q & 15)]);
            y[j + LEN / 2] = d * f32::from(VALUES[usize::from(q >> 4)]);
        }
    }
}
