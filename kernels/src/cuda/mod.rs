//! NVIDIA GPUs: the device's weight layout and the kernels that ship as PTX (docs/cuda.md). What launches them is not here yet.
//! Knows formats and PTX texts; nothing of drivers.

pub mod layout;
pub mod modules;
pub mod plan;
