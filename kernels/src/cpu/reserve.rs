//! How much working memory the CPU backend needs for given limits: the arithmetic that `scratch_bytes` announces and `reserve`
//! allocates. Each number repeats a size that the code beside this file takes; debug builds assert that nothing grows later.

use super::attention;
use super::isa::Isa;
use super::matmul::{STREAM_BYTES, TILE};
use super::quantized::{BLOCK, Quantized};
use super::scratch::Areas;
use super::table::{self, SEVERAL};
use super::tiles::{self, Line};
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

/// Lines of tiles: a call's input, hidden layers of which a token has one row, and those of routed experts.
pub fn tile_lines(l: &Limits) -> [usize; 3] {
    let [hidden, routed] = blocks(l);
    let x = (hidden * tiles::lines(l.max_in)).max((hidden + routed) * tiles::lines(l.width.min(l.max_in)));
    [x, hidden * tiles::lines(l.hidden.rounded), routed * tiles::lines(l.routed.rounded)]
}

/// Blocks of tiles of a batch's tokens, and of the pairs of tokens and experts, where each expert's last block may have one row.
fn blocks(l: &Limits) -> [usize; 2] {
    let pairs = l.tokens * l.used;
    [l.tokens.div_ceil(tiles::ROWS), (pairs + (tiles::ROWS - 1) * l.experts.min(pairs)) / tiles::ROWS]
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
        let (tiles, rows) = match isa.has_tiles() {
            // And which rows each block has.
            true => (
                tile_lines(l).iter().sum::<usize>() * size_of::<Line>(),
                24 * blocks(l).iter().sum::<usize>(),
            ),
            false => (0, 0),
        };
        let floats = l.tokens * l.hidden.float + pairs * l.routed.float;
        // The router's logits and a row's lists; who goes where; columns of products, by reference; tiles and parts of attention.
        let lists = 4 * (l.tokens * l.experts + 8 * l.experts)
            + (8 + 8) * pairs
            + 3 * 16 * (l.tokens + pairs)
            + 256 * (l.experts.min(pairs) + 1)
            + 256 * l.tokens
            + rows
            + (16 << 10);
        let per_thread = results * 4 + table::scratch_bytes(isa, unpack) + attention::PER_THREAD;
        let bytes =
            Areas::size(threads) + threads * per_thread + (store + floats) * 4 + rounded + tiles + lists;
        Self { results, unpack, store, bytes }
    }
}
