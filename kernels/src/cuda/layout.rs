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
    use quant::FORMATS;

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
