//! A PTX interpreter: runs NVIDIA's virtual assembly on the CPU, a warp at a time, and reports what a GPU would let pass.
//!
//! It is made to prove kernels where there is no GPU. PTX text is parsed and decoded once ([`Module::parse`]); [`Machine::launch`]
//! then runs a grid over memory of its own. Semantics are those of the PTX ISA (8.x) for `sm_70` and later: every thread has its own
//! place in the program, threads of a warp that stand at the same place run together, and `.sync` instructions wait for the
//! threads they name.
//!
//! ```
//! let module = ptx::Module::parse(r#"
//! .version 8.1
//! .target sm_75
//! .address_size 64
//! .visible .entry twice(.param .u64 twice_param_0)
//! {
//!     .reg .b32 %r<3>; .reg .b64 %rd<4>;
//!     ld.param.u64 %rd1, [twice_param_0];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     shl.b32 %r2, %r2, 1;
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }"#).unwrap();
//! let mut machine = ptx::Machine::new();
//! let p = machine.alloc(4 * 32);
//! machine.write(p, &[7u8, 0, 0, 0].repeat(32)).unwrap();
//! machine.launch(module.kernel("twice").unwrap(), [1; 3], [32, 1, 1], 0, &[ptx::Param::U64(p)]).unwrap();
//! assert_eq!(machine.read(p, 4).unwrap(), [14, 0, 0, 0]);
//! ```
//!
//! **What ends a launch with an error** that names kernel, line, block and thread: accesses outside an allocation, misaligned, or of
//! bytes and registers that nothing wrote; `ld.global.nc` of bytes that the same launch writes; shared or global memory that two threads
//! touch, one of them writing, be it the same value, with nothing that orders them (below); reading the target of a `cp.async` before it
//! was waited for; in launches that may overlap those before, writes, or reads of what those wrote, ahead of `griddepcontrol.wait`, and
//! threads that never come to it; shuffles from lanes that do not take part; barriers and `.sync` instructions that not all of their threads
//! can reach; running on without end. An instruction or modifier it does not know is an error of `parse`, never ignored.
//!
//! **What orders two threads**: of a block its barriers, of a warp `bar.warp.sync` of all its threads; blocks of a launch nothing. Atomic
//! operations do not race with each other, with plain accesses they do. That the order in which blocks happened to run was right is no
//! excuse: whatever order they run in, the same races are found. Fences count for nothing, so the ways in which blocks can wait for
//! each other (a count of those that are done, a lock, a flag) are reported. To allow one, `race` would have to know that an atomic operation
//! behind a fence gives on all that its thread may rely on, and that one before a fence takes it over: a clock for each block, which such
//! pairs join.
//!
//! **What it does not model**: time, caches, and instructions whose results the ISA leaves open (`ex2.approx` and the like: refused). `mma` with f32 accumulators is defined here as the exact sum rounded once; GPUs round less
//! well, and not all alike. Subnormals are kept (no `.ftz`); arithmetic NaNs are `0x7fffffff`, as on the hardware.

mod alu;
mod asynchronous;
mod convert;
mod error;
mod float16;
mod lower;
mod machine;
mod memory;
mod op;
mod race;
mod shared;
mod tensor;
mod text;
mod warp;

pub use error::{Fault, PtxError};
pub use lower::{Kernel, Module};
pub use machine::{Machine, Param, Stats};
