//! Attention mass (`backend::Mass`): what queries gave to each cached entry, once their normalisers are known.
//!
//! Rows of decoding keep their weights while they go, relative to the running maximum, and scale them at the end: one more
//! pass over what still lies in the cache. Rows of prompts, whose weights would fill memory by the square, score their entries
//! a second time, with maximum and sum known. Every task owns the slots it adds to, and adds row by row in order. Knows
//! weights, rows and slots; nothing of values.

use super::super::isa::Isa;
use super::super::lanes::{Kernel, Simd, W, padded};
use super::super::math::LOG2_E;
use super::super::scratch::{AREA, Areas, Cut, Shared, Store};
use super::super::{Pool, cache};
use super::expanded::Expanded;
use super::rows::{Plan, slice};
use super::tile::{BLOCK, Block, LANES, Seen, Tile};
use super::{Tiling, seen, walk};
use crate::KernelError;
use crate::backend::{Attention, Mass, Mla, Span};
use std::marker::PhantomData;
use std::ops::Range;

/// Most slots of a prompt's task.
const SLOTS: usize = 512;

/// The mass a call adds to, shared by its tasks.
pub struct Target<'a> {
    out: Shared<f32>,
    stride: usize,
    slots: usize,
    rows: Range<usize>,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> Target<'a> {
    pub fn new(mut m: Mass<'a>) -> Self {
        let slots = m.out.cols();
        let (out, stride) = m.out.raw();
        Self { out: Shared(out), stride, slots, rows: m.rows, life: PhantomData }
    }

    /// The rows of `first..end` that count.
    pub fn rows(&self, first: usize, end: usize) -> Range<usize> {
        let from = self.rows.start.clamp(first, end);
        from..self.rows.end.clamp(from, end)
    }

    /// Slots `at` of head `g`.
    ///
    /// # Safety
    /// No two tasks may hold the same ones.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slots(&self, g: usize, at: Range<usize>) -> &mut [f32] {
        assert!(at.end <= self.slots);
        // SAFETY: inside the window, whose borrow `self` stands for; apart by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.out.at(g * self.stride + at.start), at.len()) }
    }
}

/// Maximum and 1 / sum of each head of the rows that count, `[rows][heads][2]`.
#[derive(Clone, Copy)]
pub struct Stats {
    pub at: Shared<f32>,
    pub first: usize,
    pub end: usize,
    pub heads: usize,
}

impl Stats {
    /// Floats for `rows` rows.
    pub fn floats(rows: usize, heads: usize) -> usize {
        2 * rows * heads
    }

    /// Room in the store for rows `first..end` of the target.
    pub fn take(
        store: &mut Store,
        target: Option<&Target<'_>>,
        first: usize,
        end: usize,
        heads: usize,
    ) -> Result<Self, KernelError> {
        let rows = target.map_or(first..first, |t| t.rows(first, end));
        let at = store.take(Self::floats(rows.len(), heads), "attention mass")?;
        Ok(Self { at: Shared(at.as_mut_ptr()), first: rows.start, end: rows.end, heads })
    }

    /// Notes a lane's state, if its row counts.
    pub fn note(&self, row: usize, head: usize, tile: &Tile<'_>, lane: usize) {
        if (self.first..self.end).contains(&row) {
            let at = 2 * ((row - self.first) * self.heads + head);
            // SAFETY: inside; one task has this row and head.
            unsafe {
                *self.at.at(at) = tile.max[lane];
                *self.at.at(at + 1) = 1.0 / tile.sum[lane];
            }
        }
    }

    /// Gives a lane its state.
    fn recall(&self, row: usize, head: usize, tile: &mut Tile<'_>, lane: usize) {
        let at = 2 * ((row - self.first) * self.heads + head);
        // SAFETY: inside; written before, by a loop that has ended.
        (tile.max[lane], tile.sum[lane]) = unsafe { (*self.at.at(at), *self.at.at(at + 1)) };
    }
}

/// `sums[e] = sum_h factors[h] weights[h * row + e]`, whole vectors, h ascending.
pub struct OverRows<'a> {
    pub weights: &'a [f32],
    pub row: usize,
    pub factors: &'a [f32],
    pub sums: &'a mut [f32],
}

impl Kernel for OverRows<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.sums.len();
        assert!(n.is_multiple_of(W) && n <= self.row && self.weights.len() >= self.factors.len() * self.row);
        for at in (0..n).step_by(W) {
            let mut sum = s.splat(0.0);
            for (h, f) in self.factors.iter().enumerate() {
                // SAFETY: at + 16 <= row, h < factors.
                sum =
                    s.fma(s.splat(*f), unsafe { s.load(self.weights.as_ptr().add(h * self.row + at)) }, sum);
            }
            // SAFETY: at + 16 <= n.
            unsafe { s.store(sum, self.sums.as_mut_ptr().add(at)) };
        }
    }
}

/// `sums[e] = sum over p and l of factors[p * lanes + l] weights[p * piece + e * lanes + l]`: p and whole vectors ascending,
/// then across the vector.
pub struct OverLanes<'a> {
    pub weights: &'a [f32],
    pub piece: usize,
    pub lanes: usize,
    pub factors: &'a [f32],
    pub sums: &'a mut [f32],
}

impl Kernel for OverLanes<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, lanes) = (self.sums.len(), self.lanes);
        let pieces = self.factors.len() / lanes;
        assert!(n.is_multiple_of(W) && lanes.is_multiple_of(W) && n * lanes <= self.piece);
        assert!(self.weights.len() >= pieces * self.piece && self.factors.len() == pieces * lanes);
        for e0 in (0..n).step_by(W) {
            let mut rows = [s.splat(0.0); W];
            for (e, row) in rows.iter_mut().enumerate() {
                for p in 0..pieces {
                    for l in (0..lanes).step_by(W) {
                        // SAFETY: p < pieces, e0 + e < n, l + 16 <= lanes.
                        unsafe {
                            let f = s.load(self.factors.as_ptr().add(p * lanes + l));
                            let at = p * self.piece + (e0 + e) * lanes + l;
                            *row = s.fma(f, s.load(self.weights.as_ptr().add(at)), *row);
                        }
                    }
                }
            }
            // SAFETY: e0 + 16 <= n.
            unsafe { s.store(s.sums(&rows), self.sums.as_mut_ptr().add(e0)) };
        }
    }
}

/// Adds the sums of entries `list` of a row's list to head `g` of the target.
///
/// # Safety
/// No other task may have the head meanwhile.
pub unsafe fn add_list(t: &Target<'_>, g: usize, row: &[Span], list: Range<usize>, sums: &[f32]) {
    let mut at = 0;
    for s in slice(row, list) {
        let slots = s.start as usize..s.end as usize;
        let n = slots.len();
        // SAFETY: the caller's.
        let out = unsafe { t.slots(g, slots) };
        out.iter_mut().zip(&sums[at..][..n]).for_each(|(o, x)| *o += x);
        at += n;
    }
}

struct Weigh<'t, 'a> {
    tile: &'t Tile<'a>,
    block: Block,
    seen: Option<(&'t [f32; LANES], &'t [f32; LANES])>,
    scores: &'t mut [f32],
}

impl Kernel for Weigh<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: whoever builds a `Weigh` gives pointers to rows of a scratch block of at least these lengths.
        unsafe { self.tile.weigh(s, self.block, self.seen, self.scores) }
    }
}

/// Adds the probabilities of a block's entries, summed over the `group` lanes of each row, to `sums[r * stride + e]`.
///
/// # Safety
/// As [`Tile::weigh`].
unsafe fn add_block(
    isa: Isa,
    tile: &Tile<'_>,
    block: Block,
    from: u32,
    ranges: &[(u32, u32)],
    group: usize,
    scores: &mut [f32],
    sums: &mut [f32],
    stride: usize,
) {
    let (lo, hi);
    let some = match seen(from, block.len, ranges, group) {
        Seen::Nothing => return,
        Seen::All => None,
        Seen::Some(a, b) => {
            (lo, hi) = (a, b);
            Some((&lo, &hi))
        }
    };
    let lanes = tile.max.len();
    isa.vectorize(Weigh { tile, block, seen: some, scores: &mut *scores });
    for r in 0..ranges.len() {
        let sums = &mut sums[r * stride..][..block.len];
        for h in 0..group {
            let p = scores.chunks_exact(lanes).map(|row| row[r * group + h]);
            sums.iter_mut().zip(p).for_each(|(s, p)| *s += p);
        }
    }
}

/// The slots that some row of the plan's tiles sees, cut in tasks for `threads` threads of which each has `heads` more to
/// share: first slot, slots of a task, tasks.
fn cut(plan: &Plan, threads: usize, heads: usize, least: usize, most: usize) -> (usize, usize, usize) {
    let (start, end) = plan.slots();
    let n = (end - start) as usize;
    let step = (n * heads).div_ceil(4 * threads).next_multiple_of(BLOCK).max(least).min(most);
    (start as usize, step, n.div_ceil(step))
}

/// How many slots of sums for `rows` rows fit beside `floats` in an area: at most [`SLOTS`].
fn fitting(floats: usize, rows: usize) -> Result<usize, KernelError> {
    let most = (AREA.saturating_sub(floats) / rows).min(SLOTS) / BLOCK * BLOCK;
    if most == 0 {
        let bytes = (floats + rows * BLOCK) * 4;
        return Err(KernelError::Scratch { what: "attention mass", bytes, reserved: AREA * 4 });
    }
    Ok(most)
}

/// Adds the mass of prompt rows whose states `stats` holds.
pub fn prompt(
    pool: &Pool,
    isa: Isa,
    areas: &Areas,
    plan: &mut Plan,
    a: &Attention<'_>,
    by: Tiling,
    target: &Target<'_>,
    stats: Stats,
) -> Result<(), KernelError> {
    let (key, group) = (a.k.width() / a.kv_heads, a.heads / a.kv_heads);
    let key_pad = padded(key);
    let sinks = a.q_sink.is_some();
    let rows = by.lanes / by.heads;
    plan.clear();
    let mut at = stats.first;
    while at < stats.end {
        at = plan.push(a.visible, at, stats.end, rows);
    }
    let plan = &*plan;
    let floats = Tile::floats(by.lanes, key, 0, sinks) + BLOCK * (by.lanes + key_pad) + 8 * W;
    let (start, step, tasks) = cut(plan, pool.threads(), a.kv_heads, BLOCK, fitting(floats, rows)?);
    pool.run(tasks * a.kv_heads, |i| {
        let (c, g) = (i / a.kv_heads, i % a.kv_heads);
        let from = start + c * step;
        let slots = from..(from + step).min(plan.slots().1 as usize);
        let mut claim = areas.claim();
        let mut area = Cut(&mut claim);
        const FITS: &str = "the step was chosen to fit";
        let keys = area.take(BLOCK * key_pad, "").expect(FITS);
        let scores = area.take(BLOCK * by.lanes, "").expect(FITS);
        let sums = area.take(rows * step, "").expect(FITS);
        for t in &plan.tiles {
            let sums = &mut sums[..t.rows.len() * step];
            sums.fill(0.0);
            for h0 in (0..group).step_by(by.heads) {
                let hs = by.heads.min(group - h0);
                let width = padded(t.rows.len() * hs);
                let mut area = Cut(&mut *area.0);
                let mut tile = Tile::new(&mut area, width, key, 0, sinks).expect(FITS);
                for lane in 0..width {
                    let (r, h) = (t.rows.start + lane / hs, g * group + h0 + lane % hs);
                    if r < t.rows.end {
                        let q = &a.q.row(r)[h * key..][..key];
                        let q2 = a.q_sink.map_or(q, |s| &s.row(r)[h * key..][..key]);
                        tile.set(lane, q, q2, a.scale * LOG2_E);
                        stats.recall(r, h, &mut tile, lane);
                    } else {
                        tile.set(lane, &[], &[], 0.0);
                    }
                }
                walk(plan, t, slots.start as u32..slots.end as u32, |from, len, sink, ranges| {
                    let at = from as usize - slots.start;
                    // SAFETY: blocks of BLOCK rows of the padded width.
                    unsafe {
                        cache::read(isa, a.k, from as usize, len, g * key, key, keys.as_mut_ptr(), key_pad);
                        let block = Block::keys(keys.as_ptr(), key_pad, len, sink);
                        add_block(isa, &tile, block, from, ranges, hs, scores, &mut sums[at..], step);
                    }
                });
            }
            // SAFETY: no other task has these slots of this head.
            add_rows(unsafe { target.slots(g, slots.clone()) }, sums, step);
        }
    });
    Ok(())
}

/// `out += sums`, row by row.
fn add_rows(out: &mut [f32], sums: &[f32], stride: usize) {
    for row in sums.chunks_exact(stride) {
        out.iter_mut().zip(row).for_each(|(o, x)| *o += x);
    }
}

/// The same for latent attention in its expanded form: the keys of a task's slots are made once more for each head.
pub fn expanded(
    pool: &Pool,
    isa: Isa,
    areas: &Areas,
    plan: &mut Plan,
    m: &Mla<'_>,
    target: &Target<'_>,
    stats: Stats,
) -> Result<(), KernelError> {
    /// Tiles whose sums lie side by side.
    const TILES: usize = 8;
    let x = Expanded::new(m);
    plan.clear();
    let mut at = stats.first;
    while at < stats.end {
        at = plan.push(m.visible, at, stats.end, TILES * LANES);
    }
    let plan = &*plan;
    let rows = plan.tiles.iter().map(|t| t.rows.len()).max().unwrap_or(1);
    let tile = Tile::floats(LANES, m.nope + m.rope, 0, m.q_sink.is_some()) + 8 * W;
    let floats = rows.div_ceil(LANES) * tile + x.key_floats();
    let most = fitting(floats, rows)?;
    let (start, step, tasks) = cut(plan, pool.threads(), 1, most.min(128), most);
    pool.run(tasks, |c| {
        let from = start + c * step;
        let slots = from..(from + step).min(plan.slots().1 as usize);
        let mut claim = areas.claim();
        let mut area = Cut(&mut claim);
        const FITS: &str = "the step was chosen to fit";
        let mut w = x.keys(&mut area).expect(FITS);
        let sums = area.take(rows * step, "").expect(FITS);
        let scores = area.take(BLOCK * LANES, "").expect(FITS);
        for t in &plan.tiles {
            let n = t.rows.len();
            let sums = &mut sums[..n * step];
            sums.fill(0.0);
            for h in 0..m.heads {
                x.key_up(m, h, &mut w);
                let mut area = Cut(&mut *area.0);
                let mut tiles: [Option<Tile<'_>>; TILES] = [const { None }; TILES];
                for (tile, first) in tiles.iter_mut().zip((0..n).step_by(LANES)) {
                    let rows = t.rows.start + first..t.rows.start + n.min(first + LANES);
                    let mut new = x.tile(&mut area, m, h, rows.clone(), 0).expect(FITS);
                    rows.enumerate().for_each(|(lane, r)| stats.recall(r, h, &mut new, lane));
                    *tile = Some(new);
                }
                walk(plan, t, slots.start as u32..slots.end as u32, |from, len, sink, ranges| {
                    let at = from as usize - slots.start;
                    // SAFETY: slots of the cache, len <= BLOCK; the block's keys are those just made.
                    unsafe {
                        x.make_keys(isa, m, from as usize, len, &mut w);
                        let block = Block::keys(w.keys.as_ptr(), x.key_row, len, sink);
                        for (i, ranges) in ranges.chunks(LANES).enumerate() {
                            let tile = tiles[i].as_ref().expect(FITS);
                            let sums = &mut sums[i * LANES * step + at..];
                            add_block(isa, tile, block, from, ranges, 1, scores, sums, step);
                        }
                    }
                });
            }
            // SAFETY: no other task has these slots.
            add_rows(unsafe { target.slots(0, slots.clone()) }, sums, step);
        }
    });
    Ok(())
}
