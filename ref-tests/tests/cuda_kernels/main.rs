//! Every committed PTX kernel, run by the PTX interpreter, against its scalar twin on the CPU: same bits where the twin's order of
//! summation is the kernel's too. With `RSINFER_TEST_GPU=cuda:0` each launch runs on that GPU as well, and gives the interpreter's bytes.

mod attend_half;
mod attention;
mod half;
mod matmul;
mod matvec;
mod mla;
mod mutants;
mod prompt;
mod prompt_half;
mod router;
mod rows;
mod skinny;
mod store;

use kernels::cuda::modules::{Ptx, all, text_for};
use ptx::{Param, PtxError};
use ref_tests::mirror::{Machine, Text, device};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

/// A device and one module on it. Where kernels of another text for newer GPUs may overlap, every launch is done by both, the newer as if
/// all memory but constants were still being written by others: they must leave the same bytes.
pub(crate) struct Gpu {
    pub(crate) machine: Machine,
    /// Of the module, if it ships.
    name: &'static str,
    module: Arc<Text>,
    overlaps: bool,
    /// The other of two such texts. A GPU runs the first: the newer, if it takes it.
    other: Option<Arc<Text>>,
    constants: Vec<u64>,
}

/// A text that ships, parsed once.
fn parsed(ptx: &'static Ptx) -> Arc<Text> {
    static PARSED: OnceLock<Mutex<HashMap<&'static str, Arc<Text>>>> = OnceLock::new();
    let mut parsed = PARSED.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
    let parse = || Arc::new(Text::new(ptx.text).unwrap_or_else(|e| panic!("{}: {e}", ptx.name)));
    parsed.entry(ptx.name).or_insert_with(parse).clone()
}

impl Gpu {
    pub(crate) fn new(ptx: &'static Ptx) -> Self {
        let mut gpu = Self { name: ptx.name, ..Self::of(parsed(ptx)) };
        if mutants::active() {
            return gpu;
        }
        // Of three texts the middle one is what the newest is without that.
        let latest = text_for(ptx.module(), 89).is_some_and(|t| t.name == ptx.name);
        let newer = text_for(ptx.module(), 90).filter(|n| latest && n.overlaps());
        gpu.other = newer.map(parsed);
        if device().is_some_and(|d| d.capability() >= (9, 0))
            && let Some(newer) = &mut gpu.other
        {
            std::mem::swap(&mut gpu.module, newer);
            gpu.overlaps = true;
        }
        gpu
    }

    fn of(module: Arc<Text>) -> Self {
        let machine = if mutants::active() { Machine::alone() } else { Machine::new() };
        Self { machine, name: "", module, overlaps: false, other: None, constants: Vec::new() }
    }

    /// Of a text that ships, or of one of a test's own.
    pub(crate) fn of_text(text: &str) -> Result<Self, PtxError> {
        match all().find(|m| m.text == text) {
            Some(ptx) => Ok(Self::new(ptx)),
            None => {
                let overlaps = text.contains(".target sm_90");
                Ok(Self { overlaps, ..Self::of(Arc::new(Text::new(text)?)) })
            }
        }
    }

    /// Says that no kernel of a pass writes there: weights, and lists that come from the host.
    pub(crate) fn constant(&mut self, p: u64) -> u64 {
        self.constants.push(p);
        p
    }

    pub(crate) fn weights(&mut self, b: &[u8]) -> u64 {
        let p = self.bytes(b);
        self.constant(p)
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
        if let Some((text, limit)) = mutants::stands_in(self.name, kernel) {
            limit.into_iter().for_each(|n| self.machine.set_limit(n));
            let block = [threads, 1, 1];
            return self.machine.launch(&text, kernel, grid, block, 4 * shared, params).map(mutants::took);
        }
        let twin = self.other.as_ref().map(|_| self.machine.copy());
        let run = |machine: &mut Machine, text: &Text, overlaps: bool| match overlaps {
            true => machine.launch_overlapping(text, kernel, grid, [threads, 1, 1], 4 * shared, params),
            false => machine.launch(text, kernel, grid, [threads, 1, 1], 4 * shared, params),
        };
        let all = self.machine.allocations();
        let flying: Vec<u64> = all.iter().map(|a| a.0).filter(|a| !self.constants.contains(a)).collect();
        if self.overlaps {
            self.machine.in_flight(&flying)?;
        }
        run(&mut self.machine, &self.module, self.overlaps)?;
        let (Some(other), Some(mut twin)) = (&self.other, twin) else { return Ok(()) };
        if !self.overlaps {
            twin.in_flight(&flying)?;
        }
        run(&mut twin, other, !self.overlaps)?;
        for (at, bytes) in all {
            assert!(
                twin.peek(at, bytes) == self.machine.peek(at, bytes),
                "{kernel}: {at:#x} differs on newer GPUs"
            );
        }
        Ok(())
    }
}

pub(crate) fn p(x: u64) -> Param {
    Param::U64(x)
}

pub(crate) fn n(x: usize) -> Param {
    Param::U32(u32::try_from(x).unwrap())
}

/// The text, each time without another wait of kernel `entry`.
pub(crate) fn without_a_wait(text: &str, entry: &str) -> Vec<String> {
    let wait = "griddepcontrol.wait;";
    let start = text.find(&format!("entry {entry}(")).expect("such a kernel");
    let end = text[start..].find(".entry ").map_or(text.len(), |e| start + e);
    let waits: Vec<usize> = text[start..end].match_indices(wait).map(|w| start + w.0).collect();
    assert!(!waits.is_empty(), "{entry}");
    waits.iter().map(|at| format!("{}{}", &text[..*at], &text[at + wait.len()..])).collect()
}
