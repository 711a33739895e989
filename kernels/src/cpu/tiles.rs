//! Activations of prompts in bf16, in the order that tile products read them: blocks of 16 rows, in each block a tile per 32
//! values, in each tile a line per pair of values with that pair of all 16 rows. Rounded once per input, shared by every
//! product that reads it. Knows nothing of weights.

use super::Pool;
use super::isa::Isa;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::x86_64::amx;
use crate::{KernelError, View};
use std::ops::Range;

/// Rows of a block.
pub const ROWS: usize = 16;
/// Values of a row in a tile.
pub const DEPTH: usize = 32;

/// Tokens of the shortest prompt whose rows take tile products: shorter ones would wait for unpacking (docs/performance.md).
pub const LEAST_PROMPT: u32 = 32;

/// A cache line: a pair of bf16 of each of 16 rows, or 32 bf16 of one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u32; 16]);

impl Line {
    /// Zeros.
    pub const ZERO: Self = Self([0; 16]);
}

/// Lines of a block of rows of `cols` values.
pub const fn lines(cols: usize) -> usize {
    cols.div_ceil(DEPTH) * ROWS
}

/// The rows of block `i` of `n`.
fn block_of(i: usize, n: usize) -> Range<usize> {
    i * ROWS..n.min((i + 1) * ROWS)
}

/// Rows of `cols` values in consecutive blocks, the last filled up with zeros.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// [`lines`] a block.
    pub lines: &'a [Line],
    /// Rows.
    pub rows: usize,
    /// Values of a row; those up to a whole tile are zeros.
    pub cols: usize,
}

/// Blocks of rows; their memory is reused from call to call.
#[derive(Default)]
pub struct Tiles {
    data: Vec<Line>,
    cols: usize,
    reserved: bool,
}

impl Tiles {
    /// Makes room for `blocks` blocks of rows of `cols` values, to be filled by [`Tiles::writer`].
    pub fn resize(&mut self, blocks: usize, cols: usize) {
        let n = blocks * lines(cols);
        if self.data.len() < n {
            debug_assert!(!self.reserved, "{blocks} blocks of {cols} were not reserved");
            self.data.resize(n, Line::ZERO);
        }
        self.cols = cols;
    }

    /// Makes room for `n` lines, and from now on for no more.
    pub fn reserve(&mut self, n: usize) -> Result<(), KernelError> {
        super::scratch::grow(&mut self.data, n, Line::ZERO)?;
        self.reserved = true;
        Ok(())
    }

    /// Rounds rows of `x`: those of block i are `rows(i)`, at most 16.
    pub fn set<R: Iterator<Item = usize>>(
        &mut self,
        isa: Isa,
        pool: &Pool,
        x: View<'_>,
        blocks: usize,
        rows: impl Fn(usize) -> R + Sync,
    ) {
        self.resize(blocks, x.cols());
        let writer = self.writer();
        pool.share(blocks, x.rows() * x.cols(), |i| {
            let mut block = [&[][..]; ROWS];
            let mut n = 0;
            rows(i).for_each(|r| {
                block[n] = x.row(r);
                n += 1;
            });
            // SAFETY: each index of the loop writes its own block.
            unsafe { writer.set(isa, i, 0, &block[..n]) };
        });
    }

    /// The same for all rows in order.
    pub fn set_all(&mut self, isa: Isa, pool: &Pool, x: View<'_>) {
        self.set(isa, pool, x, x.rows().div_ceil(ROWS), |i| block_of(i, x.rows()));
    }

    /// A handle through which a parallel loop fills blocks.
    pub fn writer(&mut self) -> Writer<'_> {
        Writer { data: self.data.as_mut_ptr(), len: self.data.len(), cols: self.cols, _t: Default::default() }
    }

    /// `rows` rows from the beginning of block `first` on.
    pub fn panel(&self, first: usize, rows: usize) -> Panel<'_> {
        let block = lines(self.cols);
        Panel { lines: &self.data[first * block..][..rows.div_ceil(ROWS) * block], rows, cols: self.cols }
    }
}

/// See [`Tiles::writer`].
pub struct Writer<'a> {
    data: *mut Line,
    len: usize,
    cols: usize,
    _t: std::marker::PhantomData<&'a mut Tiles>,
}
// SAFETY: whoever calls `set` says why no two tasks meet.
unsafe impl Sync for Writer<'_> {}

impl Writer<'_> {
    /// Rounds up to 16 rows into columns `from..` of block `block`; `from` is a multiple of 32, all rows are of one length and
    /// reach a multiple of 32 or the row's end. Rows that are not given become zeros.
    ///
    /// # Safety
    /// No other thread writes the same columns of the same block meanwhile.
    pub unsafe fn set(&self, isa: Isa, block: usize, from: usize, rows: &[&[f32]]) {
        let len = rows[0].len();
        let end = from + len;
        assert!(from.is_multiple_of(DEPTH) && end <= self.cols);
        assert!(end.is_multiple_of(DEPTH) || end == self.cols);
        let at = block * lines(self.cols) + from / DEPTH * ROWS;
        assert!(at + lines(len) <= self.len);
        // SAFETY: inside the allocation, by the assertion; nobody else writes it, by the caller's promise.
        let to = unsafe { std::slice::from_raw_parts_mut(self.data.add(at), lines(len)) };
        interleave(isa, rows, to);
    }
}

/// Rounds up to 16 rows of one length to [`lines`] of it.
fn interleave(isa: Isa, rows: &[&[f32]], to: &mut [Line]) {
    assert!(rows.len() <= ROWS && rows.iter().all(|r| lines(r.len()) == to.len()));
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token says that the CPU has the set; the lengths were checked.
        Isa::Amx(_) => unsafe { amx::interleave(rows, to) },
        _ => scalar::interleave(rows, to),
    }
}
