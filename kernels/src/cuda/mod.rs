//! NVIDIA GPUs (docs/cuda.md): the backend, the device's weight layout, the kernels that ship as PTX, and what a GPU is asked for. Knows
//! formats, shapes and PTX texts; nothing of files or models.

mod attend;
mod backend;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(not(feature = "cuda"))]
#[path = "no_driver.rs"]
mod driver;
mod gpu;
mod half;
mod launch;
pub mod layout;
mod mla;
pub mod modules;
mod operands;
pub mod plan;
mod queue;
mod scratch;

pub use backend::{CudaBackend, kv_bytes, scratch_bytes, weight_bytes};
pub use driver::{devices, open};
pub use gpu::{Arg, Gpu, GpuError, GpuInfo, GraphId, KernelId, Launch, Memory, STAGED, Step};
pub use launch::Skinny;
