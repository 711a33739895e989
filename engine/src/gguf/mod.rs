//! GGUF files: header, metadata, tensors, memory map, split files, writer
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). A hostile file is a typed error, never a panic.
//!
//! Knows the container alone: nothing of architectures, of what a tensor is for, or of devices.

mod cursor;
mod error;
mod file;
mod header;
mod mmap;
mod progress;
mod split;
mod summary;
mod tensor;
mod value;
mod writer;

pub use error::{ErrorKind, GgufError};
pub use file::{Access, File, OpenMode};
pub(crate) use mmap::Map;
#[cfg(target_os = "linux")]
pub(crate) use mmap::interleave;
pub use progress::Progress;
pub use summary::{Summary, TypeShare, file_type_name, size_label};
pub use tensor::{TensorInfo, type_id_name};
pub use value::{Array, Metadata, MetadataError, Value};
pub use writer::{NewTensor, Writer, encode};
