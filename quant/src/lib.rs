//! The block formats of GGUF tensors: what each stores, how it is read back to f32 and how f32 is packed into it.
//!
//! Knows bytes and numbers only: nothing of files, models, threads or instruction sets.
#![forbid(unsafe_code)]

mod dtype;
pub mod formats;
mod search;

pub use dtype::{DType, FORMATS, Format, QuantError, Quantize};
