//! Every committed PTX kernel, run by the PTX interpreter, against its scalar twin on the CPU: same bits where the twin's order of
//! summation is the kernel's too.

mod matvec;
mod rows;

use kernels::cuda::modules::Ptx;
use ptx::{Machine, Module, Param};

/// A device and one module on it.
pub(crate) struct Gpu {
    pub(crate) machine: Machine,
    module: Module,
}

impl Gpu {
    pub(crate) fn new(ptx: &Ptx) -> Self {
        let module = Module::parse(ptx.text).unwrap_or_else(|e| panic!("{}: {e}", ptx.name));
        Self { machine: Machine::new(), module }
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
        let bytes = self.machine.read(p, 4 * floats).unwrap();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub(crate) fn run(&mut self, kernel: &str, grid: [usize; 2], threads: u32, params: &[Param]) {
        let k = self.module.kernel(kernel).unwrap_or_else(|| panic!("no kernel {kernel}"));
        let grid = [grid[0] as u32, grid[1] as u32, 1];
        self.machine.launch(k, grid, [threads, 1, 1], 0, params).unwrap_or_else(|e| panic!("{e}"));
    }
}

pub(crate) fn p(x: u64) -> Param {
    Param::U64(x)
}

pub(crate) fn n(x: usize) -> Param {
    Param::U32(u32::try_from(x).unwrap())
}
