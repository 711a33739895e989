//! One file a format: bit diagram, block struct, dequantise, quantise.
//!
//! Every block struct has alignment 1 and the field names of ggml, so a block may be cast from any offset of a mapped file
//! and a kernel reads like the format's documentation. This file holds only what all formats share.
//!
//! **Non-finite scales.** A scale that is NaN or infinite is multiplied through as IEEE 754 says: such a block yields NaN or
//! infinities, as it does in ggml and in the `gguf` package. Nothing here replaces or hides it. Sign and payload of a NaN are
//! not specified (the instruction that widens f16 chooses them); every other result is bit-exact with the `gguf` package.
//!
//! **Non-finite input.** Packing never panics. A block of a block format that holds a NaN or an infinity is stored with a NaN
//! scale, so that the damage shows instead of hiding. Finite input never makes a block NaN or infinite: a scale beyond f16 is
//! capped at 65504. F32, F16 and BF16 convert value by value as IEEE 754 says, infinities beyond the range included.

use crate::search;
use bytemuck::{Pod, Zeroable};

pub mod bf16;
pub mod f16;
pub mod f32;
pub mod iq4_nl;
pub mod iq4_xs;
pub mod mxfp4;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
pub mod q8_k;

/// Elements in a super-block of the K-quants and of IQ4_XS.
pub const QK_K: usize = 256;

/// An f16 as it lies in a file: little-endian, alignment 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F16Le(pub [u8; 2]);

impl F16Le {
    /// The IEEE 754 half's bits.
    #[inline]
    pub fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// Widened: exact for every finite value.
    #[inline]
    pub fn to_f32(self) -> f32 {
        half::f16::from_bits(self.to_bits()).to_f32()
    }

    /// A quiet NaN: the scale of a block that could not be packed.
    pub const NAN: Self = Self(0x7e00u16.to_le_bytes());

    /// Rounded to nearest, ties to even; beyond the range an infinity.
    #[inline]
    pub fn from_f32(x: f32) -> Self {
        Self(half::f16::from_f32(x).to_le_bytes())
    }
}

/// `src` as whole blocks, for a destination of `len` elements.
///
/// # Panics
/// If the lengths do not belong together.
fn blocks<B: Pod>(src: &[u8], len: usize, block_len: usize) -> &[B] {
    let n = blocks_in::<B>(src.len(), len, block_len);
    let blocks: &[B] = bytemuck::cast_slice(src);
    debug_assert_eq!(blocks.len(), n);
    blocks
}

/// The number of blocks, once byte count and element count are seen to agree.
fn blocks_in<B>(bytes: usize, len: usize, block_len: usize) -> usize {
    let n = bytes / size_of::<B>();
    assert!(
        n * size_of::<B>() == bytes && n * block_len == len,
        "{bytes} bytes are not {len} values in blocks of {block_len} values and {} bytes",
        size_of::<B>()
    );
    n
}

/// Packs `src` block by block. A block with a value that is not finite becomes `broken`.
///
/// # Panics
/// If the lengths of `src`, `dst` and `importance` do not belong together.
fn pack<B: Pod, const N: usize>(
    src: &[f32],
    dst: &mut [u8],
    importance: Option<&[f32]>,
    broken: B,
    pack_block: impl Fn(&search::Block<N>) -> B,
) {
    blocks_in::<B>(dst.len(), src.len(), N);
    if let Some(w) = importance {
        assert_eq!(w.len(), src.len(), "one importance weight a value");
    }
    let dst: &mut [B] = bytemuck::cast_slice_mut(dst);
    for (i, (x, out)) in src.chunks_exact(N).zip(dst).enumerate() {
        let block = search::Block::new(x, importance.map(|w| &w[i * N..][..N]));
        *out = block.map_or(broken, |b| pack_block(&b));
    }
}

/// Two 4-bit codes a byte: the first half of a block in the low nibbles, the second in the high ones.
fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| codes[j] & 15 | codes[j + 16] << 4)
}
