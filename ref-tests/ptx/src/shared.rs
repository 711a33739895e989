//! A block's shared memory with its race detector: who touched each byte last, and whether a barrier lay between.
//! Knows threads by number; nothing of instructions.

use crate::Fault;

/// A moment and a thread. Barriers of the block advance `epoch`, `bar.warp.sync` advances the warp's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    pub thread: u32,
    pub epoch: u32,
    pub warp_epoch: u32,
}

impl Who {
    const NOBODY: Self = Self { thread: u32::MAX, epoch: 0, warp_epoch: 0 };
    /// Stands for several threads.
    const SEVERAL: u32 = u32::MAX - 1;

    fn warp(self) -> u32 {
        self.thread / 32
    }

    /// Whether an access by `self` now may come before or after an earlier one by `before`.
    #[inline]
    fn races(self, before: Self) -> bool {
        before.epoch == self.epoch
            && before.thread != self.thread
            && before.thread != u32::MAX
            && !(before.warp() == self.warp() && before.warp_epoch < self.warp_epoch)
    }
}

#[derive(Clone, Copy)]
struct Shadow {
    writer: Who,
    reader: Who,
    /// Another thread of the same epoch that read, besides `reader`.
    other: Who,
    /// Who changed it by an atomic operation since it was written.
    atomic: Who,
    written: bool,
}

const FRESH: Shadow = Shadow {
    writer: Who::NOBODY,
    reader: Who::NOBODY,
    other: Who::NOBODY,
    atomic: Who::NOBODY,
    written: false,
};

/// Shared memory of one block.
pub struct Shared {
    bytes: Vec<u8>,
    shadow: Vec<Shadow>,
}

impl Shared {
    pub fn new(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes], shadow: vec![FRESH; bytes] }
    }

    /// As new, for the next block.
    pub fn clear(&mut self) {
        self.shadow.fill(FRESH);
    }

    fn find(&self, address: u64, bytes: usize) -> Result<usize, Fault> {
        match usize::try_from(address) {
            Ok(at) if at.checked_add(bytes).is_some_and(|end| end <= self.bytes.len()) => Ok(at),
            _ => Err(Fault::OutOfBounds { space: "shared", address, bytes }),
        }
    }

    /// Bytes that thread `who` reads.
    pub fn read(&mut self, address: u64, bytes: usize, who: Who) -> Result<&[u8], Fault> {
        let at = self.find(address, bytes)?;
        for (k, s) in self.shadow[at..at + bytes].iter_mut().enumerate() {
            let address = address + k as u64;
            if !s.written {
                return Err(Fault::Uninitialised { space: "shared", address });
            }
            for (them, before) in [(s.writer, "write"), (s.atomic, "atomic")] {
                if who.races(them) {
                    return Err(Fault::Race { address, access: "read", other: them.thread, before });
                }
            }
            if s.reader.thread != who.thread {
                // Of all readers, keep two that are as hard to be ordered after as any: the latest, and one of another warp.
                if s.reader.epoch == who.epoch
                    && (s.other.epoch != who.epoch || s.reader.warp() != who.warp())
                {
                    s.other = s.reader;
                }
            }
            s.reader = who;
        }
        Ok(&self.bytes[at..at + bytes])
    }

    /// Bytes that thread `who` is about to write.
    pub fn write(&mut self, address: u64, bytes: usize, who: Who) -> Result<&mut [u8], Fault> {
        self.touch(address, bytes, who, true)
    }

    /// The same for a copy under way: the bytes are unreadable until they are written.
    pub fn reserve(&mut self, address: u64, bytes: usize, who: Who) -> Result<(), Fault> {
        self.touch(address, bytes, who, false).map(|_| ())
    }

    fn touch(&mut self, address: u64, bytes: usize, who: Who, written: bool) -> Result<&mut [u8], Fault> {
        let at = self.find(address, bytes)?;
        for (k, s) in self.shadow[at..at + bytes].iter_mut().enumerate() {
            let all = [(s.writer, "write"), (s.reader, "read"), (s.other, "read"), (s.atomic, "atomic")];
            for (them, before) in all {
                if who.races(them) {
                    let address = address + k as u64;
                    return Err(Fault::Race { address, access: "write", other: them.thread, before });
                }
            }
            *s = Shadow { writer: who, written, ..FRESH };
        }
        Ok(&mut self.bytes[at..at + bytes])
    }

    /// Bytes for an atomic operation: atomics do not race with each other, but with plain accesses they do.
    pub fn atomic(&mut self, address: u64, bytes: usize, who: Who) -> Result<&mut [u8], Fault> {
        let at = self.find(address, bytes)?;
        for (k, s) in self.shadow[at..at + bytes].iter_mut().enumerate() {
            let address = address + k as u64;
            if !s.written {
                return Err(Fault::Uninitialised { space: "shared", address });
            }
            for (them, before) in [(s.writer, "write"), (s.reader, "read"), (s.other, "read")] {
                if who.races(them) {
                    return Err(Fault::Race { address, access: "atomic", other: them.thread, before });
                }
            }
            let thread = if who.races(s.atomic) { Who::SEVERAL } else { who.thread };
            s.atomic = Who { thread, ..who };
        }
        Ok(&mut self.bytes[at..at + bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(thread: u32, epoch: u32, warp_epoch: u32) -> Who {
        Who { thread, epoch, warp_epoch }
    }

    #[test]
    fn a_barrier_orders_and_its_absence_races() {
        let mut s = Shared::new(8);
        s.write(0, 4, who(0, 1, 0)).unwrap();
        assert!(s.read(0, 4, who(0, 1, 0)).is_ok());
        assert!(matches!(s.read(0, 4, who(40, 1, 0)), Err(Fault::Race { other: 0, .. })));
        assert!(s.read(0, 4, who(40, 2, 0)).is_ok());
        assert!(s.read(0, 4, who(70, 2, 0)).is_ok());
        // Written while others read.
        assert!(matches!(s.write(0, 4, who(70, 2, 0)), Err(Fault::Race { other: 40, .. })));
        assert!(s.write(0, 4, who(70, 3, 0)).is_ok());
    }

    #[test]
    fn warps_order_themselves() {
        let mut s = Shared::new(4);
        s.write(0, 4, who(1, 1, 0)).unwrap();
        assert!(s.read(0, 4, who(2, 1, 0)).is_err());
        assert!(s.read(0, 4, who(2, 1, 1)).is_ok());
        assert!(s.read(0, 4, who(33, 1, 1)).is_err());
    }

    /// Atomics are ordered among themselves, not with plain accesses.
    #[test]
    fn atomics_race_with_plain_accesses() {
        let mut s = Shared::new(4);
        s.write(0, 4, who(0, 1, 0)).unwrap();
        assert!(matches!(s.atomic(0, 4, who(5, 1, 0)), Err(Fault::Race { before: "write", .. })));
        s.atomic(0, 4, who(5, 2, 0)).unwrap();
        assert!(s.read(0, 4, who(5, 2, 0)).is_ok(), "its own");
        assert!(matches!(s.atomic(0, 4, who(6, 2, 0)), Err(Fault::Race { before: "read", .. })));
        s.atomic(0, 4, who(5, 3, 0)).unwrap();
        s.atomic(0, 4, who(40, 3, 0)).unwrap();
        for thread in [5, 40, 70] {
            assert!(matches!(s.read(0, 4, who(thread, 3, 0)), Err(Fault::Race { before: "atomic", .. })));
            assert!(s.write(0, 4, who(thread, 3, 0)).is_err());
        }
        assert!(s.read(0, 4, who(70, 4, 0)).is_ok() && s.write(0, 4, who(70, 4, 0)).is_ok());
    }

    #[test]
    fn nothing_is_read_before_it_is_written() {
        let mut s = Shared::new(8);
        assert!(matches!(s.read(4, 4, who(0, 1, 0)), Err(Fault::Uninitialised { address: 4, .. })));
        s.reserve(4, 4, who(0, 1, 0)).unwrap();
        assert!(s.read(4, 4, who(0, 1, 0)).is_err());
        assert!(matches!(s.read(6, 4, who(0, 1, 0)), Err(Fault::OutOfBounds { .. })));
    }
}
