//! A warp: 32 threads, each with its own place in the program; those at the same place run together. Of several places the lowest goes
//! first, so that threads that branched apart meet again where their paths do.

mod execute;

use crate::asynchronous::Copies;
use crate::lower::Kernel;
use crate::machine::Stats;
use crate::memory::Global;
use crate::op::{Special, Src};
use crate::race::{Access, Who};
use crate::shared::Shared;
use crate::tensor::Lanes;
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
    /// Launches before it may still run.
    pub overlaps: bool,
    /// Its first phase.
    pub since: u32,
    /// The block's number, x fastest.
    pub index: u32,
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
    /// Lanes that have waited for the launches before, where these may still run.
    waited: u32,
    /// Grows whenever `bar.warp.sync` orders all that are left.
    phase: u32,
    /// Of the instruction that runs.
    line: u32,
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
            waited: 0,
            phase: 0,
            line: 0,
            copies: Copies::default(),
        }
    }

    /// Puts `threads` threads at the start of the kernel; `overlaps`: they have to wait for the launches before.
    pub fn begin(&mut self, threads: u32, overlaps: bool) {
        self.written.fill(0);
        self.local_written.fill(false);
        self.alive = u32::MAX >> (32 - threads);
        self.waited = if overlaps { 0 } else { u32::MAX };
        self.groups = vec![Group { pc: 0, lanes: self.alive, wait: Wait::No }];
        self.phase = 0;
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
                self.line = i.line;
                self.execute(launch, &i.op, mask)
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

    /// An access by a lane to memory that others may touch.
    #[inline]
    fn access(&self, launch: &Launch<'_>, lane: usize) -> Access {
        let who = Who {
            phase: launch.global.phase,
            warp_phase: self.phase,
            block: launch.index,
            thread: (32 * self.index + lane as u32) as u16,
            constant: false,
            line: self.line,
        };
        Access { who, since: launch.since, grid: launch.grid }
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
}
