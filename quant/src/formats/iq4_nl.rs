//! IQ4_NL: 32 values as 4-bit indices into a fixed non-linear code book, times one f16 scale; 18 bytes, 4.5 bits a value. Read
//! only.
//!
//! ```text
//! byte  0..2   d      f16
//!       2..18  qs     qs[j] = index of value j (low nibble) | index of value j + 16 (high nibble)
//!
//! value = d * VALUES[index]
//! ```

use super::F16Le;
use bytemuck::{Pod, Zeroable};

/// Elements in a block.
pub const LEN: usize = 32;

/// The code book of IQ4_NL and IQ4_XS: denser near zero, as weights are.
pub const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// A block as it lies in a file.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIq4Nl {
    /// Scale.
    pub d: F16Le,
    /// Indices, two a byte: values 0..16 in the low nibbles, 16..32 in the high ones.
    pub qs: [u8; LEN / 2],
}

const _: () = assert!(size_of::<BlockIq4Nl>() == 18 && align_of::<BlockIq4Nl>() == 1);

/// Reads whole blocks; see [`Format::dequantize`](crate::Format::dequantize).
pub fn dequantize(src: &[u8], dst: &mut [f32]) {
    let blocks = super::blocks::<BlockIq4Nl>(src, dst.len(), LEN);
    for (b, y) in blocks.iter().zip(dst.chunks_exact_mut(LEN)) {
        let d = b.d.to_f32();
        for (j, &q) in b.qs.iter().enumerate() {
            y[j] = d * f32::from(VALUES[usize::from(q & 15)]);
            y[j + LEN / 2] = d * f32::from(VALUES[usize::from(q >> 4)]);
        }
    }
}
