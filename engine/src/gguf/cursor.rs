//! Reads little-endian numbers, strings and metadata values off a byte slice, never past its end, and reserves no memory
//! that the bytes left do not justify; memory that cannot be had is an error. Knows the encoding of values; nothing of keys,
//! tensors or files.

use super::error::{ErrorKind, shown};
use super::value::{Array, Value};

/// Arrays may nest this deep; real files use one level, the format sets no limit, the stack does.
const MAX_NESTING: usize = 8;

/// Bytes of a key, by the format; here of a tensor's name too, which it limits to 64 (not all programs do).
const MOST_NAME: u64 = 65535;

/// An empty list with room for `n` entries.
pub(super) fn room<T>(n: usize) -> Result<Vec<T>, ErrorKind> {
    let mut list = Vec::new();
    list.try_reserve_exact(n).map_err(|_| no_room::<T>(n))?;
    Ok(list)
}

/// The error where there is no memory for `n` entries.
pub(super) fn no_room<T>(n: usize) -> ErrorKind {
    ErrorKind::HeaderMemory { bytes: n.saturating_mul(size_of::<T>()) as u64 }
}

/// A position in a byte slice.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// The value that is being read, for error messages; formatted only when one is due.
#[derive(Clone, Copy)]
pub(super) enum What<'a> {
    Header,
    KeyName(u64),
    Key(&'a str),
    TensorName(u64),
    Tensor(&'a str),
}

impl std::fmt::Display for What<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::KeyName(i) => write!(f, "the name of metadata key number {i}"),
            Self::Key(k) => write!(f, "metadata key {}", shown(k)),
            Self::TensorName(i) => write!(f, "the name of tensor number {i}"),
            Self::Tensor(t) => write!(f, "the description of tensor {}", shown(t)),
        }
    }
}

macro_rules! number {
    ($name:ident, $t:ty) => {
        pub(super) fn $name(&mut self, what: What) -> Result<$t, ErrorKind> {
            let raw = self.take(size_of::<$t>() as u64, what)?;
            Ok(<$t>::from_le_bytes(raw.try_into().expect("take returns the length asked for")))
        }
    };
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes not read yet.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    pub(super) fn take(&mut self, n: u64, what: What) -> Result<&'a [u8], ErrorKind> {
        if n > self.left() {
            return Err(ErrorKind::Truncated { what: what.to_string() });
        }
        let start = self.at;
        self.at += n as usize; // n <= left() fits usize
        Ok(&self.bytes[start..self.at])
    }

    number!(u32, u32);
    number!(u64, u64);

    /// Checks that `count` items of at least `min_bytes` each fit in what is left.
    pub(super) fn count(
        &self,
        count: u64,
        min_bytes: u64,
        what: impl Fn() -> String,
    ) -> Result<usize, ErrorKind> {
        if count > self.left() / min_bytes {
            return Err(ErrorKind::Count { what: what(), count, left: self.left() });
        }
        Ok(count as usize)
    }

    pub(super) fn string(&mut self, what: What) -> Result<String, ErrorKind> {
        let n = self.u64(what)?;
        let n = self.count(n, 1, || format!("the length of a string in {what}"))?;
        let raw = self.take(n as u64, what)?;
        let text = std::str::from_utf8(raw).map_err(|_| ErrorKind::Utf8 { what: what.to_string() })?;
        let mut string = String::new();
        string.try_reserve_exact(n).map_err(|_| no_room::<u8>(n))?;
        string.push_str(text);
        Ok(string)
    }

    /// A key or the name of a tensor.
    pub(super) fn name(&mut self, what: What) -> Result<String, ErrorKind> {
        let name = self.string(what)?;
        let len = name.len() as u64;
        if len > MOST_NAME {
            return Err(ErrorKind::NameLength { what: what.to_string(), len, most: MOST_NAME });
        }
        Ok(name)
    }

    /// A value: its type id, then its bytes.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, ErrorKind> {
        let what = What::Key(key);
        let id = self.u32(what)?;
        Ok(match id {
            ARRAY => Value::Array(self.array(key, 1)?),
            STRING => Value::String(self.string(what)?),
            _ => {
                let size = scalar_size(id).ok_or_else(|| ErrorKind::ValueType { key: shown(key), id })?;
                // One element of the array of that type: one decoder serves both.
                match self.scalars(key, id, 1, size)? {
                    Array::U8(v) => Value::U8(v[0]),
                    Array::I8(v) => Value::I8(v[0]),
                    Array::U16(v) => Value::U16(v[0]),
                    Array::I16(v) => Value::I16(v[0]),
                    Array::U32(v) => Value::U32(v[0]),
                    Array::I32(v) => Value::I32(v[0]),
                    Array::U64(v) => Value::U64(v[0]),
                    Array::I64(v) => Value::I64(v[0]),
                    Array::F32(v) => Value::F32(v[0]),
                    Array::F64(v) => Value::F64(v[0]),
                    Array::Bool(v) => Value::Bool(v[0]),
                    Array::String(_) | Array::Array(_) => unreachable!("scalars() makes neither"),
                }
            }
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array, ErrorKind> {
        if depth > MAX_NESTING {
            return Err(ErrorKind::Nesting { key: shown(key), limit: MAX_NESTING });
        }
        let what = What::Key(key);
        let id = self.u32(what)?;
        let n = self.u64(what)?;
        let length = || format!("the array length of {what}");
        Ok(match id {
            STRING => {
                let n = self.count(n, 8, length)?;
                let mut v = room(n)?;
                for _ in 0..n {
                    v.push(self.string(what)?);
                }
                Array::String(v)
            }
            ARRAY => {
                let n = self.count(n, 12, length)?;
                let mut v = room(n)?;
                for _ in 0..n {
                    v.push(self.array(key, depth + 1)?);
                }
                Array::Array(v)
            }
            _ => {
                let size = scalar_size(id).ok_or_else(|| ErrorKind::ValueType { key: shown(key), id })?;
                let n = self.count(n, size, length)?;
                self.scalars(key, id, n, size)?
            }
        })
    }

    /// `n` numbers or bools of the type `id`, which has `size` bytes.
    fn scalars(&mut self, key: &str, id: u32, n: usize, size: u64) -> Result<Array, ErrorKind> {
        let raw = self.take(n as u64 * size, What::Key(key))?;
        macro_rules! list {
            ($t:ty) => {{
                let mut list = room(n)?;
                let values = raw.chunks_exact(size_of::<$t>());
                list.extend(values.map(|c| <$t>::from_le_bytes(c.try_into().expect("exact"))));
                list
            }};
        }
        Ok(match id {
            0 => Array::U8(list!(u8)),
            1 => Array::I8(list!(i8)),
            2 => Array::U16(list!(u16)),
            3 => Array::I16(list!(i16)),
            4 => Array::U32(list!(u32)),
            5 => Array::I32(list!(i32)),
            6 => Array::F32(list!(f32)),
            7 => {
                if let Some(&found) = raw.iter().find(|&&b| b > 1) {
                    return Err(ErrorKind::Bool { key: shown(key), found });
                }
                let mut list = room(n)?;
                list.extend(raw.iter().map(|&b| b == 1));
                Array::Bool(list)
            }
            10 => Array::U64(list!(u64)),
            11 => Array::I64(list!(i64)),
            12 => Array::F64(list!(f64)),
            _ => return Err(ErrorKind::ValueType { key: shown(key), id }),
        })
    }
}

/// GGUF's id of strings.
pub(super) const STRING: u32 = 8;
/// GGUF's id of arrays.
pub(super) const ARRAY: u32 = 9;

/// Bytes of a number or bool by GGUF's value type id.
fn scalar_size(id: u32) -> Option<u64> {
    Some(match id {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}
