//! Blocks of cache slots: which are free, how many sequences share each, how many are promised. Plain numbers; knows nothing
//! of what the slots hold.

use std::collections::BTreeSet;

/// Slots of a block.
pub const BLOCK: usize = 32;

/// The blocks of one group of layers.
pub struct Pool {
    /// Sequences that hold each block.
    holders: Vec<u32>,
    free: BTreeSet<u32>,
    promised: usize,
}

impl Pool {
    /// `n` free blocks.
    pub fn new(n: usize) -> Self {
        Self { holders: vec![0; n], free: (0..n as u32).collect(), promised: 0 }
    }

    /// Blocks, free or not.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Blocks that some sequence holds.
    pub fn held(&self) -> usize {
        self.holders.len() - self.free.len()
    }

    /// Promises `n` blocks; false if that many are not left. A sequence never holds more than it was promised, shared blocks
    /// counted in each: so a promised block is always to be had.
    pub fn promise(&mut self, n: usize) -> bool {
        let fits = n <= self.holders.len() - self.promised;
        self.promised += if fits { n } else { 0 };
        fits
    }

    /// Takes a promise back.
    pub fn release_promise(&mut self, n: usize) {
        self.promised -= n;
    }

    /// A free block, of one holder from now on: the one after `last` if it is free, so that spans stay long.
    pub fn take(&mut self, last: Option<u32>) -> u32 {
        let next = last.map(|b| b + 1).filter(|b| self.free.contains(b));
        let b = next
            .or_else(|| self.free.first().copied())
            .expect("sequences hold no more than they were promised");
        self.free.remove(&b);
        self.holders[b as usize] = 1;
        b
    }

    /// One more holder.
    pub fn share(&mut self, b: u32) {
        self.holders[b as usize] += 1;
    }

    /// Whether more than one sequence holds it.
    pub fn is_shared(&self, b: u32) -> bool {
        self.holders[b as usize] > 1
    }

    /// One holder less; without holders it is free.
    pub fn drop(&mut self, b: u32) {
        let holders = &mut self.holders[b as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.insert(b);
        }
    }

    /// Makes `b` one's own before a write: if others hold it too, a new block takes its place and `moves` gets the copies of
    /// its first `used` slots.
    pub fn own(&mut self, b: &mut u32, used: usize, moves: &mut Vec<(u32, u32)>) {
        if self.is_shared(*b) {
            let old = *b;
            self.drop(old);
            *b = self.take(None);
            let at = |b: u32| b * BLOCK as u32;
            moves.extend((0..used as u32).map(|i| (at(old) + i, at(*b) + i)));
        }
    }
}
