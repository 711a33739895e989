//! The entries of one sequence in one layer under a policy that chooses: in position order in the first slots of a list of
//! blocks, so that what goes makes room at the end. Heads may keep different tokens, but as many. Knows blocks and positions;
//! the moving is `evict`'s.

use super::policy::{AttentionKind, KvPolicy, LayerGeometry, Needs};
use super::pool::{BLOCK, Pool};
use super::ring::runs;
use super::spec::Trigger;
use kernels::Span;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// What one layer keeps.
#[derive(Clone, Debug)]
pub struct SetShape {
    /// The layer.
    pub geometry: LayerGeometry,
    /// Who chooses.
    pub policy: Arc<dyn KvPolicy>,
    /// What must be recorded.
    pub needs: Needs,
    /// Entries after an eviction.
    pub budget: usize,
    /// Entries at most.
    pub capacity: usize,
    /// When to evict, besides when there is no room.
    pub trigger: Trigger,
    /// Whether kept entries get the positions 0, 1, 2, ...
    pub compact: bool,
}

impl SetShape {
    /// Blocks of a sequence at most.
    pub fn blocks(&self) -> usize {
        self.capacity.div_ceil(BLOCK)
    }

    /// Bytes of a query over all heads.
    pub fn query_bytes(&self) -> usize {
        4 * self.geometry.heads * (self.geometry.key + self.geometry.k_pe)
    }

    /// Bytes that a sequence keeps beside the cache: positions, blocks, recorded queries.
    pub fn record_bytes(&self) -> usize {
        8 * self.geometry.kv_heads * self.capacity
            + 4 * self.blocks()
            + self.needs.queries * (self.query_bytes() + 32)
    }

    /// Bytes that an eviction takes while it lasts, in an arena of `slots` slots: what the policy is shown (`evict::Shown`),
    /// its scores and ranks, the list of moves, and a mass as it is read or written.
    pub fn eviction_bytes(&self, slots: usize) -> usize {
        let (g, n, needs) = (&self.geometry, self.capacity, &self.needs);
        let mla = g.kind == AttentionKind::Mla;
        let masses = usize::from(needs.mass_total) + usize::from(needs.mass_recent > 0);
        let wanted = |yes: bool, width: usize| if yes { 4 * n * width } else { 0 };
        let shown = wanted(needs.keys, g.kv_heads * g.key + g.k_pe)
            + wanted(needs.values && !mla, g.kv_heads * g.value)
            + (8 + 4 * masses) * g.kv_heads * n
            + needs.queries * self.query_bytes();
        let chosen = (4 + 4) * g.kv_heads * n + (8 + 16 + 8 + 4) * n;
        shown + chosen + if masses > 0 { 4 * g.kv_heads * slots } else { 0 }
    }
}

/// Where a sequence stands in its prompt and between evictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Tokens of the prompt being read, and how many of them have been.
    pub reading: (usize, usize),
    /// Length of the sequence when a prompt ended last.
    pub prompt_end: usize,
    /// Tokens decoded since the last regular eviction.
    pub decoded: usize,
}

impl Progress {
    /// The state after `n` tokens of a prompt of `prompt` (0: decoded), and whether the prompt has ended with them.
    pub fn after(mut self, n: usize, prompt: usize, len: usize) -> (Self, bool) {
        if prompt == 0 {
            self.reading = (0, 0);
            self.decoded += n;
            return (self, false);
        }
        let read = if self.reading.0 == prompt { self.reading.1 + n } else { n };
        let ended = read >= prompt;
        self.reading = if ended { (0, 0) } else { (prompt, read) };
        if ended {
            self.prompt_end = len + n;
            self.decoded = 0;
        }
        (self, ended)
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Set {
    pub blocks: Vec<u32>,
    /// Entries, those of a batch begun not counted.
    pub entries: usize,
    /// `[kv_heads][entries]`: original positions.
    pub positions: Vec<Vec<u64>>,
    /// The sequence's length when something was evicted last.
    pub evicted_at: usize,
    /// Queries committed whose mass the recent mass holds.
    pub recent: usize,
    /// Rows of the batch begun that it will hold besides.
    pub counting: usize,
    /// The latest queries: position, `[heads * dims]`.
    pub queries: VecDeque<(u64, Vec<f32>)>,
}

impl Set {
    /// An empty one.
    pub fn new(s: &SetShape) -> Self {
        Self { positions: vec![Vec::new(); s.geometry.kv_heads], ..Self::default() }
    }

    /// Blocks for `n` more entries, and their slots. The capacity must allow them.
    pub fn extend(&mut self, pool: &mut Pool, n: usize, slots: &mut Vec<u32>) {
        while self.blocks.len() * BLOCK < self.entries + n {
            let b = pool.take(self.blocks.last().copied());
            self.blocks.push(b);
        }
        slots.extend((self.entries..self.entries + n).map(|i| self.slot(i)));
    }

    /// The slot of entry `i`.
    pub fn slot(&self, i: usize) -> u32 {
        self.blocks[i / BLOCK] * BLOCK as u32 + (i % BLOCK) as u32
    }

    /// The slots of the first `n` entries.
    pub fn slots(&self, n: usize) -> Vec<u32> {
        (0..n).map(|i| self.slot(i)).collect()
    }

    /// What a query sees that is entry `i` itself.
    pub fn see(&self, i: usize, out: &mut Vec<Span>) {
        runs(&self.blocks, 0..i + 1, false, out);
    }

    /// Which of the `n` rows begun are among the last `needs.mass_recent` before the next eviction that can be foreseen.
    /// `next`: the state after them; `ended`: with them the prompt ends; `chunk`: rows of a pass at most.
    pub fn recent_rows(
        &self,
        s: &SetShape,
        n: usize,
        (next, ended): (Progress, bool),
        prompt: usize,
        chunk: usize,
    ) -> Range<usize> {
        let held = self.entries + n;
        // Rows that follow before the eviction.
        let mut ahead = usize::MAX;
        if prompt > 0 {
            let left = next.reading.0 - next.reading.1;
            if (ended && s.trigger.prompt_end) || held + left.min(chunk) > s.capacity {
                ahead = 0;
            } else if s.trigger.prompt_end {
                ahead = left;
            }
        } else {
            ahead = s.capacity - held.min(s.capacity);
            if let Some(every) = s.trigger.every {
                ahead = ahead.min(every.saturating_sub(next.decoded));
            }
        }
        let count = s.needs.mass_recent.saturating_sub(ahead).min(n);
        n - count..n
    }

    /// How many of the first `want` of `len` tokens can be kept when the rest is forgotten: all, if no eviction and no record
    /// knows of the rest; else none.
    pub fn usable(&self, s: &SetShape, want: usize, len: usize) -> usize {
        let recorded = s.needs.mass_total || s.needs.mass_recent > 0 || s.needs.queries > 0;
        let free = want == len || (want >= self.evicted_at && (!recorded || want == 0));
        if free { want } else { 0 }
    }

    /// Forgets the latest tokens down to `len`, which [`Set::usable`] allowed.
    pub fn truncate(&mut self, pool: &mut Pool, len: usize, now: usize) {
        if len == 0 {
            self.blocks.drain(..).for_each(|b| pool.drop(b));
            let heads = self.positions.len();
            *self = Self { positions: vec![Vec::new(); heads], ..Self::default() };
            return;
        }
        self.shrink(pool, self.entries - (now - len));
    }

    /// Keeps the first `n` entries of every head.
    pub fn shrink(&mut self, pool: &mut Pool, n: usize) {
        self.entries = n;
        self.positions.iter_mut().for_each(|p| p.truncate(n));
        self.blocks.drain(n.div_ceil(BLOCK)..).for_each(|b| pool.drop(b));
    }
}
