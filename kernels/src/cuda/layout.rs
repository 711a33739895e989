//! How rows of weights lie in device memory: the fields of a row's blocks as planes, one after another, each padded to 16 bytes, so that
//! a kernel reads every field by aligned loads. `src/formats.cuh` reads what this writes; a new format is a line in both.

use quant::DType;
use std::ops::Range;

/// Planes begin at multiples of this.
const ALIGN: usize = 16;

/// The fields of a block that the device keeps, as (first byte, bytes), in the order of their planes.
fn fields(dtype: DType) -> &'static [(usize, usize)] {
    match dtype {
        DType::F32 => &[(0, 4)],
        DType::F16 | DType::BF16 => &[(0, 2)],
        DType::Q4_0 | DType::IQ4_NL => &[(2, 16), (0, 2)],
        DType::Q4_1 => &[(4, 16), (0, 4)],
        DType::Q5_0 => &[(6, 16), (2, 4), (0, 2)],
        DType::Q5_1 => &[(8, 16), (4, 4), (0, 4)],
        DType::Q8_0 => &[(2, 32), (0, 2)],
        DType::MXFP4 => &[(1, 16), (0, 1)],
        DType::Q2_K => &[(0, 16), (16, 64), (80, 4)],
        DType::Q3_K => &[(0, 32), (32, 64), (96, 12), (108, 2)],
        DType::Q4_K => &[(0, 144)],
        DType::Q5_K => &[(0, 176)],
        DType::Q6_K => &[(0, 128), (128, 64), (192, 16), (208, 2)],
        // The sums at the end of a block serve other engines' kernels.
        DType::Q8_K => &[(4, 256), (0, 4)],
        DType::IQ4_XS => &[(8, 128), (0, 8)],
    }
}

/// Bytes of a row of `cols` weights on the device. Panics if that is not whole blocks.
pub fn row_bytes(dtype: DType, cols: usize) -> usize {
    let n = blocks(dtype, cols);
    fields(dtype).iter().map(|f| (n * f.1).next_multiple_of(ALIGN)).sum()
}

/// Bytes of a row of `cols` weights with what is kept beside it: its [`power`], where it [has one](has_power).
pub fn weight_bytes(dtype: DType, cols: usize) -> usize {
    row_bytes(dtype, cols) + if has_power(dtype) { POWER } else { 0 }
}

/// Whether rows are brought within f16 by a [`power`]: those of F16 are, those of F32 never meet it.
pub fn has_power(dtype: DType) -> bool {
    !matches!(dtype, DType::F32 | DType::F16)
}

/// Bytes of a row's power.
pub const POWER: usize = 4;

/// A scale of a block.
enum Scale {
    F16,
    BF16,
    F32,
    /// A power of two, 2^(e - 128).
    E8M0,
}

/// The scales of a block: where they lie, of which type, and the most that a weight is of each. One of BF16 is its own.
fn scales(dtype: DType) -> &'static [(usize, Scale, u32)] {
    use Scale::*;
    match dtype {
        DType::F32 | DType::F16 => &[],
        DType::BF16 => &[(0, BF16, 1)],
        DType::Q4_0 => &[(0, F16, 8)],
        DType::Q4_1 => &[(0, F16, 15), (2, F16, 1)],
        DType::Q5_0 => &[(0, F16, 16)],
        DType::Q5_1 => &[(0, F16, 31), (2, F16, 1)],
        DType::Q8_0 => &[(0, F16, 128)],
        DType::Q2_K => &[(80, F16, 3 * 15), (82, F16, 15)],
        DType::Q3_K => &[(108, F16, 4 * 32)],
        DType::Q4_K => &[(0, F16, 15 * 63), (2, F16, 63)],
        DType::Q5_K => &[(0, F16, 31 * 63), (2, F16, 63)],
        DType::Q6_K => &[(208, F16, 32 * 128)],
        DType::Q8_K => &[(0, F32, 128)],
        DType::IQ4_NL => &[(0, F16, 127)],
        DType::IQ4_XS => &[(0, F16, 127 * 32)],
        DType::MXFP4 => &[(0, E8M0, 12)],
    }
}

/// A power of two that brings every finite weight of a row (as a GGUF file has it) below 2^14, the largest near it: what `matmul_half`
/// multiplies the row by, so that f16 holds it. Within what f32 and its inverse hold; 1 for a row of zeros.
pub fn power(dtype: DType, src: &[u8]) -> f32 {
    let block = dtype.format().block_bytes;
    // Magnitudes of one type are ordered as their bits are.
    let most = |of: &dyn Fn(&[u8]) -> u32, infinity: u32| {
        src.chunks_exact(block).map(of).filter(|bits| *bits < infinity).max().unwrap_or(0)
    };
    let each = scales(dtype).iter().map(|&(at, ref scale, factor)| {
        let scale = match scale {
            Scale::F16 => {
                let bits = most(&|b| u32::from(b[at]) | u32::from(b[at + 1] & 0x7f) << 8, 0x7c00);
                f64::from(half::f16::from_bits(bits as u16))
            }
            Scale::BF16 => {
                let bits = most(&|b| u32::from(b[at]) | u32::from(b[at + 1] & 0x7f) << 8, 0x7f80);
                f64::from(f32::from_bits(bits << 16))
            }
            Scale::F32 => {
                let bits = |b: &[u8]| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
                f64::from(f32::from_bits(most(&|b| bits(b) & 0x7fff_ffff, 0x7f80_0000)))
            }
            Scale::E8M0 => 2f64.powi(most(&|b| u32::from(b[at]), 256) as i32 - 128),
        };
        scale * f64::from(factor)
    });
    let most: f64 = each.sum();
    if most == 0.0 {
        return 1.0;
    }
    let exponent = (most.to_bits() >> 52) as i32 - 1023;
    f32::from_bits(((13 - exponent).clamp(-126, 126) + 127) as u32 * (1 << 23))
}

/// Blocks in a row of `cols` weights. Panics if they are not whole.
pub fn blocks(dtype: DType, cols: usize) -> usize {
    let len = dtype.format().block_len;
    assert!(cols.is_multiple_of(len), "{cols} columns of {dtype}");
    cols / len
}

/// Whether products with weights of `dtype` read activations rounded to int8.
pub fn rounds(dtype: DType) -> bool {
    !matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// The bytes of columns `first .. end` of a row of `cols`, in each plane that it has (at most two: cache types), relative to the row.
/// Panics where these are not whole blocks.
pub fn column_bytes(dtype: DType, cols: usize, first: usize, end: usize) -> [Range<usize>; 2] {
    let (n, from, to) = (blocks(dtype, cols), blocks(dtype, first), blocks(dtype, end));
    let mut out = [0..0, 0..0];
    let mut at = 0;
    for (range, (_, len)) in out.iter_mut().zip(fields(dtype)) {
        *range = at + from * len..at + to * len;
        at += (n * len).next_multiple_of(ALIGN);
    }
    out
}

/// The inverse of [`pack_row`] for formats of which every byte is kept.
pub fn unpack_row(dtype: DType, src: &[u8], dst: &mut [u8]) {
    let block = dtype.format().block_bytes;
    let n = dst.len() / block;
    let mut at = 0;
    for &(from, len) in fields(dtype) {
        for (b, f) in dst.chunks_exact_mut(block).zip(src[at..at + n * len].chunks_exact(len)) {
            b[from..from + len].copy_from_slice(f);
        }
        at += (n * len).next_multiple_of(ALIGN);
    }
}

/// Writes a row of a GGUF file as the device holds it: `dst.len()` is its [`row_bytes`]; padding is zeroed.
pub fn pack_row(dtype: DType, src: &[u8], dst: &mut [u8]) {
    let block = dtype.format().block_bytes;
    let n = src.len() / block;
    dst.fill(0);
    if let [(0, whole)] = fields(dtype)
        && *whole == block
    {
        return dst[..src.len()].copy_from_slice(src);
    }
    let mut at = 0;
    for &(from, len) in fields(dtype) {
        let plane = (n * len).next_multiple_of(ALIGN);
        for (to, b) in dst[at..at + n * len].chunks_exact_mut(len).zip(src.chunks_exact(block)) {
            to.copy_from_slice(&b[from..from + len]);
        }
        at += plane;
    }
    assert_eq!(at, dst.len(), "a row of {n} blocks of {dtype}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fill, Rng, weights};
    use quant::FORMATS;

    #[test]
    fn powers_bring_weights_near_the_top_of_f16() {
        for f in FORMATS.iter().filter(|f| has_power(f.dtype)) {
            let (cols, mut rng) = (2 * f.block_len, Rng(f.dtype as u64));
            let (mut largest, mut values) = (0.0f64, vec![0.0; cols]);
            for i in 0..200 {
                let fill = [Fill::Even, Fill::Random, Fill::Extreme][i % 3];
                let row = weights(f.dtype, 1, cols, fill, &mut rng);
                (f.dequantize)(&row, &mut values);
                let finite = values.iter().filter(|v| v.is_finite()).map(|v| f64::from(v.abs()));
                let most = finite.fold(0.0, f64::max) * f64::from(power(f.dtype, &row));
                assert!(most < 16384.0, "{}: {most}", f.name);
                largest = largest.max(most);
            }
            assert!(largest > 4096.0, "{}: {largest}", f.name);
            assert_eq!(
                power(f.dtype, &vec![0; row_bytes(f.dtype, cols)]),
                if f.dtype == DType::MXFP4 { 2f32.powi(126) } else { 1.0 }
            );
        }
    }

    #[test]
    fn every_byte_of_a_block_has_its_place() {
        for f in FORMATS {
            let n = if f.block_len == 1 { 5 } else { 3 };
            let src: Vec<u8> = (0..n * f.block_bytes).map(|i| (i * 7 + 1) as u8).collect();
            let mut dst = vec![0xaa; row_bytes(f.dtype, n * f.block_len)];
            pack_row(f.dtype, &src, &mut dst);
            // Fields do not overlap, and only Q8_K leaves bytes out.
            let mut taken = vec![0; f.block_bytes];
            let mut at = 0;
            for &(from, len) in fields(f.dtype) {
                taken[from..from + len].iter_mut().for_each(|t| *t += 1);
                for b in 0..n {
                    let want = &src[b * f.block_bytes + from..][..len];
                    assert_eq!(&dst[at + b * len..][..len], want, "{} field at {from}", f.name);
                }
                at += (n * len).next_multiple_of(ALIGN);
            }
            if f.dtype != DType::Q8_K {
                let mut back = vec![0; src.len()];
                unpack_row(f.dtype, &dst, &mut back);
                assert_eq!(back, src, "{}", f.name);
            }
            let left = taken.iter().filter(|t| **t == 0).count();
            assert!(taken.iter().all(|t| *t <= 1), "{}", f.name);
            assert_eq!(left, if f.dtype == DType::Q8_K { 32 } else { 0 }, "{}", f.name);
        }
    }
}
