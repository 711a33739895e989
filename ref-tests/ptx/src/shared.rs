//! A block's shared memory. Knows bytes, and who is about to touch them; nothing of instructions.

use crate::Fault;
use crate::race::{Access, Kind, Shadow};

/// Shared memory of one block.
pub struct Shared {
    bytes: Vec<u8>,
    written: Vec<bool>,
    shadow: Shadow,
    /// The first phase of the block.
    since: u32,
}

impl Shared {
    pub fn new(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes], written: vec![false; bytes], shadow: Shadow::default(), since: 0 }
    }

    /// As new, for the block that begins with this phase.
    pub fn begin(&mut self, since: u32) {
        self.written.fill(false);
        self.since = since;
    }

    /// Notes an access; where it begins.
    #[inline]
    fn touch(&mut self, kind: Kind, address: u64, bytes: usize, now: &Access) -> Result<usize, Fault> {
        let at = match usize::try_from(address) {
            Ok(at) if at.checked_add(bytes).is_some_and(|end| end <= self.bytes.len()) => at,
            _ => return Err(Fault::OutOfBounds { space: "shared", address, bytes }),
        };
        if kind != Kind::Write
            && let Some(k) = self.written[at..at + bytes].iter().position(|w| !w)
        {
            return Err(Fault::Uninitialised { space: "shared", address: address + k as u64 });
        }
        let now = Access { since: self.since, ..*now };
        self.shadow.touch(kind, at, bytes, &now, address)?;
        Ok(at)
    }

    /// Bytes that a thread reads.
    #[inline]
    pub fn read(&mut self, address: u64, bytes: usize, now: &Access) -> Result<&[u8], Fault> {
        let at = self.touch(Kind::Read, address, bytes, now)?;
        Ok(&self.bytes[at..at + bytes])
    }

    /// Bytes that it is about to write.
    #[inline]
    pub fn write(&mut self, address: u64, bytes: usize, now: &Access) -> Result<&mut [u8], Fault> {
        let at = self.touch(Kind::Write, address, bytes, now)?;
        self.written[at..at + bytes].fill(true);
        Ok(&mut self.bytes[at..at + bytes])
    }

    /// The same for a copy under way: the bytes are unreadable until they are written.
    pub fn reserve(&mut self, address: u64, bytes: usize, now: &Access) -> Result<(), Fault> {
        let at = self.touch(Kind::Write, address, bytes, now)?;
        self.written[at..at + bytes].fill(false);
        Ok(())
    }

    /// Bytes for an atomic operation.
    pub fn atomic(&mut self, address: u64, bytes: usize, now: &Access) -> Result<&mut [u8], Fault> {
        let at = self.touch(Kind::Atomic, address, bytes, now)?;
        Ok(&mut self.bytes[at..at + bytes])
    }
}
