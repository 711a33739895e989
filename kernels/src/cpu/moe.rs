//! Gated feed-forward layers, dense and mixture of experts, in two parallel loops: gate, up and activation of everything the
//! tokens chose; then down, each task a few output rows of all of it. An expert's matrices are read once for all its tokens.
//! A token's experts are summed shared first, then by rank, whatever else is in the batch. Knows nothing of formats.

use super::isa::Isa;
use super::matmul::{self, Columns, Input, Rounded, TILE, columns, needs_quantized, product, with_scratch};
use super::quantized::{BLOCK, Quantized, RowWriter};
use super::reserve::tile_lines;
use super::scratch::Shared;
use super::table::SEVERAL;
use super::tiles::{self, Tiles};
use super::{Pool, ops};
use crate::backend::{Ffn, Write};
use crate::{KernelError, Limits, View, ViewMut};
use std::ops::Range;

/// What the layers work in, kept between calls.
#[derive(Default)]
pub struct Memory {
    /// The input, rounded.
    pub x: Quantized,
    /// The same of prompts that take tile products: for experts each row once per expert.
    pub x_tiles: Tiles,
    /// Hidden activations of the shared (or dense) layer and of the experts, rounded or in f32 as `down` wants them.
    rounded: [Quantized; 2],
    tiles: [Tiles; 2],
    float: [Vec<f32>; 2],
    /// (token, rank) pairs by expert, and where each pair went.
    order: Vec<u32>,
    place: Vec<u32>,
    /// Nothing grows any more.
    reserved: bool,
}

impl Memory {
    /// Makes room for calls within the limits.
    pub fn reserve(&mut self, l: &Limits, isa: Isa) -> Result<(), KernelError> {
        if isa.has_tiles() {
            let [x, hidden, routed] = tile_lines(l);
            self.x_tiles.reserve(x)?;
            self.tiles[0].reserve(hidden)?;
            self.tiles[1].reserve(routed)?;
        }
        let pairs = l.tokens * l.used;
        self.x.reserve(l.tokens, l.max_in)?;
        for ((h, n), (rounded, float)) in [(l.hidden, l.tokens), (l.routed, pairs)]
            .into_iter()
            .zip(self.rounded.iter_mut().zip(&mut self.float))
        {
            rounded.reserve(n, h.rounded)?;
            let floats = n * h.float;
            if floats > float.len() {
                *float = Vec::new();
                let fail = |_| KernelError::Memory { what: "hidden activations", bytes: 4 * floats };
                float.try_reserve_exact(floats).map_err(fail)?;
                float.resize(floats, 0.0);
            }
        }
        let fail = |_| KernelError::Memory { what: "lists of experts", bytes: 16 * pairs };
        self.order.try_reserve_exact(pairs.saturating_sub(self.order.len())).map_err(fail)?;
        self.place.try_reserve_exact(pairs.saturating_sub(self.place.len())).map_err(fail)?;
        self.reserved = true;
        Ok(())
    }
}

/// Which experts the rows of a call go to, as in `Routes`.
#[derive(Clone, Copy, Default)]
pub struct Chosen<'a> {
    /// Experts per row.
    pub used: usize,
    /// `[n, used]`.
    pub ids: &'a [u32],
    /// `[n, used]`.
    pub weights: &'a [f32],
}

/// Tokens that go through one feed-forward layer: rows `rows` of hidden matrix `bank`, in tiles from its block `block` on.
struct Unit<'a> {
    f: Ffn<'a>,
    m: usize,
    bank: usize,
    rows: Range<usize>,
    block: usize,
}

/// Where hidden rows go.
enum Bank<'a> {
    Rounded(RowWriter<'a>),
    Tiles(tiles::Writer<'a>),
    Float(Shared<f32>, usize),
}

/// `out (=|+=) shared(x) + sum_k weight_k expert_k(x)`, of which a dense layer has the first term alone; with tile products where
/// `tiled`. See `Device::ffn`, `Device::moe`.
pub fn layers(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    shared: Option<Ffn<'_>>,
    experts: Option<Ffn<'_>>,
    routes: Chosen<'_>,
    tiled: bool,
    x: View<'_>,
    mut out: ViewMut<'_>,
    write: Write,
) {
    let n = x.rows();
    if n == 0 {
        return;
    }
    let used = if experts.is_some() { routes.used } else { 0 };
    let all = || shared.iter().chain(experts.iter());
    let work: usize = shared.map_or(0, |f| n * f.gate.rows() * x.cols())
        + experts.map_or(0, |f| n * used * f.gate.rows() * x.cols());
    let Memory { x: int8, x_tiles, rounded, tiles, float, order, place, reserved } = mem;
    // Pairs sorted by expert, in token order within one.
    order.clear();
    order.extend(0..(n * used) as u32);
    order.sort_unstable_by_key(|&p| (routes.ids[p as usize], p));
    place.clear();
    place.resize(n * used, 0);
    for (at, &p) in order.iter().enumerate() {
        place[p as usize] = at as u32;
    }
    let mut units: Vec<Unit<'_>> =
        Vec::with_capacity(experts.map_or(0, |f| f.gate.count().min(n * used)) + 1);
    if let Some(f) = shared {
        units.push(Unit { f, m: 0, bank: 0, rows: 0..n, block: 0 });
    }
    let mut blocks = [if shared.is_some() { n.div_ceil(tiles::ROWS) } else { 0 }, 0];
    if let Some(f) = experts {
        let mut at = 0;
        for run in order.chunk_by(|&a, &b| routes.ids[a as usize] == routes.ids[b as usize]) {
            let m = routes.ids[run[0] as usize] as usize;
            units.push(Unit { f, m, bank: 1, rows: at..at + run.len(), block: blocks[1] });
            blocks[1] += run.len().div_ceil(tiles::ROWS);
            at += run.len();
        }
    }
    // The token of a row of a hidden matrix.
    let token = |bank: usize, row: usize| if bank == 0 { row } else { order[row] as usize / used };
    let input = Input {
        float: x,
        rounded: if !all().any(|f| needs_quantized(f.gate) || needs_quantized(f.up)) {
            Rounded::No
        } else if tiled {
            let mut rows = Vec::with_capacity(blocks[0] + blocks[1]);
            for u in &units {
                let starts = u.rows.clone().step_by(tiles::ROWS);
                rows.extend(starts.map(|r| (u.bank, r..u.rows.end.min(r + tiles::ROWS))));
            }
            x_tiles.set(isa, pool, x, rows.len(), |i| {
                let (bank, rows) = &rows[i];
                rows.clone().map(move |r| token(*bank, r))
            });
            Rounded::Bf16(x_tiles)
        } else {
            int8.set_with(isa, pool, x);
            Rounded::Int8(int8)
        },
    };
    let inputs: Vec<[Columns<'_>; 2]> = units
        .iter()
        .map(|u| {
            let block = if u.bank == 0 { 0 } else { blocks[0] } + u.block;
            [u.f.gate, u.f.up].map(|w| columns(w, input, block, u.rows.clone().map(|r| token(u.bank, r))))
        })
        .collect();
    // Hidden activations: rounded as they are made, or kept in f32 for a float `down`.
    let mut banks = [None, None];
    let shapes = [shared.map(|f| (f, n)), experts.map(|f| (f, n * used))];
    for (i, (((bank, tiles), rounded), float)) in
        banks.iter_mut().zip(&mut *tiles).zip(&mut *rounded).zip(&mut *float).enumerate()
    {
        let Some((f, rows)) = &shapes[i] else { continue };
        let width = f.down.cols();
        *bank = Some(if needs_quantized(f.down) && tiled {
            tiles.resize(blocks[i], width);
            Bank::Tiles(tiles.writer())
        } else if needs_quantized(f.down) {
            rounded.resize(*rows, width);
            Bank::Rounded(rounded.writer())
        } else {
            if float.len() < rows * width {
                debug_assert!(!*reserved, "{rows} hidden rows of {width} were not reserved");
                float.resize(rows * width, 0.0);
            }
            Bank::Float(Shared(float.as_mut_ptr()), width)
        });
    }
    // Tasks: BLOCK hidden rows of one unit, so that each task's hidden values fill whole blocks.
    let pieces = |u: &Unit<'_>| u.f.gate.rows().div_ceil(BLOCK);
    let tasks: usize = units.iter().map(pieces).sum();
    let task = |mut i: usize| {
        for (u, x) in units.iter().zip(&inputs) {
            if i < pieces(u) {
                return Some((u, x, i * BLOCK..u.f.gate.rows().min((i + 1) * BLOCK)));
            }
            i -= pieces(u);
        }
        None
    };
    // The piece that a thread will probably take next is begun to be fetched.
    let ahead = |i: usize| if n <= SEVERAL { task(i + pool.threads()) } else { None };
    pool.share(tasks, work, |i| {
        let (unit, x, rows) = task(i).expect("tasks were counted");
        let bank = banks[unit.bank].as_ref().expect("its bank was made");
        // SAFETY: this task has these hidden rows and columns alone.
        unsafe { hide(isa, unit, x, rows, bank, ahead(i)) };
    });
    let hidden: Vec<Columns<'_>> = units
        .iter()
        .map(|u| {
            let width = u.f.down.cols();
            let rows = shapes[u.bank].expect("its bank was made").1;
            let input = if needs_quantized(u.f.down) {
                let int8 = Rounded::Int8(&rounded[u.bank]);
                // The f32 view is not looked at.
                Input { float: x, rounded: if tiled { Rounded::Bf16(&tiles[u.bank]) } else { int8 } }
            } else {
                let float = View::from_host(&float[u.bank][..rows * width], width);
                Input { float, rounded: Rounded::No }
            };
            columns(u.f.down, input, u.block, u.rows.clone())
        })
        .collect();
    let d = out.cols();
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
    if hidden.iter().any(|x| matches!(x, Columns::Tiles(_))) {
        // Unit by unit, a token's experts in ascending order: many rows of each, so that hidden rows come from afar seldom.
        let step = d.div_ceil(4 * pool.threads()).next_multiple_of(TILE).min(BLOCK);
        return pool.share(d.div_ceil(step), work, |i| {
            let rows = i * step..d.min((i + 1) * step);
            let len = rows.len();
            // SAFETY: these rows of token t's output are this task's alone.
            let out =
                |t: usize| unsafe { std::slice::from_raw_parts_mut(ptr.at(t * stride + rows.start), len) };
            if write == Write::Set {
                (0..n).for_each(|t| out(t).fill(0.0));
            }
            for (u, x) in units.iter().zip(&hidden) {
                with_scratch(u.rows.len() * len, |y| {
                    product(u.f.down, u.m, rows.clone(), x, y);
                    for (r, y) in u.rows.clone().zip(y.chunks_exact(len)) {
                        let by = if u.bank == 0 { 1.0 } else { routes.weights[order[r] as usize] };
                        ops::axpy(isa, by, y, out(token(u.bank, r)));
                    }
                });
            }
        });
    }
    let first = if shared.is_some() { n } else { 0 };
    let step = units.first().map_or(TILE, |u| matmul::chunk(u.f.down, n, pool.threads()));
    // With many units a task reads a run of rows of each: shorter runs keep enough tasks. Those of few tokens are left as long
    // as they are, for they are read as streams.
    let step = if n <= SEVERAL { step } else { (step / units.len().clamp(1, 8)).next_multiple_of(TILE) };
    pool.share(d.div_ceil(step), work, |i| {
        let rows = i * step..d.min((i + 1) * step);
        let len = rows.len();
        with_scratch((first + n * used) * len, |y| {
            for (i, (u, x)) in units.iter().zip(&hidden).enumerate() {
                if let Some(next) = units.get(i + 1).filter(|_| n <= SEVERAL) {
                    matmul::fetch(next.f.down, next.m, rows.clone());
                }
                let at = if u.bank == 0 { 0 } else { first } + u.rows.start;
                product(u.f.down, u.m, rows.clone(), x, &mut y[at * len..][..u.rows.len() * len]);
            }
            for t in 0..n {
                // SAFETY: these rows of token t's output are this task's alone.
                let o = unsafe { std::slice::from_raw_parts_mut(ptr.at(t * stride + rows.start), len) };
                if write == Write::Set {
                    o.fill(0.0);
                }
                if shared.is_some() {
                    ops::axpy(isa, 1.0, &y[t * len..][..len], o);
                }
                for k in 0..used {
                    let at = first + place[t * used + k] as usize;
                    ops::axpy(isa, routes.weights[t * used + k], &y[at * len..][..len], o);
                }
            }
        });
    });
}

/// Hidden values `cols` of a unit's tokens.
///
/// # Safety
/// No other thread writes these columns of these rows.
unsafe fn hide(
    isa: Isa,
    u: &Unit<'_>,
    x: &[Columns<'_>; 2],
    cols: Range<usize>,
    bank: &Bank<'_>,
    next: Option<(&Unit<'_>, &[Columns<'_>; 2], Range<usize>)>,
) {
    let (tokens, width) = (u.rows.len(), cols.len());
    // Few tokens' weights are read as long streams; for many several tiles meet each block of columns.
    let step = if tokens <= SEVERAL { width } else { 4 * TILE };
    with_scratch(tokens * (width + 2 * step), |s| {
        let (hidden, y) = s.split_at_mut(tokens * width);
        let mut from = cols.start;
        while from < cols.end {
            let rows = from..cols.end.min(from + step);
            let len = rows.len();
            let (gate, rest) = y.split_at_mut(tokens * len);
            let up = &mut rest[..tokens * len];
            if tokens <= SEVERAL {
                matmul::fetch(u.f.up, u.m, rows.clone());
            }
            product(u.f.gate, u.m, rows.clone(), &x[0], gate);
            if let Some((next, _, rows)) = &next {
                matmul::fetch(next.f.gate, next.m, rows.clone());
            }
            product(u.f.up, u.m, rows, &x[1], up);
            ops::glu(isa, u.f.act, gate, up);
            for (h, g) in hidden.chunks_exact_mut(width).zip(gate.chunks_exact(len)) {
                h[from - cols.start..][..len].copy_from_slice(g);
            }
            from += len;
        }
        if let Bank::Tiles(w) = bank {
            for (i, h) in hidden.chunks(tiles::ROWS * width).enumerate() {
                let mut rows = [&[][..]; tiles::ROWS];
                rows.iter_mut().zip(h.chunks_exact(width)).for_each(|(to, h)| *to = h);
                // SAFETY: the caller's.
                unsafe { w.set(isa, u.block + i, cols.start, &rows[..h.len() / width]) };
            }
            return;
        }
        for (t, h) in hidden.chunks_exact(width).enumerate() {
            let row = u.rows.start + t;
            // SAFETY: the caller's.
            unsafe {
                match bank {
                    Bank::Tiles(_) => unreachable!("written above"),
                    Bank::Rounded(w) => w.set(row, cols.start, h),
                    Bank::Float(p, stride) => {
                        let to = p.at(row * stride + cols.start);
                        std::ptr::copy_nonoverlapping(h.as_ptr(), to, width);
                    }
                }
            }
        }
    });
}
