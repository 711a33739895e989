//! Which experts are believed to be in memory, in the order of their last use. Plain data: indices and bytes, no files.

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Entry {
    newer: u32,
    older: u32,
    bytes: usize,
    here: bool,
    pinned: bool,
}

/// Entries by number, each of a size of its own, in a list from the newest to the oldest.
pub struct Lru {
    entries: Vec<Entry>,
    newest: u32,
    oldest: u32,
    used: usize,
}

impl Lru {
    /// Entries of these sizes, none of them here.
    pub fn new(sizes: impl IntoIterator<Item = usize>) -> Self {
        let entry = |bytes| Entry { newer: NONE, older: NONE, bytes, here: false, pinned: false };
        Self { entries: sizes.into_iter().map(entry).collect(), newest: NONE, oldest: NONE, used: 0 }
    }

    /// Bytes of all entries here.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes of an entry.
    pub fn bytes(&self, e: usize) -> usize {
        self.entries[e].bytes
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Makes `e` the newest; says whether it was here.
    pub fn touch(&mut self, e: usize) -> bool {
        let was = self.entries[e].here;
        if was {
            self.unlink(e);
        } else {
            self.entries[e].here = true;
            self.used += self.entries[e].bytes;
        }
        let (entry, before) = (&mut self.entries[e], self.newest);
        (entry.newer, entry.older) = (NONE, before);
        match before {
            NONE => self.oldest = e as u32,
            b => self.entries[b as usize].newer = e as u32,
        }
        self.newest = e as u32;
        was
    }

    /// Takes the oldest entries that are not pinned until at most `capacity` bytes are here, but none of the `spared` newest ones.
    /// Calls `gone` for each.
    pub fn shrink(&mut self, capacity: usize, spared: usize, mut gone: impl FnMut(usize)) {
        let mut first_spared = self.newest;
        for _ in 1..spared {
            match self.entries.get(first_spared as usize).map_or(NONE, |e| e.older) {
                NONE => break,
                older => first_spared = older,
            }
        }
        let mut at = self.oldest;
        while self.used > capacity && at != NONE && !(spared > 0 && at == first_spared) {
            let next = self.entries[at as usize].newer;
            if !self.entries[at as usize].pinned {
                self.unlink(at as usize);
                self.entries[at as usize].here = false;
                self.used -= self.entries[at as usize].bytes;
                gone(at as usize);
            }
            at = next;
        }
    }

    /// Whether `e` stays whatever happens.
    pub fn pinned(&self, e: usize) -> bool {
        self.entries[e].pinned
    }

    /// Whether `e` is here.
    pub fn here(&self, e: usize) -> bool {
        self.entries[e].here
    }

    /// Keeps an entry that is here, or lets it go its way again.
    pub fn pin(&mut self, e: usize, pinned: bool) {
        self.entries[e].pinned = pinned;
    }

    fn unlink(&mut self, e: usize) {
        let Entry { newer, older, .. } = self.entries[e];
        match newer {
            NONE => self.newest = older,
            n => self.entries[n as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            o => self.entries[o as usize].newer = newer,
        }
    }
}

/// Bytes that a least-recently-used memory of `capacity` bytes would read for these uses, in order: an upper bound of what is
/// possible without knowing the future. An entry larger than the memory is read at every use.
pub fn ideal(sizes: &[usize], uses: impl IntoIterator<Item = usize>, capacity: usize) -> u64 {
    let mut lru = Lru::new(sizes.iter().copied());
    uses.into_iter()
        .map(|e| {
            let read = if lru.touch(e) { 0 } else { sizes[e] as u64 };
            lru.shrink(capacity, 0, |_| ());
            read
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_oldest_goes_unless_pinned_or_spared() {
        let mut lru = Lru::new([10; 5]);
        (0..4).for_each(|e| assert!(!lru.touch(e)));
        assert!(lru.touch(0));
        lru.pin(1, true);
        let mut gone = Vec::new();
        lru.shrink(20, 0, |e| gone.push(e));
        assert_eq!((gone, lru.used()), (vec![2, 3], 20));
        lru.touch(4);
        let mut gone = Vec::new();
        lru.shrink(0, 1, |e| gone.push(e));
        assert_eq!((gone, lru.used()), (vec![0], 20));
        assert!(lru.here(4) && lru.here(1) && !lru.here(0));
        lru.pin(1, false);
        lru.shrink(0, 0, |_| ());
        assert_eq!(lru.used(), 0);
    }

    #[test]
    fn ideal_of_a_cycle_is_everything_or_nothing() {
        let cycle = || (0..50).map(|i| i % 5);
        assert_eq!(ideal(&[8; 5], cycle(), 40), 40);
        assert_eq!(ideal(&[8; 5], cycle(), 39), 400);
    }

    proptest! {
        /// Against a list that is searched.
        #[test]
        fn like_a_plain_list(uses in prop::collection::vec((0usize..12, 0usize..60, 0usize..3), 1..200)) {
            let sizes: Vec<usize> = (0..12).map(|i| 3 + i % 4).collect();
            let mut lru = Lru::new(sizes.iter().copied());
            let mut plain: Vec<usize> = Vec::new();
            for (e, capacity, spared) in uses {
                prop_assert_eq!(lru.touch(e), plain.contains(&e));
                plain.retain(|p| *p != e);
                plain.push(e);
                let mut gone = Vec::new();
                lru.shrink(capacity, spared, |e| gone.push(e));
                let used = |p: &[usize]| p.iter().map(|e| sizes[*e]).sum::<usize>();
                let mut want = Vec::new();
                while used(&plain) > capacity && plain.len() > spared {
                    want.push(plain.remove(0));
                }
                prop_assert_eq!(gone, want);
                prop_assert_eq!(lru.used(), used(&plain));
            }
        }
    }
}
