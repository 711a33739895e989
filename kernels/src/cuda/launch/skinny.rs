//! Launches of `src/skinny.cu`: weights in blocks times a few columns on tensor cores, where weights are the load. Knows its sizes.

use super::{Launcher, flag, n, p, three};
use crate::cuda::layout;
use crate::cuda::operands::{Input, Matrix, Product};
use crate::{Activation, KernelError};
use quant::DType;

/// Threads of a block: a warp for each of the eight running sums.
const THREADS: u32 = 256;
/// Values of a row in a stage.
const STAGE: usize = 512;
/// Bytes of a column's group of 256 in a stage, padded.
const COLUMN: usize = 368;
/// Where larger blocks would be fewer than the multiprocessors of large GPUs, smaller ones take their place.
const BLOCKS: usize = 128;

/// An entry point of `skinny.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skinny {
    /// Its name.
    pub entry: &'static str,
    /// Output features of a block.
    pub features: usize,
    /// Columns of a block.
    pub columns: usize,
}

impl Skinny {
    /// All of them, the one for the fewest features and columns first.
    pub const ALL: [Self; 3] =
        [Self::new("skinny_16x8", 16, 8), Self::new("skinny_32x8", 32, 8), Self::new("skinny_32x16", 32, 16)];

    const fn new(entry: &'static str, features: usize, columns: usize) -> Self {
        Self { entry, features, columns }
    }

    /// For so many columns, where `blocks` tells how many blocks of so many features there would be.
    fn of(columns: usize, blocks: impl Fn(usize) -> usize) -> Self {
        let [small, large, wide] = Self::ALL;
        match columns {
            0..=8 if blocks(large.features) < BLOCKS => small,
            0..=8 => large,
            _ => wide,
        }
    }

    /// Bytes of shared memory for weights of `dtype`; `newer`: compute capability 8.0 or later. `Ring` of the source.
    pub fn shared(self, dtype: DType, newer: bool) -> usize {
        // Planes, and what makes of it an odd multiple of 16.
        let row = layout::row_bytes(dtype, STAGE) | 16;
        let stage = self.features * row + 2 * self.columns * COLUMN;
        let stages = match newer {
            true if stage <= 22 << 10 => 4,
            true => 3,
            false => 2,
        };
        // Floats of a row's scales: d, two integers in one, minima.
        let scales = match dtype {
            DType::Q2_K => 4,
            DType::Q4_1 | DType::Q5_1 | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K => 2,
            _ => 1,
        };
        stages * stage + self.features * 8 * 2 * 4 * scales
    }
}

impl Launcher {
    /// Up to three products of one format; with `up` the only one's `act(W x) * (up x)`.
    pub(super) fn skinny(
        &self,
        products: &[Product],
        x: Input,
        up: Option<(Matrix, Activation)>,
    ) -> Result<(), KernelError> {
        let w = products[0].w;
        let (at, stride) = self.input(&w, &x)?;
        let halves = if up.is_some() { 2 } else { 1 };
        let blocks = |features: usize| -> usize {
            products.iter().map(|p| p.w.rows.div_ceil(features / halves)).sum()
        };
        let kernel = Skinny::of(x.float.rows, blocks);
        let args = [
            three(products)?,
            vec![
                p(up.map_or(0, |u| u.0.at)),
                flag(up.is_some_and(|u| u.1 == Activation::GeluTanh)),
                n(w.row_bytes())?,
                n(layout::blocks(w.dtype, w.cols))?,
                p(at),
                n(stride)?,
                n(x.float.rows)?,
            ],
        ]
        .concat();
        let grid = [x.float.rows.div_ceil(kernel.columns), blocks(kernel.features), 1];
        let shared = kernel.shared(w.dtype, self.capability >= (8, 0));
        self.run(self.of("skinny", w.dtype)?, kernel.entry, grid, THREADS, shared / 4, &args)
    }
}
