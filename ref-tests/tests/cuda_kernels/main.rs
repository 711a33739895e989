//! Every committed PTX kernel, run by the PTX interpreter, against its scalar twin on the CPU: same bits where the twin's order of
//! summation is the kernel's too. With `RSINFER_TEST_GPU=cuda:0` each launch runs on that GPU as well, and gives the interpreter's bytes.

mod attention;
mod half;
mod matmul;
mod matvec;
mod mla;
mod prompt;
mod prompt_half;
mod router;
mod rows;
mod skinny;
mod split;
mod store;

use kernels::cuda::modules::Ptx;
use ptx::{Param, PtxError};
use ref_tests::mirror::{Machine, Text};

/// A device and one module on it.
pub(crate) struct Gpu {
    pub(crate) machine: Machine,
    module: Text,
}

impl Gpu {
    pub(crate) fn new(ptx: &Ptx) -> Self {
        Self::of_text(ptx.text).unwrap_or_else(|e| panic!("{}: {e}", ptx.name))
    }

    pub(crate) fn of_text(text: &str) -> Result<Self, PtxError> {
        Ok(Self { machine: Machine::new(), module: Text::new(text)? })
    }

    /// A new allocation that holds these bytes and not one more.
    pub(crate) fn bytes(&mut self, b: &[u8]) -> u64 {
        let p = self.machine.alloc(b.len());
        self.machine.write(p, b).unwrap();
        p
    }

    pub(crate) fn floats(&mut self, x: &[f32]) -> u64 {
        self.bytes(&x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn words(&mut self, x: &[u32]) -> u64 {
        self.bytes(&x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    /// A new allocation that nothing may read before a kernel wrote it.
    pub(crate) fn room(&mut self, floats: usize) -> u64 {
        self.machine.alloc(4 * floats)
    }

    pub(crate) fn read(&self, p: u64, floats: usize) -> Vec<f32> {
        self.try_read(p, floats).unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn try_read(&self, p: u64, floats: usize) -> Result<Vec<f32>, PtxError> {
        let bytes = self.machine.read(p, 4 * floats)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    pub(crate) fn run(&mut self, kernel: &str, grid: [usize; 2], threads: u32, params: &[Param]) {
        self.run_shared(kernel, [grid[0], grid[1], 1], threads, 0, params);
    }

    /// The same with `shared` floats of shared memory.
    pub(crate) fn run_shared(
        &mut self,
        kernel: &str,
        grid: [usize; 3],
        threads: u32,
        shared: usize,
        params: &[Param],
    ) {
        self.try_run(kernel, grid, threads, shared, params).unwrap_or_else(|e| panic!("{e}"));
    }

    pub(crate) fn try_run(
        &mut self,
        kernel: &str,
        grid: [usize; 3],
        threads: u32,
        shared: usize,
        params: &[Param],
    ) -> Result<(), PtxError> {
        self.machine.set_limit(3_000_000);
        let grid = grid.map(|n| n as u32);
        self.machine.launch(&self.module, kernel, grid, [threads, 1, 1], 4 * shared, params).map(|_| ())
    }
}

pub(crate) fn p(x: u64) -> Param {
    Param::U64(x)
}

pub(crate) fn n(x: usize) -> Param {
    Param::U32(u32::try_from(x).unwrap())
}
