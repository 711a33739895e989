//! Products of weight matrices with activations: what is rounded, how rows are shared out among threads, and where results go.
//! Knows no format and no instruction set.
//!
//! [`matmul`] is the whole product as one parallel loop. Fused operations (a feed-forward layer, experts) build their own
//! loop from the same parts, all of which run on the calling thread:
//!
//! 1. `Quantized::set` or `Tiles::set` rounds the input once for all products that share it; [`Input`] pairs it with the f32
//!    original.
//! 2. [`columns`] picks the rows of the input that a product is for (all, or an expert's tokens), as its weight wants them.
//! 3. [`product`] multiplies any range of the weight's rows with them into the caller's scratch, `y[column][row]`.
//!    Ranges that are multiples of [`TILE`] rows are the efficient ones; [`chunk`] proposes a size.
//! 4. The caller applies what follows (activation, bias, scale) and writes; a hidden layer can be rounded straight
//!    into the next product's `Quantized` through `Quantized::writer`.
//!
//! A result depends on the weight row and the input row alone: not on the range, the other columns, the threads or (where the
//! CPU has fused multiply-add) the instruction set.

use super::Pool;
use super::isa::Isa;
use super::quantized::{Block, Quantized};
use super::table::{self, Kernel, SEVERAL};
use super::tiles::{Panel, Tiles};
use crate::backend::{Product, Write};
use crate::{KernelError, Vector, View, ViewMut, Weight};
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Rows that the kernels for many columns take at once.
pub const TILE: usize = 32;

/// Bytes of weights that one claimed piece of work for few columns reads, about: their kernels read four streams at once, each
/// of which is a quarter of this and costs a few misses to begin, and lay out their columns anew for each piece.
pub const STREAM_BYTES: usize = 256 << 10;

/// The input of products: `[n, in]` as it came, and rounded.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// As it came.
    pub float: View<'a>,
    /// For weights of block formats.
    pub rounded: Rounded<'a>,
}

/// A rounded input. Which of the two is chosen is a property of the rows' request (docs/numerics.md).
#[derive(Clone, Copy)]
pub enum Rounded<'a> {
    /// Every weight is a float format.
    No,
    /// To int8.
    Int8(&'a Quantized),
    /// To bf16: rows of prompts, where there are tile products.
    Bf16(&'a Tiles),
}

impl<'a> From<Option<&'a Quantized>> for Rounded<'a> {
    fn from(q: Option<&'a Quantized>) -> Self {
        q.map_or(Self::No, Self::Int8)
    }
}

/// Rows of an [`Input`] in the form that a weight's format multiplies with.
pub enum Columns<'a> {
    /// Rounded to int8.
    Quantized(Vec<&'a [Block]>),
    /// Rounded to bf16.
    Tiles(Panel<'a>),
    /// As they came.
    Float(Vec<&'a [f32]>),
}

impl Columns<'_> {
    /// Number of columns.
    pub fn len(&self) -> usize {
        match self {
            Self::Quantized(c) => c.len(),
            Self::Tiles(p) => p.rows,
            Self::Float(c) => c.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Whether products with `w` need [`Input::rounded`].
pub fn needs_quantized(w: &Weight) -> bool {
    table::rounds_activations(w.dtype())
}

/// The rows `tokens` of `x` as `w` wants them; those in bf16 lie from block `block` on, in the order of `tokens`. Panics if rounded
/// activations are needed and missing.
pub fn columns<'a>(
    w: &Weight,
    x: Input<'a>,
    block: usize,
    tokens: impl ExactSizeIterator<Item = usize>,
) -> Columns<'a> {
    if !needs_quantized(w) {
        assert_eq!(x.float.cols(), w.cols());
        return Columns::Float(tokens.map(|t| x.float.row(t)).collect());
    }
    match x.rounded {
        Rounded::No => panic!("{} multiplies with rounded activations", w.dtype()),
        Rounded::Int8(q) => {
            assert_eq!(q.cols(), w.cols());
            Columns::Quantized(tokens.map(|t| q.row(t)).collect())
        }
        Rounded::Bf16(t) => Columns::Tiles(t.panel(block, tokens.len())),
    }
}

/// `y[c * rows.len() + i] = row (rows.start + i) of weight[m] . column c`, on the calling thread.
pub fn product(w: &Weight, m: usize, rows: Range<usize>, x: &Columns<'_>, y: &mut [f32]) {
    product_with(Isa::current(), w, m, rows, x, y);
}

/// The same with a chosen instruction set.
pub fn product_with(isa: Isa, w: &Weight, m: usize, rows: Range<usize>, x: &Columns<'_>, y: &mut [f32]) {
    assert!(m < w.count() && rows.start <= rows.end && rows.end <= w.rows());
    assert_eq!(y.len(), rows.len() * x.len());
    if y.is_empty() {
        return;
    }
    let bytes = w.row_bytes();
    let rows = &w.matrix(m)[rows.start * bytes..rows.end * bytes];
    match (table::kernel(w.dtype(), isa), x) {
        // SAFETY: a value of `Isa` exists only where the CPU has it.
        (Kernel::Quantized(k, _), Columns::Quantized(x)) => unsafe {
            assert!(x.iter().all(|x| x.len() * super::quantized::BLOCK >= w.cols()));
            k.of(x.len())(rows, bytes, x, y);
        },
        // SAFETY: as above.
        (Kernel::Quantized(_, tiled), Columns::Tiles(x)) => unsafe {
            assert_eq!(x.cols, w.cols());
            tiled(rows, bytes, *x, y);
        },
        // SAFETY: as above.
        (Kernel::Float(k), Columns::Float(x)) => unsafe {
            assert!(x.iter().all(|x| x.len() == w.cols()));
            k.of(x.len())(rows, bytes, x, y);
        },
        _ => panic!("the columns were made for another format than {}", w.dtype()),
    }
}

/// Asks for the beginnings of what [`product`] with few columns would read: the first lines of its four streams, which
/// otherwise begin with a wait for memory.
pub fn fetch(w: &Weight, m: usize, rows: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        const LINES: usize = 16;
        let bytes = &w.matrix(m)[rows.start * w.row_bytes()..rows.end * w.row_bytes()];
        for stream in bytes.chunks(rows.len().div_ceil(4) * w.row_bytes()) {
            for line in stream.chunks(64).take(LINES) {
                // SAFETY: every x86-64 has the instruction; it reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (w, m, rows);
}

/// How many rows of `w` one piece of work should take for `n` columns on `threads` threads.
pub fn chunk(w: &Weight, n: usize, threads: usize) -> usize {
    if n <= SEVERAL {
        // Several pieces for each thread where the matrix is large, and as many as leave the busiest thread the least.
        let rounds = (w.rows() * w.row_bytes()).div_ceil(STREAM_BYTES * threads).max(1);
        let step = |rounds: usize| w.rows().div_ceil(rounds * threads).next_multiple_of(TILE).max(TILE);
        let busiest = |step: usize| w.rows().div_ceil(step).div_ceil(threads) * step;
        return (rounds..=2 * rounds).map(step).min_by_key(|s| busiest(*s)).unwrap_or(TILE);
    }
    let fair = w.rows().div_ceil(4 * threads).next_multiple_of(TILE);
    (4 * TILE).min(fair).max(TILE)
}

thread_local! {
    static ROUNDED: RefCell<Quantized> = RefCell::default();
    static RESULT: RefCell<Vec<f32>> = RefCell::default();
    static RESERVED: Cell<bool> = const { Cell::new(false) };
}

/// Makes room for `n` results in this thread's scratch, which does not grow beyond from now on.
pub fn reserve_results(n: usize) -> Result<(), KernelError> {
    let mut v = RESULT.take();
    if v.len() < n {
        v = Vec::new();
        v.try_reserve_exact(n).map_err(|_| KernelError::Memory { what: "scratch", bytes: 4 * n })?;
        v.resize(n, 0.0);
    }
    RESULT.set(v);
    RESERVED.set(true);
    Ok(())
}

/// Calls `f` with this thread's scratch for `len` results (not cleared).
pub fn with_scratch<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    // Taken out, not borrowed: `f` may call this again.
    let mut v = RESULT.take();
    if v.len() < len {
        debug_assert!(!RESERVED.get(), "{len} results, {} are reserved", v.len());
        v.resize(len, 0.0);
    }
    let t = f(&mut v[..len]);
    RESULT.set(v);
    t
}

/// Where the rows of a product are written, by several threads at once.
struct Sink {
    out: *mut f32,
    stride: usize,
}
// SAFETY: each piece of work writes its own range of columns.
unsafe impl Sync for Sink {}

/// `out (=|+=) weight[m] x + bias`; x `[n, in]`, out `[n, out]`.
pub fn matmul(
    pool: &Pool,
    w: &Weight,
    m: usize,
    x: View<'_>,
    bias: Option<&Vector>,
    out: ViewMut<'_>,
    write: Write,
) {
    if needs_quantized(w) {
        let mut q = ROUNDED.take();
        q.set(pool, x);
        multiply(pool, w, m, Input { float: x, rounded: Rounded::Int8(&q) }, bias, out, write);
        ROUNDED.set(q);
    } else {
        multiply(pool, w, m, Input { float: x, rounded: Rounded::No }, bias, out, write);
    }
}

/// The same, its input rounded already.
pub fn multiply(
    pool: &Pool,
    w: &Weight,
    m: usize,
    x: Input<'_>,
    bias: Option<&Vector>,
    out: ViewMut<'_>,
    write: Write,
) {
    multiply_with(Isa::current(), pool, w, m, x, bias, out, write);
}

/// The same with a chosen instruction set.
pub fn multiply_with(
    isa: Isa,
    pool: &Pool,
    w: &Weight,
    m: usize,
    x: Input<'_>,
    bias: Option<&Vector>,
    out: ViewMut<'_>,
    write: Write,
) {
    if out.rows() > 0 {
        let part = Part::new(pool, w, m, x, bias, out, write);
        pool.run(part.pieces, |i| part.piece(isa, i));
    }
}

/// Products that share an input, as one parallel loop.
pub fn multiply_all(isa: Isa, pool: &Pool, x: Input<'_>, products: &mut [Product<'_>]) {
    if x.float.rows() == 0 {
        return;
    }
    let parts: Vec<Part<'_>> = products
        .iter_mut()
        .map(|p| Part::new(pool, p.weight, 0, x, p.bias, p.out.reborrow(), p.write))
        .collect();
    pool.run(parts.iter().map(|p| p.pieces).sum(), |mut i| {
        for part in &parts {
            if i < part.pieces {
                return part.piece(isa, i);
            }
            i -= part.pieces;
        }
    });
}

/// A product, cut into pieces of work.
struct Part<'a> {
    w: &'a Weight,
    m: usize,
    columns: Columns<'a>,
    bias: Option<&'a Vector>,
    sink: Sink,
    write: Write,
    /// Rows of the first piece beyond `step`.
    lead: usize,
    step: usize,
    pieces: usize,
}

impl<'a> Part<'a> {
    fn new(
        pool: &Pool,
        w: &'a Weight,
        m: usize,
        x: Input<'a>,
        bias: Option<&'a Vector>,
        mut out: ViewMut<'a>,
        write: Write,
    ) -> Self {
        let n = out.rows();
        assert!(out.cols() == w.rows() && bias.is_none_or(|b| b.len() == w.rows()));
        let columns = columns(w, x, 0, 0..n);
        let (out, stride) = out.raw();
        let step = chunk(w, n, pool.threads());
        // A single row's pieces end where a cache line of the output ends, so that no two threads write to one.
        let lead = if n == 1 { out.align_offset(64).min(w.rows()) } else { 0 };
        let pieces = (w.rows() - lead).div_ceil(step).max(1);
        Self { w, m, columns, bias, sink: Sink { out, stride }, write, lead, step, pieces }
    }

    /// Computes piece `i`, on the calling thread.
    fn piece(&self, isa: Isa, i: usize) {
        let Self { w, lead, step, .. } = *self;
        let start = if i == 0 { 0 } else { lead + i * step };
        let end = (lead + (i + 1) * step).min(w.rows());
        with_scratch((end - start) * self.columns.len(), |y| {
            product_with(isa, w, self.m, start..end, &self.columns, y);
            for (t, y) in y.chunks_exact(end - start).enumerate() {
                // SAFETY: row t, columns start..end of `out`, which `out.cols() == w.rows()` holds; this piece's alone.
                let o = unsafe {
                    std::slice::from_raw_parts_mut(
                        self.sink.out.add(t * self.sink.stride + start),
                        end - start,
                    )
                };
                store(o, y, self.bias.map(|b| &b.data[start..end]), self.write);
            }
        });
    }
}

fn store(out: &mut [f32], y: &[f32], bias: Option<&[f32]>, write: Write) {
    let add = write == Write::Add;
    match bias {
        None if add => out.iter_mut().zip(y).for_each(|(o, y)| *o += y),
        None => out.copy_from_slice(y),
        Some(b) => {
            for ((o, y), b) in out.iter_mut().zip(y).zip(b) {
                *o = (if add { *o } else { 0.0 }) + (y + b);
            }
        }
    }
}
