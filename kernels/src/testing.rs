//! What kernel tests share: boundary lengths, seeded fills, comparators. Knows formats only through `quant::FORMATS`.

use crate::cpu::Pool;
use crate::cpu::isa::Isa;
use crate::cpu::machine::Clock;
use crate::cpu::matmul::{Input, Rounded, multiply_with, needs_quantized};
use crate::cpu::quantized::Quantized;
use crate::cpu::table::SEVERAL;
use crate::cpu::tiles::{LEAST_PROMPT, Tiles};
use crate::{HostBytes, View, ViewMut, Weight, Write};
use quant::{DType, Format};
use std::time::Instant;

/// A small generator (splitmix64): the same numbers everywhere, from a seed.
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `n` activations: mostly uniform, now and then an outlier or a run of zeros, as real ones have.
    pub fn activations(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| match (self.bits() % 64, i / 32 % 7) {
                (_, 6) => 0.0,
                (0, _) => 16.0 * self.unit(),
                _ => self.unit(),
            })
            .collect()
    }
}

/// How weights are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Any bytes.
    Random,
    /// Bytes 00, 7f, 80 and ff only: the largest magnitudes of every field.
    Extreme,
    /// As `Random`, but F32 and BF16 spread evenly over -1..1, and scales of MXFP4 and Q8_K of ordinary size: for timing, since
    /// processors are slow with subnormal operands.
    Even,
}

/// `rows` rows of `cols` weights as bytes of `dtype`; blocks are drawn until every value is finite and below 1e4.
pub fn weights(dtype: DType, rows: usize, cols: usize, fill: Fill, rng: &mut Rng) -> Vec<u8> {
    let f: &Format = dtype.format();
    let mut out = vec![0u8; rows * dtype.row_bytes(cols).expect("whole blocks")];
    let mut values = vec![0.0; f.block_len];
    if fill == Fill::Even && matches!(dtype, DType::F32 | DType::BF16) {
        for v in out.chunks_exact_mut(f.block_bytes) {
            // BF16 is the upper half of F32.
            v.copy_from_slice(&rng.unit().to_le_bytes()[4 - f.block_bytes..]);
        }
        return out;
    }
    for block in out.chunks_exact_mut(f.block_bytes) {
        loop {
            for b in block.iter_mut() {
                let bits = rng.bits();
                *b = if fill == Fill::Extreme {
                    [0, 0x7f, 0x80, 0xff][(bits % 4) as usize]
                } else {
                    bits as u8
                };
            }
            if fill == Fill::Even {
                match dtype {
                    DType::MXFP4 => block[0] = 112 + block[0] % 16,
                    DType::Q8_K => block[..4].copy_from_slice(&rng.unit().to_le_bytes()),
                    _ => {}
                }
            }
            (f.dequantize)(block, &mut values);
            if values.iter().all(|v| v.abs() < 1e4) {
                break;
            }
        }
    }
    out
}

/// Row lengths at which kernels change course: single and partial groups, vector tails.
pub fn lengths(dtype: DType) -> Vec<usize> {
    match dtype.format().block_len {
        1 => vec![1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 100, 511, 512, 513, 1030],
        256 => [1, 2, 3, 5, 8].map(|n| n * 256).to_vec(),
        block => [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32].map(|n| n * block).to_vec(),
    }
}

/// Numbers of rows and of columns at which kernels change course.
pub const ROWS: [usize; 8] = [1, 2, 3, 4, 5, 31, 33, 70];
/// See [`ROWS`].
pub const COLUMNS: [usize; 10] = [1, 2, 3, 4, 7, 8, 9, 16, 17, 27];

/// Asserts equality bit for bit.
pub fn assert_bits(got: &[f32], want: &[f32], what: impl Fn() -> String) {
    assert_eq!(got.len(), want.len(), "{}", what());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits(), "{}: element {i} is {g:e}, not {w:e}", what());
    }
}

/// Asserts `|got - want| <= tolerance * scale` element by element.
pub fn assert_close(got: &[f32], want: &[f64], scale: &[f64], tolerance: f32, what: impl Fn() -> String) {
    assert_eq!(got.len(), want.len(), "{}", what());
    for (i, ((&g, w), s)) in got.iter().zip(want).zip(scale).enumerate() {
        let error = (f64::from(g) - w).abs();
        let bound = f64::from(tolerance) * s + 1e-30;
        assert!(error <= bound, "{}: element {i} is {g:e}, not {w:e} (error {error:e} > {bound:e})", what());
    }
}

/// A speed measured: seconds of the best of several products of `[rows, cols]` weights of `dtype` with `n` rows of
/// activations (rounded within the time). The weights are copied until they exceed any cache, and the copies used in turn.
pub fn time_matmul(isa: Isa, pool: &Pool, dtype: DType, rows: usize, cols: usize, n: usize) -> f64 {
    let mut rng = Rng(11);
    let one = weights(dtype, 8, cols, Fill::Even, &mut rng).repeat(rows.div_ceil(8));
    let one = &one[..rows * dtype.row_bytes(cols).expect("whole blocks")];
    let count = if n > SEVERAL { 1 } else { ((768 << 20) / one.len()).max(1) };
    let w = Weight::host(dtype, count, rows, cols, HostBytes::from_vec(one.repeat(count))).expect("it fits");
    let x = rng.activations(n * cols);
    let (mut q, mut tiles, mut out) = (Quantized::new(), Tiles::default(), vec![0.0; n * rows]);
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    let mut i = 0;
    while i < 3 * count.min(16) || begin.elapsed().as_secs_f64() < 0.3 {
        let float = View::from_host(&x, cols);
        let start = Clock::start(pool.threads());
        let rounded = if !needs_quantized(&w) {
            Rounded::No
        } else if isa.has_tiles() && n >= LEAST_PROMPT as usize {
            tiles.set_all(isa, pool, float);
            Rounded::Bf16(&tiles)
        } else {
            q.set_with(isa, pool, float);
            Rounded::Int8(&q)
        };
        let input = Input { float, rounded };
        multiply_with(isa, pool, &w, i % count, input, None, ViewMut::from_host(&mut out, rows), Write::Set);
        if i >= count.min(16) || n > SEVERAL {
            best = best.min(start.seconds());
        }
        i += 1;
    }
    best
}
