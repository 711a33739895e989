//! Global memory: allocations far apart, so that no wrong address falls into a neighbour, each byte with its history.
//! Knows bytes; nothing of threads or instructions.

use crate::Fault;

/// Allocation n begins at `(n + 1) << SHIFT`.
const SHIFT: u32 = 40;

#[derive(Clone)]
struct Allocation {
    bytes: Vec<u8>,
    /// 0: never written; [`BEFORE`]: before any launch that may still run; a launch's stamp: by it.
    written: Vec<u8>,
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
}

impl Global {
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.allocations.push(Some(Allocation { bytes: vec![0; bytes], written: vec![0; bytes] }));
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

    /// Bytes a thread (or the host) reads; with `constant`, none may be of this launch or one that may run beside it.
    #[inline]
    pub fn read(&self, address: u64, bytes: usize, constant: bool) -> Result<&[u8], Fault> {
        let (i, at) = self.find(address, bytes)?;
        let a = self.allocations[i].as_ref().expect("found");
        let written = &a.written[at..at + bytes];
        if let Some(k) = written.iter().position(|w| *w == 0) {
            return Err(Fault::Uninitialised { space: "global", address: address + k as u64 });
        }
        if constant && self.stamp > BEFORE && written.iter().any(|w| *w >= self.first) {
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
