//! A warp: 32 threads, each with its own place in the program; those at the same place run together. Of several places the lowest goes
//! first, so that threads that branched apart meet again where their paths do.

use crate::alu::Function;
use crate::asynchronous::Copies;
use crate::lower::{Kernel, LOCAL_WINDOW, Op, Place, SHARED_WINDOW, Shuffle, Space, Special, Src, Vote};
use crate::machine::Stats;
use crate::memory::Global;
use crate::shared::{Shared, Who};
use crate::tensor::{self, Lanes};
use crate::{Fault, PtxError};

/// What the threads of a launch share.
pub struct Launch<'a> {
    pub kernel: &'a Kernel,
    pub params: &'a [u8],
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// The block's index.
    pub at: [u32; 3],
    pub global: &'a mut Global,
    pub shared: Shared,
    /// Barriers passed.
    pub epoch: u32,
    pub stats: Stats,
    pub limit: u64,
}

impl Launch<'_> {
    pub fn error(&self, pc: u32, thread: u32, fault: Fault) -> PtxError {
        let line = self.kernel.code[pc as usize].line;
        PtxError::Run { kernel: self.kernel.name.clone(), line, block: self.at, thread, fault }
    }
}

/// Why a warp stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All its threads are out.
    Done,
    /// All that are left wait at the barrier at this place.
    Barrier(u32),
}

/// Why a group of threads does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    No,
    /// For the lanes of a mask to come to the same place; how many had left by then.
    Lanes(u32, u32),
    Barrier,
}

/// Threads at the same place.
#[derive(Clone, Copy, Debug)]
struct Group {
    pc: u32,
    lanes: u32,
    wait: Wait,
}

/// What an instruction does to the group that ran it.
enum Flow {
    Next,
    Jump(u32, u32),
    Exit(u32),
    Wait(Wait),
}

type Failed = (u32, Fault);

pub struct Warp {
    index: u32,
    registers: Vec<Lanes>,
    /// Lanes that have written each register.
    written: Vec<u32>,
    local: Vec<u8>,
    local_written: Vec<bool>,
    groups: Vec<Group>,
    alive: u32,
    epoch: u32,
    copies: Copies,
}

/// The lanes of a mask, in order.
#[inline(always)]
fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        (mask != 0).then(|| {
            mask &= mask - 1;
            lane as usize
        })
    })
}

fn first(mask: u32) -> u32 {
    mask.trailing_zeros().min(31)
}

impl Warp {
    pub fn new(kernel: &Kernel, index: u32) -> Self {
        Self {
            index,
            registers: vec![[0; 32]; kernel.registers.len()],
            written: vec![0; kernel.registers.len()],
            local: vec![0; 32 * kernel.local_bytes],
            local_written: vec![false; 32 * kernel.local_bytes],
            groups: Vec::new(),
            alive: 0,
            epoch: 0,
            copies: Copies::default(),
        }
    }

    /// Puts `threads` threads at the start of the kernel.
    pub fn begin(&mut self, threads: u32) {
        self.written.fill(0);
        self.local_written.fill(false);
        self.alive = u32::MAX >> (32 - threads);
        self.groups = vec![Group { pc: 0, lanes: self.alive, wait: Wait::No }];
        self.epoch = 0;
        self.copies.clear();
    }

    /// Goes on after a barrier.
    pub fn pass_barrier(&mut self) {
        for g in &mut self.groups {
            (g.pc, g.wait) = (g.pc + 1, Wait::No);
        }
    }

    /// Runs until all threads are out or wait at a barrier of the block.
    pub fn run(&mut self, launch: &mut Launch<'_>) -> Result<State, PtxError> {
        loop {
            let ready = |g: &&Group| g.wait == Wait::No;
            let Some(group) = self.groups.iter().filter(ready).min_by_key(|g| g.pc).copied() else {
                match self.stuck(launch)? {
                    Some(state) => return Ok(state),
                    None => continue,
                }
            };
            self.groups.retain(|g| g.pc != group.pc);
            self.run_group(launch, group)?;
        }
    }

    /// No group can run: the block's barrier, the end, or threads that wait for each other.
    fn stuck(&mut self, launch: &Launch<'_>) -> Result<Option<State>, PtxError> {
        let Some(group) = self.groups.first().copied() else { return Ok(Some(State::Done)) };
        let alive = self.alive;
        let mut again = false;
        for g in &mut self.groups {
            // Whoever left since need not be waited for.
            if matches!(g.wait, Wait::Lanes(_, then) if then != alive) {
                (g.wait, again) = (Wait::No, true);
            }
        }
        if again {
            return Ok(None);
        }
        let thread = |g: &Group| 32 * self.index + first(g.lanes);
        if let Some(g) = self.groups.iter().find(|g| matches!(g.wait, Wait::Lanes(..))) {
            let Wait::Lanes(mask, _) = g.wait else { unreachable!() };
            let fault = Fault::SyncDivergence(mask, mask & alive & !g.lanes);
            return Err(launch.error(g.pc, thread(g), fault));
        }
        if let Some(other) = self.groups.iter().find(|g| g.pc != group.pc) {
            let line = |g: &Group| launch.kernel.code[g.pc as usize].line;
            let what = format!(
                "lanes {:#010x} wait at line {}, lanes {:#010x} of the same warp at line {}",
                group.lanes,
                line(&group),
                other.lanes,
                line(other)
            );
            return Err(launch.error(other.pc, thread(other), Fault::BarrierDivergence(what)));
        }
        Ok(Some(State::Barrier(group.pc)))
    }

    /// Adds threads to those at the same place; they look anew at what they wait for.
    fn put(&mut self, pc: u32, lanes: u32, wait: Wait) {
        if lanes == 0 {
            return;
        }
        match self.groups.iter_mut().find(|g| g.pc == pc) {
            Some(g) => (g.lanes, g.wait) = (g.lanes | lanes, Wait::No),
            None => self.groups.push(Group { pc, lanes, wait }),
        }
    }

    /// Runs a group until it meets another, parts, waits or ends.
    fn run_group(&mut self, launch: &mut Launch<'_>, group: Group) -> Result<(), PtxError> {
        let Group { mut pc, lanes: active, .. } = group;
        let kernel = launch.kernel;
        loop {
            let i = &kernel.code[pc as usize];
            launch.stats.instructions += 1;
            if launch.stats.instructions > launch.limit {
                return Err(launch.error(pc, 32 * self.index, Fault::Endless(launch.limit)));
            }
            let failed =
                |launch: &Launch<'_>, (lane, fault): Failed| launch.error(pc, 32 * self.index + lane, fault);
            let mut mask = active;
            if let Some((p, negate)) = i.guard {
                if active & !self.written[p as usize] != 0 {
                    let lane = first(active & !self.written[p as usize]);
                    let name = kernel.registers[p as usize].clone();
                    return Err(failed(launch, (lane, Fault::UninitialisedRegister(name))));
                }
                let values = &self.registers[p as usize];
                mask = lanes(active).filter(|l| (values[*l] != 0) != negate).fold(0, |m, l| m | 1 << l);
            }
            let flow = if mask == 0 {
                Flow::Next
            } else {
                let index = self.index;
                self.execute(launch, &i.op, mask, pc)
                    .map_err(|(lane, fault)| launch.error(pc, 32 * index + lane, fault))?
            };
            match flow {
                Flow::Next => pc += 1,
                Flow::Jump(to, who) if who == active => pc = to,
                Flow::Jump(to, who) => {
                    self.put(to, who, Wait::No);
                    self.put(pc + 1, active & !who, Wait::No);
                    return Ok(());
                }
                Flow::Exit(who) => {
                    self.alive &= !who;
                    self.put(pc + 1, active & !who, Wait::No);
                    return Ok(());
                }
                Flow::Wait(wait) => {
                    self.put(pc, mask, wait);
                    self.put(pc + 1, active & !mask, Wait::No);
                    return Ok(());
                }
            }
            if !self.groups.is_empty() && self.groups.iter().any(|g| g.pc <= pc) {
                self.put(pc, active, Wait::No);
                return Ok(());
            }
        }
    }

    fn who(&self, launch: &Launch<'_>, lane: usize) -> Who {
        Who { thread: 32 * self.index + lane as u32, epoch: launch.epoch, warp_epoch: self.epoch }
    }

    /// A source's value in every lane of the mask.
    #[inline]
    fn get(&self, launch: &Launch<'_>, s: Src, mask: u32) -> Result<Lanes, Failed> {
        match s {
            Src::Reg(r) => {
                let missing = mask & !self.written[r as usize];
                if missing != 0 {
                    let name = launch.kernel.registers[r as usize].clone();
                    return Err((first(missing), Fault::UninitialisedRegister(name)));
                }
                Ok(self.registers[r as usize])
            }
            Src::Imm(n) => Ok([n; 32]),
            Src::Special(s) => Ok(std::array::from_fn(|lane| self.special(launch, s, lane as u32))),
        }
    }

    fn special(&self, launch: &Launch<'_>, s: Special, lane: u32) -> u64 {
        let thread = 32 * self.index + lane;
        let b = launch.block;
        let below = (1u64 << lane) - 1;
        match s {
            Special::Tid(axis) => {
                u64::from([thread % b[0], thread / b[0] % b[1], thread / b[0] / b[1]][axis as usize])
            }
            Special::Ntid(axis) => b[axis as usize].into(),
            Special::Ctaid(axis) => launch.at[axis as usize].into(),
            Special::Nctaid(axis) => launch.grid[axis as usize].into(),
            Special::Lane => lane.into(),
            Special::Warp => self.index.into(),
            Special::MaskEq => 1 << lane,
            Special::MaskLt => below,
            Special::MaskLe => below | 1 << lane,
            Special::MaskGt => !(below | 1 << lane) & 0xffff_ffff,
            Special::MaskGe => !below & 0xffff_ffff,
        }
    }

    #[inline]
    fn set(&mut self, d: u32, mask: u32, keep: u64, values: &Lanes) {
        let to = &mut self.registers[d as usize];
        if mask == u32::MAX {
            for (t, v) in to.iter_mut().zip(values) {
                *t = v & keep;
            }
        } else {
            lanes(mask).for_each(|l| to[l] = values[l] & keep);
        }
        self.written[d as usize] |= mask;
    }

    /// Whether the lanes that a `.sync` instruction names are all here; if not, what to wait for.
    fn together(&self, launch: &Launch<'_>, members: Src, mask: u32) -> Result<Option<Wait>, Failed> {
        let m = self.get(launch, members, mask)?;
        let want = m[first(mask) as usize] as u32;
        if lanes(mask).any(|l| m[l] as u32 != want) || want & mask != mask {
            return Err((first(mask), Fault::SyncMask(want, mask)));
        }
        let missing = want & self.alive & !mask;
        Ok((missing != 0).then_some(Wait::Lanes(want, self.alive)))
    }

    fn all_lanes(&self, mask: u32) -> Result<Option<Wait>, Failed> {
        if self.alive != u32::MAX {
            return Err((first(mask), Fault::SyncMask(u32::MAX, self.alive)));
        }
        Ok((mask != u32::MAX).then_some(Wait::Lanes(u32::MAX, self.alive)))
    }

    fn execute(&mut self, launch: &mut Launch<'_>, op: &Op, mask: u32, pc: u32) -> Result<Flow, Failed> {
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
                    let who = self.who(launch, l);
                    let (space, address) = addresses[l];
                    aligned(space, address, size).map_err(|e| (l as u32, e))?;
                    let memory = match space {
                        Space::Shared => launch.shared.atomic(address, size, who),
                        Space::Global => launch
                            .global
                            .read(address, size, false)
                            .map(|_| ())
                            .and_then(|()| launch.global.write(address, size)),
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
            Op::Exit => return Ok(Flow::Exit(mask)),
            Op::Barrier => return Ok(Flow::Wait(Wait::Barrier)),
            Op::WarpSync(members) => {
                if let Some(wait) = self.together(launch, *members, mask)? {
                    return Ok(Flow::Wait(wait));
                }
                self.epoch += 1;
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
                    let who = self.who(launch, l);
                    let failed = |e| (l as u32, e);
                    aligned(Space::Shared, to[l].1, size).map_err(failed)?;
                    aligned(Space::Global, from[l].1, size).map_err(failed)?;
                    let sizes = (size, read[l] as usize);
                    let places = (to[l].1, from[l].1);
                    self.copies
                        .start((l as u32, who), places, sizes, launch.global, &mut launch.shared)
                        .map_err(failed)?;
                    launch.stats.loaded += read[l];
                }
            }
            Op::CopyCommit => lanes(mask).for_each(|l| self.copies.commit(l as u32)),
            Op::CopyWait(but) => {
                for l in lanes(mask) {
                    let who = self.who(launch, l);
                    let all = *but == u32::MAX;
                    if all {
                        self.copies.commit(l as u32);
                    }
                    let but = if all { 0 } else { *but };
                    self.copies.wait(l as u32, but, who, &mut launch.shared).map_err(|e| (l as u32, e))?;
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
                        let who = self.who(launch, l);
                        let got = aligned(Space::Shared, address, 16)
                            .and_then(|()| launch.shared.read(address, 16, who));
                        row.copy_from_slice(got.map_err(|e| (l as u32, e))?);
                    }
                    self.set(*d, mask, 0xffff_ffff, &tensor::spread(&rows, *transpose));
                }
            }
            Op::Mma { kind, d, a, b, c } => {
                if let Some(wait) = self.all_lanes(mask)? {
                    return Ok(Flow::Wait(wait));
                }
                let get = |s: Src| self.get(launch, s, mask);
                let a = [get(a[0])?, get(a[1])?, get(a[2])?, get(a[3])?];
                let c = [get(c[0])?, get(c[1])?, get(c[2])?, get(c[3])?];
                let out = tensor::multiply(*kind, &a, &[get(b[0])?, get(b[1])?], &c);
                for (d, out) in d.iter().zip(&out) {
                    self.set(*d, mask, 0xffff_ffff, out);
                }
            }
            Op::Nothing => {}
        }
        let _ = pc;
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
            let who = self.who(launch, l);
            let data = match space {
                Space::Global | Space::Generic => {
                    launch.stats.loaded += total as u64;
                    launch.global.read(address, total, constant).map_err(failed)?
                }
                Space::Shared => launch.shared.read(address, total, who).map_err(failed)?,
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
                let who = self.who(launch, lane);
                launch.shared.write(address, data.len(), who).map_err(failed)?.copy_from_slice(data);
            }
            Space::Local => {
                let at = self.local_place(launch, lane, address, data.len()).map_err(failed)?;
                self.local[at..at + data.len()].copy_from_slice(data);
                self.local_written[at..at + data.len()].fill(true);
            }
            _ => {
                launch.stats.stored += data.len() as u64;
                launch.global.write(address, data.len()).map_err(failed)?.copy_from_slice(data);
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
