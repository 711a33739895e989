//! Global memory: allocations far apart, so that no wrong address falls into a neighbour, each byte with its history.
//! Knows bytes; nothing of threads or instructions.

use crate::Fault;

/// Allocation n begins at `(n + 1) << SHIFT`.
const SHIFT: u32 = 40;

struct Allocation {
    bytes: Vec<u8>,
    /// 0: never written; [`BEFORE`]: before this launch; the launch's stamp: by it.
    written: Vec<u8>,
}

const BEFORE: u8 = 1;

/// Device memory.
#[derive(Default)]
pub struct Global {
    allocations: Vec<Option<Allocation>>,
    stamp: u8,
}

impl Global {
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.allocations.push(Some(Allocation { bytes: vec![0; bytes], written: vec![0; bytes] }));
        (self.allocations.len() as u64) << SHIFT
    }

    /// Gives an allocation back; its address is never used again.
    pub fn free(&mut self, address: u64) -> Result<(), Fault> {
        let (i, at) = place(address);
        match self.allocations.get_mut(i) {
            Some(a @ Some(_)) if at == 0 => *a = None,
            _ => return Err(Fault::OutOfBounds { space: "global", address, bytes: 0 }),
        }
        Ok(())
    }

    /// What is written from now on belongs to a new launch.
    pub fn begin_launch(&mut self) {
        if self.stamp == 0 || self.stamp == u8::MAX {
            for a in self.allocations.iter_mut().flatten() {
                a.written.iter_mut().filter(|w| **w != 0).for_each(|w| *w = BEFORE);
            }
            self.stamp = BEFORE;
        }
        self.stamp += 1;
    }

    #[inline]
    fn find(&self, address: u64, bytes: usize) -> Result<(usize, usize), Fault> {
        let (i, at) = place(address);
        match self.allocations.get(i) {
            Some(Some(a)) if at + bytes <= a.bytes.len() => Ok((i, at)),
            _ => Err(Fault::OutOfBounds { space: "global", address, bytes }),
        }
    }

    /// Bytes a thread (or the host) reads; with `constant`, none may be of this launch.
    #[inline]
    pub fn read(&self, address: u64, bytes: usize, constant: bool) -> Result<&[u8], Fault> {
        let (i, at) = self.find(address, bytes)?;
        let a = self.allocations[i].as_ref().expect("found");
        let written = &a.written[at..at + bytes];
        if let Some(k) = written.iter().position(|w| *w == 0) {
            return Err(Fault::Uninitialised { space: "global", address: address + k as u64 });
        }
        if constant && written.contains(&self.stamp) && self.stamp > BEFORE {
            return Err(Fault::NotReadOnly(address));
        }
        Ok(&a.bytes[at..at + bytes])
    }

    /// Bytes a thread is about to write.
    #[inline]
    pub fn write(&mut self, address: u64, bytes: usize) -> Result<&mut [u8], Fault> {
        let (i, at) = self.find(address, bytes)?;
        let stamp = self.stamp;
        let a = self.allocations[i].as_mut().expect("found");
        a.written[at..at + bytes].fill(stamp);
        Ok(&mut a.bytes[at..at + bytes])
    }

    /// The same for the host.
    pub fn host_write(&mut self, address: u64, from: &[u8]) -> Result<(), Fault> {
        let (i, at) = self.find(address, from.len())?;
        let a = self.allocations[i].as_mut().expect("found");
        a.written[at..at + from.len()].fill(BEFORE);
        a.bytes[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    /// Bytes, and which of them were ever written.
    pub fn raw(&self, address: u64, bytes: usize) -> Result<(&[u8], &[u8]), Fault> {
        let (i, at) = self.find(address, bytes)?;
        let a = self.allocations[i].as_ref().expect("found");
        Ok((&a.bytes[at..at + bytes], &a.written[at..at + bytes]))
    }
}

fn place(address: u64) -> (usize, usize) {
    (((address >> SHIFT) as usize).wrapping_sub(1), (address & ((1 << SHIFT) - 1)) as usize)
}
