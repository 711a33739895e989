//! BF16: the upper half of an IEEE single, little-endian, one value a block.
//!
//! ```text
//! bit 15   14..7      6..0
//!     sign exponent   mantissa        value = (-1)^sign * 1.mantissa * 2^(exponent - 127)
//! ```

use half::bf16;

/// Reads `src` (2 bytes a value): exact.
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * 2);
    for (d, s) in dst.iter_mut().zip(src.chunks_exact(2)) {
        *d = f32::from_bits(u32::from(u16::from_le_bytes([s[0], s[1]])) << 16);
    }
}

/// Rounds `src` to nearest even; NaN stays NaN.
pub fn quantize(src: &[f32], dst: &mut [u8], _importance: Option<&[f32]>) {
    assert_eq!(dst.len(), src.len() * 2);
    for (d, s) in dst.chunks_exact_mut(2).zip(src) {
        d.copy_from_slice(&bf16::from_f32(*s).to_le_bytes());
    }
}
