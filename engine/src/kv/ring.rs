//! Sinks and a window: the first S tokens and the last W of a sequence, in blocks that are used again as the window moves on
//! (StreamingLLM, arXiv:2309.17453). Without a window it keeps everything: the full cache is the ring that never turns.
//! No entry is ever moved or rewritten. Knows blocks and indices of tokens; nothing of layers.

use super::pool::{BLOCK, Pool};
use kernels::Span;
use std::collections::VecDeque;

/// What a query at index t sees: the sinks, indices below S, and the window t-W+1..=t.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// S.
    pub sinks: usize,
    /// W; `None`: everything.
    pub window: Option<usize>,
}

impl Reach {
    /// The same reach with other sinks: what the window has is the sinks' loss. Local attention, which has none, gets none.
    pub fn with_sinks(self, sinks: Option<usize>) -> Self {
        match (sinks, self.window) {
            (Some(n), Some(w)) if self.sinks > 0 => Self { sinks: n, window: Some(self.sinks + w - n) },
            _ => self,
        }
    }

    /// Blocks that a sequence holds at most, fed at most `chunk` tokens at a time, that ends at `end` tokens, if ever.
    pub fn blocks(&self, chunk: usize, end: Option<usize>) -> usize {
        // From the oldest entry that the chunk's first query sees to its last: W - 1 + chunk, beginning anywhere in a block.
        let ring = self.window.map(|w| (w - 1 + chunk - 1).div_ceil(BLOCK) + 1 + self.sinks.div_ceil(BLOCK));
        let all = end.map(|e| {
            let sinks = self.sinks.min(e);
            sinks.div_ceil(BLOCK) + (e - sinks).div_ceil(BLOCK)
        });
        ring.into_iter().chain(all).min().expect("an endless sequence has a window")
    }

    /// The index from which on sinks look nearer than they are: S + W - 1, where there are sinks.
    pub fn far(&self) -> Option<u64> {
        self.window.filter(|_| self.sinks > 0).map(|w| (self.sinks + w - 1) as u64)
    }

    /// The indices of a sequence of `len` tokens that a query at `len` can see: sinks, then the window.
    pub fn kept(&self, len: usize) -> impl Iterator<Item = usize> + use<> {
        (0..len.min(self.sinks)).chain(self.oldest(len).min(len)..len)
    }

    /// The oldest index outside the sinks that a query at `t` sees.
    fn oldest(&self, t: usize) -> usize {
        self.window.map_or(0, |w| (t + 1).saturating_sub(w)).max(self.sinks)
    }
}

/// The blocks of one sequence in one group.
#[derive(Debug, Default)]
pub struct Ring {
    /// Indices 0..S.
    sinks: Vec<u32>,
    /// Indices from S on, of which whole blocks at the front are gone.
    blocks: VecDeque<u32>,
    /// Blocks gone.
    gone: usize,
    /// Entries before this one, counted from S, are not there although their block may be: they were not in a file.
    valid: usize,
}

impl Ring {
    /// Makes room for the indices `len..len + n`, holding at most `most` blocks: what no query from `len` on sees goes only
    /// when its blocks are needed. `moves` gets the copies to make first, `slots` the slots in order.
    pub fn extend(
        &mut self,
        r: &Reach,
        pool: &mut Pool,
        (len, n): (usize, usize),
        most: usize,
        moves: &mut Vec<(u32, u32)>,
        slots: &mut Vec<u32>,
    ) {
        let end = len + n;
        for (i, b) in self.sinks.iter_mut().enumerate().skip(len / BLOCK) {
            pool.own(b, len.saturating_sub(i * BLOCK).min(BLOCK), moves);
        }
        while self.sinks.len() * BLOCK < end.min(r.sinks) {
            let b = pool.take(self.sinks.last().copied());
            self.sinks.push(b);
        }
        if end > r.sinks {
            let (from, last) = (len.max(r.sinks) - r.sinks, (end - 1 - r.sinks) / BLOCK);
            let needed = (r.oldest(len) - r.sinks) / BLOCK;
            while self.gone < needed
                && !self.blocks.is_empty()
                && self.sinks.len() + last + 1 - self.gone > most
            {
                pool.drop(self.blocks.pop_front().expect("not empty"));
                self.gone += 1;
            }
            if self.blocks.is_empty() {
                self.gone = from / BLOCK;
            }
            for (i, b) in self.blocks.iter_mut().enumerate().skip(from / BLOCK - self.gone) {
                pool.own(b, from.saturating_sub((self.gone + i) * BLOCK).min(BLOCK), moves);
            }
            while self.gone + self.blocks.len() <= last {
                let b = pool.take(self.blocks.back().copied());
                self.blocks.push_back(b);
            }
        }
        slots.extend((len..end).map(|i| self.slot(r, i)));
    }

    /// The slot of index `i`, which must be held.
    pub fn slot(&self, r: &Reach, i: usize) -> u32 {
        let (block, at) = match i.checked_sub(r.sinks) {
            None => (self.sinks[i / BLOCK], i),
            Some(i) => (self.blocks[i / BLOCK - self.gone], i),
        };
        block * BLOCK as u32 + (at % BLOCK) as u32
    }

    /// Appends what a query at index `t` sees, itself included.
    pub fn see(&self, r: &Reach, t: usize, out: &mut Vec<Span>) {
        runs(&self.sinks, 0..(t + 1).min(r.sinks), true, out);
        if t >= r.sinks {
            let (from, to) = (r.oldest(t) - r.sinks, t + 1 - r.sinks);
            let first = from / BLOCK;
            let skip = first - self.gone;
            let (a, b) = self.blocks.as_slices();
            if skip < a.len() && !b.is_empty() {
                let cut = ((self.gone + a.len()) * BLOCK).min(to);
                runs(&a[skip..], from - first * BLOCK..cut - first * BLOCK, false, out);
                let start = (self.gone + a.len()) * BLOCK;
                runs(b, 0..to.saturating_sub(start), false, out);
            } else {
                let (part, skip) = if b.is_empty() { (a, skip) } else { (b, skip - a.len()) };
                runs(&part[skip..], from - first * BLOCK..to - first * BLOCK, false, out);
            }
        }
    }

    /// How many of the first `want` tokens can be kept when the rest of `len` is forgotten: `want`, or fewer where entries
    /// are gone that the next query would see.
    pub fn usable(&self, r: &Reach, want: usize) -> usize {
        if r.oldest(want) - r.sinks >= self.valid.max(self.gone * BLOCK) { want } else { want.min(r.sinks) }
    }

    /// Forgets all but the first `len` tokens, which [`Ring::usable`] allowed.
    pub fn truncate(&mut self, r: &Reach, pool: &mut Pool, len: usize) {
        let sinks = len.min(r.sinks).div_ceil(BLOCK);
        self.sinks.drain(sinks.min(self.sinks.len())..).for_each(|b| pool.drop(b));
        let blocks = len.saturating_sub(r.sinks).div_ceil(BLOCK).saturating_sub(self.gone);
        self.blocks.drain(blocks.min(self.blocks.len())..).for_each(|b| pool.drop(b));
        if self.blocks.is_empty() {
            self.gone = len.saturating_sub(r.sinks) / BLOCK;
        }
        if len <= r.sinks {
            self.valid = 0;
        }
    }

    /// Has the sinks of `to` be those of a sequence of `len` tokens, with all entries from the first on where they are. False:
    /// entries are gone, or blocks begin elsewhere.
    pub fn resink(&mut self, from: &Reach, to: &Reach, len: usize) -> bool {
        let aligned = from.sinks.is_multiple_of(BLOCK) || len <= from.sinks;
        if self.gone > 0 || self.valid > 0 || !aligned || !to.sinks.is_multiple_of(BLOCK) {
            return false;
        }
        let mut all: VecDeque<u32> = self.sinks.drain(..).chain(self.blocks.drain(..)).collect();
        self.sinks = all.drain(..all.len().min(to.sinks / BLOCK)).collect();
        self.blocks = all;
        true
    }

    /// Blocks for what [`Reach::kept`] names of a sequence of `len` tokens.
    pub fn restore(r: &Reach, pool: &mut Pool, len: usize) -> Self {
        let valid = r.oldest(len) - r.sinks;
        let mut ring = Self { gone: valid / BLOCK, valid, ..Self::default() };
        while ring.sinks.len() * BLOCK < len.min(r.sinks) {
            ring.sinks.push(pool.take(ring.sinks.last().copied()));
        }
        while (ring.gone + ring.blocks.len()) * BLOCK < len.saturating_sub(r.sinks) {
            ring.blocks.push_back(pool.take(ring.blocks.back().copied()));
        }
        ring
    }

    /// A second holder of the same blocks.
    pub fn fork(&self, pool: &mut Pool) -> Self {
        self.sinks.iter().chain(&self.blocks).for_each(|&b| pool.share(b));
        Self { sinks: self.sinks.clone(), blocks: self.blocks.clone(), ..*self }
    }
}

/// Slots `range` of a list of blocks as spans, neighbouring blocks joined.
pub fn runs(blocks: &[u32], range: std::ops::Range<usize>, sink: bool, out: &mut Vec<Span>) {
    let mut at = range.start;
    let first = out.len();
    while at < range.end {
        let end = (at / BLOCK + 1) * BLOCK;
        let (start, len) =
            ((blocks[at / BLOCK] as usize * BLOCK + at % BLOCK) as u32, end.min(range.end) - at);
        match out[first..].last_mut() {
            Some(s) if s.start + s.len == start => s.len += len as u32,
            _ => out.push(Span { start, len: len as u32, sink }),
        }
        at = end;
    }
}
