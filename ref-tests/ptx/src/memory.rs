//! Global memory: allocations far apart, so that no wrong address falls into a neighbour, each byte with its history.
//! Knows bytes; nothing of threads or instructions.

use crate::Fault;
use crate::race::{Access, Kind, Shadow};

/// Allocation n begins at `(n + 1) << SHIFT`.
pub const SHIFT: u32 = 40;

#[derive(Clone)]
struct Allocation {
    bytes: Vec<u8>,
    /// 0: never written; [`BEFORE`]: before any launch that may still run; a launch's stamp: by it.
    written: Vec<u8>,
    /// Who touched each byte in the launch that runs.
    shadow: Shadow,
}

const BEFORE: u8 = 1;

/// Device memory.
#[derive(Clone, Default)]
pub struct Global {
    allocations: Vec<Option<Allocation>>,
    stamp: u8,
    /// Stamp of the first launch that may still run when the last began, and the kernels from that one on.
    first: u8,
    kernels: Vec<String>,
    /// Grows with every block that begins and every barrier of a block.
    pub phase: u32,
}

impl Global {
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.allocations.push(Some(Allocation {
            bytes: vec![0; bytes],
            written: vec![0; bytes],
            shadow: Shadow::default(),
        }));
        (self.allocations.len() as u64) << SHIFT
    }

    /// Addresses and sizes.
    pub fn allocations(&self) -> impl Iterator<Item = (u64, usize)> {
        let all = self.allocations.iter().zip(1u64..);
        all.filter_map(|(a, i)| Some((i << SHIFT, a.as_ref()?.bytes.len())))
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

    /// What is written from now on belongs to a new launch of `kernel`; `overlaps`: the one before it may still run, and so may all that
    /// that one overlaps.
    pub fn begin_launch(&mut self, kernel: &str, overlaps: bool) {
        if self.stamp == 0 || self.stamp == u8::MAX {
            // Those that may still run become one.
            let running = (overlaps && self.stamp != 0).then_some(self.first);
            for w in self.allocations.iter_mut().flatten().flat_map(|a| &mut a.written) {
                *w = if running.is_some_and(|first| *w >= first) { BEFORE + 1 } else { (*w).min(BEFORE) };
            }
            self.kernels = Vec::from_iter(running.map(|_| "an earlier kernel".into()));
            (self.stamp, self.first) = (BEFORE + self.kernels.len() as u8, BEFORE + 1);
        }
        self.stamp += 1;
        if !overlaps {
            self.first = self.stamp;
            self.kernels.clear();
        }
        self.kernels.push(kernel.to_owned());
        // No launch has as many phases as are left here: each takes an instruction.
        if self.phase > u32::MAX / 2 {
            self.phase = 0;
            self.allocations.iter_mut().flatten().for_each(|a| a.shadow = Shadow::default());
        }
    }

    /// Takes what lies in an allocation for written by this launch.
    pub fn claim(&mut self, address: u64) -> Result<(), Fault> {
        let (i, _) = self.find(address, 0)?;
        let (a, stamp) = (self.allocations[i].as_mut().expect("found"), self.stamp);
        a.written.iter_mut().filter(|w| **w != 0).for_each(|w| *w = stamp);
        Ok(())
    }

    /// A read by a thread that has not waited for the launches that may still run: none of them may have written there.
    pub fn read_early(&self, address: u64, bytes: usize) -> Result<(), Fault> {
        let (i, at) = self.find(address, bytes)?;
        let written = &self.allocations[i].as_ref().expect("found").written[at..at + bytes];
        match written.iter().find(|w| **w >= self.first && **w < self.stamp) {
            Some(w) => {
                let by = self.kernels[usize::from(w - self.first)].clone();
                Err(Fault::Early { access: "read", address, by: Some(by) })
            }
            None => Ok(()),
        }
    }

    #[inline]
    fn find(&self, address: u64, bytes: usize) -> Result<(usize, usize), Fault> {
        let (i, at) = place(address);
        match self.allocations.get(i) {
            Some(Some(a)) if at + bytes <= a.bytes.len() => Ok((i, at)),
            _ => Err(Fault::OutOfBounds { space: "global", address, bytes }),
        }
    }

    /// Bytes a thread reads; by the read-only path, none may be of this launch or one that may run beside it.
    #[inline]
    pub fn read(&mut self, address: u64, bytes: usize, now: &Access) -> Result<&[u8], Fault> {
        self.touch(Kind::Read, address, bytes, now).map(|b| &*b)
    }

    /// Bytes a thread is about to write.
    #[inline]
    pub fn write(&mut self, address: u64, bytes: usize, now: &Access) -> Result<&mut [u8], Fault> {
        self.touch(Kind::Write, address, bytes, now)
    }

    /// Bytes for an atomic operation.
    pub fn atomic(&mut self, address: u64, bytes: usize, now: &Access) -> Result<&mut [u8], Fault> {
        self.touch(Kind::Atomic, address, bytes, now)
    }

    #[inline]
    fn touch(&mut self, kind: Kind, address: u64, bytes: usize, now: &Access) -> Result<&mut [u8], Fault> {
        let (i, at) = self.find(address, bytes)?;
        let a = self.allocations[i].as_mut().expect("found");
        let written = &mut a.written[at..at + bytes];
        if kind != Kind::Write {
            if let Some(k) = written.iter().position(|w| *w == 0) {
                return Err(Fault::Uninitialised { space: "global", address: address + k as u64 });
            }
            if now.who.constant && written.iter().any(|w| *w >= self.first) {
                return Err(Fault::NotReadOnly(address));
            }
        }
        if kind != Kind::Read {
            written.fill(self.stamp);
        }
        a.shadow.touch(kind, at, bytes, now, address)?;
        Ok(&mut a.bytes[at..at + bytes])
    }

    /// Bytes the host reads.
    pub fn host_read(&self, address: u64, bytes: usize) -> Result<&[u8], Fault> {
        let (data, written) = self.raw(address, bytes)?;
        match written.iter().position(|w| *w == 0) {
            Some(k) => Err(Fault::Uninitialised { space: "global", address: address + k as u64 }),
            None => Ok(data),
        }
    }

    /// Bytes the host writes.
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
