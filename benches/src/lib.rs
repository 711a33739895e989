//! Shared parts of the benchmarks: models with public geometries and random weights, the comparison with peers, and what a GPU is asked.
#![forbid(unsafe_code)]

pub mod gpu;
pub mod larger;
pub mod peers;
pub mod synth;
