//! The interpreter's own cases of every instruction (`ref-tests/ptx/tests/machine`), on the GPU that `RSINFER_TEST_GPU=cuda:0` asks for as
//! well: it must give the interpreter's bits. Products of floats are of small numbers, whose sums every rounding leaves alone.

#[path = "../ptx/tests/machine/cases.rs"]
mod cases;
#[path = "../ptx/tests/machine/control.rs"]
mod control;
#[path = "../ptx/tests/machine/instructions.rs"]
mod instructions;
#[path = "../ptx/tests/machine/tensor.rs"]
mod tensor;

pub(crate) use cases::{kernel, one, run};
use ptx::{Param, PtxError};
use ref_tests::mirror::{Machine, Text};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A case's number, and its instructions but for those that every case has.
fn name(text: &str) -> String {
    static CASES: AtomicUsize = AtomicUsize::new(0);
    let inner = text.split_once("%tid.x;\n").map_or(text, |t| t.1);
    let inner = inner.split("mul.wide.u32 %rd15").next().unwrap_or(inner).replace('\n', " ");
    format!("case {}: {}", CASES.fetch_add(1, Relaxed), inner.trim())
}

/// As the interpreter's own.
pub(crate) fn launch(text: &str, threads: u32, out: usize, memory: &[u8]) -> Result<Vec<u8>, PtxError> {
    let module = Text::own(&name(text), text.to_owned())?;
    // In which order threads come to one address, and which of them go on together, is the hardware's.
    let ordered = threads == 1 || !["atom.global", "activemask"].iter().any(|i| text.contains(i));
    let mut m = if ordered { Machine::new() } else { Machine::alone() };
    m.set_limit(100_000);
    let (to, data) = (m.alloc(out), m.alloc(memory.len()));
    m.write(data, memory)?;
    m.launch(&module, "k", [1; 3], [threads, 1, 1], 0, &[Param::U64(to), Param::U64(data)])?;
    m.read(to, out)
}
