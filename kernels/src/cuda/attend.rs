//! Attention over a cache, grouped heads and MLA: rows of prompts in tiles that walk the cache together, decoded rows in parts of their own
//! list; masses from the parts. Knows lists of slots and heads.

use super::backend::{CudaBackend, cache_of};
use super::half;
use super::launch::COLUMNS;
use super::operands::{Absorbed, Floats, Gqa, Input, Lists, Matrix, Parts, Product, Tiles, input_bytes};
use super::plan::{self, Plan};
use super::scratch::{Area, Scratch};
use crate::backend::{Attention, Mass, Mla, MlaUp, Visible};
use crate::{KernelError, View, ViewMut};
use std::ops::Range;

impl CudaBackend {
    /// The first of `rows`, as many as the area of lists holds the tiles of; tiles count rows from there.
    fn tiles(
        &self,
        s: &mut Scratch,
        v: &Visible,
        rows: Range<usize>,
        group: usize,
        lanes: usize,
    ) -> Result<(Range<usize>, Tiles), KernelError> {
        let (first, mut n) = (rows.start, rows.len());
        let mut plan = Plan::default();
        loop {
            plan.set(v, first..first + n, group, lanes);
            plan.tiles.iter_mut().for_each(|t| t[0] -= first as u32);
            // Pairs first: they are read as such.
            let words = [plan.ranges.concat(), plan.tiles.concat(), plan.segments.concat()].concat();
            let room = s.room(Area::Lists, if n == 1 { 4 * words.len() } else { 0 }, 4 * words.len())?;
            if 4 * words.len() > room {
                n /= 2;
                continue;
            }
            let ranges = s.send(&[Area::Lists, Area::OtherLists], &words)?;
            let tiles = ranges + 8 * plan.ranges.len() as u64;
            let segments = tiles + 20 * plan.tiles.len() as u64;
            let (count, heads) = (plan.tiles.len(), plan::heads(group, lanes));
            return Ok((first..first + n, Tiles { tiles, segments, ranges, count, heads }));
        }
    }

    /// The next rows of a call of attention, at most `most`, and their lists on the device. `each`: bytes of one of a row's `parts`.
    fn pass(
        &self,
        s: &mut Scratch,
        v: &Visible,
        first: usize,
        most: usize,
        (parts, each): (Parts, usize),
    ) -> Result<(Range<usize>, Lists), KernelError> {
        let count = |i: usize| parts.count(v.seen(i));
        let all = (first..first + most).map(count).max().unwrap_or(0);
        let room = s.room(Area::Parts, count(first) * each, most * all * each)?;
        let spans: usize = (first..first + most).map(|i| v.row(i).len()).sum();
        let lists = s.room(Area::Lists, 4 + 12 * v.row(first).len(), 4 * most + 12 * spans)?;
        let (mut end, mut splits, mut spans) = (first, 0, 0);
        while end < first + most {
            let (split, more) = (splits.max(count(end)), spans + v.row(end).len());
            let n = end + 1 - first;
            if end > first && (n * split * each > room || 4 * n + 12 * more > lists) {
                break;
            }
            (end, splits, spans) = (end + 1, split, more);
        }
        let longest = (first..end).map(|i| v.seen(i)).max().unwrap_or(0);
        let rows = end - first;
        let mut words = Vec::with_capacity(rows + 3 * spans);
        let mut at = 0;
        words.extend((first..end).map(|i| {
            at += v.row(i).len() as u32;
            at
        }));
        words.extend((first..end).flat_map(|i| v.row(i)).flat_map(|s| [s.start, s.len, u32::from(s.sink)]));
        let ends = s.send(&[Area::Lists, Area::OtherLists], &words)?;
        Ok((first..end, Lists { ends, spans: ends + 4 * rows as u64, rows, longest, parts, splits }))
    }

    /// `ids[i] = i % heads`, for `count` of them.
    fn head_ids(&self, s: &mut Scratch, count: usize, heads: usize) -> Result<u64, KernelError> {
        s.room(Area::HeadIds, 4 * count, 4 * count)?;
        let at = s.at(Area::HeadIds);
        if s.cycle.0 != heads || s.cycle.1 < count {
            self.kernels.cycle(at, count, heads)?;
            s.cycle = (heads, count);
        }
        Ok(at)
    }

    /// See `Device::attention_mass`.
    pub(super) fn attend(
        &self,
        s: &mut Scratch,
        a: &Attention<'_>,
        out: ViewMut<'_>,
        mass: Option<Mass<'_>>,
    ) -> Result<(), KernelError> {
        let (q, out, n) = (Floats::of(&a.q)?, s.output(&out)?, a.q.rows());
        let sinks = sinks(a.q_sink, &q)?;
        let (k, v) = (cache_of(a.k)?, cache_of(a.v)?);
        let (key, value) = (k.width / a.kv_heads, v.width / a.kv_heads);
        let parts = (Parts::GROUPED, 4 * a.heads * (value + 2));
        let op = |rows: &Range<usize>| Gqa {
            heads: a.heads,
            kv_heads: a.kv_heads,
            key,
            value,
            scale: a.scale,
            q: q.part(rows.clone()),
            q_sink: sinks.map_or(0, |x| x.part(rows.clone()).at),
            k,
            v,
        };
        let tiled = self.kernels.takes_prompts(k, v, value);
        let mut first = 0;
        while first < n {
            let (prompt, end) = run(a.visible, first, |tokens| tiled && tokens > 0);
            let mut rows = first..end;
            if prompt {
                let lanes = self.kernels.prompt_lanes(&op(&rows));
                let (some, tiles) = self.tiles(s, a.visible, rows, a.heads / a.kv_heads, lanes)?;
                self.kernels.prompt(&op(&some), tiles, out.part(some.clone()))?;
                rows = some;
            }
            // Masses need the parts of rows that tiles have computed, too.
            let counted = mass.as_ref().map_or(0..0, |m| m.rows.clone());
            let mut at = if prompt { rows.start.max(counted.start) } else { rows.start };
            let end = if prompt { rows.end.min(counted.end) } else { rows.end };
            while at < end {
                let (some, lists) = self.pass(s, a.visible, at, end - at, parts)?;
                let (op, parts) = (op(&some), s.at(Area::Parts));
                self.kernels.attend(&op, lists, parts)?;
                if !prompt {
                    self.kernels.merge((k, v), parts, (a.heads, value), lists, out.part(some.clone()))?;
                }
                if let Some(m) = &mass {
                    let to = s.output(&m.out)?;
                    for row in counted.start.max(some.start)..counted.end.min(some.end) {
                        self.kernels.mass(&op, lists, row - some.start, parts, to)?;
                    }
                }
                at = some.end;
            }
            first = rows.end;
        }
        Ok(())
    }

    /// See `Device::mla_mass`.
    pub(super) fn attend_latents(
        &self,
        s: &mut Scratch,
        m: &Mla<'_>,
        out: ViewMut<'_>,
        mass: Option<Mass<'_>>,
    ) -> Result<(), KernelError> {
        let (heads, latent, n) = (m.heads, m.latent.width(), m.q.rows());
        let (q, out) = (Floats::of(&m.q)?, s.output(&out)?);
        let sinks = sinks(m.q_sink, &q)?;
        let (latents, k_pe) = (cache_of(m.latent)?, cache_of(m.k_pe)?);
        let step = m.nope + m.rope;
        let gaps = || KernelError::Shape("cuda: MLA's queries and outputs must be whole rows".into());
        let (k_b, v_b) = match m.up {
            MlaUp::Split { k_b, v_b } => (k_b, v_b),
            MlaUp::Joint { kv_b } => (kv_b, kv_b),
        };
        let values = match m.up {
            MlaUp::Split { v_b, .. } => Matrix::of(v_b)?,
            MlaUp::Joint { kv_b } => {
                Matrix { matrix_rows: m.nope + m.value, ..Matrix::of(kv_b)? }.part(m.nope..m.nope + m.value)
            }
        };
        // Rows that the areas hold.
        let inputs = |tiled| {
            let k_b =
                if matches!(m.up, MlaUp::Split { .. }) { input_bytes(k_b.dtype(), m.nope, tiled) } else { 0 };
            heads * k_b.max(input_bytes(v_b.dtype(), latent, tiled))
        };
        let mut most = n;
        for (area, each) in [
            (Area::Absorbed, 4 * heads * latent),
            (Area::Latents, 4 * heads * latent),
            (Area::HeadIds, 4 * heads),
            (Area::JobOrder, 4 * heads),
            (Area::Hidden, inputs(false).max(if self.kernels.takes_halves() { inputs(true) } else { 0 })),
        ] {
            most = most.min(s.rows(area, each, n)?);
        }
        let each = 4 * heads * (latent + 2);
        let takes_tiles = self.kernels.takes_mla_prompts(latents, k_pe);
        let mut first = 0;
        while first < n {
            let halves = self.kernels.takes_halves();
            let ((prompt, half), end) =
                run(m.visible, first, |tokens| (tokens > 0, halves && tokens > COLUMNS));
            let (tiled, parts) = (prompt && takes_tiles, Parts::absorbed(heads, prompt && !takes_tiles));
            let mut rows = first..end.min(first + most);
            let mut tiles = None;
            if tiled {
                let (some, t) = self.tiles(s, m.visible, rows, heads, plan::LANES)?;
                (rows, tiles) = (some, Some(t));
            }
            let jobs = rows.len() * heads;
            let ids = self.head_ids(s, jobs, heads)?;
            // Job j is head j % heads of its row.
            let columns = half.then(|| half::grouped_columns(&[k_b, v_b], rows.len()));
            let head_jobs = self.jobs(s, ids, rows.len(), heads, heads, columns)?.alone();
            let each_head = |w: Matrix, x: Input, to: Floats| {
                self.kernels.product(Product::set(w, to), x, head_jobs, None)
            };
            // Queries into the coordinates of the latent.
            let absorbed = Floats::dense(s.at(Area::Absorbed), jobs, latent);
            match m.up {
                MlaUp::Split { k_b, .. } => {
                    let x = q.part(rows.clone()).heads(m.nope, step).ok_or_else(gaps)?;
                    let x = self.input(s, Area::Hidden, x, &[k_b], half)?;
                    each_head(Matrix::of(k_b)?, x, absorbed)?;
                }
                MlaUp::Joint { kv_b } => {
                    let shape = (heads, m.nope + m.value, m.nope);
                    let q = q.part(rows.clone());
                    self.kernels.transposed(Matrix::of(kv_b)?, shape, q, step, absorbed.at)?;
                }
            }
            let op = |some: &Range<usize>| Absorbed {
                heads,
                latent,
                nope: m.nope,
                rope: m.rope,
                scale: m.scale,
                q_latent: absorbed.part((some.start - rows.start) * heads..jobs).at,
                q: q.part(some.clone()),
                q_sink: sinks.map_or(0, |x| x.part(some.clone()).at),
                latents,
                k_pe,
            };
            let sums = Floats::dense(s.at(Area::Latents), rows.len(), heads * latent);
            if let Some(t) = tiles {
                self.kernels.prompt_mla(&op(&rows), t, sums.at)?;
            }
            let counted = mass.as_ref().map_or(0..0, |m| m.rows.clone());
            let mut at = if tiled { rows.start.max(counted.start) } else { rows.start };
            let end = if tiled { rows.end.min(counted.end) } else { rows.end };
            while at < end {
                let (some, lists) = self.pass(s, m.visible, at, end - at, (parts, each))?;
                let (op, parts) = (op(&some), s.at(Area::Parts));
                self.kernels.attend_mla(&op, lists, parts)?;
                if !tiled {
                    let to = sums.part(some.start - rows.start..some.end - rows.start);
                    self.kernels.merge((latents, k_pe), parts, (heads, latent), lists, to)?;
                }
                if let Some(mass) = &mass {
                    let to = s.output(&mass.out)?;
                    for row in counted.start.max(some.start)..counted.end.min(some.end) {
                        self.kernels.mass_mla(&op, lists, row - some.start, parts, to)?;
                    }
                }
                at = some.end;
            }
            // And what they saw out of them.
            let x = self.input(s, Area::Hidden, Floats::dense(sums.at, jobs, latent), &[v_b], half)?;
            let to = out.part(rows.clone()).heads(m.value, m.value).ok_or_else(gaps)?;
            each_head(values, x, to)?;
            first = rows.end;
        }
        Ok(())
    }
}

/// What row `first` is, by the tokens of its prompt, and the end of the rows like it. Decided by the row alone, so that its bits do not
/// depend on its neighbours.
fn run<K: PartialEq>(v: &Visible, first: usize, kind: impl Fn(usize) -> K) -> (K, usize) {
    let its = kind(v.prompt(first));
    let end = (first..v.rows()).find(|i| kind(v.prompt(*i)) != its).unwrap_or(v.rows());
    (its, end)
}

/// The queries for sinks, which lie as the others do.
fn sinks(x: Option<View<'_>>, q: &Floats) -> Result<Option<Floats>, KernelError> {
    let Some(x) = x else { return Ok(None) };
    let x = Floats::of(&x)?;
    if x.stride != q.stride {
        return Err(KernelError::Shape("cuda: queries for sinks must lie as the others do".into()));
    }
    Ok(Some(x))
}
