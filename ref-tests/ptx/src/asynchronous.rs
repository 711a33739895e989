//! `cp.async`: copies from global to shared memory that take effect when they are waited for, not before.

use crate::race::Access;
use crate::shared::Shared;
use crate::{Fault, memory::Global};

struct Copy {
    lane: u32,
    group: u32,
    to: u64,
    bytes: Vec<u8>,
}

/// The copies under way of a warp.
#[derive(Default)]
pub struct Copies {
    copies: Vec<Copy>,
    /// Groups that each lane has committed.
    committed: [u32; 32],
}

impl Copies {
    pub fn clear(&mut self) {
        self.copies.clear();
        self.committed = [0; 32];
    }

    /// Starts one: `read` bytes from global memory, zeros up to `bytes`. Of none the address may be any.
    pub fn start(
        &mut self,
        (lane, now): (u32, &Access),
        (to, from): (u64, u64),
        (bytes, read): (usize, usize),
        global: &mut Global,
        shared: &mut Shared,
    ) -> Result<(), Fault> {
        let mut data = if read == 0 { Vec::new() } else { global.read(from, read.min(bytes), now)?.to_vec() };
        data.resize(bytes, 0);
        shared.reserve(to, bytes, now)?;
        self.copies.push(Copy { lane, group: self.committed[lane as usize], to, bytes: data });
        Ok(())
    }

    pub fn commit(&mut self, lane: u32) {
        self.committed[lane as usize] += 1;
    }

    /// Completes a lane's groups but for the latest `but`.
    pub fn wait(&mut self, lane: u32, but: u32, now: &Access, shared: &mut Shared) -> Result<(), Fault> {
        let done = self.committed[lane as usize].saturating_sub(but);
        for c in self.copies.iter().filter(|c| c.lane == lane && c.group < done) {
            shared.write(c.to, c.bytes.len(), now)?.copy_from_slice(&c.bytes);
        }
        self.copies.retain(|c| c.lane != lane || c.group >= done);
        Ok(())
    }
}
