//! Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).
//!
//! Absorbed: W_k^T q meets the latents themselves, all heads of a row being the lanes of one tile, so that each block of the
//! cache is converted once for all of them; W_v comes after the weighted sum. Expanded: keys and values of a head are made
//! from a block of latents for all rows of the call, then attention as usual. A row of decoding is absorbed; a row of a
//! prompt takes the form that is cheaper for a prompt of its request's length at the row's own depth: never the call's.

use super::super::isa::Isa;
use super::super::lanes::{Gemm, Kernel, Simd, W, padded};
use super::super::math::LOG2_E;
use super::super::quantized::Quantized;
use super::super::scratch::{AREA, Cut, Shared};
use super::super::{Pool, cache, matmul};
use super::rows::slice;
use super::tile::{BLOCK, Block, LANES, Tile};
use super::{Memory, add_seen, passes, pow2, walk};
use crate::backend::{Mla, MlaUp};
use crate::{KernelError, View, ViewMut, Weight};
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a call that the cost estimate reckons with at most: engines cut prompts at about this size.
const CHUNK: usize = 512;
/// Most tiles that one expansion serves.
const TILES: usize = 16;

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
) -> Result<(), KernelError> {
    let v = m.visible;
    let kind = |i: usize| v.prompt(i) > 0 && expands(&m, v.prompt(i), v.seen(i));
    let mut at = 0;
    while at < m.q.rows() {
        let expand = kind(at);
        let end = (at..m.q.rows()).find(|&i| kind(i) != expand).unwrap_or(m.q.rows());
        if expand {
            expanded(pool, isa, mem, &m, &mut out, at, end)?;
        } else {
            absorbed(pool, isa, mem, &m, &mut out, at, end)?;
        }
        at = end;
    }
    Ok(())
}

/// Row `r` of W_v of head `h`.
fn value_row<'a>(m: &Mla<'a>, h: usize, r: usize) -> (&'a Weight, &'a [u8]) {
    match m.up {
        MlaUp::Split { v_b, .. } => (v_b, v_b.row(h, r)),
        MlaUp::Joint { kv_b } => (kv_b, kv_b.row(0, h * (m.nope + m.value) + m.nope + r)),
    }
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
    passes(mem, m.visible, first, end, pieces * piece, per_row, |jobs, rows, store, areas| {
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
            let from = jobs.partition_point(|j| j.row < r);
            let jobs = &jobs[from..][..jobs[from..].partition_point(|j| j.row == r)];
            let (p, lane) = (h / lanes, h % lanes);
            // SAFETY: states are complete and only read; the mix and the outputs are this (row, head)'s alone.
            let (state, mix, o) = unsafe {
                let state = |j: &super::Job| {
                    std::slice::from_raw_parts(base.at(j.at + p * piece).cast_const(), piece)
                };
                let mix = base.at(jobs[0].at - per_row + (heads + h) * latent);
                let o = ptr.at(r * stride + h * m.value);
                (
                    state,
                    std::slice::from_raw_parts_mut(mix, latent),
                    std::slice::from_raw_parts_mut(o, m.value),
                )
            };
            let max = |j: &super::Job| state(j)[lanes * latent + lane];
            let top = jobs.iter().map(max).fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            mix.fill(0.0);
            for j in jobs {
                let f = pow2(max(j) - top);
                let s = state(j);
                sum += f * s[lanes * (latent + 1) + lane];
                mix.iter_mut().zip(s.chunks_exact(lanes)).for_each(|(x, s)| *x += f * s[lane]);
            }
            let inv = 1.0 / sum;
            mix.iter_mut().for_each(|x| *x *= inv);
            match m.up {
                MlaUp::Split { v_b, .. } => matvec(v_b, h, 0..m.value, mix, o),
                MlaUp::Joint { kv_b } => {
                    let first = h * (m.nope + m.value) + m.nope;
                    matvec(kv_b, 0, first..first + m.value, mix, o);
                }
            }
        });
    })
}

/// Rows `first..end`: a task is a head and as many rows as fit a thread's area.
fn expanded(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    m: &Mla<'_>,
    out: &mut ViewMut<'_>,
    first: usize,
    end: usize,
) -> Result<(), KernelError> {
    let (latent, heads, hd) = (m.latent.width(), m.heads, m.nope + m.rope);
    let (nope_pad, value_pad, latent_pad) = (padded(m.nope), padded(m.value), padded(latent));
    let key_row = nope_pad.max(m.nope + padded(m.rope));
    let sinks = m.q_sink.is_some();
    let fixed = latent * (nope_pad + value_pad)
        + BLOCK * (latent_pad + key_row + value_pad + LANES)
        + latent.max(m.nope)
        + 16 * W;
    let tile_floats = Tile::floats(LANES, hd, m.value, sinks) + 8 * W;
    let tiles = (AREA.saturating_sub(fixed) / tile_floats).min(TILES);
    if tiles == 0 {
        return absorbed(pool, isa, mem, m, out, first, end);
    }
    let Memory { plan, areas, .. } = mem;
    plan.clear();
    let mut at = first;
    while at < end {
        at = plan.push(m.visible, at, end, tiles * LANES);
    }
    let plan = &*plan;
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
    pool.run(plan.tiles.len() * heads, |i| {
        let (rows, h) = (&plan.tiles[plan.tiles.len() - 1 - i / heads], i % heads);
        let mut claim = areas.claim();
        let mut area = Cut(&mut claim);
        const FITS: &str = "tiles were counted to fit";
        let mut take = |n: usize| area.take(n, "").expect(FITS);
        let (wk, wv) = (take(latent * nope_pad), take(latent * value_pad));
        let (latents, keys) = (take(BLOCK * latent_pad), take(BLOCK * key_row));
        let (values, scores) = (take(BLOCK * value_pad), take(BLOCK * LANES));
        up(m, h, wk, wv, take(latent.max(m.nope)), nope_pad, value_pad);
        let n = rows.rows.len();
        let mut tiles: [Option<Tile<'_>>; TILES] = [const { None }; TILES];
        for (t, tile) in tiles.iter_mut().enumerate().take(n.div_ceil(LANES)) {
            let here = LANES.min(n - t * LANES);
            let mut new = Tile::new(&mut area, padded(here), hd, m.value, sinks).expect(FITS);
            for lane in 0..padded(here) {
                if lane >= here {
                    new.set(lane, &[], &[], 0.0);
                    continue;
                }
                let r = rows.rows.start + t * LANES + lane;
                let q = &m.q.row(r)[h * hd..][..hd];
                let (q, pe) = q.split_at(m.nope);
                let pe_sink = m.q_sink.map_or(pe, |s| &s.row(r)[h * hd + m.nope..][..m.rope]);
                new.set_parts(lane, q, pe, pe_sink, m.scale * LOG2_E);
            }
            *tile = Some(new);
        }
        walk(plan, rows, |from, len, sink, ranges| {
            // SAFETY: BLOCK rows of the padded widths; the rotary part overwrites the padding of the keys.
            unsafe {
                let c = latents.as_mut_ptr();
                cache::read(isa, m.latent, from as usize, len, 0, latent, c, latent_pad);
                let grow = |w: &[f32], width: usize, to: *mut f32, to_row: usize| Gemm {
                    rows: len,
                    vectors: width / W,
                    depth: latent,
                    a: c,
                    a_row: latent_pad,
                    a_k: 1,
                    b: w.as_ptr(),
                    b_row: width,
                    c: to,
                    c_row: to_row,
                    accumulate: false,
                };
                isa.vectorize(Product(grow(wk, nope_pad, keys.as_mut_ptr(), key_row)));
                isa.vectorize(Product(grow(wv, value_pad, values.as_mut_ptr(), value_pad)));
                let pe = keys.as_mut_ptr().add(m.nope);
                cache::read(isa, m.k_pe, from as usize, len, 0, m.rope, pe, key_row);
                let (keys, values) = (keys.as_ptr(), values.as_ptr());
                let block = Block { keys, key_row, values, value_row: value_pad, len, sink };
                for (t, ranges) in ranges.chunks(LANES).enumerate() {
                    let tile = tiles[t].as_mut().expect(FITS);
                    add_seen(isa, tile, block, from, ranges, 1, scores);
                }
            }
        });
        for r in 0..n {
            let at = (rows.rows.start + r) * stride + h * m.value;
            // SAFETY: a row and head that no other task has.
            let o = unsafe { std::slice::from_raw_parts_mut(ptr.at(at), m.value) };
            tiles[r / LANES].as_ref().expect(FITS).finish(r % LANES, o);
        }
    });
    Ok(())
}

struct Product(Gemm);

impl Kernel for Product {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: whoever builds a `Product` answers for its operands.
        unsafe { s.gemm(self.0) }
    }
}

/// W_k and W_v of head h in f32, by latent: `[latent][nope_pad]` and `[latent][value_pad]`.
fn up(
    m: &Mla<'_>,
    h: usize,
    wk: &mut [f32],
    wv: &mut [f32],
    row: &mut [f32],
    nope_pad: usize,
    value_pad: usize,
) {
    let latent = m.latent.width();
    fn scatter(row: &[f32], to: &mut [f32], stride: usize, col: usize) {
        row.iter().zip(to.chunks_exact_mut(stride)).for_each(|(x, to)| to[col] = *x);
    }
    wk.fill(0.0);
    wv.fill(0.0);
    match m.up {
        MlaUp::Split { k_b, .. } => {
            for (l, to) in wk.chunks_exact_mut(nope_pad).enumerate() {
                (k_b.dtype().format().dequantize)(k_b.row(h, l), &mut to[..m.nope]);
            }
        }
        MlaUp::Joint { kv_b } => {
            for d in 0..m.nope {
                let bytes = kv_b.row(0, h * (m.nope + m.value) + d);
                (kv_b.dtype().format().dequantize)(bytes, &mut row[..latent]);
                scatter(&row[..latent], wk, nope_pad, d);
            }
        }
    }
    for v in 0..m.value {
        let (w, bytes) = value_row(m, h, v);
        (w.dtype().format().dequantize)(bytes, &mut row[..latent]);
        scatter(&row[..latent], wv, value_pad, v);
    }
}
