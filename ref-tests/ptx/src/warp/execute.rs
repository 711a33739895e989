//! What each instruction does to a warp's registers and memory. Knows one group of threads at one place; where threads go next is
//! `warp`'s.

use super::{Failed, Flow, Launch, Wait, Warp, lanes};
use crate::Fault;
use crate::alu::Function;
use crate::op::{LOCAL_WINDOW, Op, Place, SHARED_WINDOW, Shuffle, Space, Src, Vote};
use crate::tensor;

impl Warp {
    pub(super) fn execute(&mut self, launch: &mut Launch<'_>, op: &Op, mask: u32) -> Result<Flow, Failed> {
        match op {
            Op::Function { f, d, keep, src } => {
                let mut out = [0; 32];
                let a = self.get(launch, src[0], mask)?;
                match f {
                    Function::One(f) => lanes(mask).for_each(|l| out[l] = f(a[l])),
                    Function::Two(f) => {
                        let b = self.get(launch, src[1], mask)?;
                        lanes(mask).for_each(|l| out[l] = f(a[l], b[l]));
                    }
                    Function::Three(f) => {
                        let (b, c) = (self.get(launch, src[1], mask)?, self.get(launch, src[2], mask)?);
                        lanes(mask).for_each(|l| out[l] = f(a[l], b[l], c[l]));
                    }
                    Function::Four(f) => {
                        let (b, c) = (self.get(launch, src[1], mask)?, self.get(launch, src[2], mask)?);
                        let e = self.get(launch, src[3], mask)?;
                        lanes(mask).for_each(|l| out[l] = f(a[l], b[l], c[l], e[l]));
                    }
                }
                self.set(*d, mask, *keep, &out);
            }
            Op::Compare { f, d, not_d, a, b, with } => {
                let (a, b) = (self.get(launch, *a, mask)?, self.get(launch, *b, mask)?);
                let (mut yes, mut no) = ([0; 32], [0; 32]);
                lanes(mask).for_each(|l| yes[l] = u64::from(f(a[l], b[l])));
                lanes(mask).for_each(|l| no[l] = 1 - yes[l]);
                if let Some((Function::Two(join), p, negate)) = with {
                    let p = self.get(launch, *p, mask)?;
                    for l in lanes(mask) {
                        let p = p[l] ^ u64::from(*negate);
                        (yes[l], no[l]) = (join(yes[l], p), join(no[l], p));
                    }
                }
                self.set(*d, mask, 1, &yes);
                if let Some(d) = not_d {
                    self.set(*d, mask, 1, &no);
                }
            }
            Op::Load { at, bytes, signed, constant, d, keep } => {
                let addresses = self.addresses(launch, at, mask)?;
                self.load(launch, &addresses, mask, usize::from(*bytes), *signed, *constant, d, *keep)?;
            }
            Op::Store { at, bytes, src } => {
                let addresses = self.addresses(launch, at, mask)?;
                let size = usize::from(*bytes);
                let mut values = [[0; 32]; 4];
                for (v, s) in values.iter_mut().zip(src) {
                    *v = self.get(launch, *s, mask)?;
                }
                for l in lanes(mask) {
                    let mut data = [0u8; 32];
                    for (i, v) in values[..src.len()].iter().enumerate() {
                        data[i * size..][..size].copy_from_slice(&v[l].to_le_bytes()[..size]);
                    }
                    self.store(launch, addresses[l], l, &data[..size * src.len()])?;
                }
            }
            Op::Atomic { at, bytes, f, d, b, c } => {
                let addresses = self.addresses(launch, at, mask)?;
                let (b, c) = (self.get(launch, *b, mask)?, self.get(launch, *c, mask)?);
                let size = usize::from(*bytes);
                let mut old = [0; 32];
                for l in lanes(mask) {
                    let now = self.access(launch, l);
                    let (space, address) = addresses[l];
                    aligned(space, address, size).map_err(|e| (l as u32, e))?;
                    let memory = match space {
                        Space::Shared => launch.shared.atomic(address, size, &now),
                        Space::Global => self
                            .may_write(l, address)
                            .and_then(|()| launch.global.atomic(address, size, &now)),
                        _ => Err(Fault::Value("atomic on local or parameter memory".into())),
                    };
                    let memory = memory.map_err(|e| (l as u32, e))?;
                    old[l] = bits(memory);
                    memory.copy_from_slice(&f(old[l], b[l], c[l]).to_le_bytes()[..size]);
                }
                if let Some(d) = d {
                    self.set(*d, mask, u64::MAX, &old);
                }
            }
            Op::Branch(to) => return Ok(Flow::Jump(*to, mask)),
            Op::Exit => match lanes(mask & !self.waited).next() {
                Some(lane) => return Err((lane as u32, Fault::NoWait)),
                None => return Ok(Flow::Exit(mask)),
            },
            Op::WaitForGrids => self.waited |= mask,
            Op::Prefetch(at) => {
                let addresses = self.addresses(launch, at, mask)?;
                for l in lanes(mask) {
                    launch.global.raw(addresses[l].1, 1).map_err(|e| (l as u32, e))?;
                }
            }
            Op::Barrier => return Ok(Flow::Wait(Wait::Barrier)),
            Op::WarpSync(members) => {
                if let Some(wait) = self.together(launch, *members, mask)? {
                    return Ok(Flow::Wait(wait));
                }
                // One of some of them orders these alone, and is taken for nothing.
                self.phase += u32::from(mask == self.alive);
            }
            Op::Shuffle { mode, d, p, a, b, c, mask: members } => {
                if let Some(wait) = self.together(launch, *members, mask)? {
                    return Ok(Flow::Wait(wait));
                }
                let [a, b, c] = [*a, *b, *c].map(|s| self.get(launch, s, mask));
                let (a, b, c) = (a?, b?, c?);
                let (mut out, mut inside) = ([0; 32], [0; 32]);
                for l in lanes(mask) {
                    let (from, ok) = source(*mode, l as u32, b[l] as u32, c[l] as u32);
                    if mask >> from & 1 == 0 {
                        return Err((l as u32, Fault::ShuffleSource(from)));
                    }
                    (out[l], inside[l]) = (a[from as usize], u64::from(ok));
                }
                self.set(*d, mask, 0xffff_ffff, &out);
                if let Some(p) = p {
                    self.set(*p, mask, 1, &inside);
                }
            }
            Op::Vote { mode, d, a, negate, mask: members } => {
                if let Some(wait) = self.together(launch, *members, mask)? {
                    return Ok(Flow::Wait(wait));
                }
                let a = self.get(launch, *a, mask)?;
                let yes = lanes(mask).filter(|l| (a[*l] != 0) != *negate).fold(0u32, |m, l| m | 1 << l);
                let out = match mode {
                    Vote::All => u64::from(yes == mask),
                    Vote::Any => u64::from(yes != 0),
                    Vote::Uniform => u64::from(yes == mask || yes == 0),
                    Vote::Ballot => yes.into(),
                };
                self.set(*d, mask, 0xffff_ffff, &[out; 32]);
            }
            Op::ActiveMask(d) => self.set(*d, mask, 0xffff_ffff, &[mask.into(); 32]),
            Op::CopyAsync { to, from, bytes, fill } => {
                let (to, from) = (self.addresses(launch, to, mask)?, self.addresses(launch, from, mask)?);
                let size = usize::from(*bytes);
                let read = self.get(launch, fill.unwrap_or(Src::Imm(size as u64)), mask)?;
                for l in lanes(mask) {
                    let now = self.access(launch, l);
                    let failed = |e| (l as u32, e);
                    aligned(Space::Shared, to[l].1, size).map_err(failed)?;
                    aligned(Space::Global, from[l].1, size).map_err(failed)?;
                    let sizes = (size, read[l] as usize);
                    self.may_read(launch, l, from[l].1, sizes.1.min(size)).map_err(failed)?;
                    let places = (to[l].1, from[l].1);
                    self.copies
                        .start((l as u32, &now), places, sizes, launch.global, &mut launch.shared)
                        .map_err(failed)?;
                    launch.stats.loaded += read[l];
                }
            }
            Op::CopyCommit => lanes(mask).for_each(|l| self.copies.commit(l as u32)),
            Op::CopyWait(but) => {
                for l in lanes(mask) {
                    let now = self.access(launch, l);
                    let all = *but == u32::MAX;
                    if all {
                        self.copies.commit(l as u32);
                    }
                    let but = if all { 0 } else { *but };
                    self.copies.wait(l as u32, but, &now, &mut launch.shared).map_err(|e| (l as u32, e))?;
                }
            }
            Op::LoadMatrix { at, transpose, d } => {
                if let Some(wait) = self.all_lanes(mask)? {
                    return Ok(Flow::Wait(wait));
                }
                let addresses = self.addresses(launch, at, mask)?;
                for (i, d) in d.iter().enumerate() {
                    let mut rows = [[0u8; 16]; 8];
                    for (r, row) in rows.iter_mut().enumerate() {
                        let l = 8 * i + r;
                        let address = addresses[l].1;
                        let now = self.access(launch, l);
                        let got = aligned(Space::Shared, address, 16)
                            .and_then(|()| launch.shared.read(address, 16, &now));
                        row.copy_from_slice(got.map_err(|e| (l as u32, e))?);
                    }
                    self.set(*d, mask, 0xffff_ffff, &tensor::spread(&rows, *transpose));
                }
            }
            Op::Mma { kind, d, a, b, c } => {
                if let Some(wait) = self.all_lanes(mask)? {
                    return Ok(Flow::Wait(wait));
                }
                let get = |list: &[Src]| {
                    list.iter().map(|s| self.get(launch, *s, mask)).collect::<Result<Vec<_>, _>>()
                };
                let out = tensor::multiply(*kind, &get(a)?, &get(b)?, &get(c)?);
                for (d, out) in d.iter().zip(&out) {
                    self.set(*d, mask, 0xffff_ffff, out);
                }
            }
            Op::Nothing => {}
        }
        Ok(Flow::Next)
    }

    /// Each lane's address and the space it falls into.
    fn addresses(&self, launch: &Launch<'_>, at: &Place, mask: u32) -> Result<[(Space, u64); 32], Failed> {
        let base = self.get(launch, at.base, mask)?;
        Ok(base.map(|b| {
            let address = b.wrapping_add(at.offset as u64);
            match at.space {
                Space::Generic if address < SHARED_WINDOW => (Space::Global, address),
                Space::Generic if address < LOCAL_WINDOW => (Space::Shared, address - SHARED_WINDOW),
                Space::Generic if address < 2 * LOCAL_WINDOW => (Space::Local, address - LOCAL_WINDOW),
                Space::Generic => (Space::Global, address),
                space => (space, address),
            }
        }))
    }

    fn load(
        &mut self,
        launch: &mut Launch<'_>,
        addresses: &[(Space, u64); 32],
        mask: u32,
        size: usize,
        signed: bool,
        constant: bool,
        d: &[u32],
        keep: u64,
    ) -> Result<(), Failed> {
        let total = size * d.len();
        let mut out = [[0u64; 32]; 4];
        for l in lanes(mask) {
            let failed = |e| (l as u32, e);
            let (space, address) = addresses[l];
            aligned(space, address, total).map_err(failed)?;
            let mut now = self.access(launch, l);
            let data = match space {
                Space::Global | Space::Generic => {
                    launch.stats.loaded += total as u64;
                    self.may_read(launch, l, address, total).map_err(failed)?;
                    now.who.constant = constant;
                    launch.global.read(address, total, &now).map_err(failed)?
                }
                Space::Shared => launch.shared.read(address, total, &now).map_err(failed)?,
                Space::Param => {
                    let end = address as usize + total;
                    let outside = Fault::OutOfBounds { space: "parameter", address, bytes: total };
                    launch.params.get(address as usize..end).ok_or(outside).map_err(failed)?
                }
                Space::Local => {
                    let at = self.local_place(launch, l, address, total).map_err(failed)?;
                    if self.local_written[at..at + total].contains(&false) {
                        return Err(failed(Fault::Uninitialised { space: "local", address }));
                    }
                    &self.local[at..at + total]
                }
            };
            for (out, part) in out.iter_mut().zip(data.chunks_exact(size)) {
                let v = bits(part);
                let shift = 64 - 8 * size as u32;
                out[l] = if signed { ((v << shift) as i64 >> shift) as u64 } else { v };
            }
        }
        for (d, out) in d.iter().zip(&out) {
            self.set(*d, mask, keep, out);
        }
        Ok(())
    }

    /// What a lane may read before it has waited for the launches before: nothing that these wrote.
    fn may_read(&self, launch: &Launch<'_>, lane: usize, address: u64, bytes: usize) -> Result<(), Fault> {
        if self.waited >> lane & 1 == 1 || bytes == 0 {
            return Ok(());
        }
        launch.global.read_early(address, bytes)
    }

    /// What it may write: nothing, which these may still read or write.
    fn may_write(&self, lane: usize, address: u64) -> Result<(), Fault> {
        let early = Fault::Early { access: "write", address, by: None };
        if self.waited >> lane & 1 == 1 { Ok(()) } else { Err(early) }
    }

    fn local_place(
        &self,
        launch: &Launch<'_>,
        lane: usize,
        address: u64,
        bytes: usize,
    ) -> Result<usize, Fault> {
        let each = launch.kernel.local_bytes;
        match usize::try_from(address) {
            Ok(at) if at.checked_add(bytes).is_some_and(|end| end <= each) => Ok(lane * each + at),
            _ => Err(Fault::OutOfBounds { space: "local", address, bytes }),
        }
    }

    fn store(
        &mut self,
        launch: &mut Launch<'_>,
        (space, address): (Space, u64),
        lane: usize,
        data: &[u8],
    ) -> Result<(), Failed> {
        let failed = |e| (lane as u32, e);
        aligned(space, address, data.len()).map_err(failed)?;
        match space {
            Space::Shared => {
                let now = self.access(launch, lane);
                launch.shared.write(address, data.len(), &now).map_err(failed)?.copy_from_slice(data);
            }
            Space::Local => {
                let at = self.local_place(launch, lane, address, data.len()).map_err(failed)?;
                self.local[at..at + data.len()].copy_from_slice(data);
                self.local_written[at..at + data.len()].fill(true);
            }
            _ => {
                launch.stats.stored += data.len() as u64;
                self.may_write(lane, address).map_err(failed)?;
                let now = self.access(launch, lane);
                launch.global.write(address, data.len(), &now).map_err(failed)?.copy_from_slice(data);
            }
        }
        Ok(())
    }
}

fn bits(bytes: &[u8]) -> u64 {
    let mut b = [0; 8];
    b[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(b)
}

fn aligned(space: Space, address: u64, bytes: usize) -> Result<(), Fault> {
    if address.is_multiple_of(bytes as u64) {
        return Ok(());
    }
    let space = match space {
        Space::Param => "parameter",
        Space::Shared => "shared",
        Space::Local => "local",
        _ => "global",
    };
    Err(Fault::Misaligned { space, address, bytes })
}

/// The lane that a shuffle reads, and whether it lies inside the segment (PTX ISA, `shfl.sync`).
fn source(mode: Shuffle, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (b, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
    let (least, most) = (lane & segment, (lane & segment) | (clamp & !segment));
    let (from, ok) = match mode {
        Shuffle::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= most as i32),
        Shuffle::Down => (lane + b, lane + b <= most),
        Shuffle::Butterfly => (lane ^ b, lane ^ b <= most),
        Shuffle::Index => {
            let from = least | (b & !segment);
            (from, from <= most)
        }
    };
    if ok { (from, true) } else { (lane, false) }
}
