//! Working memory of the backend on the device: a few areas, sized once from `Limits`, and lists that are sent there only when they
//! change. An operation on more rows than an area holds takes several passes, which changes no bit. Knows bytes.

use super::gpu::{Counted, Memory};
use super::launch::{TILE_COLUMNS, choices};
use super::operands::{BLOCK_BYTES, Floats, Parts, input_bytes};
use crate::{Hidden, KernelError, Limits, MOST_BEST, ViewMut};
use quant::DType;
use std::sync::Arc;

/// What an area is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Inputs of products, rounded to int8 or f16.
    Input,
    /// Hidden activations likewise, and MLA's rounded heads.
    Hidden,
    /// The gate's side of hidden activations.
    Gate,
    /// The other.
    Up,
    /// Outputs of experts before they are added up.
    Experts,
    /// Outputs of shared experts.
    Shared,
    /// The router's logits.
    Logits,
    /// Chosen experts.
    RouteIds,
    /// Their weights.
    RouteWeights,
    /// Jobs sorted by expert.
    JobOrder,
    /// Tiles of them.
    JobTiles,
    /// MLA's queries in the coordinates of the latent.
    Absorbed,
    /// What MLA's heads saw, in those too.
    Latents,
    /// Which head a row of heads is.
    HeadIds,
    /// Parts of attention.
    Parts,
    /// The best of rows' values, and of their parts.
    Best,
    /// Ids of tokens, rows, or pairs of slots.
    Ids,
    /// What rows see, for two groups of layers.
    Lists,
    OtherLists,
    /// Slots that rows go to, likewise.
    Slots,
    OtherSlots,
}

const AREAS: [(Area, &str); 21] = [
    (Area::Input, "rounded inputs"),
    (Area::Hidden, "rounded hidden activations"),
    (Area::Gate, "hidden activations"),
    (Area::Up, "hidden activations"),
    (Area::Experts, "outputs of experts"),
    (Area::Shared, "outputs of shared experts"),
    (Area::Logits, "router's logits"),
    (Area::RouteIds, "lists of experts"),
    (Area::RouteWeights, "weights of experts"),
    (Area::JobOrder, "lists of experts"),
    (Area::JobTiles, "lists of experts"),
    (Area::Absorbed, "absorbed queries"),
    (Area::Latents, "sums of latents"),
    (Area::HeadIds, "lists of heads"),
    (Area::Parts, "parts of attention"),
    (Area::Best, "best logits"),
    (Area::Ids, "lists of rows"),
    (Area::Lists, "lists of cache entries"),
    (Area::OtherLists, "lists of cache entries"),
    (Area::Slots, "lists of slots"),
    (Area::OtherSlots, "lists of slots"),
];

/// An area of what rows need is no larger, unless one row needs more: beyond, an operation takes several passes.
const BUDGET: usize = 64 << 20;
/// Words that lists are sent in; areas have a multiple of it.
const ROUND: usize = 16;
/// Bytes for what rows see beyond one span for each slot of the cache.
const SPANS: usize = 64 << 10;

/// Rows whose best are found at a time.
const BEST_ROWS: usize = 16;

/// Bytes of the `k` best of a row of so many columns: pairs, of its parts too.
pub fn best_bytes(k: usize, cols: usize) -> usize {
    8 * k * (1 + choices(cols))
}

/// Bytes of the tiles of so many jobs (`sort_experts`).
pub fn tile_bytes(jobs: usize, experts: usize) -> usize {
    12 * (jobs / TILE_COLUMNS + experts)
}

/// Bytes of each area.
pub struct Sizes([usize; AREAS.len()]);

impl Sizes {
    pub fn of(l: &Limits) -> Self {
        let tokens = l.tokens.max(1);
        // As many rows as the budget allows.
        let rows = |each: usize| each * (BUDGET / each.max(1)).clamp(1, tokens);
        let blocks = |values: usize| values.div_ceil(256) * BLOCK_BYTES;
        // Rounded, or of prompts in f16; `float`: only the latter.
        let read = |rounded: usize, float: usize| {
            let half = |values: usize| input_bytes(DType::F16, values, values > 0);
            blocks(rounded).max(half(rounded.max(float)))
        };
        let dense = l.hidden.rounded.max(l.hidden.float);
        let routed = l.used * l.routed.rounded.max(l.routed.float);
        let hidden = 4 * dense.max(routed);
        let hidden_of = |h: Hidden| read(h.rounded, h.half);
        let hidden_input = hidden_of(l.hidden).max(l.used * hidden_of(l.routed));
        let (mla, heads) = (l.latent > 0, l.heads);
        let head_inputs = if mla { heads * read(l.latent, l.latent) } else { 0 };
        let latents = if mla { rows(4 * l.max_heads_out) } else { 0 };
        let moe = l.used > 0;
        let parts = if mla { Parts::absorbed(heads, false) } else { Parts::GROUPED };
        let size = |a: Area| match a {
            Area::Input => rows(read(l.max_in, l.half_in)),
            Area::Hidden => rows(hidden_input).max(rows(head_inputs)),
            Area::Gate | Area::Up => rows(hidden),
            Area::Experts => rows(4 * l.used * l.width),
            Area::Shared if moe => rows(4 * l.width),
            Area::Logits => rows(4 * l.experts),
            Area::RouteIds | Area::RouteWeights => 4 * tokens * l.used,
            Area::JobOrder => rows(4 * l.used).max(if mla { rows(4 * heads) } else { 0 }),
            Area::JobTiles => {
                let experts = if moe { tile_bytes(tokens * l.used, l.experts) } else { 0 };
                experts.max(if mla { tile_bytes(tokens * heads, heads) } else { 0 })
            }
            Area::Absorbed | Area::Latents => latents,
            Area::HeadIds if mla => rows(4 * heads),
            Area::Parts => rows(4 * parts.limit(l.slots) * (l.max_heads_out + 2 * heads)),
            Area::Best if l.choices > 0 => BEST_ROWS.min(tokens) * best_bytes(MOST_BEST, l.choices),
            Area::Ids | Area::Slots | Area::OtherSlots => 4 * tokens,
            Area::Lists | Area::OtherLists => 4 * tokens + 12 * l.slots + SPANS,
            Area::Shared | Area::HeadIds | Area::Best => 0,
        };
        Self(AREAS.map(|(a, _)| size(a).next_multiple_of(256)))
    }

    pub fn bytes(&self) -> usize {
        self.0.iter().sum()
    }
}

/// See the module.
pub struct Scratch {
    gpu: Arc<Counted>,
    areas: [Option<Memory>; AREAS.len()],
    /// Nothing grows any more.
    fixed: bool,
    /// What lies in the areas of lists, and when it was used last.
    lists: Vec<(Area, Vec<u32>, u64)>,
    clock: u64,
    /// Heads and length of the list of heads.
    pub cycle: (usize, usize),
    /// Calls of the router so far.
    pub routed: u64,
    /// The rows whose rounding lies in [`Area::Input`].
    pub rounded: Option<Floats>,
}

impl Scratch {
    pub fn new(gpu: Arc<Counted>) -> Self {
        Self {
            gpu,
            areas: std::array::from_fn(|_| None),
            fixed: false,
            lists: Vec::new(),
            clock: 0,
            cycle: (0, 0),
            routed: 0,
            rounded: None,
        }
    }

    /// Makes room for calls within the limits; from then on nothing grows.
    pub fn reserve(&mut self, l: &Limits) -> Result<(), KernelError> {
        for ((area, _), bytes) in AREAS.iter().zip(Sizes::of(l).0) {
            if self.bytes(*area) < bytes {
                self.grow(*area, bytes)?;
            }
        }
        self.fixed = true;
        Ok(())
    }

    /// Bytes of an area.
    pub fn bytes(&self, a: Area) -> usize {
        self.areas[a as usize].as_ref().map_or(0, Memory::bytes)
    }

    fn grow(&mut self, a: Area, bytes: usize) -> Result<(), KernelError> {
        // What was there is given back first: the plan counts it once.
        self.areas[a as usize] = None;
        self.lists.retain(|l| l.0 != a);
        match a {
            Area::HeadIds => self.cycle = (0, 0),
            Area::Input => self.rounded = None,
            _ => {}
        }
        self.areas[a as usize] = Some(Memory::new(&self.gpu, bytes, AREAS[a as usize].1)?);
        Ok(())
    }

    /// An area's address; room must have been made.
    pub fn at(&self, a: Area) -> u64 {
        self.areas[a as usize].as_ref().map_or(0, Memory::at)
    }

    /// Bytes of an area that must hold `least` and need not hold more than `most`.
    pub fn room(&mut self, a: Area, least: usize, most: usize) -> Result<usize, KernelError> {
        let here = self.bytes(a);
        if here >= least.max(most.min(BUDGET)) || (self.fixed && here >= least) {
            return Ok(here);
        }
        if self.fixed {
            return Err(KernelError::Scratch { what: AREAS[a as usize].1, bytes: least, reserved: here });
        }
        self.grow(a, least.max(most.min(BUDGET)).next_multiple_of(256))?;
        Ok(self.bytes(a))
    }

    /// How many of `rows` rows that take `each` bytes fit an area, at least one.
    pub fn rows(&mut self, a: Area, each: usize, rows: usize) -> Result<usize, KernelError> {
        if each == 0 {
            return Ok(rows);
        }
        Ok((self.room(a, each, each * rows)? / each).min(rows))
    }

    /// A pass begins: its lists go to the same areas as those of any other, whatever was sent before.
    pub fn begin(&mut self) {
        self.lists.clear();
        self.rounded = None;
    }

    /// Where an operation writes. A rounding of what was there is one no more.
    pub fn output(&mut self, to: &ViewMut<'_>) -> Result<Floats, KernelError> {
        let to = Floats::of_mut(to)?;
        self.rounded = self.rounded.filter(|r| !r.meets(&to));
        Ok(to)
    }

    /// A kernel is about to write there: what was sent is gone.
    pub fn forget(&mut self, areas: &[Area]) {
        self.lists.retain(|l| !areas.contains(&l.0));
    }

    /// Sends words to one of `areas`, unless they are there.
    pub fn send(&mut self, areas: &[Area], words: &[u32]) -> Result<u64, KernelError> {
        self.clock += 1;
        let clock = self.clock;
        if let Some(l) = self.lists.iter_mut().find(|l| areas.contains(&l.0) && l.1 == words) {
            l.2 = clock;
            let area = l.0;
            return Ok(self.at(area));
        }
        let last = |a: &&Area| self.lists.iter().find(|l| l.0 == **a).map_or(0, |l| l.2);
        let area = *areas.iter().min_by_key(last).expect("an area");
        self.room(area, 4 * words.len(), 4 * words.len())?;
        self.lists.retain(|l| l.0 != area);
        let at = self.at(area);
        // Filled up to a round number, which areas hold: lists of one entry more or less are sent alike.
        let mut sent = words.to_vec();
        sent.resize(words.len().next_multiple_of(ROUND), 0);
        self.gpu.gpu.write(at, bytemuck::cast_slice(&sent))?;
        sent.truncate(words.len());
        self.lists.push((area, sent, clock));
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_numbered_as_they_stand() {
        for (i, (a, _)) in AREAS.iter().enumerate() {
            assert_eq!(*a as usize, i);
        }
    }

    #[test]
    fn rows_beyond_the_budget_take_passes() {
        let l = Limits { tokens: 4096, max_in: 1 << 20, ..Limits::default() };
        let each = input_bytes(DType::Q8_0, 1 << 20, true);
        assert_eq!(Sizes::of(&l).0[Area::Input as usize], (BUDGET / each * each).next_multiple_of(256));
        assert_eq!(Sizes::of(&Limits::default()).0[Area::Gate as usize], 0);
    }
}
