//! The cache of a loaded model: the buffers of all layers, allocated once, and the sequences that share them.
//!
//! Layers that keep the same entries form a group; a group's slots are dealt out in blocks. Models ask only for the slots to
//! write, for positions and for what is visible; they never compute any of it. Knows nothing of models.

use super::geometry::{CacheTypes, LayerSpec};
use super::pool::{BLOCK, Pool};
use super::ring::{Reach, Ring};
use crate::EngineError;
use kernels::{Device, KvBuf, Span, View, Visible};

/// How large a cache is and what it keeps.
#[derive(Clone, Debug)]
pub struct ArenaOptions {
    /// Tokens of a sequence, where what it keeps sets no bound of its own.
    pub ctx: usize,
    /// Tokens of one sequence in one forward pass at most.
    pub chunk: usize,
    /// Sequences at a time.
    pub sequences: usize,
    /// What layers without local attention keep.
    pub keep: Reach,
}

impl ArenaOptions {
    /// Tokens after which a sequence is full; `None`: never.
    pub fn end(&self) -> Option<usize> {
        self.keep.window.is_none().then_some(self.ctx)
    }

    /// What a layer keeps. Local attention looks at its own window under every policy, or at the policy's where that is
    /// shorter; sinks lie outside of it.
    fn reach(&self, s: &LayerSpec) -> Reach {
        match s.window {
            Some(w) => Reach { sinks: 0, window: Some(self.keep.window.map_or(w, |k| k.min(w))) },
            None => self.keep,
        }
    }

    fn groups(&self, specs: &[LayerSpec]) -> Vec<(Reach, Vec<usize>)> {
        let mut groups: Vec<(Reach, Vec<usize>)> = Vec::new();
        for (l, s) in specs.iter().enumerate() {
            let reach = self.reach(s);
            match groups.iter_mut().find(|g| g.0 == reach) {
                Some(g) => g.1.push(l),
                None => groups.push((reach, vec![l])),
            }
        }
        groups
    }

    fn check(&self) -> Result<(), EngineError> {
        let fail = |s: String| Err(EngineError::Option(s));
        if self.ctx == 0 || u32::try_from(self.ctx).is_err() {
            return fail(format!("a context of {} entries is not possible", self.ctx));
        }
        if self.chunk == 0 {
            return fail("a batch size of 0 is not possible".into());
        }
        if self.sequences == 0 {
            return fail("a cache for 0 sequences is not possible".into());
        }
        if self.keep.window == Some(0) {
            return fail("a window of 0 tokens is not possible".into());
        }
        Ok(())
    }

    /// Entries that a query sees at most, in any layer.
    pub fn seen(&self, specs: &[LayerSpec]) -> usize {
        self.groups(specs).iter().map(|g| g.0.seen(self.end())).max().unwrap_or(0)
    }

    /// Bytes that [`Arena::new`] allocates.
    pub fn bytes(&self, specs: &[LayerSpec], types: CacheTypes) -> Result<usize, EngineError> {
        self.check()?;
        let mut sum = 0;
        for (reach, layers) in self.groups(specs) {
            let slots = self.slots(&reach)?;
            for l in layers {
                sum += types.bytes(&specs[l], slots)?;
            }
        }
        Ok(sum)
    }

    fn slots(&self, reach: &Reach) -> Result<usize, EngineError> {
        let blocks = reach.blocks(self.chunk, self.end()).checked_mul(self.sequences);
        let slots = blocks.and_then(|b| b.checked_mul(BLOCK)).filter(|s| u32::try_from(*s).is_ok());
        slots.ok_or_else(|| {
            EngineError::Option(format!(
                "{} sequences of {} entries are not possible",
                self.sequences, self.ctx
            ))
        })
    }
}

/// A sequence of an [`Arena`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeqId {
    index: u32,
    /// Ids of freed sequences stay wrong for ever.
    generation: u32,
}

/// The next tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Whose.
    pub seq: SeqId,
    /// Their ids.
    pub tokens: &'a [u32],
    /// The length of the prompt that they are part of, however it is cut, or 0 when decoding: backends choose their method
    /// by it.
    pub prompt: usize,
}

/// One layer's buffers, `[slots, width]` each.
pub struct LayerKv {
    /// Keys, or latents.
    pub first: KvBuf,
    /// Values, or shared rotary keys.
    pub second: KvBuf,
    group: usize,
}

/// Layers that keep the same entries.
struct Group {
    reach: Reach,
    layers: Vec<usize>,
    pool: Pool,
    /// Of the batch begun: what its rows see, their slots, and the positions at which their queries look at sinks.
    visible: Visible,
    slots: Vec<u32>,
    sink_positions: Vec<u64>,
    /// Whether any of these differs from the row's own position.
    far: bool,
}

struct Sequence {
    generation: u32,
    /// Position of the first token.
    base: u64,
    tokens: Vec<u32>,
    /// Per group.
    rings: Vec<Ring>,
}

/// The cache. Its memory is allocated once.
pub struct Arena {
    options: ArenaOptions,
    layers: Vec<LayerKv>,
    groups: Vec<Group>,
    sequences: Vec<Option<Sequence>>,
    generation: u32,
    /// Of the batch begun: whose rows, how many of each.
    begun: Vec<(usize, Vec<u32>)>,
    positions: Vec<u64>,
    spans: Vec<Span>,
    moves: Vec<(u32, u32)>,
}

impl Arena {
    /// Allocates the cache of layers `specs`.
    ///
    /// # Errors
    /// Impossible sizes or types, or memory that cannot be had.
    pub fn new(
        device: &Device,
        specs: &[LayerSpec],
        types: CacheTypes,
        options: ArenaOptions,
    ) -> Result<Self, EngineError> {
        options.check()?;
        let mut groups = Vec::new();
        let mut of = vec![0; specs.len()];
        for (reach, layers) in options.groups(specs) {
            layers.iter().for_each(|&l| of[l] = groups.len());
            let pool = Pool::new(options.slots(&reach)? / BLOCK);
            groups.push(Group {
                reach,
                layers,
                pool,
                visible: Visible::default(),
                slots: Vec::new(),
                sink_positions: Vec::new(),
                far: false,
            });
        }
        let mut layers = Vec::with_capacity(specs.len());
        for (s, &group) in specs.iter().zip(&of) {
            let slots = groups[group].pool.len() * BLOCK;
            layers.push(LayerKv {
                first: device.alloc_kv(types.k, slots, s.first)?,
                second: device.alloc_kv(types.second(s.second_kind), slots, s.second)?,
                group,
            });
        }
        let sequences = (0..options.sequences).map(|_| None).collect();
        Ok(Self {
            options,
            layers,
            groups,
            sequences,
            generation: 0,
            begun: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            moves: Vec::new(),
        })
    }

    /// What it was made for.
    pub fn options(&self) -> &ArenaOptions {
        &self.options
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.first.bytes() + l.second.bytes()).sum()
    }

    /// Entries that sequences hold, of all that there is room for, summed over layers.
    pub fn entries(&self) -> (usize, usize) {
        let sum = |f: fn(&Pool) -> usize| {
            self.groups.iter().map(|g| f(&g.pool) * g.layers.len() * BLOCK).sum::<usize>()
        };
        (sum(Pool::held), sum(Pool::len))
    }

    /// Admits a sequence whose first token has position `base`, with all the blocks that it can ever need.
    ///
    /// # Errors
    /// [`EngineError::NoRoom`] if as many sequences as the arena was made for are there.
    pub fn admit(&mut self, base: u64) -> Result<SeqId, EngineError> {
        let rings = self.groups.iter().map(|_| Ring::default()).collect();
        self.place(Sequence { generation: 0, base, tokens: Vec::new(), rings })
    }

    fn room(&self) -> Result<usize, EngineError> {
        let free = self.sequences.iter().position(Option::is_none);
        free.ok_or(EngineError::NoRoom { sequences: self.options.sequences })
    }

    fn place(&mut self, mut s: Sequence) -> Result<SeqId, EngineError> {
        let index = self.room()?;
        for g in &mut self.groups {
            let promised = g.pool.promise(g.reach.blocks(self.options.chunk, self.options.end()));
            assert!(promised, "an arena has blocks for all its sequences");
        }
        self.generation += 1;
        s.generation = self.generation;
        self.sequences[index] = Some(s);
        Ok(SeqId { index: index as u32, generation: self.generation })
    }

    fn get(&self, id: SeqId) -> Result<&Sequence, EngineError> {
        let s = self.sequences.get(id.index as usize).and_then(Option::as_ref);
        s.filter(|s| s.generation == id.generation).ok_or(EngineError::NoSequence)
    }

    /// Frees a sequence. Blocks that others share stay theirs.
    pub fn free(&mut self, id: SeqId) -> Result<(), EngineError> {
        self.truncate(id, 0)?;
        self.begun.clear();
        self.sequences[id.index as usize] = None;
        for g in &mut self.groups {
            g.pool.release_promise(g.reach.blocks(self.options.chunk, self.options.end()));
        }
        Ok(())
    }

    /// A second sequence with the same past. Blocks are shared until one of the two writes into them.
    ///
    /// # Errors
    /// [`EngineError::NoRoom`].
    pub fn fork(&mut self, id: SeqId) -> Result<SeqId, EngineError> {
        self.get(id)?;
        self.room()?;
        let s = self.sequences[id.index as usize].as_ref().expect("checked");
        let rings = s.rings.iter().zip(&mut self.groups).map(|(r, g)| r.fork(&mut g.pool)).collect();
        let (base, tokens) = (s.base, s.tokens.clone());
        self.place(Sequence { generation: 0, base, tokens, rings })
    }

    /// The tokens of a sequence, those no longer seen included.
    pub fn tokens(&self, id: SeqId) -> Result<&[u32], EngineError> {
        Ok(&self.get(id)?.tokens)
    }

    /// Tokens that no query of a layer without local attention will see any more.
    pub fn evicted(&self, id: SeqId) -> Result<usize, EngineError> {
        let len = self.get(id)?.tokens.len();
        let keep = self.options.keep;
        Ok(keep.window.map_or(0, |w| len.saturating_sub(keep.sinks + w)))
    }

    /// Forgets all but the first `len` tokens; where entries are gone that the next query would need, all but fewer. Returns
    /// how many are left.
    pub fn truncate(&mut self, id: SeqId, len: usize) -> Result<usize, EngineError> {
        let s = self.get(id)?;
        let mut left = len.min(s.tokens.len());
        loop {
            let rings = s.rings.iter().zip(&self.groups);
            let usable = rings.map(|(r, g)| r.usable(&g.reach, left)).min().unwrap_or(left);
            if usable == left {
                break;
            }
            left = usable;
        }
        let s = self.sequences[id.index as usize].as_mut().expect("checked");
        s.tokens.truncate(left);
        for (r, g) in s.rings.iter_mut().zip(&mut self.groups) {
            r.truncate(&g.reach, &mut g.pool, left);
        }
        Ok(left)
    }

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
    /// [`EngineError::Context`] if they do not fit, [`EngineError::NoSequence`]; then nothing has changed.
    pub fn begin(&mut self, device: &Device, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        self.check(rows)?;
        let Self { options, layers, groups, sequences, begun, positions, spans, moves, .. } = self;
        begun.clear();
        positions.clear();
        for r in rows {
            let s = sequences[r.seq.index as usize].as_ref().expect("checked");
            let first = s.base + s.tokens.len() as u64;
            positions.extend(first..first + r.tokens.len() as u64);
        }
        for (g, group) in groups.iter_mut().enumerate() {
            let Group { reach, pool, visible, slots, sink_positions, far, .. } = group;
            visible.clear();
            slots.clear();
            sink_positions.clear();
            moves.clear();
            *far = false;
            let most = reach.blocks(options.chunk, options.end());
            for r in rows {
                let s = sequences[r.seq.index as usize].as_mut().expect("checked");
                let (len, n) = (s.tokens.len(), r.tokens.len());
                s.rings[g].extend(reach, pool, (len, n), most, moves, slots);
                visible.set_prompt(r.prompt);
                for t in len..len + n {
                    spans.clear();
                    s.rings[g].see(reach, t, spans);
                    visible.push(spans.iter().copied());
                    if let Some(limit) = reach.far() {
                        *far |= t as u64 > limit;
                        sink_positions.push(s.base + limit.min(t as u64));
                    }
                }
            }
            if !moves.is_empty() {
                for &l in &group.layers {
                    let LayerKv { first, second, .. } = &mut layers[l];
                    let (a, b) = (first.width(), second.width());
                    device.kv_move(first, moves, 0..a)?;
                    device.kv_move(second, moves, 0..b)?;
                }
            }
        }
        // Only now: a batch that could not begin must not be committed.
        begun.extend(rows.iter().map(|r| (r.seq.index as usize, r.tokens.to_vec())));
        Ok(())
    }

    /// Makes the tokens of the last [`Arena::begin`] part of their sequences.
    pub fn commit(&mut self) {
        for (i, tokens) in self.begun.drain(..) {
            let s = self.sequences[i].as_mut().expect("freeing a sequence forgets the batch");
            s.tokens.extend(tokens);
        }
    }

    /// Positions of the rows begun, in layer `l`; layers with the same number have the same positions.
    pub fn positions(&self, l: usize) -> (usize, &[u64]) {
        let _ = l;
        (0, &self.positions)
    }

    /// The positions at which the rows' queries look at sinks in layer `l`, if any row's differs from its own; layers with
    /// the same number have the same ones.
    pub fn sink_positions(&self, l: usize) -> Option<(usize, &[u64])> {
        let g = self.layers[l].group;
        self.groups[g].far.then_some((g, &self.groups[g].sink_positions[..]))
    }

    /// Stores this batch's rows in layer `l` and returns the layer and what its queries see.
    pub fn append(
        &mut self,
        device: &Device,
        l: usize,
        first: View<'_>,
        second: View<'_>,
    ) -> Result<(&LayerKv, &Visible), EngineError> {
        let layer = &mut self.layers[l];
        let group = &self.groups[layer.group];
        device.kv_write(first, &mut layer.first, &group.slots)?;
        device.kv_write(second, &mut layer.second, &group.slots)?;
        Ok((layer, &group.visible))
    }
}
