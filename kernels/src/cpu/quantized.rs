//! Activations as the dot products read them: int8 with one scale per 32 values, and the sums that minima and unsigned
//! weights need. Rounded once per input, shared by every product that reads it. Knows nothing of weights.

use super::Pool;
use super::isa::Isa;
use super::round::round;
use crate::{KernelError, View};

/// Values in a [`Block`].
pub const BLOCK: usize = 256;

/// 256 consecutive activations. Sub-block b is values 32b..32b+32; its values are `q * scale[b]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Block {
    /// Rounded values, -127..=127.
    pub q: [i8; 256],
    /// The sub-block's step, see [`round`].
    pub scale: [f32; 8],
    /// `scale[b]` times the sum of the sub-block's `q`.
    pub sum: [f32; 8],
    /// The same for the first 16 values of each sub-block.
    pub sum_lo: [f32; 8],
    /// The same for the last 16.
    pub sum_hi: [f32; 8],
    /// -128 times the sum of `q` over each run of 16: what unsigned weights (q + 128) have too much of.
    pub off16: [i32; 16],
    /// The same over each sub-block.
    pub off: [i32; 8],
    /// Fills the eighth cache line.
    pub pad: [i32; 8],
}

const _: () = assert!(size_of::<Block>() == 512);

impl Block {
    const ZERO: Self = Self {
        q: [0; 256],
        scale: [0.0; 8],
        sum: [0.0; 8],
        sum_lo: [0.0; 8],
        sum_hi: [0.0; 8],
        off16: [0; 16],
        off: [0; 8],
        pad: [0; 8],
    };
}

/// A matrix of rounded activations; its memory is reused from call to call.
#[derive(Default)]
pub struct Quantized {
    data: Vec<Block>,
    blocks: usize,
    stride: usize,
    rows: usize,
    cols: usize,
    reserved: bool,
}

/// Blocks from one row to the next. Odd, so that the same block of eight rows falls into different sets of the cache.
fn stride(cols: usize) -> usize {
    cols.div_ceil(BLOCK) | 1
}

struct Rows(*mut Block);
// SAFETY: each index of the loop that shares it writes its own row.
unsafe impl Sync for Rows {}

impl Quantized {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rounds `x` `[n, cols]`, rows in parallel.
    pub fn set(&mut self, pool: &Pool, x: View<'_>) {
        self.set_with(Isa::current(), pool, x);
    }

    /// The same with a chosen instruction set.
    pub fn set_with(&mut self, isa: Isa, pool: &Pool, x: View<'_>) {
        self.resize(x.rows(), x.cols());
        let (to, stride, blocks) = (Rows(self.data.as_mut_ptr()), self.stride, self.blocks);
        let to = &to;
        pool.run(self.rows, |i| {
            // SAFETY: row i of the allocation made by `resize`, written by this index alone.
            let row = unsafe { std::slice::from_raw_parts_mut(to.0.add(i * stride), blocks) };
            round(isa, x.row(i), row);
        });
    }

    /// Makes room for `[rows, cols]`, to be filled by [`Quantized::set_row`].
    pub fn resize(&mut self, rows: usize, cols: usize) {
        let (blocks, stride) = (cols.div_ceil(BLOCK), stride(cols));
        if self.data.len() < rows * stride {
            debug_assert!(!self.reserved, "{rows} rounded rows of {cols} were not reserved");
            self.data.resize(rows * stride, Block::ZERO);
        }
        (self.rows, self.cols, self.blocks, self.stride) = (rows, cols, blocks, stride);
    }

    /// Bytes of a matrix `[rows, cols]`; none where there are no columns.
    pub fn size(rows: usize, cols: usize) -> usize {
        if cols == 0 { 0 } else { rows * stride(cols) * size_of::<Block>() }
    }

    /// Makes room for any matrix of at most as many rows and columns, and from now on for no larger one.
    pub fn reserve(&mut self, rows: usize, cols: usize) -> Result<(), KernelError> {
        let bytes = Self::size(rows, cols);
        let blocks = bytes / size_of::<Block>();
        if blocks > self.data.len() {
            self.data = Vec::new();
            let fail = |_| KernelError::Memory { what: "rounded activations", bytes };
            self.data.try_reserve_exact(blocks).map_err(fail)?;
            self.data.resize(blocks, Block::ZERO);
        }
        self.reserved = true;
        Ok(())
    }

    /// Rounds one row, on the calling thread.
    pub fn set_row(&mut self, i: usize, x: &[f32]) {
        assert!(i < self.rows && x.len() == self.cols);
        round(Isa::current(), x, &mut self.data[i * self.stride..][..self.blocks]);
    }

    /// A handle through which a parallel loop fills rows (the output of one product is the input of the next): each row by
    /// one thread at a time.
    pub fn writer(&mut self) -> RowWriter<'_> {
        RowWriter {
            rows: Rows(self.data.as_mut_ptr()),
            shape: (self.rows, self.cols, self.stride),
            _q: std::marker::PhantomData,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`; the values after the last column are zeros.
    pub fn row(&self, i: usize) -> &[Block] {
        assert!(i < self.rows);
        &self.data[i * self.stride..][..self.blocks]
    }
}

/// See [`Quantized::writer`].
pub struct RowWriter<'a> {
    rows: Rows,
    shape: (usize, usize, usize),
    _q: std::marker::PhantomData<&'a mut Quantized>,
}

impl RowWriter<'_> {
    /// Rounds `x` into columns `from..from + x.len()` of row `i`; `from` is a multiple of 256 and `x` reaches a multiple of 256
    /// or the row's end.
    ///
    /// # Safety
    /// No other thread writes the same columns of the same row meanwhile.
    pub unsafe fn set(&self, i: usize, from: usize, x: &[f32]) {
        let (rows, cols, stride) = self.shape;
        let end = from + x.len();
        assert!(
            i < rows
                && end <= cols
                && from.is_multiple_of(BLOCK)
                && (end.is_multiple_of(BLOCK) || end == cols)
        );
        // SAFETY: inside row i of the allocation, by the assertion; nobody else writes it, by the caller's promise.
        let blocks = unsafe {
            std::slice::from_raw_parts_mut(
                self.rows.0.add(i * stride + from / BLOCK),
                x.len().div_ceil(BLOCK),
            )
        };
        round(Isa::current(), x, blocks);
    }
}
