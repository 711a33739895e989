//! The cache of a loaded model: the buffers of all layers, allocated once, and the sequences that share them.
//!
//! Layers that keep the same entries form a group; a group's slots are dealt out in blocks. What a forward pass does with it
//! is in `step`. Knows nothing of models.

use super::evict::{Masses, read_mass, write_mass};
use super::geometry::{CacheTypes, LayerSpec};
use super::options::{ArenaOptions, Kind};
use super::policy::{KvError, LayerView, Selection};
use super::pool::{BLOCK, Pool};
use super::ring::Ring;
use super::set::{Progress, Set, SetShape};
use super::spec::KvPlan;
use super::step::Step;
use crate::EngineError;
use crate::stages::Devices;
use kernels::{Device, KvBuf, Visible};
use std::ops::Range;

/// The last position a sequence may begin at: none that follows overflows.
pub(super) const LAST_BASE: u64 = 1 << 62;

/// A sequence of an [`Arena`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeqId {
    pub(super) index: u32,
    /// Ids of freed sequences stay wrong for ever.
    pub(super) generation: u32,
}

/// One layer's buffers, `[slots, width]` each.
pub struct LayerKv {
    /// Where they lie.
    pub(super) device: Device,
    /// Keys, or latents.
    pub first: KvBuf,
    /// Values, or shared rotary keys.
    pub second: KvBuf,
    pub(super) masses: Masses,
    pub(super) group: usize,
}

/// Layers that keep the same entries.
pub(super) struct Group {
    pub kind: Kind,
    pub layers: Vec<usize>,
    pub pool: Pool,
    /// Blocks promised to each sequence.
    pub most: usize,
    /// Of the batch begun: what its rows see, their slots, their positions where these are the group's own, the positions at
    /// which their queries look at sinks and whether any of these differs from the row's own, and which rows count for the
    /// recent mass.
    pub visible: Visible,
    pub slots: Vec<u32>,
    pub positions: Vec<u64>,
    pub sink_positions: Vec<u64>,
    pub far: bool,
    pub recent: Vec<Range<usize>>,
}

/// What a sequence holds in a group.
pub(super) enum Held {
    Ring(Ring),
    Set(Set),
}

pub(super) struct Sequence {
    pub generation: u32,
    /// Position of the first token.
    pub base: u64,
    /// Sinks of its own, instead of the configuration's.
    pub sinks: Option<usize>,
    pub tokens: Vec<u32>,
    /// Per group.
    pub held: Vec<Held>,
    pub progress: Progress,
}

/// An eviction as a watcher sees it, before anything moves.
pub struct Eviction<'a> {
    /// Whose.
    pub seq: SeqId,
    /// All tokens of the sequence.
    pub tokens: &'a [u32],
    /// What the policy saw; what it asked for is there.
    pub view: &'a LayerView<'a>,
    /// What it keeps.
    pub kept: &'a Selection,
}

/// Is told of every eviction.
pub type Watcher = Box<dyn FnMut(&Eviction<'_>) + Send>;

/// The cache. Its memory is allocated once.
pub struct Arena {
    pub(super) options: ArenaOptions,
    pub(super) layers: Vec<LayerKv>,
    pub(super) groups: Vec<Group>,
    pub(super) sequences: Vec<Option<Sequence>>,
    generation: u32,
    pub(super) step: Step,
    pub(super) watcher: Option<Watcher>,
}

/// Heads that are chosen for on their own, and keys that are turned, must begin and end with whole blocks.
fn check_blocks(s: &SetShape, layer: &LayerKv) -> Result<(), EngineError> {
    let g = &s.geometry;
    let alone = s.policy.per_head() && g.kv_heads > 1;
    for buf in [&layer.first, &layer.second] {
        let dim = buf.width() / g.kv_heads;
        if (alone || s.compact) && buf.byte_range(&(0..dim)).is_none() {
            return Err(EngineError::Kv(KvError::Unsupported {
                policy: format!("{:?}", s.policy),
                layer: g.layer,
                why: format!(
                    "its heads of {dim} are not whole blocks of {}: choose f16 for the cache",
                    buf.dtype().name()
                ),
            }));
        }
    }
    Ok(())
}

impl Arena {
    /// Allocates the cache of layers `specs`, each layer's on its device.
    ///
    /// # Errors
    /// Impossible sizes or types, or memory that cannot be had.
    pub(crate) fn new(
        on: &Devices,
        specs: &[LayerSpec],
        types: CacheTypes,
        options: ArenaOptions,
    ) -> Result<Self, EngineError> {
        options.check()?;
        let (mut groups, mut slots) = (Vec::new(), Vec::new());
        let mut of = vec![0; specs.len()];
        for (kind, layers) in options.groups(specs) {
            layers.iter().for_each(|&l| of[l] = groups.len());
            slots.push(options.slots(&kind)?);
            groups.push(Group {
                // Filled below, when there is memory for what it counts.
                pool: Pool::new(0),
                most: options.blocks(&kind),
                kind,
                layers,
                visible: Visible::default(),
                slots: Vec::new(),
                positions: Vec::new(),
                sink_positions: Vec::new(),
                far: false,
                recent: Vec::new(),
            });
        }
        let mut layers = Vec::with_capacity(specs.len());
        for (l, (s, &group)) in specs.iter().zip(&of).enumerate() {
            let device = on.layer(l);
            let slots = slots[group] / BLOCK * BLOCK;
            let mut masses = Masses::default();
            if let Kind::Set(set) = &groups[group].kind {
                let heads = set.geometry.kv_heads;
                let mass = |wanted: bool| wanted.then(|| device.alloc(heads, slots)).transpose();
                masses.total = mass(set.needs.mass_total)?;
                masses.recent = mass(set.needs.mass_recent > 0)?;
            }
            let layer = LayerKv {
                first: device.alloc_kv(types.k, slots, s.first)?,
                second: device.alloc_kv(types.second(s.second_kind), slots, s.second)?,
                masses,
                group,
                device: device.clone(),
            };
            if let Kind::Set(set) = &groups[group].kind {
                check_blocks(set, &layer)?;
            }
            layers.push(layer);
        }
        groups.iter_mut().zip(slots).for_each(|(g, n): (&mut Group, _)| g.pool = Pool::new(n / BLOCK));
        Ok(Self {
            sequences: (0..options.sequences).map(|_| None).collect(),
            options,
            layers,
            groups,
            generation: 0,
            step: Step::default(),
            watcher: None,
        })
    }

    /// What it was made for.
    pub fn options(&self) -> &ArenaOptions {
        &self.options
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let mass = |m: &Option<kernels::Buf>| m.as_ref().map_or(0, kernels::Buf::bytes);
        let layer =
            |l: &LayerKv| l.first.bytes() + l.second.bytes() + mass(&l.masses.total) + mass(&l.masses.recent);
        self.layers.iter().map(layer).sum()
    }

    /// Entries in blocks that sequences hold, and all there are, summed over layers.
    pub fn entries(&self) -> (usize, usize) {
        let sum = |f: fn(&Pool) -> usize| {
            self.groups.iter().map(|g| f(&g.pool) * g.layers.len() * BLOCK).sum::<usize>()
        };
        (sum(Pool::held), sum(Pool::len))
    }

    /// Has `watcher` told of every eviction that a policy makes from now on.
    pub fn watch(&mut self, watcher: Option<Watcher>) {
        self.watcher = watcher;
    }

    /// Admits a sequence whose first token has position `base`, with all the blocks that it can ever need.
    ///
    /// # Errors
    /// [`EngineError::NoRoom`] if as many sequences as the arena was made for are there. Policies that choose by position
    /// need base 0.
    pub fn admit(&mut self, base: u64) -> Result<SeqId, EngineError> {
        self.check_base(base)?;
        let held = self.groups.iter().map(|g| match &g.kind {
            Kind::Ring(_) => Held::Ring(Ring::default()),
            Kind::Set(s) => Held::Set(Set::new(s)),
        });
        let held = held.collect();
        let progress = Progress::default();
        self.place(Sequence { generation: 0, base, sinks: None, tokens: Vec::new(), held, progress })
    }

    fn check_base(&self, base: u64) -> Result<(), EngineError> {
        if base > 0 && self.groups.iter().any(|g| matches!(g.kind, Kind::Set(_))) {
            let why = "a kv policy that chooses entries needs positions from 0 on";
            return Err(EngineError::Option(why.into()));
        }
        if base > LAST_BASE {
            return Err(EngineError::Option(format!("a first position of {base} is not possible")));
        }
        Ok(())
    }

    /// Forgets a sequence's tokens; its next one has position `base`.
    ///
    /// # Errors
    /// As [`Arena::admit`] for a position that is not possible; then nothing has changed.
    pub fn restart(&mut self, id: SeqId, base: u64) -> Result<(), EngineError> {
        self.check_base(base)?;
        self.truncate(id, 0)?;
        if let Some(s) = &mut self.sequences[id.index as usize] {
            s.base = base;
        }
        Ok(())
    }

    fn room(&self) -> Result<usize, EngineError> {
        let free = self.sequences.iter().position(Option::is_none);
        free.ok_or(EngineError::NoRoom { sequences: self.options.sequences })
    }

    fn place(&mut self, mut s: Sequence) -> Result<SeqId, EngineError> {
        let index = self.room()?;
        for g in &mut self.groups {
            assert!(g.pool.promise(g.most), "an arena has blocks for all its sequences");
        }
        self.generation += 1;
        s.generation = self.generation;
        self.sequences[index] = Some(s);
        Ok(SeqId { index: index as u32, generation: self.generation })
    }

    pub(super) fn get(&self, id: SeqId) -> Result<&Sequence, EngineError> {
        let s = self.sequences.get(id.index as usize).and_then(Option::as_ref);
        s.filter(|s| s.generation == id.generation).ok_or(EngineError::NoSequence)
    }

    /// Frees a sequence. Blocks that others share stay theirs.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn free(&mut self, id: SeqId) -> Result<(), EngineError> {
        self.truncate(id, 0)?;
        self.sequences[id.index as usize] = None;
        self.groups.iter_mut().for_each(|g| g.pool.release_promise(g.most));
        Ok(())
    }

    /// A second sequence with the same past. Rings share blocks until one of the two writes into them; sets, whose entries
    /// move when a policy evicts, are copied.
    ///
    /// # Errors
    /// [`EngineError::NoRoom`], [`EngineError::NoSequence`].
    pub fn fork(&mut self, id: SeqId) -> Result<SeqId, EngineError> {
        self.get(id)?;
        self.room()?;
        let Self { layers, groups, sequences, .. } = self;
        let s = sequences[id.index as usize].as_ref().expect("checked");
        let mut held = Vec::with_capacity(groups.len());
        for (h, g) in s.held.iter().zip(groups) {
            held.push(match h {
                Held::Ring(r) => Held::Ring(r.fork(&mut g.pool)),
                Held::Set(old) => Held::Set(copy(old, g, layers)?),
            });
        }
        let (base, sinks, tokens, progress) = (s.base, s.sinks, s.tokens.clone(), s.progress);
        self.place(Sequence { generation: 0, base, sinks, tokens, held, progress })
    }

    /// The tokens of a sequence, those no longer seen included.
    pub fn tokens(&self, id: SeqId) -> Result<&[u32], EngineError> {
        Ok(&self.get(id)?.tokens)
    }

    /// Tokens that are not seen any more: of the layers that the policy rules, the one that has let go of most.
    pub fn evicted(&self, id: SeqId) -> Result<usize, EngineError> {
        let s = self.get(id)?;
        let len = s.tokens.len();
        let window = match self.options.keep {
            KvPlan::Ring { sinks, window } => sinks + window,
            _ => usize::MAX,
        };
        let sets = s.held.iter().filter_map(|h| match h {
            Held::Set(set) => Some(set.entries),
            Held::Ring(_) => None,
        });
        Ok(len.saturating_sub(sets.min().unwrap_or(window)))
    }

    /// Where the tokens of a sequence still are: it is cut into `parts` stretches of equal length, and of each the share of
    /// entries is given, 0 to 1 over all layers and heads, that its next query can see. Empty for an empty sequence.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn held(&self, id: SeqId, parts: usize) -> Result<Vec<f32>, EngineError> {
        let s = self.get(id)?;
        let len = s.tokens.len();
        let parts = parts.min(len);
        // Weighted by layers; heads count as parts of a layer.
        let mut sums = vec![0.0; parts];
        for (h, g) in s.held.iter().zip(&self.groups) {
            let layers = g.layers.len() as f32;
            match (h, &g.kind) {
                (Held::Ring(_), Kind::Ring(reach)) => {
                    let reach = reach.with_sinks(s.sinks);
                    reach.kept(len).for_each(|i| sums[i * parts / len] += layers);
                }
                (Held::Set(set), _) => {
                    let share = layers / set.positions.len() as f32;
                    let entries = set.positions.iter().flatten().map(|&p| p as usize).filter(|&p| p < len);
                    entries.for_each(|p| sums[p * parts / len] += share);
                }
                _ => {}
            }
        }
        let layers = self.groups.iter().map(|g| g.layers.len()).sum::<usize>() as f32;
        // Index i lies in stretch floor(i * parts / len).
        let begin = |part: usize| (part * len).div_ceil(parts);
        let all = |part: usize| (begin(part + 1) - begin(part)) as f32 * layers;
        Ok(sums.iter().enumerate().map(|(part, sum)| sum / all(part)).collect())
    }

    /// Forgets all but the first `len` tokens; where entries are gone that the next query would need, all but fewer. Returns
    /// how many are left. A policy that has evicted or recorded anything since then leaves none: what it keeps depends on
    /// what came after.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn truncate(&mut self, id: SeqId, len: usize) -> Result<usize, EngineError> {
        let s = self.get(id)?;
        let now = s.tokens.len();
        let mut left = len.min(now);
        loop {
            let usable = s.held.iter().zip(&self.groups).map(|(h, g)| match (h, &g.kind) {
                (Held::Ring(r), Kind::Ring(reach)) => r.usable(&reach.with_sinks(s.sinks), left),
                (Held::Set(set), Kind::Set(shape)) => set.usable(shape, left, now),
                _ => 0,
            });
            let usable = usable.min().unwrap_or(left);
            if usable == left {
                break;
            }
            left = usable;
        }
        self.step.forget();
        let s = self.sequences[id.index as usize].as_mut().expect("checked");
        s.tokens.truncate(left);
        // What comes next is a prompt of its own, even if the latest was broken off and nothing is taken back.
        s.progress.reading = Progress::default().reading;
        if left < now {
            s.progress = Progress { prompt_end: s.progress.prompt_end.min(left), ..Progress::default() };
        }
        for (h, g) in s.held.iter_mut().zip(&mut self.groups) {
            match (h, &g.kind) {
                (Held::Ring(r), Kind::Ring(reach)) => {
                    r.truncate(&reach.with_sinks(s.sinks), &mut g.pool, left);
                }
                (Held::Set(set), _) if left < now => set.truncate(&mut g.pool, left, now),
                _ => {}
            }
        }
        Ok(left)
    }

    /// Has a ring with sinks keep at least the first `n` tokens of this sequence, in whole blocks, for as long as something
    /// follows: the window is shorter or longer by as much. A quarter of both always stays the window's. Returns how many of
    /// the sequence's tokens are left: those that would be the same with the new sinks. Caches that keep everything, have no
    /// sinks or choose what stays are as they were.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn set_sinks(&mut self, id: SeqId, n: usize) -> Result<usize, EngineError> {
        let s = self.get(id)?;
        let (old, now) = (s.sinks, s.tokens.len());
        let KvPlan::Ring { sinks, window } = self.options.keep else { return Ok(now) };
        let new = n.max(1).next_multiple_of(BLOCK).min(self.most_sinks());
        if new == 0 || old.unwrap_or(sinks) == new {
            return Ok(now);
        }
        // As long as all is seen, sinks change nothing.
        let mut left = self.truncate(id, now.min(sinks + window))?;
        let s = self.sequences[id.index as usize].as_mut().expect("checked");
        let mut moved = true;
        for (h, g) in s.held.iter_mut().zip(&self.groups) {
            if let (Held::Ring(r), Kind::Ring(reach)) = (h, &g.kind)
                && reach.sinks > 0
            {
                moved = r.resink(&reach.with_sinks(old), &reach.with_sinks(Some(new)), left);
            }
        }
        if !moved {
            left = self.truncate(id, 0)?;
        }
        self.sequences[id.index as usize].as_mut().expect("checked").sinks = Some(new);
        Ok(left)
    }

    /// Sinks that a sequence may have of its own; 0: none.
    pub(super) fn most_sinks(&self) -> usize {
        match self.options.keep {
            KvPlan::Ring { sinks, window } if sinks > 0 => {
                let all = sinks + window;
                (all - all / 4) / BLOCK * BLOCK
            }
            _ => 0,
        }
    }

    /// The first tokens of a sequence that stay for as long as something follows; 0 where the cache has no sinks.
    ///
    /// # Errors
    /// [`EngineError::NoSequence`].
    pub fn sinks(&self, id: SeqId) -> Result<usize, EngineError> {
        let own = self.get(id)?.sinks;
        Ok(match self.options.keep {
            KvPlan::Ring { sinks, .. } => own.unwrap_or(sinks),
            _ => 0,
        })
    }
}

/// A set with the same entries in blocks of its own.
fn copy(old: &Set, g: &mut Group, layers: &mut [LayerKv]) -> Result<Set, EngineError> {
    let mut new = Set { blocks: Vec::new(), entries: 0, ..old.clone() };
    let mut slots = Vec::new();
    new.extend(&mut g.pool, old.entries, &mut slots);
    new.entries = old.entries;
    let from = old.slots(old.entries);
    let moves: Vec<(u32, u32)> = from.iter().copied().zip(slots.iter().copied()).collect();
    for &l in &g.layers {
        let LayerKv { device, first, second, masses, .. } = &mut layers[l];
        let (a, b) = (first.width(), second.width());
        device.kv_move(first, &moves, 0..a)?;
        device.kv_move(second, &moves, 0..b)?;
        for mass in [&mut masses.total, &mut masses.recent].into_iter().flatten() {
            let values = read_mass(device, mass, &from)?;
            write_mass(device, mass, &slots, &values)?;
        }
    }
    Ok(new)
}

#[cfg(test)]
#[path = "arena_tests.rs"]
mod tests;
