//! Shared parts of the benchmarks: models with public geometries and random weights, and the comparison with peers.
#![forbid(unsafe_code)]

pub mod larger;
pub mod peers;
pub mod synth;
