//! The KV cache: what a model keeps of past tokens, and which of it each new token sees.

mod cache;

pub use cache::{Cache, CacheTypes, LayerSpec, SecondKind};
