//! How much working memory the CPU backend needs for given limits: the arithmetic that `scratch_bytes` announces and `reserve`
//! allocates. Each number repeats a size that the code beside this file takes; debug builds assert that nothing grows later.

use super::attention;
use super::isa::Isa;
use super::matmul::{STREAM_BYTES, TILE};
use super::quantized::{BLOCK, Quantized};
use super::scratch::Areas;
use super::table::{self, SEVERAL};
use crate::Limits;

/// Working memory in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Floats of results, for each thread.
    pub results: usize,
    /// Widest input whose weights the kernels unpack, for each thread.
    pub unpack: usize,
    /// Floats of attention's store.
    pub store: usize,
    /// Bytes of it all.
    pub bytes: usize,
}

/// The most rows of a weight of `rows` rows that a piece of work takes (`matmul::chunk`), for `n` columns.
fn piece(rows: usize, min_row_bytes: usize, n: usize, threads: usize) -> usize {
    let (share, most) = match n > SEVERAL {
        true => (rows.div_ceil(4 * threads), 4 * TILE),
        false => (rows.div_ceil(threads), STREAM_BYTES.div_ceil(min_row_bytes.max(1))),
    };
    share.min(most).next_multiple_of(TILE).max(TILE)
}

/// Floats of results that one piece of work holds at most.
fn results(l: &Limits, threads: usize) -> usize {
    // Rows of eight experts of a router, dequantised.
    let mut most = (8 * l.width).max(1);
    for n in [1, SEVERAL.min(l.tokens), l.tokens] {
        if n == 0 {
            continue;
        }
        // A single row's first piece reaches to the next cache line.
        most = most.max(n * piece(l.max_out, l.min_row_bytes, n, threads) + 16);
        if l.width > 0 {
            // Rows of `down` may be as short as a block.
            let step = piece(l.width, 1, n, threads);
            most = most.max(n * step);
            if l.used > 0 {
                let units = l.used.min(8);
                let step = if n <= SEVERAL { step } else { (step / units).next_multiple_of(TILE) };
                most = most.max(n * (1 + l.used) * step);
            }
            // Hidden values of a task: a block of one unit's rows, and its gate and up.
            let step = if n > SEVERAL { 4 * TILE } else { BLOCK };
            most = most.max(n * (BLOCK + 2 * step));
        }
    }
    most
}

impl Sizes {
    /// For `threads` threads of `isa`.
    pub fn of(l: &Limits, threads: usize, isa: Isa) -> Self {
        let results = results(l, threads);
        let unpack = l.max_in.max(l.hidden.rounded).max(l.routed.rounded);
        let store = attention::Memory::floats(l);
        let pairs = l.tokens * l.used;
        let rounded = Quantized::size(l.tokens, l.max_in)
            + Quantized::size(l.tokens, l.hidden.rounded)
            + Quantized::size(pairs, l.routed.rounded);
        let floats = l.tokens * l.hidden.float + pairs * l.routed.float;
        // The router's logits and a row's lists; who goes where; columns of products, by reference; tiles and parts of attention.
        let lists = 4 * (l.tokens * l.experts + 8 * l.experts)
            + (8 + 8) * pairs
            + 3 * 16 * (l.tokens + pairs)
            + 256 * (l.experts.min(pairs) + 1)
            + 256 * l.tokens
            + (16 << 10);
        let per_thread = results * 4 + table::scratch_bytes(isa, unpack) + attention::PER_THREAD;
        let bytes = Areas::size(threads) + threads * per_thread + (store + floats) * 4 + rounded + lists;
        Self { results, unpack, store, bytes }
    }
}
