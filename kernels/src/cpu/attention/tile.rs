//! Attention of up to 64 query rows at once, one row a lane: scores and sums of a block of keys and values are float products
//! whose broadcast operand is the cache block, so a block converted to f32 once serves every row and head of the tile.
//!
//! The running maximum is an integer power of two, rescaled by exact factors, and every sum runs entry by entry: a row's
//! bits do not depend on where blocks begin, nor on the other rows. Knows f32 blocks; nothing of caches or heads.

use super::super::lanes::{Gemm, Simd, W, prefetch};
use super::super::math::exp2_parts;
use super::super::scratch::Cut;
use crate::KernelError;

/// Cache entries of a block.
pub const BLOCK: usize = 64;
/// Most rows of a tile.
pub const LANES: usize = 64;

/// Scores are cut to +-CUT before anything else: an infinite one counts as a huge one, NaN as the lowest.
pub const CUT: f32 = 4_194_304.0;
/// Below every cut score by more than any exponent reaches: the score of an entry that a row does not see.
pub const UNSEEN: f32 = -2.0 * CUT;
/// The maximum follows the scores only once they pass it by this many powers of two: rescaling is exact, so waiting costs
/// nothing but range, of which 2^32 is spare.
pub const LAZY: f32 = 32.0;

/// The running state of a tile.
pub struct Tile<'a> {
    lanes: usize,
    key: usize,
    value: usize,
    /// Queries, scaled to powers of two, `[key][lanes]`.
    pub q: &'a mut [f32],
    /// The same for sinks, where they differ.
    pub q_sink: Option<&'a mut [f32]>,
    /// Weighted sums, `[value][lanes]`.
    pub out: &'a mut [f32],
    /// Largest score, an integer.
    pub max: &'a mut [f32],
    /// Sum of the weights.
    pub sum: &'a mut [f32],
    /// Where the weights of all entries so far are kept, relative to `max`, if they are: `[entries][lanes]`, and how many.
    pub kept: Option<(&'a mut [f32], usize)>,
}

/// What the lanes of a tile see of a block: everything, nothing, or per lane the first entry of the block it sees and the one
/// after the last.
#[allow(clippy::large_enum_variant)] // lives on the stack of one call
pub enum Seen {
    All,
    Nothing,
    Some([f32; LANES], [f32; LANES]),
}

/// Memory that will be read next, fetched into the second-level cache between the pieces of a block's products: the conversion of
/// a block of the cache would otherwise wait for memory that stands idle during the products.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// Runs of bytes: start and length.
    runs: [(*const u8, usize); 2],
    /// Bytes at a time.
    step: usize,
}

/// Pieces that each product of a block is cut in while something lies ahead.
const STEPS: usize = 6;

impl Ahead {
    /// Nothing.
    pub const NONE: Self = Self { runs: [(std::ptr::null(), 0); 2], step: 0 };

    /// Two runs of bytes.
    pub fn new(a: &[u8], b: &[u8]) -> Self {
        let step = (a.len() + b.len()).div_ceil(2 * STEPS).next_multiple_of(64);
        Self { runs: [(a.as_ptr(), a.len()), (b.as_ptr(), b.len())], step }
    }

    /// Asks for the next lines.
    #[inline(always)]
    fn fetch(&mut self) {
        let mut left = self.step;
        for (at, len) in &mut self.runs {
            let n = left.min(*len);
            for i in (0..n).step_by(64) {
                prefetch::<1>(at.wrapping_add(i));
            }
            (*at, *len, left) = (at.wrapping_add(n), *len - n, left - n);
        }
    }
}

/// `g` row by row of its output, in pieces of `rows`, with a look ahead before each.
///
/// # Safety
/// As [`Gemm`] says.
#[inline(always)]
unsafe fn pieces<S: Simd>(s: S, g: Gemm, rows: usize, ahead: &mut Ahead) {
    let mut at = 0;
    while at < g.rows {
        ahead.fetch();
        let n = rows.min(g.rows - at);
        // SAFETY: rows at..at + n of the same product.
        unsafe { s.gemm(Gemm { rows: n, a: g.a.add(at * g.a_row), c: g.c.add(at * g.c_row), ..g }) };
        at += n;
    }
}

/// A block of keys and values in f32.
#[derive(Clone, Copy)]
pub struct Block {
    /// `[len][key_row]`.
    pub keys: *const f32,
    /// Distance between keys.
    pub key_row: usize,
    /// `[len][value_row]`.
    pub values: *const f32,
    /// Distance between values.
    pub value_row: usize,
    /// Entries.
    pub len: usize,
    /// Whether these are sinks.
    pub sink: bool,
}

impl Block {
    /// A block of keys alone.
    pub fn keys(keys: *const f32, key_row: usize, len: usize, sink: bool) -> Self {
        Self { keys, key_row, values: keys, value_row: 0, len, sink }
    }
}

impl<'a> Tile<'a> {
    /// Floats of a tile.
    pub fn floats(lanes: usize, key: usize, value: usize, sinks: bool) -> usize {
        lanes * (key * (1 + usize::from(sinks)) + value + 2)
    }

    /// Carves a tile out of `area`: `lanes` whole vectors, keys and values of these lengths. The state is empty, the queries
    /// are not set.
    pub fn new(
        area: &mut Cut<'a>,
        lanes: usize,
        key: usize,
        value: usize,
        sinks: bool,
    ) -> Result<Self, KernelError> {
        const WHAT: &str = "attention tile";
        assert!(lanes.is_multiple_of(W));
        let mut t = Self {
            lanes,
            key,
            value,
            q: area.take(lanes * key, WHAT)?,
            q_sink: if sinks { Some(area.take(lanes * key, WHAT)?) } else { None },
            out: area.take(lanes * value, WHAT)?,
            max: area.take(lanes, WHAT)?,
            sum: area.take(lanes, WHAT)?,
            kept: None,
        };
        t.reset();
        Ok(t)
    }

    /// A tile whose queries are set, for sinks too where they differ, and whose state, empty, lies in `state`:
    /// `[value][lanes]` sums, `[lanes]` maxima, `[lanes]` weights.
    pub fn over(lanes: usize, q: &'a mut [f32], q_sink: Option<&'a mut [f32]>, state: &'a mut [f32]) -> Self {
        assert!(lanes.is_multiple_of(W) && q.len().is_multiple_of(lanes) && state.len() >= 2 * lanes);
        let value = state.len() / lanes - 2;
        let (out, rest) = state.split_at_mut(value * lanes);
        let (max, sum) = rest.split_at_mut(lanes);
        let mut t = Self { lanes, key: q.len() / lanes, value, q, q_sink, out, max, sum, kept: None };
        t.reset();
        t
    }

    /// Empties the state.
    pub fn reset(&mut self) {
        self.out.fill(0.0);
        self.max.fill(-CUT);
        self.sum.fill(0.0);
    }

    /// Sets the query of a lane: `q * scale`; lanes never set must be cleared with an empty slice.
    pub fn set(&mut self, lane: usize, q: &[f32], q_sink: &[f32], scale: f32) {
        fn put(to: &mut [f32], lanes: usize, lane: usize, q: &[f32], scale: f32) {
            for (d, row) in to.chunks_exact_mut(lanes).enumerate() {
                row[lane] = q.get(d).map_or(0.0, |q| q * scale);
            }
        }
        put(self.q, self.lanes, lane, q, scale);
        if let Some(to) = self.q_sink.as_deref_mut() {
            put(to, self.lanes, lane, q_sink, scale);
        }
    }

    /// Sets the query of a lane from its latent and rotary parts; the rotary part alone differs for sinks.
    pub fn set_parts(&mut self, lane: usize, q: &[f32], pe: &[f32], pe_sink: &[f32], scale: f32) {
        let lanes = self.lanes;
        fn put(to: &mut [f32], lanes: usize, lane: usize, q: &[f32], pe: &[f32], scale: f32) {
            for (row, q) in to.chunks_exact_mut(lanes).zip(q.iter().chain(pe)) {
                row[lane] = q * scale;
            }
        }
        put(self.q, lanes, lane, q, pe, scale);
        if let Some(to) = self.q_sink.as_deref_mut() {
            put(to, lanes, lane, q, pe_sink, scale);
        }
    }

    /// Adds a block. `seen`, where given, holds per lane the first entry of the block it sees and the one after the last.
    /// `scores` is room for `BLOCK * lanes`.
    ///
    /// # Safety
    /// The block's pointers must be readable for what its lengths say.
    #[inline(always)]
    pub unsafe fn add<S: Simd>(
        &mut self,
        s: S,
        b: Block,
        seen: Option<(&[f32; LANES], &[f32; LANES])>,
        scores: &mut [f32],
        ahead: &mut Ahead,
    ) {
        let lanes = self.lanes;
        assert!(self.out.len() == self.value * lanes);
        // SAFETY: the caller's.
        unsafe { self.score(s, b, scores, ahead) };
        for j in (0..lanes).step_by(W) {
            self.soften(s, b.len, j, seen, scores);
        }
        let g = Gemm {
            rows: self.value,
            vectors: lanes / W,
            depth: b.len,
            a: b.values,
            a_row: 1,
            a_k: b.value_row,
            b: scores.as_ptr(),
            b_row: lanes,
            c: self.out.as_mut_ptr(),
            c_row: lanes,
            accumulate: true,
        };
        let rows = if ahead.step > 0 { self.value.div_ceil(STEPS).next_multiple_of(W) } else { usize::MAX };
        // SAFETY: as above, for the values.
        unsafe { pieces(s, g, rows, ahead) };
        if let Some((kept, n)) = &mut self.kept {
            kept[*n * lanes..][..b.len * lanes].copy_from_slice(&scores[..b.len * lanes]);
            *n += b.len;
        }
    }

    /// `scores` becomes the probabilities of a block's entries, `[len][lanes]`, by a state that is known: `max`, and 1 / sum in
    /// `sum`.
    ///
    /// # Safety
    /// As [`Tile::add`], for the keys.
    #[inline(always)]
    pub unsafe fn weigh<S: Simd>(
        &self,
        s: S,
        b: Block,
        seen: Option<(&[f32; LANES], &[f32; LANES])>,
        scores: &mut [f32],
    ) {
        let lanes = self.lanes;
        // SAFETY: the caller's; then every access is at e * lanes + j, inside by the assertion of `score`.
        unsafe {
            self.score(s, b, scores, &mut Ahead { ..Ahead::NONE });
            for j in (0..lanes).step_by(W) {
                self.cut(s, b.len, j, seen, scores);
                let (max, inv) = (s.load(self.max.as_ptr().add(j)), s.load(self.sum.as_ptr().add(j)));
                for e in 0..b.len {
                    let at = scores.as_mut_ptr().add(e * lanes + j);
                    let (p, n) = exp2_parts(s, s.load(at));
                    s.store(s.mul(s.scale2(p, s.sub(n, max)), inv), at);
                }
            }
        }
    }

    /// The scores of a block, `[len][lanes]`.
    ///
    /// # Safety
    /// As [`Tile::add`], for the keys.
    #[inline(always)]
    unsafe fn score<S: Simd>(&self, s: S, b: Block, scores: &mut [f32], ahead: &mut Ahead) {
        let lanes = self.lanes;
        assert!(b.len <= BLOCK && scores.len() >= b.len * lanes && lanes <= LANES);
        let q = match &self.q_sink {
            Some(q) if b.sink => &**q,
            _ => &*self.q,
        };
        assert!(q.len() == self.key * lanes && self.max.len() == lanes && self.sum.len() == lanes);
        let g = Gemm {
            rows: b.len,
            vectors: lanes / W,
            depth: self.key,
            a: b.keys,
            a_row: b.key_row,
            a_k: 1,
            b: q.as_ptr(),
            b_row: lanes,
            c: scores.as_mut_ptr(),
            c_row: lanes,
            accumulate: false,
        };
        // SAFETY: shapes as asserted; keys as the caller promised.
        unsafe { pieces(s, g, if ahead.step > 0 { W } else { usize::MAX }, ahead) };
    }

    /// Cuts the scores of lanes `j..j + 16` to their range and hides what is not seen; returns the largest.
    #[inline(always)]
    fn cut<S: Simd>(
        &self,
        s: S,
        len: usize,
        j: usize,
        seen: Option<(&[f32; LANES], &[f32; LANES])>,
        scores: &mut [f32],
    ) -> S::V {
        let lanes = self.lanes;
        assert!(j + W <= lanes && scores.len() >= len * lanes);
        // SAFETY: every access is at e * lanes + j or lane j, inside by the assertion.
        unsafe {
            let first = scores.as_mut_ptr().add(j);
            let to = |e: usize| first.add(e * lanes);
            let (low, high) = (s.splat(-CUT), s.splat(CUT));
            let mut top = s.splat(UNSEEN);
            if let Some((from, end)) = seen {
                let (from, end) = (s.load(from.as_ptr().add(j)), s.load(end.as_ptr().add(j)));
                let unseen = s.splat(UNSEEN);
                for e in 0..len {
                    let x = s.min(s.max(s.load(to(e)), low), high);
                    let i = s.splat(e as f32);
                    let x = s.pick(i, end, s.pick(i, from, unseen, x), unseen);
                    s.store(x, to(e));
                    top = s.max(top, x);
                }
            } else {
                for e in 0..len {
                    let x = s.min(s.max(s.load(to(e)), low), high);
                    s.store(x, to(e));
                    top = s.max(top, x);
                }
            }
            top
        }
    }

    /// Turns the scores of lanes `j..j + 16` into weights.
    #[inline(always)]
    fn soften<S: Simd>(
        &mut self,
        s: S,
        len: usize,
        j: usize,
        seen: Option<(&[f32; LANES], &[f32; LANES])>,
        scores: &mut [f32],
    ) {
        let lanes = self.lanes;
        let top = self.cut(s, len, j, seen, scores);
        assert!(j + W <= lanes && scores.len() >= len * lanes && self.max.len() == lanes);
        // SAFETY: every access is at e * lanes + j or lane j, inside by the assertion.
        unsafe {
            let first = scores.as_mut_ptr().add(j);
            let at = |e: usize| first.add(e * lanes);
            let mut max = s.load(self.max.as_ptr().add(j));
            let mut sum = s.load(self.sum.as_ptr().add(j));
            if s.hmax(s.sub(top, max)) > LAZY {
                let next = s.pick(s.add(max, s.splat(LAZY)), top, s.round(top), max);
                let shift = s.sub(max, next);
                for d in 0..self.value {
                    let o = self.out.as_mut_ptr().add(d * lanes + j);
                    s.store(s.scale2(s.load(o), shift), o);
                }
                if let Some((kept, n)) = &mut self.kept {
                    for row in kept[..*n * lanes].chunks_exact_mut(lanes) {
                        let w = row.as_mut_ptr().add(j);
                        s.store(s.scale2(s.load(w), shift), w);
                    }
                }
                sum = s.scale2(sum, shift);
                max = next;
                s.store(max, self.max.as_mut_ptr().add(j));
            }
            for e in 0..len {
                let (p, n) = exp2_parts(s, s.load(at(e)));
                let p = s.scale2(p, s.sub(n, max));
                sum = s.add(sum, p);
                s.store(p, at(e));
            }
            s.store(sum, self.sum.as_mut_ptr().add(j));
        }
    }

    /// Writes a lane's `value` outputs, divided by the sum of its weights.
    pub fn finish(&self, lane: usize, out: &mut [f32]) {
        let inv = 1.0 / self.sum[lane];
        for (o, row) in out.iter_mut().zip(self.out.chunks_exact(self.lanes)) {
            *o = row[lane] * inv;
        }
    }
}
