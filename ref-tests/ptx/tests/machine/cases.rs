//! What a case is: one kernel around a few instructions. Where it runs is `crate::launch`'s: here on the interpreter, in ref-tests' test
//! `cuda_instructions` on a GPU besides.

use crate::launch;
use ptx::PtxError;

/// A kernel around `body`: %r0 is the thread's index, `out` is the pointer in %rd0, memory of `words` behind it in %rd1.
pub(crate) fn kernel(body: &str) -> String {
    // What these came with; assemblers insist.
    let target = if ["add.rn.bf16x2", "mul.rn.bf16x2", "griddepcontrol"].iter().any(|i| body.contains(i)) {
        90
    } else {
        80
    };
    format!(
        ".version 8.1\n.target sm_{target}\n.address_size 64\n\
         .visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)\n{{\n\
         .reg .pred %p<8>;\n.reg .b16 %h<8>;\n.reg .b32 %r<40>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<16>;\n\
         .shared .align 16 .b8 buffer[1024];\n\
         ld.param.u64 %rd0, [k_param_0];\nld.param.u64 %rd1, [k_param_1];\nmov.u32 %r0, %tid.x;\n\
         {body}\n}}\n"
    )
}

/// Stores %r1 at out[tid].
pub(crate) const STORE: &str =
    "mul.wide.u32 %rd15, %r0, 4;\nadd.s64 %rd15, %rd0, %rd15;\nst.global.u32 [%rd15], %r1;\nret;";

/// Runs `body` with `threads` threads and the given memory; returns %r1 of every thread.
pub(crate) fn run(body: &str, threads: u32, memory: &[u8]) -> Result<Vec<u32>, PtxError> {
    let bytes = launch(&kernel(&format!("{body}\n{STORE}")), threads, 4 * threads as usize, memory)?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
}

/// The same for one thread without memory.
pub(crate) fn one(body: &str) -> u32 {
    run(body, 1, &[]).unwrap_or_else(|e| panic!("{body}: {e}"))[0]
}
