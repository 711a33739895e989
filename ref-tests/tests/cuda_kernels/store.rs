//! Rows of caches written: the bytes that `quant` packs, in the device's layout.

use crate::{Gpu, n, p};
use kernels::KvBuf;
use kernels::cuda::layout::{pack_row, row_bytes};
use kernels::cuda::modules::module;
use kernels::testing::Rng;
use quant::DType;

/// Rows as they come, and those that search for scales differently: zeros, one outlier, tiny, large beyond f16, not finite.
fn values(rng: &mut Rng, rows: usize, cols: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..rows * cols).map(|_| rng.unit()).collect();
    for (i, row) in x.chunks_exact_mut(cols).enumerate() {
        match i % 9 {
            1 => row.fill(0.0),
            2 => row[cols / 2] = -40.0,
            3 => row.iter_mut().for_each(|v| *v *= 1e-6),
            4 => row.iter_mut().for_each(|v| *v *= 1e9),
            5 => (row[0], row[cols - 1]) = (f32::NAN, f32::NEG_INFINITY),
            6 => row.iter_mut().for_each(|v| *v = -(v.abs() * 7.0).round()),
            7 => row.fill(-0.0),
            8 => row.iter_mut().for_each(|v| *v *= 3e-39),
            _ => {}
        }
    }
    x
}

fn packed(dtype: DType, x: &[f32]) -> Vec<u8> {
    let f = dtype.format();
    let mut host = vec![0; dtype.row_bytes(x.len()).unwrap()];
    (f.quantize.unwrap())(x, &mut host, None);
    let mut to = vec![0; row_bytes(dtype, x.len())];
    pack_row(dtype, &host, &mut to);
    to
}

#[test]
fn rows_are_stored_as_quant_packs_them() {
    for dtype in KvBuf::TYPES {
        for (width, seed) in [(32, 1), (96, 2), (576, 3)] {
            let mut rng = Rng(seed);
            let (rows, slots) = (11, 14);
            let x = values(&mut rng, rows, width);
            let places: Vec<u32> = (0..rows as u32).map(|i| (i * 5 + 3) % slots as u32).collect();
            let row = row_bytes(dtype, width);
            let mut g = Gpu::new(module(&format!("store_{}", dtype.name())).unwrap());
            let (dx, cache, dslots) = (g.floats(&x), g.machine.alloc(slots * row), g.words(&places));
            // Beside them the first columns in a cache of their own.
            let (narrow, narrow_row) = (32, row_bytes(dtype, 32));
            let other = g.machine.alloc(slots * narrow_row);
            let params = [
                p(dx),
                n(width),
                n(width),
                p(cache),
                p(row as u64),
                p(dx),
                n(width),
                n(narrow),
                p(other),
                p(narrow_row as u64),
                p(dslots),
            ];
            g.run_shared("cache_write", [width.div_ceil(256), rows, 2], 256, 0, &params);
            for (i, slot) in places.iter().enumerate() {
                for (at, row, width) in [(cache, row, width), (other, narrow_row, narrow)] {
                    let x = &x[i * x.len() / rows..][..width];
                    let got = g.machine.peek(at + (*slot as usize * row) as u64, row).unwrap();
                    let want = packed(dtype, x);
                    // What pads a plane is nobody's: never written, never read. NaN is NaN.
                    let differs = got.iter().zip(&want).position(|(g, w)| g.is_some_and(|g| g != *w));
                    let nan = dtype.format().block_len == 1 && i % 9 == 5;
                    assert!(differs.is_none() || nan, "{dtype}, {width} columns, row {i}: byte {differs:?}");
                    let written = got.iter().filter(|b| b.is_some()).count();
                    assert_eq!(written, dtype.row_bytes(width).unwrap(), "{dtype}, {width} columns");
                }
            }
        }
    }
}
