//! What can be wrong with a GGUF file. Every error is one line that names the file once and the thing that is wrong.

use std::path::{Path, PathBuf};

use quant::QuantError;

use super::value::MetadataError;

/// A file that could not be read or written as GGUF, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct GgufError {
    path: PathBuf,
    /// The cause; boxed to keep results small.
    kind: Box<ErrorKind>,
}

impl GgufError {
    /// Puts the path in front of a cause.
    pub fn new(path: impl Into<PathBuf>, kind: impl Into<ErrorKind>) -> Self {
        Self { path: path.into(), kind: Box::new(kind.into()) }
    }

    /// The file (for split files: the part) that is wrong.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is wrong, without the path.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }
}

/// Why a file is not usable. Names taken from the file are shortened and escaped, so that each message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system's answer.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Whoever waited has given up ([`super::Progress::stop`]).
    #[error("reading it was given up")]
    Stopped,
    /// The path is a folder.
    #[error("is a directory, not a GGUF file")]
    Directory,
    /// The path is a pipe, a device, a socket.
    #[error("is not a regular file")]
    NotRegular,
    /// No bytes at all.
    #[error("is an empty file, not a GGUF file")]
    Empty,
    /// Another format.
    #[error("is not a GGUF file: {found}")]
    NotGguf {
        /// What it looks like instead.
        found: String,
    },
    /// Written for big-endian machines.
    #[error("is a big-endian GGUF file, which is not supported; convert it with gguf_convert_endian.py")]
    BigEndian,
    /// Neither version 2 nor 3.
    #[error("is a GGUF file of version {version}; versions 2 and 3 are supported")]
    Version {
        /// The version in the file.
        version: u32,
    },
    /// The file ends inside `what`.
    #[error("is truncated: it ends inside {what}")]
    Truncated {
        /// What was being read.
        what: String,
    },
    /// A count or length that the rest of the file cannot hold.
    #[error("{what} says {count}, but only {left} bytes of the file are left: truncated or corrupt")]
    Count {
        /// What is counted.
        what: String,
        /// The number found.
        count: u64,
        /// Bytes after it.
        left: u64,
    },
    /// A key or a tensor's name longer than the format allows keys to be.
    #[error("{what} is {len} bytes long; {most} are possible")]
    NameLength {
        /// Which name.
        what: String,
        /// Its length.
        len: u64,
        /// The format's limit.
        most: u64,
    },
    /// A string that is not UTF-8.
    #[error("{what} is not valid UTF-8")]
    Utf8 {
        /// Which string.
        what: String,
    },
    /// An unknown metadata value type.
    #[error("metadata key {key} has the unknown value type {id}")]
    ValueType {
        /// The key.
        key: String,
        /// The id found.
        id: u32,
    },
    /// A bool that is neither 0 nor 1.
    #[error("metadata key {key} has a bool of value {found}")]
    Bool {
        /// The key.
        key: String,
        /// The byte found.
        found: u8,
    },
    /// Arrays of arrays of arrays ... .
    #[error("metadata key {key} nests arrays more than {limit} deep")]
    Nesting {
        /// The key.
        key: String,
        /// The limit.
        limit: usize,
    },
    /// The same key twice.
    #[error("metadata key {key} occurs twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A key needed here that is missing or of the wrong type.
    #[error("{0}")]
    Metadata(#[from] MetadataError),
    /// `general.alignment` is no power of two from 8 up.
    #[error("general.alignment is {alignment}, not a power of two of at least 8")]
    Alignment {
        /// The value found.
        alignment: u64,
    },
    /// The same tensor name twice (in any of the parts).
    #[error("tensor {tensor} occurs twice")]
    DuplicateTensor {
        /// Its name.
        tensor: String,
    },
    /// A type this engine cannot read.
    #[error("tensor {tensor} has type {}, which is not supported", type_label(*id))]
    TensorType {
        /// Its name.
        tensor: String,
        /// ggml's type id.
        id: u32,
    },
    /// No or more than four dimensions.
    #[error("tensor {tensor} has {count} dimensions; 1 to 4 are possible")]
    Dimensions {
        /// Its name.
        tensor: String,
        /// The number found.
        count: u32,
    },
    /// A dimension of zero.
    #[error("tensor {tensor} has a dimension of zero: {dims:?}")]
    ZeroDimension {
        /// Its name.
        tensor: String,
        /// Its dimensions.
        dims: Vec<u64>,
    },
    /// The number of elements or bytes does not fit 63 bits.
    #[error("tensor {tensor} is impossibly large: {dims:?}")]
    TensorSize {
        /// Its name.
        tensor: String,
        /// Its dimensions.
        dims: Vec<u64>,
    },
    /// The row is not a whole number of blocks.
    #[error("tensor {tensor}: {error}")]
    Row {
        /// Its name.
        tensor: String,
        /// Length and type.
        error: QuantError,
    },
    /// The data do not start at a multiple of the alignment.
    #[error("tensor {tensor} starts at offset {offset}, not a multiple of the alignment {alignment}")]
    Misaligned {
        /// Its name.
        tensor: String,
        /// Relative to the data section.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// The data end behind the end of the file.
    #[error("is truncated: tensor {tensor} ends at byte {end}, the file at {len}")]
    OutOfFile {
        /// Its name.
        tensor: String,
        /// Where the tensor would end.
        end: u128,
        /// Bytes of the file.
        len: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first} and {second} overlap")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The other.
        second: String,
    },
    /// A part of a split model under a name that does not say which.
    #[error(
        "is one of {count} parts of a split model, but is not named like ...-00001-of-{count:05}.gguf, \
         so the other parts cannot be found"
    )]
    SplitName {
        /// Number of parts.
        count: u64,
    },
    /// A part that is not there.
    #[error("part {number} of {count} of this split model is missing")]
    SplitMissing {
        /// Counted from 1.
        number: u64,
        /// Number of parts.
        count: u64,
    },
    /// The parts do not agree.
    #[error("split model: {key} is {found}, expected {expected}")]
    Split {
        /// The metadata key.
        key: &'static str,
        /// Its value, or "absent".
        found: String,
        /// What the name or the other parts say.
        expected: u64,
    },
    /// `--no-mmap` on a file larger than memory.
    #[error("needs {bytes} bytes of memory to be read, which are not there; let it be memory-mapped instead")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// A header larger than the memory that is left.
    #[error("cannot allocate {bytes} bytes for its header")]
    HeaderMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The system's table of maps, or this program's, is full.
    #[error("cannot be mapped: {most} files are, and more are not watched over; read it instead (--no-mmap)")]
    TooManyMaps {
        /// Files that can be mapped at a time.
        most: usize,
    },
    /// Something shortened or wrote to the file while it was mapped.
    #[error(
        "was {how} while it was in use: load the model again; a file is replaced safely by renaming another over it"
    )]
    Changed {
        /// What was done to it.
        how: &'static str,
    },
    /// A disk error, or a file that was cut off and has grown again.
    #[error("could not be read while it was in use (a disk error, or a file cut off): load the model again")]
    Unreadable,
    /// The system keeps no more pages in memory for this process.
    #[error(
        "{bytes} bytes cannot be locked in memory: {error}; raise the limit (ulimit -l), or leave --mlock out"
    )]
    Lock {
        /// Bytes of the file.
        bytes: u64,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The writer was given more or less data than it was told to expect.
    #[error("tensor {tensor}: {found} bytes of data written, {expected} announced")]
    WriteSize {
        /// Its name.
        tensor: String,
        /// Bytes of data given.
        found: u64,
        /// Bytes its type and dimensions make.
        expected: u64,
    },
}

fn type_label(id: u32) -> String {
    match super::tensor::type_id_name(id) {
        Some(name) => format!("{name} (id {id})"),
        None => format!("id {id} (unknown)"),
    }
}

/// A name from a file, fit for one line of an error message: control characters escaped, at most 80 characters.
pub(super) fn shown(name: &str) -> String {
    let mut out: String = name.chars().take(80).flat_map(char::escape_debug).collect();
    // escape_debug also escapes quotes, which are harmless here and confusing when escaped.
    out = out.replace("\\\"", "\"").replace("\\'", "'");
    if name.chars().nth(80).is_some() {
        out.push('…');
    }
    out
}
