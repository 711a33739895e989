//! What can go wrong in the engine, one clear line each.

use crate::gguf::{GgufError, MetadataError};
use crate::kv::KvError;
use crate::sample::SampleError;
use crate::text::TextError;
use kernels::KernelError;

/// Any error of loading or running a model.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Its metadata does not say what is needed.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// Its vocabulary or chat template is unusable.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A backend refused an operation.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A token could not be chosen.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// A cache configuration or eviction policy that cannot do what is asked.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// Something the file asks for that the engine does not implement; names it.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// A tensor is not there.
    #[error("the file has no tensor {0}")]
    MissingTensor(String),
    /// A tensor has another shape than the metadata implies.
    #[error("tensor {name} has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Its dimensions in the file, innermost first.
        found: Vec<u64>,
        /// What the metadata implies.
        expected: Vec<u64>,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is out of range: the vocabulary has {n_vocab} entries")]
    TokenId {
        /// The id.
        id: u32,
        /// Entries in the vocabulary.
        n_vocab: usize,
    },
    /// More tokens than the context holds.
    #[error("{need} tokens do not fit the context of {ctx}: shorten the prompt or raise -c/--ctx-size")]
    Context {
        /// Tokens that would have to be cached.
        need: usize,
        /// Entries the cache holds.
        ctx: usize,
    },
    /// As many sequences as the cache was made for are there.
    #[error("all {sequences} sequences of the cache are in use: free one, or make it for more (--parallel)")]
    NoRoom {
        /// Sequences it was made for.
        sequences: usize,
    },
    /// A sequence that was freed, or is of another cache.
    #[error("there is no such sequence in this cache: it was freed")]
    NoSequence,
    /// A saved cache that cannot be used, or cannot be written.
    #[error("{path}: {why}")]
    CacheFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// An option with an impossible value.
    #[error("{0}")]
    Option(String),
}
