//! The queue, the places and the next pass.
//!
//! - Every sequence that decodes has a row in every pass. While one does, prompts share at most [`Limits::chunk`] rows, so the
//!   gap between two tokens is bounded by one such pass, however long a prompt is.
//! - Prompts share their rows max-min fair: none gets fewer than another unless it needs no more.
//! - Jobs are admitted in the order they came, to the place with the longest common prefix; a place whose past is still of
//!   use to others, or a running one, is forked.

use super::sequence::{Job, Slot, Work};
use std::collections::VecDeque;
use std::ops::Range;

/// A common prefix shorter than this is not worth a fork.
const LEAST_FORK: usize = 8;

/// Sizes of a scheduler.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences at a time.
    pub slots: usize,
    /// Rows of a pass at most; at least `slots`.
    pub rows: usize,
    /// Rows of one sequence in a pass at most.
    pub batch: usize,
    /// Rows of prompts in a pass while others decode.
    pub chunk: usize,
    /// Jobs that may wait.
    pub queue: usize,
}

/// As many jobs wait as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// Where a place's past comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// What the place holds, cut to `keep` tokens.
    Own {
        /// Tokens to keep.
        keep: usize,
    },
    /// A fork of the place `of`, cut to `keep` tokens, instead of what it holds.
    Fork {
        /// Whose past.
        of: usize,
        /// Tokens to keep.
        keep: usize,
    },
}

/// A job that may begin, once its place is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The job.
    pub job: u64,
    /// Its place, `0..slots`.
    pub slot: usize,
    /// What its cache starts from.
    pub start: Start,
}

/// Rows of one sequence in a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The place.
    pub slot: usize,
    /// Part of the prompt; `None`: the token decoded last.
    pub prompt: Option<Range<usize>>,
    /// The logits after the last of the rows are wanted.
    pub logits: bool,
}

/// Where a cancelled job was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// In the queue.
    Waiting,
    /// On this place, which is idle now and keeps its tokens.
    Running(usize),
}

/// A place as others may see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The job at work.
    pub job: Option<u64>,
    /// Tokens cached.
    pub cached: usize,
    /// Tokens of its prompt that are to come.
    pub prompt_left: usize,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    queue: VecDeque<Job>,
    slots: Vec<Slot>,
    clock: u64,
}

impl Scheduler {
    /// An idle scheduler. Sizes below what is possible are raised to it.
    pub fn new(mut limits: Limits) -> Self {
        limits.slots = limits.slots.max(1);
        limits.batch = limits.batch.max(1);
        limits.rows = limits.rows.max(limits.slots);
        limits.chunk = limits.chunk.clamp(limits.slots, limits.rows);
        let slots = vec![Slot::default(); limits.slots];
        Self { limits, queue: VecDeque::new(), slots, clock: 0 }
    }

    /// Puts a job into the queue. An empty prompt is refused by the caller: there would be nothing to compute.
    ///
    /// # Errors
    /// [`QueueFull`], unless a place is free for it.
    pub fn submit(&mut self, job: Job) -> Result<(), QueueFull> {
        debug_assert!(!job.prompt.is_empty());
        let free = self.slots.iter().filter(|s| s.work.is_none()).count();
        if self.queue.len() >= self.limits.queue.saturating_add(free) {
            return Err(QueueFull);
        }
        self.queue.push_back(job);
        Ok(())
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Jobs at work.
    pub fn running(&self) -> usize {
        self.slots.iter().filter(|s| s.work.is_some()).count()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running() == 0
    }

    /// The places.
    pub fn places(&self) -> impl Iterator<Item = Place> + '_ {
        self.slots.iter().map(|s| Place {
            job: s.work.as_ref().map(|w| w.job.id),
            cached: s.tokens.len(),
            prompt_left: s.rest().len(),
        })
    }

    /// The first of the queue, if a place is free. The caller prepares the cache and calls [`Scheduler::admitted`], or
    /// [`Scheduler::end`] and [`Scheduler::forget`] if that fails.
    pub fn admit(&mut self) -> Option<Admission> {
        let job = self.queue.front()?;
        let idle = |i: &usize| self.slots[*i].work.is_none();
        let common: Vec<usize> = self.slots.iter().map(|s| s.common(job)).collect();
        let all = 0..self.slots.len();
        // Of equals the one whose past is shortest, then the one unused for longest.
        let best = all.clone().filter(idle).max_by_key(|&i| {
            let s = &self.slots[i];
            (common[i], usize::MAX - s.tokens.len(), u64::MAX - s.used)
        })?;
        let oldest = |not: Option<usize>| {
            let others = all.clone().filter(idle).filter(|i| Some(*i) != not);
            others.min_by_key(|&i| self.slots[i].used)
        };
        let donor = all.clone().max_by_key(|&i| common[i])?;
        let lost = self.slots[best].tokens.len() - common[best];
        let (slot, start) = if common[donor] > common[best].max(LEAST_FORK) {
            let slot = oldest(None)?;
            (slot, Start::Fork { of: donor, keep: common[donor] })
        } else if common[best] >= LEAST_FORK && lost > common[best] / 2 {
            match oldest(Some(best)) {
                Some(slot) => (slot, Start::Fork { of: best, keep: common[best] }),
                None => (best, Start::Own { keep: common[best] }),
            }
        } else if common[best] < LEAST_FORK {
            (oldest(None)?, Start::Own { keep: 0 })
        } else {
            (best, Start::Own { keep: common[best] })
        };
        let job = self.queue.pop_front()?;
        let id = job.id;
        if let Start::Fork { of, .. } = start {
            self.clock += 1;
            self.slots[of].used = self.clock;
            (self.slots[slot].tokens, self.slots[slot].exact) =
                (self.slots[of].tokens.clone(), self.slots[of].exact);
        }
        self.clock += 1;
        self.slots[slot].used = self.clock;
        self.slots[slot].work = Some(Work { job, next: None });
        Some(Admission { job: id, slot, start })
    }

    /// The cache of an admitted job's place holds the first `kept` tokens, as many as asked for or fewer.
    pub fn admitted(&mut self, slot: usize, kept: usize) {
        self.slots[slot].truncate(kept);
    }

    /// The rows of the next pass: empty if nobody has any. Sequences for which `ready` is false have none.
    pub fn plan(&self, pass: &mut Vec<Piece>, ready: impl Fn(usize) -> bool) {
        pass.clear();
        let mut prompts: Vec<usize> = Vec::new();
        for (i, s) in self.slots.iter().enumerate().filter(|(i, _)| ready(*i)) {
            if s.decodes() {
                pass.push(Piece { slot: i, prompt: None, logits: true });
            } else if !s.rest().is_empty() {
                prompts.push(i);
            }
        }
        let room = self.limits.rows - pass.len();
        let mut budget = if pass.is_empty() { room } else { room.min(self.limits.chunk) };
        prompts.sort_by_key(|&i| self.slots[i].rest().len());
        let n = prompts.len();
        for (k, i) in prompts.into_iter().enumerate() {
            let rest = self.slots[i].rest();
            let rows = rest.len().min(budget / (n - k)).min(self.limits.batch);
            if rows > 0 {
                let end = rest.start + rows;
                pass.push(Piece { slot: i, prompt: Some(rest.start..end), logits: end == rest.end });
                budget -= rows;
            }
        }
    }

    /// The tokens of a piece.
    pub fn tokens(&self, piece: &Piece) -> &[u32] {
        let Some(w) = &self.slots[piece.slot].work else { return &[] };
        match &piece.prompt {
            Some(range) => &w.job.prompt[range.clone()],
            None => w.next.as_ref().map_or(&[], |t| &t[..]),
        }
    }

    /// The pass was made: its rows are cached.
    pub fn done(&mut self, pass: &[Piece]) {
        for p in pass {
            let s = &mut self.slots[p.slot];
            let Some(w) = &mut s.work else { continue };
            match &p.prompt {
                Some(range) => {
                    if s.exact == s.tokens.len() {
                        s.exact += range.len();
                    }
                    s.tokens.extend_from_slice(&w.job.prompt[range.clone()]);
                }
                None => s.tokens.extend(w.next.take().into_iter().flatten()),
            }
        }
    }

    /// The next token of a sequence, to be computed in the next pass.
    pub fn push(&mut self, slot: usize, token: u32) {
        if let Some(w) = &mut self.slots[slot].work {
            w.next = Some([token]);
        }
    }

    /// The job on a place is over. What is cached stays for others.
    pub fn end(&mut self, slot: usize) {
        self.slots[slot].work = None;
        self.clock += 1;
        self.slots[slot].used = self.clock;
    }

    /// What a place held is gone.
    pub fn forget(&mut self, slot: usize) {
        let s = &mut self.slots[slot];
        s.truncate(0);
        s.used = 0;
    }

    /// Takes a job out, wherever it is.
    pub fn cancel(&mut self, id: u64) -> Option<Cancelled> {
        if let Some(at) = self.queue.iter().position(|j| j.id == id) {
            self.queue.remove(at);
            return Some(Cancelled::Waiting);
        }
        let slot = self.slots.iter().position(|s| s.work.as_ref().is_some_and(|w| w.job.id == id))?;
        self.end(slot);
        Some(Cancelled::Running(slot))
    }
}
