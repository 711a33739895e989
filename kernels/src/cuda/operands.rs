//! What kernels work on, as addresses, sizes and strides: made of buffers, weights and caches, taken by `launch`.

use super::layout;
use crate::{KernelError, View, ViewMut, Weight};
use quant::DType;
use std::ops::Range;

/// Bytes of 256 rounded activations: `Block` of matvec.cu.
pub const BLOCK_BYTES: usize = 448;
/// How a row's list is cut into parts: of `split` entries; or, with `most` > 0, into eight of `split` to four times that, and into more of
/// the larger up to `most`. Decided by the layer and the row's own length, so that bits do not depend on what else there is. `part_len` of
/// src/lists.cuh.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    pub split: usize,
    pub most: usize,
}

impl Parts {
    /// Of grouped heads. With two key heads 64 parts of one row are a block for each multiprocessor of a large GPU; more only write more.
    pub const GROUPED: Self = Self { split: 128, most: 64 };

    /// Of absorbed MLA. A part's sums are as long as the latents it read for 128 heads and 230 entries, and its queries as those of 256: some
    /// 128 blocks of up to 64 heads fill a GPU, more only write more; of a short row smaller parts, since else only few multiprocessors would
    /// have any. A prompt's rows fill it by themselves.
    pub fn absorbed(heads: usize, prompt: bool) -> Self {
        let most = (128 / heads.div_ceil(64)).max(1);
        match prompt {
            true => Self { split: 1024, most: most.min(16) },
            false => Self { split: if heads > 32 { 128 } else { 32 }, most },
        }
    }

    /// Parts of a list of `seen` entries.
    pub fn count(self, seen: usize) -> usize {
        if self.most == 0 {
            return seen.div_ceil(self.split);
        }
        let [eighth, each] = [8, self.most].map(|n| seen.div_ceil(n).next_multiple_of(32));
        seen.div_ceil(eighth.min(4 * self.split).max(self.split).max(each))
    }

    /// Parts of a list of at most `seen` entries.
    pub fn limit(self, seen: usize) -> usize {
        let parts = seen.div_ceil(self.split);
        if self.most == 0 { parts } else { parts.min(seen.div_ceil(4 * self.split).max(8)).min(self.most) }
    }
}

/// Activations in device memory: `rows` rows of `cols` values, `stride` values apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floats {
    pub at: u64,
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
}

impl Floats {
    /// Rows without gaps.
    pub fn dense(at: u64, rows: usize, cols: usize) -> Self {
        Self { at, stride: cols, rows, cols }
    }

    pub fn of(x: &View<'_>) -> Result<Self, KernelError> {
        let (at, stride) = x.address().ok_or(KernelError::Place { op: "cuda" })?;
        Ok(Self { at, stride, rows: x.rows(), cols: x.cols() })
    }

    /// Where an operation writes: of `Scratch::output`, which is told of all that is written.
    pub(super) fn of_mut(x: &ViewMut<'_>) -> Result<Self, KernelError> {
        let (at, stride) = x.address().ok_or(KernelError::Place { op: "cuda" })?;
        Ok(Self { at, stride, rows: x.rows(), cols: x.cols() })
    }

    /// Whether some address lies in both.
    pub fn meets(&self, other: &Self) -> bool {
        let end = |f: &Self| f.at + 4 * (f.rows.max(1) * f.stride.max(f.cols)) as u64;
        self.at < end(other) && other.at < end(self)
    }

    /// Some of the rows.
    pub fn part(self, rows: Range<usize>) -> Self {
        Self { at: self.at + 4 * (rows.start * self.stride) as u64, rows: rows.len(), ..self }
    }

    /// Heads of `width` columns, `step` apart, as rows of their own; `None` where rows have gaps that heads have not.
    pub fn heads(self, width: usize, step: usize) -> Option<Self> {
        let heads = self.cols / step;
        (self.stride == heads * step).then(|| Self {
            rows: self.rows * heads,
            stride: step,
            cols: width,
            ..self
        })
    }
}

/// Rows rounded to int8: `stride` blocks each.
#[derive(Clone, Copy, Debug)]
pub struct Rounded {
    pub at: u64,
    pub stride: usize,
}

impl Rounded {
    /// Rows of so many values without gaps.
    pub fn of(at: u64, cols: usize) -> Self {
        Self { at, stride: cols.div_ceil(256) }
    }
}

/// Rows of prompts in f16 (`half_rows` of round.cu): `stride` bytes each, and what undoes their powers of two.
#[derive(Clone, Copy, Debug)]
pub struct Halves {
    pub at: u64,
    pub stride: usize,
    pub scales: u64,
}

impl Halves {
    /// Rows of `x` at `at`, their scales behind them.
    pub fn of(at: u64, x: &Floats) -> Self {
        let stride = 64 * x.cols.div_ceil(32);
        Self { at, stride, scales: at + (x.rows * stride) as u64 }
    }
}

/// Bytes of a row of `cols` activations as weights of `dtype` read it, beside the floats; `tiled`: rows of prompts, in f16.
pub fn input_bytes(dtype: DType, cols: usize, tiled: bool) -> usize {
    match dtype {
        DType::F32 => 0,
        _ if tiled => 64 * cols.div_ceil(32) + 4,
        d if layout::rounds(d) => cols.div_ceil(256) * BLOCK_BYTES,
        _ => 0,
    }
}

/// The same for several weights.
pub fn inputs_bytes(weights: &[&Weight], cols: usize, tiled: bool) -> usize {
    weights.iter().map(|w| input_bytes(w.dtype(), cols, tiled)).max().unwrap_or(0)
}

/// What a product reads.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    pub float: Floats,
    /// Needed where a weight's format asks for it.
    pub rounded: Option<Rounded>,
    /// Rows of prompts, for weights of all types but F32.
    pub halves: Option<Halves>,
}

impl Input {
    /// The rows in f16, where weights of `dtype` are to read them.
    pub fn halves(&self, dtype: DType) -> Option<Halves> {
        self.halves.filter(|_| dtype != DType::F32)
    }

    pub fn part(self, rows: Range<usize>) -> Self {
        let skip = |bytes: usize| (rows.start * bytes) as u64;
        let rounded = self.rounded.map(|r| Rounded { at: r.at + skip(r.stride * BLOCK_BYTES), ..r });
        let halves = |h: Halves| Halves { at: h.at + skip(h.stride), scales: h.scales + skip(4), ..h };
        Self { rounded, halves: self.halves.map(halves), float: self.float.part(rows) }
    }
}

/// Weights in device memory: matrices of `rows` rows, `matrix_rows` apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub at: u64,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    pub matrix_rows: usize,
    /// A power of two for each row, where it [has one](layout::has_power).
    pub powers: u64,
}

impl Matrix {
    pub fn of(w: &Weight) -> Result<Self, KernelError> {
        let at = w.address().ok_or(KernelError::Place { op: "cuda" })?;
        let powers = w.powers().filter(|_| layout::has_power(w.dtype())).unwrap_or(0);
        Ok(Self { at, dtype: w.dtype(), rows: w.rows(), cols: w.cols(), matrix_rows: w.rows(), powers })
    }

    /// Rows `rows` of every matrix.
    pub fn part(self, rows: Range<usize>) -> Self {
        let skip = |bytes: usize| (rows.start * bytes) as u64;
        let (at, powers) = (self.at + skip(self.row_bytes()), self.powers + skip(layout::POWER));
        Self { at, powers, rows: rows.len(), ..self }
    }

    pub fn row_bytes(&self) -> usize {
        layout::row_bytes(self.dtype, self.cols)
    }
}

/// One product of an input: `out (=|+=) W x (+ bias)`.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub w: Matrix,
    /// 0: none.
    pub bias: u64,
    pub out: Floats,
    pub add: bool,
}

impl Product {
    pub fn set(w: Matrix, out: Floats) -> Self {
        Self { w, bias: 0, out, add: false }
    }
}

/// A cache in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    pub at: u64,
    pub dtype: DType,
    pub width: usize,
}

impl Cache {
    pub fn row_bytes(&self) -> usize {
        layout::row_bytes(self.dtype, self.width)
    }
}

/// What rows see: ends of each row's part of the spans, and the spans (start, length, sink).
#[derive(Clone, Copy, Debug)]
pub struct Lists {
    pub ends: u64,
    pub spans: u64,
    pub rows: usize,
    /// Entries of the longest.
    pub longest: usize,
    pub parts: Parts,
    /// Parts of the row that has most.
    pub splits: usize,
}

/// Grouped heads.
#[derive(Clone, Copy, Debug)]
pub struct Gqa {
    pub heads: usize,
    pub kv_heads: usize,
    pub key: usize,
    pub value: usize,
    pub scale: f32,
    pub q: Floats,
    /// 0: none.
    pub q_sink: u64,
    pub k: Cache,
    pub v: Cache,
}

/// MLA in its absorbed form.
#[derive(Clone, Copy, Debug)]
pub struct Absorbed {
    pub heads: usize,
    pub latent: usize,
    pub nope: usize,
    pub rope: usize,
    pub scale: f32,
    /// `[rows, heads, latent]`.
    pub q_latent: u64,
    pub q: Floats,
    /// 0: none.
    pub q_sink: u64,
    pub latents: Cache,
    pub k_pe: Cache,
}

/// Jobs by expert, as `sort_experts` leaves them: their order, and tiles of `columns` that a grid takes.
#[derive(Clone, Copy, Debug)]
pub struct Sorted {
    pub order: u64,
    pub tiles: u64,
    pub columns: usize,
    /// Tiles there is room for.
    pub count: usize,
    /// Jobs of a row of x.
    pub share: usize,
}

/// Which matrix of a stack makes which row.
#[derive(Clone, Copy, Debug)]
pub enum Jobs {
    /// The only one makes all.
    One,
    /// Matrix `ids[j]` makes row j, of row `j / share` of x.
    Each { ids: u64, share: usize },
    /// The same by expert.
    Sorted(Sorted),
}

impl Jobs {
    /// Rows made of a row of x.
    pub fn share(self) -> usize {
        match self {
            Self::One => 1,
            Self::Each { share, .. } | Self::Sorted(Sorted { share, .. }) => share,
        }
    }

    /// The same jobs where x has a row for each.
    pub fn alone(self) -> Self {
        match self {
            Self::One => Self::One,
            Self::Each { ids, .. } => Self::Each { ids, share: 1 },
            Self::Sorted(s) => Self::Sorted(Sorted { share: 1, ..s }),
        }
    }
}

/// A prompt's rows in tiles that walk the cache together (cuda/plan.rs).
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    pub tiles: u64,
    pub segments: u64,
    pub ranges: u64,
    pub count: usize,
    /// Heads of a group that a tile takes.
    pub heads: usize,
}
