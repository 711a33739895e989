//! Floating-point weights: 32 lanes, element i in lane i mod 32, one fused multiply-add each, and a fixed tree at the end.
//! Activations stay f32.

/// A weight format that is a float per element.
pub trait Float {
    /// Bytes of an element.
    const BYTES: usize;
    /// Reads one element; `src.len() == BYTES`.
    fn read(src: &[u8]) -> f32;
}

/// IEEE single.
pub struct F32;
/// IEEE half.
pub struct F16;
/// The upper half of an IEEE single.
pub struct BF16;

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn read(s: &[u8]) -> f32 {
        f32::from_le_bytes([s[0], s[1], s[2], s[3]])
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn read(s: &[u8]) -> f32 {
        half::f16::from_le_bytes([s[0], s[1]]).to_f32()
    }
}

impl Float for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn read(s: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes([s[0], s[1]])) << 16)
    }
}

/// The final sum of the 32 lanes: lanes l, l + 16; then l + 8; then the 8-lane tree.
#[inline(always)]
pub fn tree32(a: &[f32; 32]) -> f32 {
    let mut b = [0.0; 8];
    for (l, b) in b.iter_mut().enumerate() {
        *b = (a[l] + a[l + 16]) + (a[l + 8] + a[l + 24]);
    }
    super::tree(&b)
}

/// `y[c * rows + r] = row r of w . x[c]`; `w` holds `y.len() / x.len()` rows of `row_bytes`.
pub fn float_rows<F: Float>(w: &[u8], row_bytes: usize, x: &[&[f32]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    for (r, row) in w.chunks_exact(row_bytes).enumerate() {
        for (c, x) in x.iter().enumerate() {
            let mut acc = [0.0f32; 32];
            for (i, (w, x)) in row.chunks_exact(F::BYTES).zip(*x).enumerate() {
                acc[i % 32] = F::read(w).mul_add(*x, acc[i % 32]);
            }
            y[c * n + r] = tree32(&acc);
        }
    }
}
