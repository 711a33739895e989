//! Rows of prompts on f16 tensor cores: times weights of all types but F32 (`src/matmul_half.cu`). Knows shapes; nothing of requests.

use super::launch::{Launcher, TILE_COLUMNS, many_outputs, n, p};
use super::layout;
use super::operands::{Halves, Matrix, Product, Sorted};
use crate::{Activation, KernelError, Weight};
use quant::DType;

/// Columns of the largest tiles.
pub const COLUMNS: usize = 256;
/// Of the largest of experts.
const HALF: usize = 128;
/// Blocks from which on the largest fill an H200 better than twice as many.
const FULL: usize = 96;
/// The same of those half as large.
const MANY: usize = 64;

/// Columns of tiles of stacks, experts or heads, of whose matrices each has so many jobs in the mean: a tile of 128 costs two of 32 for half
/// the features. F32 has only the smaller ones.
pub fn grouped_columns(weights: &[&Weight], each: usize) -> usize {
    let halves = weights.iter().all(|w| w.dtype() != DType::F32);
    if halves && each > TILE_COLUMNS { HALF } else { TILE_COLUMNS }
}

impl Launcher {
    /// Whether rows of prompts go to tensor cores in f16.
    pub fn takes_halves(&self) -> bool {
        self.capability >= (8, 0)
    }

    /// Rows of prompts in f16 times weights, as [`Launcher::matmul`]: the same bits for any number of rows.
    pub(super) fn matmul_half(
        &self,
        made: Product,
        x: Halves,
        jobs: Option<Sorted>,
        up: Option<(Matrix, Activation)>,
    ) -> Result<(), KernelError> {
        let Product { w, out, .. } = made;
        let halves = if up.is_some() { 2 } else { 1 };
        // Columns, features, threads, bytes of shared memory.
        let large = ("matmul_256", COLUMNS, 128, 256, 98_304);
        let middle = ("matmul_128", HALF, 128, 256, 65_536);
        let small = ("matmul_32", TILE_COLUMNS, 64, 128, 24_576);
        let blocks = |columns: usize| out.rows.div_ceil(columns) * w.rows.div_ceil(128 / halves);
        let (entry, columns, features, threads, shared) = match jobs {
            Some(j) if j.columns > TILE_COLUMNS => middle,
            Some(_) => small,
            None if blocks(COLUMNS) >= FULL => large,
            None if out.rows > TILE_COLUMNS && blocks(HALF) >= MANY => middle,
            None => small,
        };
        let args = [
            p(w.at),
            p(w.row_bytes() as u64),
            n(w.matrix_rows)?,
            n(w.rows)?,
            n(layout::blocks(w.dtype, w.cols))?,
            p(w.powers),
            p(up.map_or(0, |u| u.0.powers)),
            p(x.at),
            n(x.stride)?,
            p(x.scales),
        ];
        let args = [&args[..], &many_outputs(&made, jobs, up)?].concat();
        let tiles = jobs.map_or(out.rows.div_ceil(columns), |j| j.count);
        let grid = [tiles, w.rows.div_ceil(features / halves), 1];
        self.run(self.of("matmul_half", w.dtype)?, entry, grid, threads, shared / 4, &args)
    }
}
