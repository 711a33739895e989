//! Races: who touched each byte last within a launch, and whether anything orders two accesses of which one writes. Shared and global
//! memory are watched by the same rules. Knows threads by number and time by phases; nothing of instructions or of what is stored.

use crate::Fault;

/// An access: by whom, when, and at which line of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Who {
    /// Grows with every block that begins and every barrier of a block, from launch to launch; 0: never.
    pub phase: u32,
    /// Grows with every `bar.warp.sync` of all the warp's threads.
    pub warp_phase: u32,
    /// Linear, x fastest.
    pub block: u32,
    /// Of the block, linear.
    pub thread: u16,
    /// By `ld.global.nc`: nobody may write there as long as the kernel runs, not even this thread.
    pub constant: bool,
    pub line: u32,
}

/// One that happens now, and what is needed to tell it from those before.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub who: Who,
    /// The first phase of the launch.
    pub since: u32,
    pub grid: [u32; 3],
}

impl Access {
    /// Whether nothing orders an earlier access before this one. Blocks are never ordered: no fence is taken for more than nothing.
    #[inline]
    fn races(&self, before: &Who) -> bool {
        let me = &self.who;
        before.phase >= self.since
            && (before.constant
                || before.block != me.block
                || before.phase == me.phase
                    && before.thread != me.thread
                    && (before.thread / 32 != me.thread / 32 || before.warp_phase == me.warp_phase))
    }

    /// How hard it is to be ordered after an earlier access: of two equal ones, one will do.
    #[inline]
    fn weight(&self, before: &Who) -> u8 {
        match before {
            b if !self.races(b) => 0,
            b if b.constant => 4,
            b if b.block != self.who.block => 3,
            b => 1 + u8::from(b.thread / 32 != self.who.thread / 32),
        }
    }
}

/// Of several accesses of one kind those that whoever races with any of them races with: the latest, and of the others the one that
/// is hardest to be ordered after.
#[derive(Clone, Copy, Default)]
struct Last([Who; 2]);

impl Last {
    #[inline]
    fn add(&mut self, now: &Access) {
        let [latest, other] = &mut self.0;
        if now.weight(latest) > now.weight(other) {
            *other = *latest;
        }
        *latest = now.who;
    }
}

#[derive(Clone, Default)]
struct Cell {
    writer: Who,
    readers: Last,
    /// Atomic operations since it was written; few places see any.
    atomics: Option<Box<Last>>,
}

/// What an access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    /// Atomics do not race with each other, but with plain accesses they do.
    Atomic,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "atomic",
        }
    }
}

impl Cell {
    /// Notes an access; an earlier one that it races with, if there is one.
    #[inline]
    fn touch(&mut self, kind: Kind, now: &Access) -> Result<(), (Kind, Who)> {
        let check = |before: Kind, all: &[Who]| match all.iter().find(|b| now.races(b)) {
            Some(b) => Err((before, *b)),
            None => Ok(()),
        };
        check(Kind::Write, &[self.writer])?;
        if kind != Kind::Read {
            check(Kind::Read, &self.readers.0)?;
        }
        if kind != Kind::Atomic
            && let Some(a) = &self.atomics
        {
            check(Kind::Atomic, &a.0)?;
        }
        match kind {
            Kind::Read => self.readers.add(now),
            Kind::Write => *self = Self { writer: now.who, ..Self::default() },
            Kind::Atomic => self.atomics.get_or_insert_default().add(now),
        }
        Ok(())
    }
}

/// Bytes of a page.
const PAGE: usize = 1024;
/// Cells are of 16 bytes at most, which is what a thread touches at once.
const WIDEST: u8 = 4;

/// Cells of `1 << shift` bytes: as small as the smallest access.
struct Page {
    shift: u8,
    cells: Vec<Cell>,
}

impl Page {
    fn fit(&mut self, shift: u8) {
        if self.shift > shift {
            let times = 1 << (self.shift - shift);
            self.cells = self.cells.iter().flat_map(|c| std::iter::repeat_n(c, times)).cloned().collect();
            self.shift = shift;
        }
    }
}

/// The history of some memory. A copy of it has none: launches begin anew.
#[derive(Default)]
pub struct Shadow(Vec<Option<Page>>);

impl Clone for Shadow {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Shadow {
    /// Notes an access to so many bytes at an offset; `address` is what to call that place.
    #[inline]
    pub fn touch(
        &mut self,
        kind: Kind,
        at: usize,
        bytes: usize,
        now: &Access,
        address: u64,
    ) -> Result<(), Fault> {
        let shift = ((at | bytes).trailing_zeros() as u8).min(WIDEST);
        let (mut from, end) = (at, at + bytes);
        while from < end {
            let (i, first) = (from / PAGE, from % PAGE);
            if self.0.len() <= i {
                self.0.resize_with(i + 1, || None);
            }
            let page =
                self.0[i].get_or_insert_with(|| Page { shift, cells: vec![Cell::default(); PAGE >> shift] });
            page.fit(shift);
            let shift = page.shift;
            let last = (end - i * PAGE).min(PAGE) - 1;
            for c in first >> shift..=last >> shift {
                if let Err((before, them)) = page.cells[c].touch(kind, now) {
                    let place = (i * PAGE + (c << shift)).max(at) - at;
                    return Err(blame(kind, before, &them, now, address + place as u64));
                }
            }
            from = (i + 1) * PAGE;
        }
        Ok(())
    }
}

#[cold]
fn blame(kind: Kind, before: Kind, them: &Who, now: &Access, address: u64) -> Fault {
    let [x, y, _] = now.grid;
    Fault::Race {
        address,
        access: kind.name(),
        before: if them.constant { "non-coherent read" } else { before.name() },
        block: (them.block != now.who.block)
            .then(|| [them.block % x, them.block / x % y, them.block / x / y]),
        other: them.thread.into(),
        line: them.line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(block: u32, thread: u16, phase: u32, warp_phase: u32) -> Access {
        let who = Who { phase, warp_phase, block, thread, constant: false, line: 10 + u32::from(thread) };
        Access { who, since: 1, grid: [4, 2, 1] }
    }

    fn touch(s: &mut Shadow, kind: Kind, at: usize, bytes: usize, now: &Access) -> Result<(), Fault> {
        s.touch(kind, at, bytes, now, (3 << 40) + at as u64)
    }

    #[test]
    fn a_barrier_orders_and_its_absence_races() {
        let mut s = Shadow::default();
        let mut touch = |kind, now| touch(&mut s, kind, 0, 4, &now);
        touch(Kind::Write, now(0, 0, 1, 0)).unwrap();
        assert!(touch(Kind::Read, now(0, 0, 1, 0)).is_ok());
        assert!(matches!(touch(Kind::Read, now(0, 40, 1, 0)), Err(Fault::Race { other: 0, .. })));
        assert!(touch(Kind::Read, now(0, 40, 2, 0)).is_ok());
        assert!(touch(Kind::Read, now(0, 70, 2, 0)).is_ok());
        // Written while others read.
        assert!(matches!(touch(Kind::Write, now(0, 70, 2, 0)), Err(Fault::Race { other: 40, .. })));
        assert!(touch(Kind::Write, now(0, 70, 3, 0)).is_ok());
    }

    #[test]
    fn warps_order_themselves() {
        let mut s = Shadow::default();
        let mut touch = |kind, now| touch(&mut s, kind, 0, 4, &now);
        touch(Kind::Write, now(0, 1, 1, 0)).unwrap();
        assert!(touch(Kind::Read, now(0, 2, 1, 0)).is_err());
        assert!(touch(Kind::Read, now(0, 2, 1, 1)).is_ok());
        assert!(touch(Kind::Read, now(0, 33, 1, 1)).is_err());
    }

    /// Whatever their barriers, whoever else read or wrote in between; launches are.
    #[test]
    fn blocks_are_not_ordered() {
        let mut s = Shadow::default();
        let mut touch = |kind, now| touch(&mut s, kind, 64, 4, &now);
        touch(Kind::Read, now(0, 7, 1, 0)).unwrap();
        touch(Kind::Read, now(5, 7, 3, 0)).unwrap();
        let race = touch(Kind::Write, now(5, 7, 4, 0)).unwrap_err();
        let said =
            "race at global #3+64: write, and read by thread 7 of block [0, 0, 0] at line 17, in any order";
        assert_eq!(race.to_string(), said);
        let next = |kind, phase| Access { since: 5, ..now(kind, 7, phase, 0) };
        touch(Kind::Write, next(5, 5)).unwrap();
        let race = touch(Kind::Write, next(6, 6)).unwrap_err();
        assert!(matches!(race, Fault::Race { block: Some([1, 1, 0]), before: "write", .. }), "{race}");
    }

    /// Atomics are ordered among themselves, not with plain accesses.
    #[test]
    fn atomics_race_with_plain_accesses() {
        let mut s = Shadow::default();
        let mut touch = |kind, now| touch(&mut s, kind, 0, 4, &now);
        touch(Kind::Write, now(0, 0, 1, 0)).unwrap();
        let race = touch(Kind::Atomic, now(0, 5, 1, 0));
        assert!(matches!(race, Err(Fault::Race { before: "write", .. })));
        touch(Kind::Atomic, now(0, 5, 2, 0)).unwrap();
        assert!(touch(Kind::Read, now(0, 5, 2, 0)).is_ok(), "its own");
        let race = touch(Kind::Atomic, now(0, 6, 2, 0));
        assert!(matches!(race, Err(Fault::Race { before: "read", .. })));
        touch(Kind::Atomic, now(0, 5, 3, 0)).unwrap();
        touch(Kind::Atomic, now(0, 40, 3, 0)).unwrap();
        for thread in [5, 40, 70] {
            let race = touch(Kind::Read, now(0, thread, 3, 0));
            assert!(matches!(race, Err(Fault::Race { before: "atomic", .. })));
            assert!(touch(Kind::Write, now(0, thread, 3, 0)).is_err());
        }
        assert!(touch(Kind::Read, now(0, 70, 4, 0)).is_ok() && touch(Kind::Write, now(0, 70, 4, 0)).is_ok());
    }

    /// What is read by the read-only path stays as it is to the end of the launch, even for who read it.
    #[test]
    fn read_only_memory_is_not_written() {
        let mut s = Shadow::default();
        let mut touch = |kind, now| touch(&mut s, kind, 0, 4, &now);
        let mut constant = now(0, 1, 1, 0);
        constant.who.constant = true;
        touch(Kind::Read, constant).unwrap();
        (0..9).for_each(|i| touch(Kind::Read, now(0, i, 2 + u32::from(i), 0)).unwrap());
        let race = touch(Kind::Write, now(0, 1, 20, 0));
        assert!(matches!(race, Err(Fault::Race { before: "non-coherent read", block: None, other: 1, .. })));
        assert!(touch(Kind::Write, Access { since: 21, ..now(0, 1, 21, 0) }).is_ok());
    }

    /// Neighbours in a word are apart, and wide accesses touch all of it.
    #[test]
    fn bytes_have_histories_of_their_own() {
        let mut s = Shadow::default();
        let mut touch = |kind, at, bytes, thread| touch(&mut s, kind, at, bytes, &now(0, thread, 1, 0));
        touch(Kind::Read, 1024, 16, 0).unwrap();
        touch(Kind::Write, 1040, 4, 1).unwrap();
        touch(Kind::Write, 1044, 1, 2).unwrap();
        touch(Kind::Write, 1045, 1, 3).unwrap();
        let race = touch(Kind::Read, 1044, 2, 2).unwrap_err();
        assert!(
            matches!(race, Fault::Race { other: 3, .. }) && race.to_string().contains("#3+1045"),
            "{race}"
        );
        assert!(matches!(touch(Kind::Write, 1030, 2, 3), Err(Fault::Race { other: 0, .. })));
        assert!(matches!(touch(Kind::Read, 1040, 16, 4), Err(Fault::Race { other: 1, .. })));
        // Across pages, and to places of which little is used.
        assert!(touch(Kind::Write, 2040, 16, 5).is_ok() && touch(Kind::Read, 2048, 8, 6).is_err());
        assert!(touch(Kind::Write, 3, 6, 7).is_ok() && touch(Kind::Read, 8, 1, 8).is_err());
    }

    /// Two or three places are kept for all that happened to a byte: on random accesses they tell what the whole history tells.
    #[test]
    fn what_is_kept_is_enough() {
        let mut state = 1u64;
        let mut random = |n: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u32 % n
        };
        let (mut races, mut longest) = (0, 0);
        for _ in 0..20_000 {
            let (mut s, mut phase) = (Shadow::default(), 0);
            let mut history: Vec<(Kind, usize, usize, Who)> = Vec::new();
            let kinds = [Kind::Read, [Kind::Write, Kind::Atomic][random(2) as usize], Kind::Write];
            // Mostly reads, so that histories grow long.
            let (writes, constants) = (1 + random(8), random(2) * (1 + random(9)));
            'run: for block in 0..3 {
                for _ in 0..1 + random(3) {
                    phase += 1;
                    let mut warps = [0; 2];
                    for _ in 0..random(7) {
                        let warp = random(2);
                        warps[warp as usize] += random(8) / 7;
                        let (thread, bytes) = (32 * warp + random(3), 1 << random(5));
                        let at = (random(32) as usize) / bytes * bytes;
                        let mut now = now(block, thread as u16, phase, warps[warp as usize]);
                        let kind = if random(60) < writes { kinds[1 + random(2) as usize] } else { kinds[0] };
                        now.who.constant = kind == Kind::Read && random(10) < constants;
                        let conflicts = |(k, a, b, them): &(Kind, usize, usize, Who)| {
                            let meet = *a < at + bytes && at < a + b;
                            let plain = (*k, kind) != (Kind::Read, Kind::Read)
                                && (*k, kind) != (Kind::Atomic, Kind::Atomic);
                            let me = &now.who;
                            let ordered = them.block == me.block
                                && (them.thread == me.thread
                                    || them.phase < me.phase
                                    || them.thread / 32 == me.thread / 32 && them.warp_phase < me.warp_phase);
                            meet && plain && (!ordered || them.constant)
                        };
                        let want = history.iter().any(conflicts);
                        let got = touch(&mut s, kind, at, bytes, &now);
                        assert_eq!(got.is_err(), want, "{history:?}, then {kind:?} {at} {bytes} {now:?}");
                        if want {
                            races += 1;
                            break 'run;
                        }
                        history.push((kind, at, bytes, now.who));
                        longest = longest.max(history.len());
                    }
                }
            }
        }
        assert!(races > 5_000 && races < 18_000 && longest > 20, "{races}, {longest}");
    }
}
