//! The interpreter against hand-computed cases: every instruction it supports, how threads part and meet, and every fault.

mod cases;
mod control;
mod faults;
mod instructions;
mod races;
mod tensor;

pub(crate) use cases::{STORE, kernel, one, run};
use ptx::{Machine, Module, Param, PtxError};

/// Runs the kernel `k` of `text` in one block of `threads` threads, and returns the `out` bytes behind its first pointer; behind the
/// second lies `memory`.
pub(crate) fn launch(text: &str, threads: u32, out: usize, memory: &[u8]) -> Result<Vec<u8>, PtxError> {
    let module = Module::parse(text)?;
    let mut m = Machine::new();
    m.set_limit(100_000);
    let (to, data) = (m.alloc(out), m.alloc(memory.len()));
    m.write(data, memory)?;
    let k = module.kernel("k").unwrap();
    m.launch(k, [1; 3], [threads, 1, 1], 0, &[Param::U64(to), Param::U64(data)])?;
    m.read(to, out)
}
