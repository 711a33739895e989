//! Metadata values and typed access to them by key. Knows nothing of where they were read from.

use std::collections::{HashMap, TryReserveError};

/// A metadata value. Strings must be UTF-8.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A homogeneous array; arrays may nest.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

/// A key that is missing, has another type than the reader needs, or a value out of range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// No such key.
    #[error("the file has no metadata key {key}")]
    Missing {
        /// The key looked for.
        key: String,
    },
    /// The key's value is of another type, or does not fit the type asked for.
    #[error("metadata key {key} is {found}, expected {expected}")]
    Type {
        /// The key.
        key: String,
        /// What was needed.
        expected: &'static str,
        /// What the file holds.
        found: String,
    },
}

macro_rules! each {
    ($self:expr, $v:ident => $e:expr) => {
        match $self {
            Array::U8($v) => $e,
            Array::I8($v) => $e,
            Array::U16($v) => $e,
            Array::I16($v) => $e,
            Array::U32($v) => $e,
            Array::I32($v) => $e,
            Array::U64($v) => $e,
            Array::I64($v) => $e,
            Array::F32($v) => $e,
            Array::F64($v) => $e,
            Array::Bool($v) => $e,
            Array::String($v) => $e,
            Array::Array($v) => $e,
        }
    };
}

impl Value {
    /// The GGUF name of the value's type, arrays with their length.
    pub fn type_name(&self) -> String {
        let name = match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "bool",
            Self::String(_) => "str",
            Self::Array(a) => return format!("arr[{},{}]", a.element_name(), a.len()),
        };
        name.into()
    }

    /// Any integer type, as i128; `None` for the others.
    pub fn as_int(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(v) => v.into(),
            Self::I8(v) => v.into(),
            Self::U16(v) => v.into(),
            Self::I16(v) => v.into(),
            Self::U32(v) => v.into(),
            Self::I32(v) => v.into(),
            Self::U64(v) => v.into(),
            Self::I64(v) => v.into(),
            _ => return None,
        })
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        each!(self, v => v.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The GGUF name of the elements' type.
    pub fn element_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "bool",
            Self::String(_) => "str",
            Self::Array(_) => "arr",
        }
    }
}

/// All key-value pairs of a file, in file order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    /// Makes room for `n` more pairs.
    pub(super) fn try_reserve(&mut self, n: usize) -> Result<(), TryReserveError> {
        self.entries.try_reserve_exact(n)?;
        self.index.try_reserve(n)
    }

    /// Adds a pair, or returns `false` (and leaves the map as it is) if the key is there already.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) -> bool {
        let key = key.into();
        if self.index.contains_key(&key) {
            return false;
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        true
    }

    /// Adds a pair or replaces the value of an existing key.
    pub fn set(&mut self, key: impl Into<String>, value: Value) {
        let key = key.into();
        match self.index.get(&key) {
            Some(&i) => self.entries[i].1 = value,
            None => {
                self.insert(key, value);
            }
        }
    }

    /// Takes a pair out.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let i = self.index.remove(key)?;
        self.index.values_mut().filter(|v| **v > i).for_each(|v| *v -= 1);
        Some(self.entries.remove(i).1)
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// All pairs in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, MetadataError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        read(v).map(Some).ok_or_else(|| MetadataError::Type {
            key: key.into(),
            expected,
            found: match v.as_int() {
                Some(i) => format!("{i} ({})", v.type_name()),
                None => v.type_name(),
            },
        })
    }

    /// An integer of any width that fits u32; `None` if the key is absent.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, MetadataError> {
        self.typed(key, "an unsigned 32-bit integer", |v| v.as_int()?.try_into().ok())
    }

    /// An integer of any width that fits u64; `None` if the key is absent.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, MetadataError> {
        self.typed(key, "an unsigned 64-bit integer", |v| v.as_int()?.try_into().ok())
    }

    /// A float of either width; `None` if the key is absent.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, MetadataError> {
        self.typed(key, "a float", |v| match *v {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => None,
        })
    }

    /// A bool; `None` if the key is absent.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, MetadataError> {
        self.typed(key, "a bool", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// A string; `None` if the key is absent.
    pub fn str(&self, key: &str) -> Result<Option<&str>, MetadataError> {
        self.typed(key, "a string", |v| if let Value::String(s) = v { Some(s.as_str()) } else { None })
    }

    /// An array; `None` if the key is absent.
    pub fn array(&self, key: &str) -> Result<Option<&Array>, MetadataError> {
        self.typed(key, "an array", |v| if let Value::Array(a) = v { Some(a) } else { None })
    }

    /// An array of strings; `None` if the key is absent.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, MetadataError> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(s)) => Some(s.as_slice()),
            _ => None,
        })
    }

    /// Turns an absent key into [`MetadataError::Missing`]: `m.need("a.b", m.u32("a.b"))`.
    pub fn need<T>(&self, key: &str, found: Result<Option<T>, MetadataError>) -> Result<T, MetadataError> {
        found?.ok_or_else(|| MetadataError::Missing { key: key.into() })
    }
}
