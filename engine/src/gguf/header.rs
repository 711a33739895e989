//! The header of one file: magic, version, metadata, tensor descriptions, all checked against the file's length.
//! Knows nothing of paths, maps or the other parts of a split file.

use std::collections::HashSet;

use quant::DType;

use super::cursor::{Cursor, What, no_room, room};
use super::error::{ErrorKind, shown};
use super::tensor::TensorInfo;
use super::value::{Metadata, Value};

/// The alignment of files that do not set `general.alignment`.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
pub(super) const KEY_ALIGNMENT: &str = "general.alignment";

/// Headers may be this large. Real ones reach some 20 MB (vocabularies of 260,000 words); a larger one is a mistake or
/// an attempt to fill the memory with values.
const MAX_HEADER: usize = 256 << 20;

/// Everything before the data.
#[derive(Debug)]
pub(super) struct Header {
    pub version: u32,
    pub alignment: u64,
    pub metadata: Metadata,
    /// In file order; `part` is 0.
    pub tensors: Vec<TensorInfo>,
}

/// Reads the header off the start of `file`, all of whose bytes are given.
pub(super) fn parse(file: &[u8]) -> Result<Header, ErrorKind> {
    parse_of(file, file.len() as u64)
}

/// The same for a file whose data may be missing.
pub(super) fn parse_alone(file: &[u8]) -> Result<Header, ErrorKind> {
    parse_of(file, u64::MAX)
}

fn parse_of(file: &[u8], len: u64) -> Result<Header, ErrorKind> {
    check_magic(file)?;
    let mut c = Cursor::new(&file[..file.len().min(MAX_HEADER)]);
    c.take(4, What::Header)?;
    let version = c.u32(What::Header)?;
    if version & 0xffff == 0 && version != 0 {
        return Err(ErrorKind::BigEndian);
    }
    if version != 2 && version != 3 {
        return Err(ErrorKind::Version { version });
    }
    let n_tensors = c.u64(What::Header)?;
    let n_keys = c.u64(What::Header)?;
    // A pair is at least a name length, a type and a byte; a tensor a name length, a count, one dimension, type, offset.
    let n_keys = c.count(n_keys, 8 + 4 + 1, || "the number of metadata keys".into())?;
    let n_tensors = c.count(n_tensors, 8 + 4 + 8 + 4 + 8, || "the number of tensors".into())?;

    let mut metadata = Metadata::default();
    metadata.try_reserve(n_keys).map_err(|_| no_room::<(String, Value)>(n_keys))?;
    for i in 0..n_keys {
        let key = c.name(What::KeyName(i as u64))?;
        let value = c.value(&key)?;
        if !metadata.insert(&key, value) {
            return Err(ErrorKind::DuplicateKey { key: shown(&key) });
        }
    }
    let alignment = metadata.u64(KEY_ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
    check_alignment(alignment)?;

    let mut tensors = room(n_tensors)?;
    for i in 0..n_tensors {
        tensors.push(tensor(&mut c, i as u64, alignment)?);
    }
    let mut names = HashSet::new();
    names.try_reserve(n_tensors).map_err(|_| no_room::<&str>(n_tensors))?;
    if let Some(t) = tensors.iter().find(|t: &&TensorInfo| !names.insert(t.name.as_str())) {
        return Err(ErrorKind::DuplicateTensor { tensor: shown(&t.name) });
    }

    place(&mut tensors, (c.position() as u64).next_multiple_of(alignment), len)?;
    Ok(Header { version, alignment, metadata, tensors })
}

/// Alignments below 8 would leave f32 scales and values unaligned; the format asks for multiples of 8.
pub(super) fn check_alignment(alignment: u64) -> Result<(), ErrorKind> {
    if !(8..=1 << 32).contains(&alignment) || !alignment.is_power_of_two() {
        return Err(ErrorKind::Alignment { alignment });
    }
    Ok(())
}

/// One description; `offset` is still relative to the data section.
fn tensor(c: &mut Cursor, i: u64, alignment: u64) -> Result<TensorInfo, ErrorKind> {
    let name = c.name(What::TensorName(i))?;
    let what = What::Tensor(&name);
    let n_dims = c.u32(what)?;
    if !(1..=4).contains(&n_dims) {
        return Err(ErrorKind::Dimensions { tensor: shown(&name), count: n_dims });
    }
    let mut dims = Vec::with_capacity(n_dims as usize);
    for _ in 0..n_dims {
        dims.push(c.u64(what)?);
    }
    let id = c.u32(what)?;
    let offset = c.u64(what)?;
    let dtype = DType::from_id(id).ok_or_else(|| ErrorKind::TensorType { tensor: shown(&name), id })?;
    let n_bytes = tensor_bytes(&name, dtype, &dims)?;
    if offset % alignment != 0 {
        return Err(ErrorKind::Misaligned { tensor: shown(&name), offset, alignment });
    }
    Ok(TensorInfo { name, dtype, dims, n_bytes, part: 0, offset })
}

/// Bytes of a tensor, after all checks on its shape.
pub(super) fn tensor_bytes(name: &str, dtype: DType, dims: &[u64]) -> Result<u64, ErrorKind> {
    if !(1..=4).contains(&dims.len()) {
        return Err(ErrorKind::Dimensions { tensor: shown(name), count: dims.len() as u32 });
    }
    if dims.contains(&0) {
        return Err(ErrorKind::ZeroDimension { tensor: shown(name), dims: dims.into() });
    }
    let too_large = || ErrorKind::TensorSize { tensor: shown(name), dims: dims.into() };
    // Elements are limited to 60 bits: at no more than 8 bytes each, no later product of sizes can overflow.
    let elements = dims
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .filter(|&n| n < 1 << 60)
        .ok_or_else(too_large)?;
    let row = usize::try_from(dims[0]).map_err(|_| too_large())?;
    let row_bytes =
        dtype.row_bytes(row).map_err(|error| ErrorKind::Row { tensor: shown(name), error })? as u64;
    (elements / dims[0]).checked_mul(row_bytes).ok_or_else(too_large)
}

/// Turns offsets into positions in the file; every tensor must lie in the file and none may share bytes with another.
fn place(tensors: &mut [TensorInfo], data: u64, len: u64) -> Result<(), ErrorKind> {
    for t in tensors.iter_mut() {
        let end = u128::from(data) + u128::from(t.offset) + u128::from(t.n_bytes);
        if end > u128::from(len) {
            return Err(ErrorKind::OutOfFile { tensor: shown(&t.name), end, len });
        }
        t.offset += data;
    }
    let mut order: Vec<&TensorInfo> = room(tensors.len())?;
    order.extend(tensors.iter());
    order.sort_unstable_by_key(|t| t.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].n_bytes > pair[1].offset {
            return Err(ErrorKind::Overlap { first: shown(&pair[0].name), second: shown(&pair[1].name) });
        }
    }
    Ok(())
}

/// Refuses what is not GGUF, saying what it looks like.
pub(super) fn check_magic(file: &[u8]) -> Result<(), ErrorKind> {
    let not = |found: &str| Err(ErrorKind::NotGguf { found: found.into() });
    if file.is_empty() {
        return Err(ErrorKind::Empty);
    }
    if file.starts_with(b"GGUF") {
        return Ok(());
    }
    // Safetensors: the length of a JSON header as u64, then the header itself.
    if file.len() > 9 && file[8] == b'{' && file[6..8] == [0, 0] {
        return not("it looks like safetensors; convert it to GGUF first");
    }
    match file.get(..4) {
        Some(b"lmgg" | b"fmgg" | b"tjgg" | b"algg") => {
            not("it is in one of ggml's formats from before GGUF; convert it or get a newer file")
        }
        Some(b"PK\x03\x04") => {
            not("it is a zip archive, maybe a PyTorch checkpoint; convert it to GGUF first")
        }
        Some(b"FUGG") => not("it starts with the bytes of GGUF in reverse"),
        _ => {
            let start = &file[..file.len().min(16)];
            not(&match std::str::from_utf8(start) {
                Ok(text) => format!("it starts with the text \"{}\"", shown(text)),
                Err(_) => format!("it starts with the bytes {:02x?}", &start[..start.len().min(4)]),
            })
        }
    }
}
