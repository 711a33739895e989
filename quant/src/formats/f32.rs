//! F32: IEEE single, little-endian, one value a block.

/// Reads `src` (4 bytes a value).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len() * 4);
    for (d, s) in dst.iter_mut().zip(src.chunks_exact(4)) {
        *d = f32::from_le_bytes([s[0], s[1], s[2], s[3]]);
    }
}

/// Writes `src` as it is.
pub fn quantize(src: &[f32], dst: &mut [u8], _importance: Option<&[f32]>) {
    assert_eq!(dst.len(), src.len() * 4);
    for (s, d) in src.iter().zip(dst.chunks_exact_mut(4)) {
        d.copy_from_slice(&s.to_le_bytes());
    }
}
