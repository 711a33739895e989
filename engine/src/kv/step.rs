//! What a forward pass does with the cache: begins rows of some sequences, stores them layer by layer, commits them; and
//! evicts where a policy asks for it. Models ask for positions, slots to write and what is visible; they compute none of it.

use super::arena::{Arena, Eviction, Group, Held, LayerKv, SeqId, Sequence, Watcher};
use super::evict::{Masses, Occasion, evict, zeros};
use super::options::Kind;
use super::pool::Pool;
use super::set::{Set, SetShape};
use crate::EngineError;
use kernels::{Buf, Device, KernelError, KvBuf, Mass, Span, View, Visible};
use std::ops::Range;

/// The next tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Whose.
    pub seq: SeqId,
    /// Their ids.
    pub tokens: &'a [u32],
    /// The length of the prompt that they are part of, however it is cut, or 0 when decoding: backends choose their method
    /// by it, and some policies evict at its end.
    pub prompt: usize,
}

/// A batch begun, and lists that are kept from one to the next.
#[derive(Default)]
pub(super) struct Step {
    /// Batches begun so far.
    pass: u64,
    begun: Vec<Begun>,
    positions: Vec<u64>,
    spans: Vec<Span>,
    moves: Vec<(u32, u32)>,
}

struct Begun {
    seq: SeqId,
    tokens: Vec<u32>,
    prompt: usize,
}

impl Step {
    /// The batch begun will not be committed.
    pub fn forget(&mut self) {
        self.begun.clear();
    }
}

/// One layer after a batch's rows were stored in it.
pub struct Stored<'a> {
    /// Keys, or latents.
    pub first: &'a KvBuf,
    /// Values, or shared rotary keys.
    pub second: &'a KvBuf,
    /// What each row sees.
    pub visible: &'a Visible,
    total: Option<&'a mut Buf>,
    recent: Option<&'a mut Buf>,
    recent_rows: &'a [Range<usize>],
}

impl Stored<'_> {
    /// Runs attention, with the masses that must be recorded. A pass records one; for more it is run again.
    pub fn attend(
        self,
        mut attention: impl FnMut(Option<Mass<'_>>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let mut done = false;
        if let Some(buf) = self.total {
            let heads = buf.rows();
            attention(Some(Mass { out: buf.view_mut(heads), rows: 0..self.visible.rows() }))?;
            done = true;
        }
        if let Some(buf) = self.recent {
            let heads = buf.rows();
            for rows in self.recent_rows {
                attention(Some(Mass { out: buf.view_mut(heads), rows: rows.clone() }))?;
                done = true;
            }
        }
        if done { Ok(()) } else { attention(None) }
    }
}

impl Arena {
    fn check(&self, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        for (i, r) in rows.iter().enumerate() {
            let len = self.get(r.seq)?.tokens.len();
            if r.tokens.is_empty() || r.tokens.len() > self.options.chunk {
                return Err(EngineError::Option(format!(
                    "{} tokens of a sequence in one pass, 1 to {} are possible",
                    r.tokens.len(),
                    self.options.chunk
                )));
            }
            let need = len + r.tokens.len();
            if let Some(ctx) = self.options.end().filter(|end| need > *end) {
                return Err(EngineError::Context { need, ctx });
            }
            if rows[..i].iter().any(|other| other.seq == r.seq) {
                return Err(EngineError::Option("a sequence is twice in one pass".into()));
            }
        }
        Ok(())
    }

    /// Makes room for the next tokens of some sequences and works out what each of them sees. They count only after
    /// [`Arena::commit`]; until then another `begin` replaces this one.
    ///
    /// # Errors
    /// [`EngineError::Context`] if they do not fit, [`EngineError::NoSequence`]; then nothing has changed. What a policy
    /// reports that had to make room.
    pub(crate) fn begin(&mut self, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        self.check(rows)?;
        let Self { options, layers, groups, sequences, step, watcher, .. } = self;
        let Step { pass, begun, positions, spans, moves } = step;
        *pass += 1;
        begun.clear();
        positions.clear();
        for r in rows {
            let s = sequences[r.seq.index as usize].as_ref().expect("checked");
            let first = s.base + s.tokens.len() as u64;
            positions.extend(first..first + r.tokens.len() as u64);
        }
        for (g, group) in groups.iter_mut().enumerate() {
            group.clear();
            moves.clear();
            for r in rows {
                let s = sequences[r.seq.index as usize].as_mut().expect("checked");
                let (len, n) = (s.tokens.len(), r.tokens.len());
                group.visible.set_prompt(r.prompt);
                let Group { kind, pool, most, visible, slots, sink_positions, far, .. } = group;
                match (kind, &mut s.held[g]) {
                    (Kind::Ring(reach), Held::Ring(ring)) => {
                        let reach = &reach.with_sinks(s.sinks);
                        ring.extend(reach, pool, (len, n), *most, moves, slots);
                        for t in len..len + n {
                            spans.clear();
                            ring.see(reach, t, spans);
                            visible.push(spans.iter().copied());
                            if let Some(limit) = reach.far() {
                                *far |= t as u64 > limit;
                                sink_positions.push(s.base + limit.min(t as u64));
                            }
                        }
                    }
                    (Kind::Set(_), Held::Set(_)) => {
                        begin_set(options.chunk, group, layers, s, (g, r), spans, watcher)?;
                    }
                    _ => unreachable!("sequences are made from the groups"),
                }
            }
            if !moves.is_empty() {
                for &l in &group.layers {
                    let LayerKv { device, first, second, .. } = &mut layers[l];
                    let (a, b) = (first.width(), second.width());
                    device.kv_move(first, moves, 0..a)?;
                    device.kv_move(second, moves, 0..b)?;
                }
            }
        }
        // Only now: a batch that could not begin must not be committed.
        begun.extend(rows.iter().map(|r| Begun { seq: r.seq, tokens: r.tokens.to_vec(), prompt: r.prompt }));
        Ok(())
    }

    /// Makes the tokens of the last [`Arena::begin`] part of their sequences; evicts where it is time.
    ///
    /// # Errors
    /// What a policy reports. The tokens are in their sequences even so, and nothing was evicted where it failed.
    pub(crate) fn commit(&mut self) -> Result<(), EngineError> {
        let Self { layers, groups, sequences, step, watcher, .. } = self;
        let mut result = Ok(());
        for Begun { seq, tokens, prompt } in step.begun.drain(..) {
            let s = sequences[seq.index as usize].as_mut().expect("freeing a sequence forgets the batch");
            let (len, n) = (s.tokens.len(), tokens.len());
            let (progress, ended) = s.progress.after(n, prompt, len);
            s.progress = progress;
            s.tokens.extend(tokens);
            let mut due = false;
            for (h, g) in s.held.iter_mut().zip(groups.iter()) {
                if let (Held::Set(set), Kind::Set(shape)) = (h, &g.kind) {
                    set.entries += n;
                    set.recent += std::mem::take(&mut set.counting);
                    let new = s.base + len as u64..s.base + (len + n) as u64;
                    set.positions.iter_mut().for_each(|p| p.extend(new.clone()));
                    let t = &shape.trigger;
                    due |= (ended && t.prompt_end) || t.every.is_some_and(|e| progress.decoded >= e);
                }
            }
            if due {
                s.progress.decoded = 0;
                for (g, group) in groups.iter_mut().enumerate() {
                    let done = evict_one(group, layers, s, (g, seq), None, watcher);
                    result = result.and(done);
                }
            }
        }
        result
    }

    /// Tokens of the prompts that the rows begun belong to, 0 for decoding.
    pub(crate) fn prompts(&self) -> &[u32] {
        // The same in every group.
        self.groups.first().map_or(&[], |g| g.visible.prompts())
    }

    /// Which batch is begun, counted.
    pub(crate) fn pass(&self) -> u64 {
        self.step.pass
    }

    /// Positions of the rows begun, in layer `l`; layers with the same number have the same positions.
    pub(crate) fn positions(&self, l: usize) -> (usize, &[u64]) {
        let g = self.layers[l].group;
        match &self.groups[g].kind {
            Kind::Set(s) if s.compact => (1 + g, &self.groups[g].positions),
            _ => (0, &self.step.positions),
        }
    }

    /// The positions at which the rows' queries look at sinks in layer `l`, if any row's differs from its own; layers with
    /// the same number have the same ones.
    pub(crate) fn sink_positions(&self, l: usize) -> Option<(usize, &[u64])> {
        let g = self.layers[l].group;
        self.groups[g].far.then_some((g, &self.groups[g].sink_positions[..]))
    }

    /// Stores this batch's rows in layer `l` and returns the layer and what its queries see.
    pub(crate) fn append(
        &mut self,
        device: &Device,
        l: usize,
        first: View<'_>,
        second: View<'_>,
    ) -> Result<Stored<'_>, EngineError> {
        let layer = &mut self.layers[l];
        let group = &self.groups[layer.group];
        device.kv_write_both((first, &mut layer.first), (second, &mut layer.second), &group.slots)?;
        Ok(Stored {
            first: &layer.first,
            second: &layer.second,
            visible: &group.visible,
            total: layer.masses.total.as_mut(),
            recent: layer.masses.recent.as_mut(),
            recent_rows: &group.recent,
        })
    }

    /// Whether a policy wants to see the queries of layer `l`.
    pub(crate) fn wants_queries(&self, l: usize) -> bool {
        matches!(&self.groups[self.layers[l].group].kind, Kind::Set(s) if s.needs.queries > 0)
    }

    /// Notes the batch's queries of layer `l`, `[n, heads * (key + k_pe)]`, rotated, in the coordinates of keys.
    pub(crate) fn record_queries(&mut self, l: usize, q: View<'_>) -> Result<(), EngineError> {
        let g = self.layers[l].group;
        let Kind::Set(shape) = &self.groups[g].kind else { return Ok(()) };
        let (keep, width) = (shape.needs.queries, q.cols());
        let mut all = zeros(q.rows() * width)?;
        self.layers[l].device.read(q, &mut all)?;
        let mut row = 0;
        for b in &self.step.begun {
            let s =
                self.sequences[b.seq.index as usize].as_mut().expect("freeing a sequence forgets the batch");
            let n = b.tokens.len();
            let first = if shape.compact { self.groups[g].positions[row] } else { self.step.positions[row] };
            if let Held::Set(set) = &mut s.held[g] {
                for i in n - n.min(keep)..n {
                    let query = all[(row + i) * width..][..width].to_vec();
                    set.queries.push_back((first + i as u64, query));
                }
                while set.queries.len() > keep {
                    set.queries.pop_front();
                }
            }
            row += n;
        }
        Ok(())
    }
}

impl Group {
    fn clear(&mut self) {
        self.visible.clear();
        self.slots.clear();
        self.positions.clear();
        self.sink_positions.clear();
        self.recent.clear();
        self.far = false;
    }
}

/// Begins a sequence's rows in a group whose entries a policy chooses, after making room if there is none.
fn begin_set(
    chunk: usize,
    group: &mut Group,
    layers: &mut [LayerKv],
    s: &mut Sequence,
    (g, r): (usize, &Rows<'_>),
    spans: &mut Vec<Span>,
    watcher: &mut Option<Watcher>,
) -> Result<(), EngineError> {
    let (len, n) = (s.tokens.len(), r.tokens.len());
    evict_one(group, layers, s, (g, r.seq), Some(n), watcher)?;
    let row = group.slots.len();
    let Group { kind, pool, visible, slots, positions, recent, .. } = group;
    let (Kind::Set(shape), Held::Set(set)) = (kind, &mut s.held[g]) else { return Ok(()) };
    set.extend(pool, n, slots);
    for i in set.entries..set.entries + n {
        spans.clear();
        set.see(i, spans);
        visible.push(spans.iter().copied());
        positions.push(i as u64);
    }
    let LayerKv { device, masses, .. } = &mut layers[group.layers[0]];
    for mass in [&mut masses.total, &mut masses.recent].into_iter().flatten() {
        Masses::clear(mass, device, &slots[row..])?;
    }
    set.counting = 0;
    if let Some(mass) = &mut masses.recent {
        let rows = set.recent_rows(shape, n, s.progress.after(n, r.prompt, len), r.prompt, chunk);
        set.counting = rows.len();
        if rows.is_empty() {
            set.recent = 0;
        } else {
            if set.recent == 0 {
                Masses::clear(mass, device, &set.slots(set.entries + n))?;
            }
            recent.push(row + rows.start..row + rows.end);
        }
    }
    Ok(())
}

/// Evicts from one sequence in one group: down to the budget, or (`room`) only if that many more entries do not fit, and
/// then so far that they do.
fn evict_one(
    group: &mut Group,
    layers: &mut [LayerKv],
    s: &mut Sequence,
    (g, seq): (usize, SeqId),
    room: Option<usize>,
    watcher: &mut Option<Watcher>,
) -> Result<(), EngineError> {
    let Group { kind, pool, layers: of, .. } = group;
    let (Kind::Set(shape), Held::Set(set)) = (kind, &mut s.held[g]) else { return Ok(()) };
    let (shape, pool): (&SetShape, &mut Pool) = (shape, pool);
    let set: &mut Set = set;
    let target = match room {
        Some(n) if set.entries + n <= shape.capacity => return Ok(()),
        Some(n) => shape.budget.min(shape.capacity - n),
        None => shape.budget,
    };
    let occasion = Occasion { target, len: s.tokens.len(), prompt: s.progress.prompt_end };
    let tokens = &s.tokens;
    evict(shape, set, &mut layers[of[0]], pool, occasion, |view, kept| {
        if let Some(w) = watcher {
            w(&Eviction { seq, tokens, view, kept });
        }
    })
}
