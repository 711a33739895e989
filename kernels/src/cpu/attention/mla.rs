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
use super::tile::{BLOCK, Block, LANES, Tile};
use super::{Memory, add_seen, jobs_of, passes, pow2};
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
            let x = matmul::columns(w, matmul::Input { float, quantized: Some(q) }, 0..1);
            matmul::product(w, m, rows, &x, y);
        });
    } else {
        let x = matmul::columns(w, matmul::Input { float, quantized: None }, 0..1);
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
    // A piece's state: sums [latent][lanes], maxima, weights. A row's own block: absorbed queries, then mixes, [heads][latent].
    let piece = lanes * (latent + 2);
    let per_row = 2 * heads * latent;
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
            let to = unsafe { std::slice::from_raw_parts_mut(base.at(row_at(r) + h * latent), latent) };
            absorb(isa, m, h, q, to, &mut claim);
        });
        let seen: usize = rows.clone().map(|r| m.visible.seen(r)).sum();
        pool.share(jobs.len() * pieces, seen * heads * (key + latent), |i| {
            let (job, p) = (jobs[i / pieces], i % pieces);
            let mut claim = areas.claim();
            let mut area = Cut(&mut claim);
            const FITS: &str = "checked to fit";
            let mut tile = Tile::new(&mut area, lanes, key, latent, sinks).expect(FITS);
            let keep = lanes * kept(job.row);
            if keep > 0 {
                // SAFETY: this job's piece, which no other task has.
                let to = unsafe { base.at(job.at + pieces * piece + p * keep) };
                // SAFETY: as above.
                tile.kept = Some((unsafe { std::slice::from_raw_parts_mut(to, keep) }, 0));
            }
            let keys = area.take(BLOCK * key_pad, "").expect(FITS);
            let scores = area.take(BLOCK * lanes, "").expect(FITS);
            let scale = m.scale * LOG2_E;
            for lane in 0..lanes {
                let h = p * lanes + lane;
                if h >= heads {
                    tile.set(lane, &[], &[], 0.0);
                    continue;
                }
                // SAFETY: written by the loop before, which has ended.
                let q = unsafe {
                    std::slice::from_raw_parts(base.at(row_at(job.row) + h * latent).cast_const(), latent)
                };
                let q_pe = &m.q.row(job.row)[h * hd + m.nope..][..m.rope];
                let q_pe2 = m.q_sink.map_or(q_pe, |s| &s.row(job.row)[h * hd + m.nope..][..m.rope]);
                tile.set_parts(lane, q, q_pe, q_pe2, scale);
            }
            for s in slice(m.visible.row(job.row), job.list(m.visible)) {
                let mut from = s.start;
                while from < s.end {
                    let len = BLOCK.min((s.end - from) as usize);
                    // SAFETY: BLOCK rows of key_pad floats; the rotary part overwrites the latent's padding.
                    unsafe {
                        let k = keys.as_mut_ptr();
                        cache::read(isa, m.latent, from as usize, len, 0, latent, k, key_pad);
                        cache::read(isa, m.k_pe, from as usize, len, 0, m.rope, k.add(latent), key_pad);
                        let keys = k.cast_const();
                        let b = Block {
                            keys,
                            key_row: key_pad,
                            values: keys,
                            value_row: key_pad,
                            len,
                            sink: s.sink,
                        };
                        add_seen(isa, &mut tile, b, from, &[], 1, scores);
                    }
                    from += len as u32;
                }
            }
            // SAFETY: this job's piece, which no other task has.
            let state = unsafe { std::slice::from_raw_parts_mut(base.at(job.at + p * piece), piece) };
            state[..lanes * latent].copy_from_slice(tile.out);
            state[lanes * latent..][..lanes].copy_from_slice(tile.max);
            state[lanes * (latent + 1)..].copy_from_slice(tile.sum);
        });
        pool.run(rows.len() * heads, |i| {
            let (r, h) = (rows.start + i / heads, i % heads);
            let jobs = jobs_of(jobs, r);
            let (p, lane) = (h / lanes, h % lanes);
            let at = |j: &super::Job, i: usize| {
                // SAFETY: inside a piece's state.
                unsafe { base.at(j.at + p * piece + i) }
            };
            // SAFETY: the sums of a piece are complete and only read; of the rest, the mix, the outputs and the maximum and sum
            // of its lane are this (row, head)'s alone.
            let (max, sum, parts, mix, o) = unsafe {
                (
                    |j: &super::Job| *at(j, lanes * latent + lane),
                    |j: &super::Job| at(j, lanes * (latent + 1) + lane),
                    |j: &super::Job| std::slice::from_raw_parts(at(j, 0).cast_const(), lanes * latent),
                    std::slice::from_raw_parts_mut(
                        base.at(jobs[0].at - per_row + (heads + h) * latent),
                        latent,
                    ),
                    std::slice::from_raw_parts_mut(ptr.at(r * stride + h * m.value), m.value),
                )
            };
            let top = jobs.iter().map(max).fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            mix.fill(0.0);
            for j in jobs {
                let f = pow2(max(j) - top);
                // SAFETY: as above.
                total += f * unsafe { *sum(j) };
                let rows = parts(j).chunks_exact(lanes);
                mix.iter_mut().zip(rows).for_each(|(x, s)| *x += f * s[lane]);
            }
            let inv = 1.0 / total;
            mix.iter_mut().for_each(|x| *x *= inv);
            if counted.contains(&r) {
                // From here on a part's sum is the factor that makes its weights probabilities.
                // SAFETY: as above.
                jobs.iter().for_each(|j| unsafe { *sum(j) = pow2(max(j) - top) * inv });
            }
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
        let factors = area.take(pieces * lanes, "").expect(FITS);
        for j in jobs.iter().filter(|j| counted.contains(&j.row)) {
            for (p, factors) in factors.chunks_exact_mut(lanes).enumerate() {
                let here = lanes.min(heads - p * lanes);
                factors[here..].fill(0.0);
                factors[..here].copy_from_slice(&store[j.at + p * piece + lanes * (latent + 1)..][..here]);
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
