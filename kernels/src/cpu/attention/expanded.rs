//! Latent attention in its expanded form, for prompts: keys and values of a head are made from a block of latents for all rows
//! of the call, then attention as usual. Knows one head at a time.

use super::super::isa::Isa;
use super::super::lanes::{Gemm, Kernel, Simd, W, padded};
use super::super::math::LOG2_E;
use super::super::scratch::{AREA, Cut, Shared};
use super::super::{Pool, cache};
use super::mass::{self, Stats, Target};
use super::tile::{BLOCK, Block, LANES, Tile};
use super::{Memory, add_seen, walk};
use crate::backend::{Mla, MlaUp};
use crate::{KernelError, ViewMut, Weight};
use std::ops::Range;

/// Most tiles that one expansion serves.
const TILES: usize = 16;

/// The lengths, padded to whole vectors where they are rows.
#[derive(Clone, Copy)]
pub struct Expanded {
    latent: usize,
    latent_pad: usize,
    nope_pad: usize,
    value_pad: usize,
    /// Distance between keys.
    pub key_row: usize,
    /// Longest row of a weight.
    row: usize,
}

/// A head's W_k and a block of its keys, in f32.
pub struct Keys<'a> {
    /// `[latent][nope_pad]`.
    wk: &'a mut [f32],
    /// Room for a row of a weight.
    row: &'a mut [f32],
    /// `[BLOCK][latent_pad]`.
    latents: &'a mut [f32],
    /// `[BLOCK][key_row]`.
    pub keys: &'a mut [f32],
}

impl Expanded {
    pub fn new(m: &Mla<'_>) -> Self {
        let latent = m.latent.width();
        let (nope_pad, value_pad) = (padded(m.nope), padded(m.value));
        let key_row = nope_pad.max(m.nope + padded(m.rope));
        Self { latent, latent_pad: padded(latent), nope_pad, value_pad, key_row, row: latent.max(m.nope) }
    }

    /// Floats of [`Keys`] and the scores of a tile.
    pub fn key_floats(&self) -> usize {
        self.latent * self.nope_pad + BLOCK * (self.latent_pad + self.key_row + LANES) + self.row + 16 * W
    }

    /// Carves [`Keys`] out of an area.
    pub fn keys<'a>(&self, area: &mut Cut<'a>) -> Result<Keys<'a>, KernelError> {
        const WHAT: &str = "expanded keys";
        Ok(Keys {
            wk: area.take(self.latent * self.nope_pad, WHAT)?,
            row: area.take(self.row, WHAT)?,
            latents: area.take(BLOCK * self.latent_pad, WHAT)?,
            keys: area.take(BLOCK * self.key_row, WHAT)?,
        })
    }

    /// W_k of head h, by latent.
    pub fn key_up(&self, m: &Mla<'_>, h: usize, w: &mut Keys<'_>) {
        if self.nope_pad > m.nope {
            w.wk.fill(0.0);
        }
        match m.up {
            MlaUp::Split { k_b, .. } => {
                for (l, to) in w.wk.chunks_exact_mut(self.nope_pad).enumerate() {
                    (k_b.dtype().format().dequantize)(k_b.row(h, l), &mut to[..m.nope]);
                }
            }
            MlaUp::Joint { kv_b } => {
                for d in 0..m.nope {
                    let bytes = kv_b.row(0, h * (m.nope + m.value) + d);
                    (kv_b.dtype().format().dequantize)(bytes, &mut w.row[..self.latent]);
                    scatter(&w.row[..self.latent], w.wk, self.nope_pad, d);
                }
            }
        }
    }

    /// W_v of head h, by latent: `[latent][value_pad]`.
    fn value_up(&self, m: &Mla<'_>, h: usize, row: &mut [f32], wv: &mut [f32]) {
        if self.value_pad > m.value {
            wv.fill(0.0);
        }
        for v in 0..m.value {
            let (w, bytes) = value_row(m, h, v);
            (w.dtype().format().dequantize)(bytes, &mut row[..self.latent]);
            scatter(&row[..self.latent], wv, self.value_pad, v);
        }
    }

    /// Reads `len` latents from slot `from` on and makes their keys.
    ///
    /// # Safety
    /// `w` must be of this shape and `len` at most [`BLOCK`].
    pub unsafe fn make_keys(&self, isa: Isa, m: &Mla<'_>, from: usize, len: usize, w: &mut Keys<'_>) {
        // SAFETY: BLOCK rows of the padded widths; the rotary part overwrites the padding of the keys.
        unsafe {
            cache::read(isa, m.latent, from, len, 0, self.latent, w.latents.as_mut_ptr(), self.latent_pad);
            let keys = w.keys.as_mut_ptr();
            self.grow(isa, w.latents, len, w.wk, self.nope_pad, keys, self.key_row);
            cache::read(isa, m.k_pe, from, len, 0, m.rope, keys.add(m.nope), self.key_row);
        }
    }

    /// `to = latents . w`, `w` `[latent][width]`.
    ///
    /// # Safety
    /// `len` rows of `latents` and `to`.
    unsafe fn grow(
        &self,
        isa: Isa,
        latents: &[f32],
        len: usize,
        w: &[f32],
        width: usize,
        to: *mut f32,
        to_row: usize,
    ) {
        isa.vectorize(Product(Gemm {
            rows: len,
            vectors: width / W,
            depth: self.latent,
            a: latents.as_ptr(),
            a_row: self.latent_pad,
            a_k: 1,
            b: w.as_ptr(),
            b_row: width,
            c: to,
            c_row: to_row,
            accumulate: false,
        }));
    }

    /// A tile with the queries of head h of up to [`LANES`] rows, for values of length `value`.
    pub fn tile<'a>(
        &self,
        area: &mut Cut<'a>,
        m: &Mla<'_>,
        h: usize,
        rows: Range<usize>,
        value: usize,
    ) -> Result<Tile<'a>, KernelError> {
        let hd = m.nope + m.rope;
        let width = padded(rows.len());
        let mut tile = Tile::new(area, width, hd, value, m.q_sink.is_some())?;
        for lane in 0..width {
            let r = rows.start + lane;
            if r >= rows.end {
                tile.set(lane, &[], &[], 0.0);
                continue;
            }
            let (q, pe) = m.q.row(r)[h * hd..][..hd].split_at(m.nope);
            let pe_sink = m.q_sink.map_or(pe, |s| &s.row(r)[h * hd + m.nope..][..m.rope]);
            tile.set_parts(lane, q, pe, pe_sink, m.scale * LOG2_E);
        }
        Ok(tile)
    }
}

fn scatter(row: &[f32], to: &mut [f32], stride: usize, col: usize) {
    row.iter().zip(to.chunks_exact_mut(stride)).for_each(|(x, to)| to[col] = *x);
}

/// Row `r` of W_v of head `h`.
fn value_row<'a>(m: &Mla<'a>, h: usize, r: usize) -> (&'a Weight, &'a [u8]) {
    match m.up {
        MlaUp::Split { v_b, .. } => (v_b, v_b.row(h, r)),
        MlaUp::Joint { kv_b } => (kv_b, kv_b.row(0, h * (m.nope + m.value) + m.nope + r)),
    }
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

/// Whether a thread's area holds one tile of this shape.
pub fn fits(m: &Mla<'_>) -> bool {
    tiles(m, &Expanded::new(m)) > 0
}

/// Tiles that fit a thread's area.
fn tiles(m: &Mla<'_>, x: &Expanded) -> usize {
    let fixed = x.key_floats() + x.latent * x.value_pad + BLOCK * x.value_pad;
    let tile = Tile::floats(LANES, m.nope + m.rope, m.value, m.q_sink.is_some()) + 8 * W;
    (AREA.saturating_sub(fixed) / tile).min(TILES)
}

/// Rows `first..end`: a task is a head and as many rows as fit a thread's area. Only where it [`fits`].
pub fn expanded(
    pool: &Pool,
    isa: Isa,
    mem: &mut Memory,
    m: &Mla<'_>,
    out: &mut ViewMut<'_>,
    mass: Option<&Target<'_>>,
    first: usize,
    end: usize,
) -> Result<(), KernelError> {
    let heads = m.heads;
    let x = Expanded::new(m);
    let tiles = tiles(m, &x);
    let Memory { plan, areas, store, .. } = mem;
    let stats = Stats::take(store, mass, first, end, heads)?;
    plan.clear();
    let mut at = first;
    while at < end {
        at = plan.push(m.visible, at, end, tiles * LANES);
    }
    let again = &mut *plan;
    let plan = &*again;
    let (ptr, stride) = out.raw();
    let ptr = Shared(ptr);
    pool.run(plan.tiles.len() * heads, |i| {
        let (rows, h) = (&plan.tiles[plan.tiles.len() - 1 - i / heads], i % heads);
        let mut claim = areas.claim();
        let mut area = Cut(&mut claim);
        const FITS: &str = "tiles were counted to fit";
        let mut w = x.keys(&mut area).expect(FITS);
        let wv = area.take(x.latent * x.value_pad, "").expect(FITS);
        let values = area.take(BLOCK * x.value_pad, "").expect(FITS);
        let scores = area.take(BLOCK * LANES, "").expect(FITS);
        x.key_up(m, h, &mut w);
        x.value_up(m, h, w.row, wv);
        let n = rows.rows.len();
        let mut tiles: [Option<Tile<'_>>; TILES] = [const { None }; TILES];
        for (tile, from) in tiles.iter_mut().zip((0..n).step_by(LANES)) {
            let here = rows.rows.start + from..rows.rows.start + n.min(from + LANES);
            *tile = Some(x.tile(&mut area, m, h, here, m.value).expect(FITS));
        }
        walk(plan, rows, 0..u32::MAX, |from, len, sink, ranges| {
            // SAFETY: slots of the cache, at most BLOCK of them; values are BLOCK rows of value_pad.
            unsafe {
                x.make_keys(isa, m, from as usize, len, &mut w);
                x.grow(isa, w.latents, len, wv, x.value_pad, values.as_mut_ptr(), x.value_pad);
                let (keys, values) = (w.keys.as_ptr(), values.as_ptr());
                let block = Block { keys, key_row: x.key_row, values, value_row: x.value_pad, len, sink };
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
            let tile = tiles[r / LANES].as_ref().expect(FITS);
            tile.finish(r % LANES, o);
            stats.note(rows.rows.start + r, h, tile, r % LANES);
        }
    });
    match mass {
        Some(target) => mass::expanded(pool, isa, areas, again, m, target, stats),
        None => Ok(()),
    }
}
