//! Grouped-query attention on the CPU: which rows go to which kernel, cut into tasks.
//!
//! Rows of prompts go in tiles of up to 64 lanes (`tile`); rows of decoding one by one, each in fixed parts of its own list
//! (`decode`), merged in order. Which of the two a row takes is a property of its request (`Visible::set_prompt`), never of
//! the call: its bits do not depend on its neighbours. Knows views and caches; nothing of the instruction set.

mod decode;
mod expanded;
mod mass;
mod mla;
pub(crate) mod rows;
#[cfg(test)]
mod tests;
mod tile;

pub use mla::mla;

use super::Pool;
use super::cache;
use super::isa::Isa;
use super::lanes::{Kernel, Simd, W, padded};
use super::math::LOG2_E;
use super::scratch::{AREA, Areas, Cut, Shared, Store};
use crate::backend::{Attention, Mass, Visible};
use crate::{KernelError, Limits, ViewMut};
use mass::{OverRows, Stats, Target};
use rows::{Plan, TileRows, part_len, parts};
use std::ops::Range;
use tile::{Ahead, BLOCK, Block, LANES, Seen, Tile};

/// What attention works in, kept between calls.
pub struct Memory {
    pub areas: Areas,
    pub store: Store,
    plan: Plan,
    jobs: Vec<Job>,
}

/// A part of a decoding row, and where its state lies in the store.
#[derive(Clone, Copy)]
struct Job {
    row: usize,
    part: usize,
    at: usize,
}

/// Bytes that a thread keeps of a rounded query.
pub const PER_THREAD: usize = 16 << 10;

/// Floats of decoding state that one pass over rows holds where the row does not need more.
const PASS: usize = 1 << 20;

impl Memory {
    /// For `threads` threads.
    pub fn new(threads: usize) -> Self {
        Self { areas: Areas::new(threads), store: Store::default(), plan: Plan::default(), jobs: Vec::new() }
    }

    /// Floats of the store for calls within the limits.
    pub fn floats(l: &Limits) -> usize {
        // Per head and part: sums, maximum, weight; MLA adds the query (twice with sinks) and the mix of each head. Heads are
        // padded to whole vectors: twice covers any number of them from 8 on, the constant fewer.
        let states = 2 * parts(l.slots.max(1)) + 8;
        let row = (l.max_heads_out + (W << 9)) * states;
        // With mass, the weights of a row (lanes and parts are padded), or the states of a prompt's.
        let weights = (padded(l.heads) + 64) * (l.slots + l.slots / 64 + 256);
        let mass = if l.mass { weights.max(Stats::floats(l.tokens, l.heads)) } else { 0 };
        row.max(PASS.min(row * l.tokens)) + mass
    }
}

/// See `Device::attention`.
pub fn attention(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    a: Attention<'_>,
    mut out: ViewMut<'_>,
    mass: Option<Mass<'_>>,
) -> Result<(), KernelError> {
    let mass = mass.map(Target::new);
    let n = a.q.rows();
    let mut at = 0;
    while at < n {
        let end = run_end(a.visible, at);
        if a.visible.prompt(at) > 0 {
            prompt_rows(pool, isa, mem, &a, &mut out, mass.as_ref(), at, end)?;
        } else {
            decode_rows(pool, isa, mem, &a, &mut out, mass.as_ref(), at, end)?;
        }
        at = end;
    }
    Ok(())
}

/// The end of the run of rows of the same kind as `first`.
fn run_end(v: &Visible, first: usize) -> usize {
    let kind = v.prompt(first) > 0;
    (first..v.rows()).find(|&i| (v.prompt(i) > 0) != kind).unwrap_or(v.rows())
}

struct Add<'t, 'a> {
    tile: &'t mut Tile<'a>,
    block: Block,
    seen: Option<(&'t [f32; LANES], &'t [f32; LANES])>,
    scores: &'t mut [f32],
    ahead: Ahead,
}

impl Kernel for Add<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // SAFETY: whoever builds an `Add` gives pointers to rows of a scratch block of at least these lengths.
        unsafe { self.tile.add(s, self.block, self.seen, self.scores, &mut self.ahead) }
    }
}

/// Adds entries `from..` of a block to a tile whose lane l belongs to row l / group, where `ranges` says what rows see.
///
/// # Safety
/// As [`Tile::add`].
unsafe fn add_seen(
    isa: Isa,
    tile: &mut Tile<'_>,
    block: Block,
    from: u32,
    ranges: &[(u32, u32)],
    group: usize,
    scores: &mut [f32],
) {
    let (lo, hi);
    let seen = match seen(from, block.len, ranges, group) {
        Seen::Nothing => return,
        Seen::All => None,
        Seen::Some(a, b) => {
            (lo, hi) = (a, b);
            Some((&lo, &hi))
        }
    };
    isa.vectorize(Add { tile, block, seen, scores, ahead: Ahead::NONE });
}

/// What lanes see of entries `from..from + len`, lane l being of row l / group and `ranges` what rows see.
fn seen(from: u32, len: usize, ranges: &[(u32, u32)], group: usize) -> Seen {
    let end = from + len as u32;
    if ranges.iter().all(|r| r.0 <= from && end <= r.1) {
        return Seen::All;
    }
    if !ranges.iter().any(|r| r.0 < end && from < r.1) {
        return Seen::Nothing;
    }
    let (mut lo, mut hi) = ([0.0; LANES], [0.0; LANES]);
    for (r, range) in ranges.iter().enumerate() {
        let cut = |x: u32| (x.clamp(from, end) - from) as f32;
        lo[r * group..][..group].fill(cut(range.0));
        hi[r * group..][..group].fill(cut(range.1));
    }
    Seen::Some(lo, hi)
}

/// How prompt rows are laid out in tiles: lanes of a tile, and heads of a group in it.
#[derive(Clone, Copy)]
struct Tiling {
    lanes: usize,
    heads: usize,
}

fn prompt_rows(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    a: &Attention<'_>,
    out: &mut ViewMut<'_>,
    mass: Option<&Target<'_>>,
    first: usize,
    end: usize,
) -> Result<(), KernelError> {
    let (key, value) = (a.k.width() / a.kv_heads, a.v.width() / a.kv_heads);
    let (key_pad, value_pad) = (padded(key), padded(value));
    let group = a.heads / a.kv_heads;
    let sinks = a.q_sink.is_some();
    let floats =
        |lanes: usize| Tile::floats(lanes, key, value, sinks) + BLOCK * (lanes + key_pad + value_pad) + 8 * W;
    let lanes = [LANES, LANES / 2, W].into_iter().find(|&l| floats(l) <= AREA).ok_or_else(|| {
        KernelError::Scratch { what: "attention tile", bytes: floats(W) * 4, reserved: AREA * 4 }
    })?;
    // A group wider than a tile is cut into pieces of heads.
    let heads = group.min(lanes);
    let pieces = group.div_ceil(heads);
    let Memory { plan, areas, store, .. } = mem;
    let stats = Stats::take(store, mass, first, end, a.heads)?;
    plan.clear();
    let mut at = first;
    while at < end {
        at = plan.push(a.visible, at, end, lanes / heads);
    }
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
    let seen = a.visible.seen(end - 1);
    let tiles = &mut *plan;
    let plan = &*tiles;
    let tasks = plan.tiles.len() * a.kv_heads * pieces;
    pool.share(tasks, (end - first) * a.heads * seen * (key + value), |i| {
        // Later tiles see more: the longest tasks first.
        let t = &plan.tiles[plan.tiles.len() - 1 - i / (a.kv_heads * pieces)];
        let g = i / pieces % a.kv_heads;
        let h0 = i % pieces * heads;
        let hs = heads.min(group - h0);
        let mut claim = areas.claim();
        let mut area = Cut(&mut claim);
        const FITS: &str = "the tile was chosen to fit";
        let width = padded(t.rows.len() * hs);
        let mut tile = Tile::new(&mut area, width, key, value, sinks).expect(FITS);
        let keys = area.take(BLOCK * key_pad, "").expect(FITS);
        let values = area.take(BLOCK * value_pad, "").expect(FITS);
        let scores = area.take(BLOCK * width, "").expect(FITS);
        for lane in 0..width {
            let (r, h) = (lane / hs, g * group + h0 + lane % hs);
            if r < t.rows.len() {
                let q = &a.q.row(t.rows.start + r)[h * key..][..key];
                let q2 = a.q_sink.map_or(q, |s| &s.row(t.rows.start + r)[h * key..][..key]);
                tile.set(lane, q, q2, a.scale * LOG2_E);
            } else {
                tile.set(lane, &[], &[], 0.0);
            }
        }
        walk(plan, t, 0..u32::MAX, |from, len, sink, ranges| {
            // SAFETY: blocks of BLOCK rows of the padded widths.
            unsafe {
                cache::read(isa, a.k, from as usize, len, g * key, key, keys.as_mut_ptr(), key_pad);
                cache::read(isa, a.v, from as usize, len, g * value, value, values.as_mut_ptr(), value_pad);
                let (keys, values) = (keys.as_ptr(), values.as_ptr());
                let block = Block { keys, key_row: key_pad, values, value_row: value_pad, len, sink };
                add_seen(isa, &mut tile, block, from, ranges, hs, scores);
            }
        });
        for r in 0..t.rows.len() {
            for h in 0..hs {
                let at = (t.rows.start + r) * stride + (g * group + h0 + h) * value;
                // SAFETY: rows and heads of `out`; no other task has this (row, head).
                let o = unsafe { std::slice::from_raw_parts_mut(ptr.at(at), value) };
                tile.finish(r * hs + h, o);
                stats.note(t.rows.start + r, g * group + h0 + h, &tile, r * hs + h);
            }
        }
    });
    match mass {
        Some(m) => mass::prompt(pool, isa, areas, tiles, a, Tiling { lanes, heads }, m, stats),
        None => Ok(()),
    }
}

/// The blocks of a tile's walk within `slots` that any of its rows sees: first slot, length, sink, what rows see of the
/// segment.
fn walk(plan: &Plan, t: &TileRows, slots: Range<u32>, mut f: impl FnMut(u32, usize, bool, &[(u32, u32)])) {
    for (seg, ranges) in plan.walk(t) {
        let (mut from, stop) = (seg.start.max(slots.start), seg.end.min(slots.end));
        while from < stop {
            let end = stop.min(from + BLOCK as u32);
            if ranges.iter().any(|r| r.0 < end && from < r.1) {
                f(from, (end - from) as usize, seg.sink, ranges);
            }
            from = end;
        }
    }
}

/// Cuts decoding rows `first..end` into passes whose states, of `per_part(row)` floats a part and `per_row` more a row, fit
/// the store; calls `f` with the jobs, the rows and the floats of each pass.
fn passes(
    mem: &mut Memory,
    visible: &Visible,
    first: usize,
    end: usize,
    per_part: impl Fn(usize) -> usize,
    per_row: usize,
    mut f: impl FnMut(&[Job], Range<usize>, &mut [f32], &Areas),
) -> Result<(), KernelError> {
    let room = mem.store.room().min(PASS);
    let mut at = first;
    while at < end {
        mem.jobs.clear();
        let (mut floats, start) = (0, at);
        while at < end {
            let (n, per_part) = (parts(visible.seen(at)), per_part(at));
            let more = n * per_part + per_row;
            if at > start && floats + more > room {
                break;
            }
            // A row's own block first, then its parts.
            let base = floats + per_row;
            mem.jobs.extend((0..n).map(|part| Job { row: at, part, at: base + part * per_part }));
            floats += more;
            at += 1;
        }
        let store = mem.store.take(floats, "attention of one row")?;
        f(&mem.jobs, start..at, store, &mem.areas);
    }
    Ok(())
}

impl Job {
    /// The entries of the row's list.
    fn list(&self, visible: &Visible) -> Range<usize> {
        let seen = visible.seen(self.row);
        let len = part_len(seen);
        self.part * len..seen.min((self.part + 1) * len)
    }
}

fn decode_rows(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    a: &Attention<'_>,
    out: &mut ViewMut<'_>,
    mass: Option<&Target<'_>>,
    first: usize,
    end: usize,
) -> Result<(), KernelError> {
    let (key, value) = (a.k.width() / a.kv_heads, a.v.width() / a.kv_heads);
    let group = a.heads / a.kv_heads;
    let pad = padded(value);
    let need = group * (2 * padded(key) + 4 * W) + 32 * (padded(key) + pad) + 8 * W;
    if need > AREA {
        return Err(KernelError::Scratch {
            what: "attention of one row",
            bytes: need * 4,
            reserved: AREA * 4,
        });
    }
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
    let counted = mass.map_or(0..0, |m| m.rows(first, end));
    // The weights kept of a part of a row: `[heads][kept(row)]` after the part's state.
    let kept = |row: usize| if counted.contains(&row) { part_len(a.visible.seen(row)) } else { 0 };
    let state = a.heads * (pad + 2);
    passes(
        mem,
        a.visible,
        first,
        end,
        |row| state + a.heads * kept(row),
        0,
        |jobs, rows, store, areas| {
            let states = Shared(store.as_mut_ptr());
            let seen: usize = rows.clone().map(|r| a.visible.seen(r)).sum();
            pool.share(jobs.len() * a.kv_heads, seen * a.heads * (key + value), |i| {
                let (job, g) = (jobs[i / a.kv_heads], i % a.kv_heads);
                let q = &a.q.row(job.row)[g * group * key..][..group * key];
                let q_sink = a.q_sink.map_or(q, |s| &s.row(job.row)[g * group * key..][..group * key]);
                let part = decode::Part {
                    k: a.k,
                    v: a.v,
                    k_col: g * key,
                    v_col: g * value,
                    key,
                    value,
                    q,
                    q_sink,
                    scale: a.scale * LOG2_E,
                    row: a.visible.row(job.row),
                    list: job.list(a.visible),
                };
                let kept = kept(job.row);
                // SAFETY: a job's block is [heads][pad] sums, [heads] maxima, [heads] weights, [heads][kept]; a task touches its
                // group's alone.
                let state = unsafe {
                    let cut = |at: usize, n: usize| std::slice::from_raw_parts_mut(states.at(job.at + at), n);
                    decode::State {
                        out: cut(g * group * pad, group * pad),
                        stride: pad,
                        max: cut(a.heads * pad + g * group, group),
                        sum: cut(a.heads * (pad + 1) + g * group, group),
                        kept: (kept > 0).then(|| cut(state + g * group * kept, group * kept)),
                    }
                };
                decode::part(isa, &part, &mut areas.claim(), state).expect("checked to fit");
            });
            let work = jobs.len() * a.heads * pad * 8;
            pool.share(rows.len() * a.heads, work, |i| {
                let (row, h) = (rows.start + i / a.heads, i % a.heads);
                let jobs = jobs_of(jobs, row);
                // SAFETY: a row and head of `out` and of the states that no other task has; the loop before has ended.
                let (o, max, sum, part) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(ptr.at(row * stride + h * value), value),
                        |j: &Job| *states.at(j.at + a.heads * pad + h),
                        |j: &Job| states.at(j.at + a.heads * (pad + 1) + h),
                        |j: &Job| std::slice::from_raw_parts(states.at(j.at + h * pad).cast_const(), value),
                    )
                };
                let top = jobs.iter().map(max).fold(f32::NEG_INFINITY, f32::max);
                let mut total = 0.0;
                o.fill(0.0);
                for j in jobs {
                    let f = pow2(max(j) - top);
                    // SAFETY: as above.
                    total += f * unsafe { *sum(j) };
                    o.iter_mut().zip(part(j)).for_each(|(o, x)| *o += f * x);
                }
                let inv = 1.0 / total;
                o.iter_mut().for_each(|o| *o *= inv);
                if counted.contains(&row) {
                    // From here on a part's sum is the factor that makes its weights probabilities.
                    // SAFETY: as above.
                    jobs.iter().for_each(|j| unsafe { *sum(j) = pow2(max(j) - top) * inv });
                }
            });
            let Some(mass) = mass.filter(|_| !counted.is_empty()) else { return };
            let states: &[f32] = store;
            pool.share(a.kv_heads, work, |g| {
                let mut claim = areas.claim();
                for j in jobs.iter().filter(|j| counted.contains(&j.row)) {
                    let (row, list) = (kept(j.row), j.list(a.visible));
                    let sums = &mut claim[..padded(list.len())];
                    let weights = &states[j.at + state + g * group * row..][..group * row];
                    let factors = &states[j.at + a.heads * (pad + 1) + g * group..][..group];
                    isa.vectorize(OverRows { weights, row, factors, sums: &mut *sums });
                    // SAFETY: no other task has this head.
                    unsafe { mass::add_list(mass, g, a.visible.row(j.row), list, sums) };
                }
            });
        },
    )
}

/// The jobs of a row: jobs lie in row order.
fn jobs_of(jobs: &[Job], row: usize) -> &[Job] {
    let jobs = &jobs[jobs.partition_point(|j| j.row < row)..];
    &jobs[..jobs.partition_point(|j| j.row == row)]
}

/// 2^n for an integer n <= 0; 0 from -127 down.
fn pow2(n: f32) -> f32 {
    f32::from_bits(((n.max(-127.0) as i32 + 127) as u32) << 23)
}
