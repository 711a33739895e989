//! What a GPU is asked in one go: whether every kernel is right there, and how fast everything is (docs/cuda.md). Timings are by the wall clock
//! around work that is waited for; medians, after a warm-up.

pub mod check;
pub mod kernels;
pub mod models;
pub mod parts;
pub mod row;
pub mod timed;
pub mod yardstick;
