//! Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).
//!
//! Absorbed: W_k^T q meets the latents themselves, all heads of a row being the lanes of one tile, so that each block of the
//! cache is converted once for all of them; W_v comes after the weighted sum. Expanded: see `expanded`. A row of decoding is
//! absorbed; a row of a prompt takes the form that is cheaper for a prompt of its request's length at the row's own depth:
//! never the call's.

use super::super::isa::Isa;
use super::super::lanes::{Kernel, Simd, W, padded};
use super::super::math::LOG2_E;
use super::super::quantized::Quantized;
use super::super::scratch::{AREA, Cut, Shared};
use super::super::{Pool, cache, matmul};
use super::expanded::{self, expanded};
use super::mass::{self, OverLanes, Target};
use super::rows::{part_len, slice};
use super::tile::{Ahead, BLOCK, Block, LANES, Tile};
use super::{Job, Memory, jobs_of, passes, pow2};
use crate::backend::{Mass, Mla, MlaUp};
use crate::{KernelError, View, ViewMut, Weight};
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a call that the cost estimate reckons with at most: engines cut prompts at about this size.
const CHUNK: usize = 512;

/// Whether a row of a prompt of `prompt` tokens that sees `seen` entries is cheaper expanded, by multiply-adds per head.
fn expands(m: &Mla<'_>, prompt: usize, seen: usize) -> bool {
    let latent = m.latent.width();
    let n = prompt.min(CHUNK);
    let up = latent * (m.nope + m.value);
    let absorbed = n * (up + seen * (2 * latent + m.rope));
    let expanded = seen * up + n * seen * (m.nope + m.rope + m.value);
    expanded < absorbed
}

/// See `Device::mla`.
pub fn mla(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    m: Mla<'_>,
    mut out: ViewMut<'_>,
    mass: Option<Mass<'_>>,
) -> Result<(), KernelError> {
    let v = m.visible;
    let fits = expanded::fits(&m);
    let kind = |i: usize| fits && v.prompt(i) > 0 && expands(&m, v.prompt(i), v.seen(i));
    let mass = mass.map(Target::new);
    let mut at = 0;
    while at < m.q.rows() {
        let expand = kind(at);
        let end = (at..m.q.rows()).find(|&i| kind(i) != expand).unwrap_or(m.q.rows());
        if expand {
            expanded(pool, isa, mem, &m, &mut out, mass.as_ref(), at, end)?;
        } else {
            absorbed(pool, isa, mem, &m, &mut out, mass.as_ref(), at, end)?;
        }
        at = end;
    }
    Ok(())
}

struct Axpy<'a>(f32, &'a [f32], &'a mut [f32]);

impl Kernel for Axpy<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.1.len() / W * W;
        assert!(self.1.len() == self.2.len());
        let a = s.splat(self.0);
        for at in (0..whole).step_by(W) {
            // SAFETY: at + 16 <= len of both.
            unsafe {
                let y = self.2.as_mut_ptr().add(at);
                s.store(s.fma(a, s.load(self.1.as_ptr().add(at)), s.load(y)), y);
            }
        }
        self.2[whole..].iter_mut().zip(&self.1[whole..]).for_each(|(y, x)| *y += self.0 * x);
    }
}

thread_local! {
    static ROUNDED: RefCell<Quantized> = RefCell::default();
}

/// `y = rows of weight[m] . x` on this thread, x rounded where the weight's format wants it.
fn matvec(w: &Weight, m: usize, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let float = View::from_host(x, x.len());
    if matmul::needs_quantized(w) {
        ROUNDED.with_borrow_mut(|q| {
            q.resize(1, x.len());
            q.set_row(0, x);
            let x = matmul::columns(w, matmul::Input { float, rounded: matmul::Rounded::Int8(q) }, 0, 0..1);
            matmul::product(w, m, rows, &x, y);
        });
    } else {
        let x = matmul::columns(w, matmul::Input { float, rounded: matmul::Rounded::No }, 0, 0..1);
        matmul::product(w, m, rows, &x, y);
    }
}

/// `to = W_k[h]^T q`, `to` `[latent]`; `row` is room for a row of the weight.
fn absorb(isa: Isa, m: &Mla<'_>, h: usize, q: &[f32], to: &mut [f32], row: &mut [f32]) {
    match m.up {
        MlaUp::Split { k_b, .. } => matvec(k_b, h, 0..to.len(), q, to),
        MlaUp::Joint { kv_b } => {
            let row = &mut row[..to.len()];
            to.fill(0.0);
            for (d, q) in q.iter().enumerate() {
                (kv_b.dtype().format().dequantize)(kv_b.row(0, h * (m.nope + m.value) + d), row);
                isa.vectorize(Axpy(*q, row, to));
            }
        }
    }
}

/// Rows `first..end`, each in parts of its own list, all heads at once.
fn absorbed(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    m: &Mla<'_>,
    out: &mut ViewMut<'_>,
    mass: Option<&Target<'_>>,
    first: usize,
    end: usize,
) -> Result<(), KernelError> {
    let (latent, heads, hd) = (m.latent.width(), m.heads, m.nope + m.rope);
    let key = latent + m.rope;
    let key_pad = latent + padded(m.rope).max(padded(latent) - latent);
    let sinks = m.q_sink.is_some();
    let lanes = padded(heads.min(LANES));
    let pieces = heads.div_ceil(lanes);
    let floats = Tile::floats(lanes, key, latent, sinks) + BLOCK * (lanes + key_pad) + 8 * W;
    let row = latent.max(m.nope);
    if floats.max(row + W) > AREA {
        return Err(KernelError::Scratch {
            what: "latent attention tile",
            bytes: floats * 4,
            reserved: AREA * 4,
        });
    }
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
    // A piece's state: sums [latent][lanes], maxima, weights. A row's own block: queries [pieces][key][lanes], the same for sinks
    // where they differ, then absorbed queries [heads][latent], later mixes [pieces][latent][lanes].
    let piece = lanes * (latent + 2);
    let q_len = lanes * key;
    let mix_at = pieces * q_len * (1 + usize::from(sinks));
    let per_row = mix_at + pieces * lanes * latent;
    let counted = mass.map_or(0..0, |t| t.rows(first, end));
    // The weights kept of a part of a row: `[pieces][kept(row)][lanes]` after the states of its pieces.
    let kept = |row: usize| if counted.contains(&row) { part_len(m.visible.seen(row)) } else { 0 };
    let per_part = |row: usize| pieces * (piece + lanes * kept(row));
    passes(mem, m.visible, first, end, per_part, per_row, |jobs, rows, store, areas| {
        let base = Shared(store.as_mut_ptr());
        // Jobs lie in row order, a row's block before its first part's.
        let row_at = |row: usize| jobs[jobs.partition_point(|j| j.row < row)].at - per_row;
        pool.run(rows.len() * heads, |i| {
            let (r, h) = (rows.start + i / heads, i % heads);
            let q = &m.q.row(r)[h * hd..][..m.nope];
            let mut claim = areas.claim();
            // SAFETY: this (row, head)'s query, which no other task has.
            let to = unsafe { base.at(row_at(r) + mix_at + h * latent) };
            // SAFETY: as above.
            absorb(isa, m, h, q, unsafe { std::slice::from_raw_parts_mut(to, latent) }, &mut claim);
        });
        let scale = m.scale * LOG2_E;
        pool.share(rows.len() * pieces, rows.len() * pieces * q_len, |i| {
            let (r, p) = (rows.start + i / pieces, i % pieces);
            let here = lanes.min(heads - p * lanes);
            let at = row_at(r);
            for (set, pe) in [Some(m.q), m.q_sink].into_iter().flatten().enumerate() {
                // SAFETY: this (row, piece)'s queries, which no other task has; absorbed ones are complete and only read.
                let (to, from) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(base.at(at + (set * pieces + p) * q_len), q_len),
                        std::slice::from_raw_parts(
                            base.at(at + mix_at + p * lanes * latent).cast_const(),
                            here * latent,
                        ),
                    )
                };
                let pe = pe.row(r);
                for (d, to) in to.chunks_exact_mut(lanes).enumerate() {
                    for (l, x) in to[..here].iter_mut().enumerate() {
                        let pe_at = (p * lanes + l) * hd + m.nope;
                        *x = scale * if d < latent { from[l * latent + d] } else { pe[pe_at + d - latent] };
                    }
                    to[here..].fill(0.0);
                }
            }
        });
        // A task takes a run of parts, so that each block can be fetched while the one before is worked on.
        let run = jobs.len().div_ceil(4 * pool.threads());
        let runs = jobs.len().div_ceil(run);
        let seen: usize = rows.clone().map(|r| m.visible.seen(r)).sum();
        pool.share(runs * pieces, seen * heads * (key + latent), |i| {
            let (jobs, p) = (&jobs[i / pieces * run..jobs.len().min((i / pieces + 1) * run)], i % pieces);
            let mut claim = areas.claim();
            let mut area = Cut(&mut claim);
            const FITS: &str = "checked to fit";
            let mut take = |n: usize| area.take(n, "").expect(FITS);
            let (q, mut q_sink) = (take(q_len), sinks.then(|| take(q_len)));
            let (keys, scores) = (take(BLOCK * key_pad), take(BLOCK * lanes));
            let mut blocks = jobs.iter().flat_map(|j| blocks(m, j).map(move |b| (j, b))).peekable();
            for job in jobs {
                for (set, q) in [Some(&mut *q), q_sink.as_deref_mut()].into_iter().flatten().enumerate() {
                    let at = row_at(job.row) + (set * pieces + p) * q_len;
                    // SAFETY: written by the loop before, which has ended.
                    q.copy_from_slice(unsafe { std::slice::from_raw_parts(base.at(at).cast_const(), q_len) });
                }
                let keep = lanes * kept(job.row);
                // SAFETY: this job's piece and its weights, which no other task has.
                let (state, weights) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(base.at(job.at + p * piece), piece),
                        std::slice::from_raw_parts_mut(base.at(job.at + pieces * piece + p * keep), keep),
                    )
                };
                let mut tile = Tile::over(lanes, q, q_sink.as_deref_mut(), state);
                tile.kept = (keep > 0).then_some((weights, 0));
                while let Some((_, (from, len, sink))) = blocks.next_if(|(j, _)| j.at == job.at) {
                    // SAFETY: BLOCK rows of key_pad floats; the rotary part overwrites the latent's padding.
                    unsafe {
                        let k = keys.as_mut_ptr();
                        cache::read(isa, m.latent, from, len, 0, latent, k, key_pad);
                        cache::read(isa, m.k_pe, from, len, 0, m.rope, k.add(latent), key_pad);
                    }
                    let ahead = blocks.peek().map_or(Ahead::NONE, |(_, (from, len, _))| {
                        Ahead::new(cache::bytes(m.latent, *from, *len), cache::bytes(m.k_pe, *from, *len))
                    });
                    let keys = keys.as_ptr();
                    let block = Block { keys, key_row: key_pad, values: keys, value_row: key_pad, len, sink };
                    isa.vectorize(super::Add { tile: &mut tile, block, seen: None, scores, ahead });
                }
            }
        });
        // Parts are merged a range of the latent at a time, all heads of a piece together.
        let share = latent.div_ceil(4 * pool.threads()).next_multiple_of(W);
        let shares = latent.div_ceil(share);
        pool.share(rows.len() * pieces * shares, jobs.len() * piece * pieces, |i| {
            let (r, p) = (rows.start + i / shares / pieces, i / shares % pieces);
            let range = i % shares * share..latent.min((i % shares + 1) * share);
            let jobs = jobs_of(jobs, r);
            // SAFETY: states are complete and only read; this range of the mix is this task's alone.
            let (states, mix) = unsafe {
                let all = jobs[0].at + p * piece..jobs[jobs.len() - 1].at + (p + 1) * piece;
                let at = row_at(r) + mix_at + (p * latent + range.start) * lanes;
                (
                    std::slice::from_raw_parts(base.at(all.start).cast_const(), all.len()),
                    std::slice::from_raw_parts_mut(base.at(at), range.len() * lanes),
                )
            };
            isa.vectorize(Merge { states, step: per_part(r), parts: jobs.len(), lanes, latent, range, mix });
        });
        pool.run(rows.len() * heads, |i| {
            let (r, h) = (rows.start + i / heads, i % heads);
            let mut claim = areas.claim();
            let mix = &mut claim[..latent];
            let at = row_at(r) + mix_at + h / lanes * lanes * latent + h % lanes;
            // SAFETY: mixes are complete and only read; the outputs are this (row, head)'s alone.
            let o = unsafe {
                mix.iter_mut().enumerate().for_each(|(d, x)| *x = *base.at(at + d * lanes));
                std::slice::from_raw_parts_mut(ptr.at(r * stride + h * m.value), m.value)
            };
            match m.up {
                MlaUp::Split { v_b, .. } => matvec(v_b, h, 0..m.value, mix, o),
                MlaUp::Joint { kv_b } => {
                    let first = h * (m.nope + m.value) + m.nope;
                    matvec(kv_b, 0, first..first + m.value, mix, o);
                }
            }
        });
        let Some(mass) = mass.filter(|_| !counted.is_empty()) else { return };
        let store: &[f32] = store;
        let mut claim = areas.claim();
        let mut area = Cut(&mut claim);
        const FITS: &str = "a part and its heads";
        let mut take = || area.take(pieces * lanes, "").expect(FITS);
        let (factors, top, inv) = (take(), take(), take());
        factors.fill(0.0);
        let mut row = usize::MAX;
        for j in jobs.iter().filter(|j| counted.contains(&j.row)) {
            // A part's maximum of head h; its sum of weights lies `lanes` later.
            let at = |j: &Job, h: usize| j.at + h / lanes * piece + lanes * latent + h % lanes;
            if row != j.row {
                row = j.row;
                for h in 0..heads {
                    let states =
                        || jobs_of(jobs, row).iter().map(|j| (store[at(j, h)], store[at(j, h) + lanes]));
                    top[h] = states().fold(f32::NEG_INFINITY, |top, s| top.max(s.0));
                    inv[h] = 1.0 / states().map(|s| pow2(s.0 - top[h]) * s.1).sum::<f32>();
                }
            }
            for h in 0..heads {
                factors[h] = pow2(store[at(j, h)] - top[h]) * inv[h];
            }
            let list = j.list(m.visible);
            let sums = &mut area.0[..padded(list.len())];
            let keep = lanes * kept(j.row);
            let weights = &store[j.at + pieces * piece..][..pieces * keep];
            isa.vectorize(OverLanes { weights, piece: keep, lanes, factors, sums: &mut *sums });
            // SAFETY: the loops have ended; this thread alone adds.
            unsafe { mass::add_list(mass, 0, m.visible.row(j.row), list, sums) };
        }
    })
}

/// The blocks of a job's list: first slot, length, whether they are sinks.
fn blocks(m: &Mla<'_>, job: &Job) -> impl Iterator<Item = (usize, usize, bool)> {
    slice(m.visible.row(job.row), job.list(m.visible)).flat_map(|s| {
        let (start, end) = (s.start as usize, s.end as usize);
        (start..end).step_by(BLOCK).map(move |from| (from, BLOCK.min(end - from), s.sink))
    })
}

/// Merges the parts of a row: `mix[d][lane] = sum_j f_j sums_j[d][lane] / sum_j f_j weight_j` for d in `range`, j ascending,
/// where f_j brings part j to the largest maximum: a power of two, so that products with it are exact.
struct Merge<'a> {
    /// Part j's state at `j * step`: `[latent][lanes]` sums, `[lanes]` maxima, `[lanes]` weights.
    states: &'a [f32],
    step: usize,
    parts: usize,
    lanes: usize,
    latent: usize,
    range: Range<usize>,
    mix: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { states, step, parts, lanes, latent, range, mix } = self;
        assert!(states.len() >= (parts - 1) * step + lanes * (latent + 2) && lanes.is_multiple_of(W));
        assert!(range.end <= latent && mix.len() == range.len() * lanes);
        for l in (0..lanes).step_by(W) {
            // SAFETY: inside a part's state, and inside the mix, by the assertions.
            unsafe {
                let at = |j: usize, d: usize| s.load(states.as_ptr().add(j * step + d * lanes + l));
                let mut top = at(0, latent);
                for j in 1..parts {
                    top = s.max(top, at(j, latent));
                }
                let one = s.splat(1.0);
                let mut total = s.splat(0.0);
                for j in 0..parts {
                    total = s.fma(s.scale2(one, s.sub(at(j, latent), top)), at(j, latent + 1), total);
                }
                let inv = s.div(one, total);
                // Four rows at a time hide the latency of the sums.
                for d0 in (range.start..range.end).step_by(4) {
                    let n = 4.min(range.end - d0);
                    let mut sums = [s.splat(0.0); 4];
                    for j in 0..parts {
                        let f = s.scale2(one, s.sub(at(j, latent), top));
                        for (i, sum) in sums.iter_mut().enumerate().take(n) {
                            *sum = s.fma(f, at(j, d0 + i), *sum);
                        }
                    }
                    for (i, sum) in sums.into_iter().enumerate().take(n) {
                        let to = mix.as_mut_ptr().add((d0 + i - range.start) * lanes + l);
                        s.store(s.mul(sum, inv), to);
                    }
                }
            }
        }
    }
}
