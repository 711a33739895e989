//! The machine: memory, and grids run block by block. Knows launches; instructions are `warp`'s.

use crate::lower::Kernel;
use crate::memory::Global;
use crate::shared::Shared;
use crate::warp::{Launch, State, Warp};
use crate::{Fault, PtxError};

/// A launch parameter; its size must be the kernel's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Param {
    /// A pointer or 64-bit integer.
    U64(u64),
    /// A 32-bit integer.
    U32(u32),
    /// A float.
    F32(f32),
}

impl Param {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::U64(x) => x.to_le_bytes().into(),
            Self::U32(x) => x.to_le_bytes().into(),
            Self::F32(x) => x.to_le_bytes().into(),
        }
    }
}

/// What a launch took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Instructions that warps executed.
    pub instructions: u64,
    /// Bytes that lanes loaded from global memory.
    pub loaded: u64,
    /// Bytes that lanes stored to it.
    pub stored: u64,
}

/// A device: global memory and what runs on it.
#[derive(Clone, Default)]
pub struct Machine {
    global: Global,
    limit: Option<u64>,
}

/// Warp instructions after which a launch counts as endless.
const LIMIT: u64 = 2_000_000_000;
/// Threads of a block, and bytes of shared memory, that every GPU since Turing takes.
const MAX_THREADS: u32 = 1024;

impl Machine {
    /// One without memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends launches after so many warp instructions, instead of two thousand million.
    pub fn set_limit(&mut self, instructions: u64) {
        self.limit = Some(instructions);
    }

    /// Allocates `bytes` that are to be written before they are read. Addresses are multiples of 2^40 and never used twice.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.global.alloc(bytes)
    }

    /// Frees an allocation.
    ///
    /// # Errors
    /// [`PtxError::Host`] if there is none at `address`.
    pub fn free(&mut self, address: u64) -> Result<(), PtxError> {
        self.global.free(address).map_err(|fault| PtxError::Host { address, bytes: 0, fault })
    }

    /// Addresses and sizes of all allocations.
    pub fn allocations(&self) -> impl Iterator<Item = (u64, usize)> {
        self.global.allocations()
    }

    /// Copies bytes from the host.
    ///
    /// # Errors
    /// [`PtxError::Host`] outside an allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), PtxError> {
        let n = bytes.len();
        self.global.host_write(address, bytes).map_err(|fault| PtxError::Host { address, bytes: n, fault })
    }

    /// Copies bytes to the host.
    ///
    /// # Errors
    /// [`PtxError::Host`] outside an allocation, or where nothing was written.
    pub fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, PtxError> {
        let got = self.global.host_read(address, bytes);
        got.map(<[u8]>::to_vec).map_err(|fault| PtxError::Host { address, bytes, fault })
    }

    /// Copies bytes, each `None` where nothing was written: for looking at what a kernel left alone.
    ///
    /// # Errors
    /// [`PtxError::Host`] outside an allocation.
    pub fn peek(&self, address: u64, bytes: usize) -> Result<Vec<Option<u8>>, PtxError> {
        let (data, written) =
            self.global.raw(address, bytes).map_err(|fault| PtxError::Host { address, bytes, fault })?;
        Ok(data.iter().zip(written).map(|(b, w)| (*w != 0).then_some(*b)).collect())
    }

    /// Runs a grid to its end. Blocks run one after another, x fastest; the warps of a block take turns at barriers.
    ///
    /// # Errors
    /// [`PtxError::Launch`] where parameters or sizes do not fit; [`PtxError::Run`] for what a thread does wrong.
    pub fn launch(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: usize,
        params: &[Param],
    ) -> Result<Stats, PtxError> {
        self.run(kernel, grid, block, dynamic_shared, params, false)
    }

    /// The same of a launch that may begin while the one before it runs, and all that that one may overlap: on a GPU by programmatic
    /// dependent launch. A thread that has not come to `griddepcontrol.wait` may neither write global memory nor read what those wrote.
    ///
    /// # Errors
    /// As [`Machine::launch`]; and [`Fault::Early`], [`Fault::NoWait`].
    pub fn launch_overlapping(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: usize,
        params: &[Param],
    ) -> Result<Stats, PtxError> {
        self.run(kernel, grid, block, dynamic_shared, params, true)
    }

    /// Takes what lies in these allocations for written by a launch that the next may overlap, where it may overlap one.
    ///
    /// # Errors
    /// [`PtxError::Host`] if there is none at an address.
    pub fn in_flight(&mut self, allocations: &[u64]) -> Result<(), PtxError> {
        self.global.begin_launch("another kernel", false);
        let claim =
            |a: &u64| self.global.claim(*a).map_err(|fault| PtxError::Host { address: *a, bytes: 0, fault });
        allocations.iter().try_for_each(claim)
    }

    fn run(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: usize,
        params: &[Param],
        overlaps: bool,
    ) -> Result<Stats, PtxError> {
        let fail = |what: String| Err(PtxError::Launch { kernel: kernel.name.clone(), what });
        let (threads, blocks) = (product(block), product(grid));
        if blocks == 0 || threads == 0 || threads > u64::from(kernel.max_threads.unwrap_or(MAX_THREADS)) {
            return fail(format!(
                "grid {grid:?} of blocks {block:?}, at most {:?} threads",
                kernel.max_threads
            ));
        }
        if grid[0] > i32::MAX as u32 || grid[1] > 65_535 || grid[2] > 65_535 {
            return fail(format!("grid {grid:?}"));
        }
        if params.len() != kernel.params.len() {
            return fail(format!("{} parameters, it takes {}", params.len(), kernel.params.len()));
        }
        let mut bytes = vec![0u8; kernel.param_bytes];
        for (i, (p, (at, size))) in params.iter().zip(&kernel.params).enumerate() {
            let p = p.bytes();
            if p.len() != *size {
                return fail(format!("parameter {i} has {} bytes, it takes {size}", p.len()));
            }
            bytes[*at..at + size].copy_from_slice(&p);
        }
        self.global.begin_launch(&kernel.name, overlaps);
        let mut launch = Launch {
            kernel,
            params: &bytes,
            grid,
            block,
            at: [0; 3],
            global: &mut self.global,
            shared: Shared::new(kernel.shared_bytes + dynamic_shared),
            overlaps,
            since: 0,
            index: 0,
            stats: Stats::default(),
            limit: self.limit.unwrap_or(LIMIT),
        };
        launch.since = launch.global.phase + 1;
        let mut warps: Vec<Warp> = (0..threads.div_ceil(32) as u32).map(|w| Warp::new(kernel, w)).collect();
        for z in 0..grid[2] {
            for y in 0..grid[1] {
                for x in 0..grid[0] {
                    launch.at = [x, y, z];
                    run_block(&mut launch, &mut warps, threads as u32)?;
                    launch.index = launch.index.wrapping_add(1);
                }
            }
        }
        Ok(launch.stats)
    }
}

fn product(v: [u32; 3]) -> u64 {
    v.iter().map(|n| u64::from(*n)).product()
}

fn run_block(launch: &mut Launch<'_>, warps: &mut [Warp], threads: u32) -> Result<(), PtxError> {
    launch.global.phase += 1;
    launch.shared.begin(launch.global.phase);
    for (w, warp) in warps.iter_mut().enumerate() {
        warp.begin((threads - 32 * w as u32).min(32), launch.overlaps);
    }
    loop {
        let mut barrier: Option<(u32, u32)> = None;
        for (w, warp) in warps.iter_mut().enumerate() {
            match warp.run(launch)? {
                State::Done => {}
                State::Barrier(pc) => match barrier {
                    None => barrier = Some((pc, w as u32)),
                    Some((other, first)) if other != pc => {
                        let line = |pc: u32| launch.kernel.code[pc as usize].line;
                        let what = format!(
                            "warp {first} waits at line {}, warp {w} at line {}",
                            line(other),
                            line(pc)
                        );
                        return Err(launch.error(pc, 32 * w as u32, Fault::BarrierDivergence(what)));
                    }
                    Some(_) => {}
                },
            }
        }
        if barrier.is_none() {
            return Ok(());
        }
        launch.global.phase += 1;
        warps.iter_mut().for_each(Warp::pass_barrier);
    }
}
