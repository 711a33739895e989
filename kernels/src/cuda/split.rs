//! Rows of prompts on tensor cores: in parts times weights of F16 and BF16, the launches of `src/matmul_split.cu`; in f16 times block formats
//! (`src/matmul_half.cu`); and which attention takes them (`src/prompt_half.cu`). Knows shapes; nothing of requests.

use super::launch::{Launcher, MANY_BLOCKS, TILE_COLUMNS, many_outputs, n, p};
use super::layout;
use super::modules::Ptx;
use super::operands::{Floats, Gqa, Input, Matrix, Product, Sorted, Split, split_bytes};
use super::plan;
use crate::backend::Ffn;
use crate::{Activation, KernelError};
use quant::DType;

/// Columns of the largest tiles, of f16.
pub const COLUMNS: usize = 256;
/// Of the largest of parts, and of experts.
const HALF: usize = 128;
/// Blocks from which on the largest of f16 fill an H200 better than twice as many.
const FULL: usize = 96;
/// Elements of a row that are added up at a time: longer sums would round too often.
const LEN: usize = 4096;

/// Columns of tiles of a mixture of experts on which `each` jobs fall in the mean: a tile of 128 costs two of 32 for half the features.
/// F16 and BF16 have only the smaller ones.
pub fn expert_columns(f: &Ffn<'_>, each: usize) -> usize {
    let blocks = [f.gate, f.up, f.down].iter().all(|w| layout::rounds(w.dtype()));
    if blocks && each > TILE_COLUMNS { HALF } else { TILE_COLUMNS }
}

impl Launcher {
    /// Whether rows of prompts go to tensor cores in parts, or in f16.
    pub fn splits(&self) -> bool {
        self.capability >= (8, 0)
    }

    /// The rows in parts for weights of `dtype`, at `out`: room for `x.rows` times [`super::operands::input_bytes`].
    pub fn split(&self, dtype: DType, x: Floats, out: u64) -> Result<Split, KernelError> {
        let stride = split_bytes(dtype, x.cols);
        let scales = if dtype == DType::BF16 { 0 } else { out + (x.rows * stride) as u64 };
        let args = [p(x.at), n(x.stride)?, n(x.cols)?, p(out), n(stride)?, p(scales)];
        let (of, entry) = match layout::rounds(dtype) {
            true => (DType::F16, "half_rows"),
            false => (dtype, "split_rows"),
        };
        self.run(self.of("matmul_split", of)?, entry, [x.rows, 1, 1], 256, 0, &args)?;
        Ok(Split { at: out, stride, scales })
    }

    /// Whether one launch may make gate and up of a layer, with the activation: not of rows that are added up in pieces.
    pub fn fuses(&self, gate: Matrix, x: &Input) -> bool {
        layout::rounds(gate.dtype) || x.split(gate.dtype).is_none() || gate.cols <= LEN
    }

    /// Rows of prompts in f16 times weights of a block format, as [`Launcher::matmul`]: the same bits for any number of rows.
    pub(super) fn matmul_half(
        &self,
        made: Product,
        x: Split,
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
            None if out.rows > TILE_COLUMNS && blocks(HALF) >= MANY_BLOCKS => middle,
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

    /// Rows of prompts in parts times weights of F16 or BF16, likewise.
    pub(super) fn matmul_split(
        &self,
        made: Product,
        x: Split,
        jobs: Option<Sorted>,
        up: Option<(Matrix, Activation)>,
    ) -> Result<(), KernelError> {
        let Product { w, out, .. } = made;
        let m = self.of("matmul_split", w.dtype)?;
        let columns = if w.dtype == DType::F16 { HALF } else { 64 };
        let halves = if up.is_some() { 2 } else { 1 };
        let tiles = |features: usize, columns: usize| {
            (out.rows.div_ceil(columns), w.rows.div_ceil(features / halves))
        };
        let (x_tiles, y_tiles) = tiles(256, columns);
        let (entry, grid, threads, shared) = match jobs {
            None if x_tiles * y_tiles >= MANY_BLOCKS => ("matmul", (x_tiles, y_tiles), 256, 98_304),
            None => ("matmul_32", tiles(64, TILE_COLUMNS), 128, 40_960),
            Some(j) => ("matmul_32", (j.count, tiles(64, TILE_COLUMNS).1), 128, 40_960),
        };
        let step = if up.is_some() { w.cols } else { LEN };
        for first in (0..w.cols).step_by(step) {
            // The bias once; what follows is added to it.
            let some = match first {
                0 => made,
                _ => Product { bias: 0, add: true, ..made },
            };
            let args = [
                p(w.at + 2 * first as u64),
                p(w.row_bytes() as u64),
                p((w.row_bytes() * w.matrix_rows) as u64),
                n(w.rows)?,
                n(step.min(w.cols - first))?,
                p(x.at + split_bytes(w.dtype, first) as u64),
                n(x.stride)?,
                p(x.scales),
            ];
            let args = [&args[..], &many_outputs(&some, jobs, up)?].concat();
            self.run(m, entry, [grid.0, grid.1, 1], threads, shared / 4, &args)?;
        }
        Ok(())
    }

    /// The kernel of a prompt's rows on tensor cores, where there is one for these heads: its dimensions.
    pub(super) fn prompt_half(&self, a: &Gqa) -> Option<(&'static Ptx, &'static str, usize)> {
        let name = format!("prompt_half_{}", a.k.dtype.name().to_ascii_lowercase());
        let text = self.text(&name).filter(|_| a.k.dtype == a.v.dtype)?;
        let all = [("prompt_64", 64), ("prompt_96", 96), ("prompt_128", 128)];
        let fits = a.key.is_multiple_of(8) && a.value.is_multiple_of(8);
        let (entry, dims) = all.into_iter().find(|e| fits && a.key.max(a.value) <= e.1)?;
        Some((text, entry, dims))
    }

    /// Lanes of a tile of a prompt's rows.
    pub fn prompt_lanes(&self, a: &Gqa) -> usize {
        if self.prompt_half(a).is_some() { plan::HALF_LANES } else { plan::LANES }
    }
}
