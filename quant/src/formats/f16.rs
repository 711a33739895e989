//! F16: IEEE half, little-endian, one value a block. Widening is exact; narrowing rounds to nearest even.
//!
//! ```text
//! bit 15   14..10     9..0
//!     sign exponent   mantissa        value = (-1)^sign * 1.mantissa * 2^(exponent - 15)
//! ```

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Values converted at once: `half` uses the CPU's conversion instructions on slices.
const CHUNK: usize = 64;

/// Reads `src` (2 bytes a value).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * 2);
    let mut buf = [f16::ZERO; CHUNK];
    for (d, s) in dst.chunks_mut(CHUNK).zip(src.chunks(2 * CHUNK)) {
        let buf = &mut buf[..d.len()];
        for (b, s) in buf.iter_mut().zip(s.chunks_exact(2)) {
            *b = f16::from_le_bytes([s[0], s[1]]);
        }
        buf.convert_to_f32_slice(d);
    }
}

/// Rounds `src` to nearest even. Beyond 65504 an infinity, as in ggml: an f16 tensor with such values is the caller's choice.
pub fn quantize(src: &[f32], dst: &mut [u8], _importance: Option<&[f32]>) {
    assert_eq!(dst.len(), src.len() * 2);
    let mut buf = [f16::ZERO; CHUNK];
    for (d, s) in dst.chunks_mut(2 * CHUNK).zip(src.chunks(CHUNK)) {
        let buf = &mut buf[..s.len()];
        buf.convert_from_f32_slice(s);
        for (d, b) in d.chunks_exact_mut(2).zip(buf.iter()) {
            d.copy_from_slice(&b.to_le_bytes());
        }
    }
}
