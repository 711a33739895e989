//! The engine: GGUF files, model architectures, KV cache, text, sampling, sessions.
//!
//! Knows nothing of instruction sets or CUDA (that is `kernels`), of HTTP or flags (that is `cli`).
#![deny(unsafe_code)]

mod config;
mod context;
pub mod device;
mod embed;
mod error;
pub mod gguf;
pub mod kv;
mod layers;
mod model;
mod numa;
pub mod pager;
pub mod plan;
pub mod quantize;
pub mod sample;
pub mod schedule;
mod session;
mod stages;
pub mod text;
mod usage;
mod weights;

pub use context::Context;
pub use embed::{Embedding, Pooling, embed};
pub use error::EngineError;
pub use kernels::cpu::machine::read_bandwidth;
pub use kv::{Arena, ArenaOptions, CacheTypes, KvSpec, Rows, SeqId};
pub use numa::Numa;
pub use quant::DType;
pub use sample::{Constraint, Logits, SampleError, Sampler, SamplerOptions};
pub use session::*;
pub use stages::{Devices, Layout, Spot};
pub use usage::{MemoryReport, Usage};
