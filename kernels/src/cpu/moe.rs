//! Gated feed-forward layers, dense and mixture of experts, in two parallel loops: gate, up and activation of everything the
//! tokens chose; then down, each task a few output rows of all of it. An expert's matrices are read once for all its tokens.
//! A token's experts are summed shared first, then by rank, whatever else is in the batch. Knows nothing of formats.

use super::isa::Isa;
use super::matmul::{self, Columns, Input, TILE, columns, needs_quantized, product, with_scratch};
use super::quantized::{BLOCK, Quantized, RowWriter};
use super::scratch::Shared;
use super::table::SEVERAL;
use super::{Pool, ops};
use crate::backend::{Ffn, Routes, Write};
use crate::{KernelError, Limits, View, ViewMut};
use std::ops::Range;

/// What the layers work in, kept between calls.
#[derive(Default)]
pub struct Memory {
    /// The input, rounded.
    pub x: Quantized,
    /// Hidden activations of the shared (or dense) layer and of the experts, rounded or in f32 as `down` wants them.
    rounded: [Quantized; 2],
    float: [Vec<f32>; 2],
    /// (token, rank) pairs by expert, and where each pair went.
    order: Vec<u32>,
    place: Vec<u32>,
    /// Nothing grows any more.
    reserved: bool,
}

impl Memory {
    /// Makes room for calls within the limits.
    pub fn reserve(&mut self, l: &Limits) -> Result<(), KernelError> {
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

/// Tokens that go through one feed-forward layer: rows `rows` of hidden matrix `bank`.
struct Unit<'a> {
    f: Ffn<'a>,
    m: usize,
    bank: usize,
    rows: Range<usize>,
    x: [Columns<'a>; 2],
}

/// Where hidden rows go.
enum Bank<'a> {
    Rounded(RowWriter<'a>),
    Float(Shared<f32>, usize),
}

/// `out (=|+=) down(act(gate x) * up x)`.
pub fn ffn(pool: &Pool, isa: Isa, mem: &mut Memory, f: Ffn<'_>, x: View<'_>, out: ViewMut<'_>, write: Write) {
    let none = Routes::default();
    layers(pool, isa, mem, Some(f), None, &none, x, out, write);
}

/// See `Device::moe`.
pub fn moe(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    experts: Ffn<'_>,
    routes: &Routes,
    shared: Option<Ffn<'_>>,
    x: View<'_>,
    out: ViewMut<'_>,
    write: Write,
) {
    layers(pool, isa, mem, shared, Some(experts), routes, x, out, write);
}

fn layers(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    shared: Option<Ffn<'_>>,
    experts: Option<Ffn<'_>>,
    routes: &Routes,
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
    if all().any(|f| needs_quantized(f.gate) || needs_quantized(f.up)) {
        mem.x.set_with(isa, pool, x);
    }
    let Memory { x: rounded_x, rounded, float, order, place, reserved } = mem;
    let input = Input { float: x, quantized: Some(rounded_x) };
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
        let x = [columns(f.gate, input, 0..n), columns(f.up, input, 0..n)];
        units.push(Unit { f, m: 0, bank: 0, rows: 0..n, x });
    }
    if let Some(f) = experts {
        let mut at = 0;
        for run in order.chunk_by(|&a, &b| routes.ids[a as usize] == routes.ids[b as usize]) {
            let tokens = || run.iter().map(|&p| p as usize / used);
            let x = [columns(f.gate, input, tokens()), columns(f.up, input, tokens())];
            let m = routes.ids[run[0] as usize] as usize;
            units.push(Unit { f, m, bank: 1, rows: at..at + run.len(), x });
            at += run.len();
        }
    }
    // Hidden activations: rounded as they are made, or kept in f32 for a float `down`.
    let mut banks = [None, None];
    let shapes = [shared.map(|f| (f, n)), experts.map(|f| (f, n * used))];
    for (((bank, shape), rounded), float) in banks.iter_mut().zip(&shapes).zip(&mut *rounded).zip(&mut *float)
    {
        let Some((f, rows)) = shape else { continue };
        let width = f.down.cols();
        *bank = Some(if needs_quantized(f.down) {
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
        for u in &units {
            if i < pieces(u) {
                return Some((u, i * BLOCK..u.f.gate.rows().min((i + 1) * BLOCK)));
            }
            i -= pieces(u);
        }
        None
    };
    // The piece that a thread will probably take next is begun to be fetched.
    let ahead = |i: usize| if n <= SEVERAL { task(i + pool.threads()) } else { None };
    pool.share(tasks, work, |i| {
        let (unit, rows) = task(i).expect("tasks were counted");
        let bank = banks[unit.bank].as_ref().expect("its bank was made");
        // SAFETY: this task has these hidden rows and columns alone.
        unsafe { hide(isa, unit, rows, bank, ahead(i)) };
    });
    let hidden: Vec<Columns<'_>> = units
        .iter()
        .map(|u| {
            let width = u.f.down.cols();
            let rows = shapes[u.bank].expect("its bank was made").1;
            if needs_quantized(u.f.down) {
                // The f32 view is not looked at.
                let input = Input { float: x, quantized: Some(&rounded[u.bank]) };
                columns(u.f.down, input, u.rows.clone())
            } else {
                let float = View::from_host(&float[u.bank][..rows * width], width);
                columns(u.f.down, Input { float, quantized: None }, u.rows.clone())
            }
        })
        .collect();
    let d = out.cols();
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
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
    cols: Range<usize>,
    bank: &Bank<'_>,
    next: Option<(&Unit<'_>, Range<usize>)>,
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
            product(u.f.gate, u.m, rows.clone(), &u.x[0], gate);
            if let Some((next, rows)) = &next {
                matmul::fetch(next.f.gate, next.m, rows.clone());
            }
            product(u.f.up, u.m, rows, &u.x[1], up);
            ops::glu(isa, u.f.act, gate, up);
            for (h, g) in hidden.chunks_exact_mut(width).zip(gate.chunks_exact(len)) {
                h[from - cols.start..][..len].copy_from_slice(g);
            }
            from += len;
        }
        for (t, h) in hidden.chunks_exact(width).enumerate() {
            let row = u.rows.start + t;
            // SAFETY: the caller's.
            unsafe {
                match bank {
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
