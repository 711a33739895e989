//! Text to token ids and back: vocabularies (BPE, SentencePiece), streaming detokenisation, chat templates.
//!
//! Reads what it needs from a GGUF file's metadata; knows nothing of tensors, models and sessions.

mod bpe;
mod chat;
mod json;
mod pretok;
mod spm;
mod stream;
pub mod thinking;
mod unicode;
mod vocab;

pub use chat::{ChatTemplate, DEFAULT_TEMPLATE, RenderOptions};
pub use stream::{Scanned, StopScanner, StreamDecoder};
pub use vocab::{EncodeOptions, TokenKind, Vocab};

use crate::gguf::MetadataError;

/// What is wrong with a vocabulary or a chat template.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A key is missing or has another type than it must.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A key's value is impossible, or contradicts another's.
    #[error("{key}: {reason}")]
    Invalid {
        /// The metadata key.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// A key's value names something that is not implemented.
    #[error("{key} is {value:?}, which is not supported (supported: {supported})")]
    Unsupported {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it could have been.
        supported: &'static str,
    },
    /// A vocabulary larger than the memory that is left.
    #[error("cannot allocate memory for the vocabulary ({entries} entries)")]
    Memory {
        /// Entries that there is no room for.
        entries: usize,
    },
    /// The chat template is not valid.
    #[error("chat template: {0}")]
    TemplateSyntax(String),
    /// The chat template refused the conversation with `raise_exception`.
    #[error("the chat template refuses these messages: {0}")]
    TemplateRaised(String),
    /// The chat template failed while rendering.
    #[error("chat template: {0}")]
    TemplateFailed(String),
    /// The messages are not what a chat template takes.
    #[error("messages: {0}")]
    Messages(String),
}

impl TextError {
    fn invalid(key: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { key, reason: reason.into() }
    }

    /// The error where there is no memory for so many entries.
    fn memory<E>(entries: usize) -> impl FnOnce(E) -> Self {
        move |_| Self::Memory { entries }
    }
}
