//! What `rsinfer inspect` tells about a file, as plain data. Knows general.* keys; nothing of architectures' own keys.

use std::collections::BTreeMap;

use quant::DType;

use super::file::File;
use super::value::{Array, MetadataError, Value};

/// A file in figures. The tensor table is [`File::tensors`], the metadata [`File::metadata`].
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// `general.architecture`.
    pub architecture: Option<String>,
    /// `general.name`.
    pub name: Option<String>,
    /// `general.file_type`: the id and llama-quantize's name for it, such as `Q4_K_M`.
    pub file_type: Option<(u32, Option<&'static str>)>,
    /// GGUF version.
    pub version: u32,
    /// Alignment of tensor data in bytes.
    pub alignment: u64,
    /// Number of files.
    pub parts: usize,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// `general.size_label`, or made from the number of parameters: `671B`, `1.5B`, `11M`, `260K`.
    pub size_label: String,
    /// Each type met, largest share of bytes first.
    pub by_type: Vec<TypeShare>,
}

/// The tensors of one type, taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeShare {
    /// The type.
    pub dtype: DType,
    /// Number of tensors.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Summary {
    /// Adds up `file`.
    ///
    /// # Errors
    /// A general.* key of the wrong type.
    pub fn of(file: &File) -> Result<Self, MetadataError> {
        let m = file.metadata();
        let mut types: BTreeMap<DType, TypeShare> = BTreeMap::new();
        for t in file.tensors() {
            let share = types.entry(t.dtype).or_insert(TypeShare {
                dtype: t.dtype,
                tensors: 0,
                elements: 0,
                bytes: 0,
            });
            share.tensors += 1;
            share.elements += t.n_elements();
            share.bytes += t.n_bytes;
        }
        let mut by_type: Vec<_> = types.into_values().collect();
        by_type.sort_by_key(|s| std::cmp::Reverse(s.bytes));
        let parameters = by_type.iter().map(|s| s.elements).sum();
        Ok(Self {
            architecture: m.str("general.architecture")?.map(Into::into),
            name: m.str("general.name")?.map(Into::into),
            file_type: m.u32("general.file_type")?.map(|id| (id, file_type_name(id))),
            version: file.version(),
            alignment: file.alignment(),
            parts: file.n_parts(),
            file_bytes: file.total_bytes(),
            parameters,
            tensor_bytes: by_type.iter().map(|s| s.bytes).sum(),
            size_label: m.str("general.size_label")?.map_or_else(|| size_label(parameters), Into::into),
            by_type,
        })
    }

    /// Bits of tensor data per parameter; 0 without tensors.
    pub fn bits_per_weight(&self) -> f64 {
        if self.parameters == 0 { 0.0 } else { self.tensor_bytes as f64 * 8.0 / self.parameters as f64 }
    }
}

/// A number of parameters as model names give it: two digits below ten, whole numbers above.
pub fn size_label(parameters: u64) -> String {
    for (unit, letter) in [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")] {
        let n = parameters as f64 / unit;
        // 999.6 thousand is a million, not 1000K.
        if n >= 0.9995 {
            let digits = usize::from(n < 9.95 && (n * 10.0).round() % 10.0 != 0.0);
            return format!("{n:.digits$}{letter}");
        }
    }
    parameters.to_string()
}

/// llama-quantize's name of a `general.file_type` (enum llama_ftype in llama.h); `None` for unknown ids.
pub fn file_type_name(id: u32) -> Option<&'static str> {
    FILE_TYPES.iter().find(|(i, _)| *i == id).map(|(_, name)| *name)
}

const FILE_TYPES: &[(u32, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (19, "IQ2_XXS"),
    (20, "IQ2_XS"),
    (21, "Q2_K_S"),
    (22, "IQ3_XS"),
    (23, "IQ3_XXS"),
    (24, "IQ1_S"),
    (25, "IQ4_NL"),
    (26, "IQ3_S"),
    (27, "IQ3_M"),
    (28, "IQ2_S"),
    (29, "IQ2_M"),
    (30, "IQ4_XS"),
    (31, "IQ1_M"),
    (32, "BF16"),
    (36, "TQ1_0"),
    (37, "TQ2_0"),
    (38, "MXFP4_MOE"),
    (39, "NVFP4"),
    (40, "Q1_0"),
];

impl Value {
    /// As JSON. Floats that JSON does not know (infinities, NaN) become null.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Self::U8(v) => (*v).into(),
            Self::I8(v) => (*v).into(),
            Self::U16(v) => (*v).into(),
            Self::I16(v) => (*v).into(),
            Self::U32(v) => (*v).into(),
            Self::I32(v) => (*v).into(),
            Self::U64(v) => (*v).into(),
            Self::I64(v) => (*v).into(),
            Self::F32(v) => float(*v),
            Self::F64(v) => (*v).into(),
            Self::Bool(v) => (*v).into(),
            Self::String(v) => v.as_str().into(),
            Self::Array(a) => a.to_json(usize::MAX),
        }
    }

    /// One line for a person: control characters escaped, strings longer than `max_chars` and arrays longer than
    /// `max_items` cut with their length said.
    pub fn brief(&self, max_items: usize, max_chars: usize) -> String {
        match self {
            Self::String(s) => {
                let cut: String = s.chars().take(max_chars).flat_map(escape).collect();
                let more = s.chars().count().saturating_sub(max_chars);
                if more > 0 { format!("{cut}… ({more} more characters)") } else { cut }
            }
            Self::Array(a) => {
                let json = a.to_json(max_items).to_string();
                let more = a.len().saturating_sub(max_items);
                if more > 0 {
                    format!("{}, … {more} more]", json.strip_suffix(']').unwrap_or(&json))
                } else {
                    json
                }
            }
            _ => self.to_json().to_string(),
        }
    }
}

/// The shortest decimal that reads back as the same f32, not the digits of its f64.
fn float(v: f32) -> serde_json::Value {
    v.to_string().parse::<f64>().map_or(serde_json::Value::Null, Into::into)
}

/// Escapes what would break or forge a line on a terminal; leaves every letter and sign.
fn escape(c: char) -> Vec<char> {
    if c.is_control() { c.escape_default().collect() } else { vec![c] }
}

impl Array {
    /// The first `max` elements as JSON.
    fn to_json(&self, max: usize) -> serde_json::Value {
        macro_rules! list {
            ($v:expr) => {
                $v.iter().take(max).map(|x| serde_json::Value::from(x.clone())).collect()
            };
        }
        match self {
            Self::U8(v) => list!(v),
            Self::I8(v) => list!(v),
            Self::U16(v) => list!(v),
            Self::I16(v) => list!(v),
            Self::U32(v) => list!(v),
            Self::I32(v) => list!(v),
            Self::U64(v) => list!(v),
            Self::I64(v) => list!(v),
            Self::F32(v) => v.iter().take(max).map(|x| float(*x)).collect(),
            Self::F64(v) => list!(v),
            Self::Bool(v) => list!(v),
            Self::String(v) => list!(v),
            Self::Array(v) => v.iter().take(max).map(|a| a.to_json(max)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for (n, label) in [
            (0, "0"),
            (999, "999"),
            (260_032, "260K"),
            (999_600, "1M"),
            (11_000_000, "11M"),
            (1_543_000_000, "1.5B"),
            (7_000_000_000, "7B"),
            (9_960_000_000, "10B"),
            (671_026_000_000, "671B"),
        ] {
            assert_eq!(size_label(n), label, "{n}");
        }
    }

    #[test]
    fn brief_values_are_one_line() {
        assert_eq!(Value::String("a\nb\u{1b}[2J".into()).brief(9, 99), "a\\nb\\u{1b}[2J");
        assert_eq!(Value::String("äöü".into()).brief(9, 2), "äö… (1 more characters)");
        assert_eq!(Value::Array(Array::U8(vec![1, 2, 3])).brief(2, 9), "[1,2, … 1 more]");
        assert_eq!(Value::Array(Array::U8(vec![1, 2])).brief(2, 9), "[1,2]");
        assert_eq!(Value::F32(0.1).to_json().to_string(), "0.1");
        assert_eq!(Value::F32(f32::NAN).to_json(), serde_json::Value::Null);
        assert_eq!(Value::F32(1e-6).brief(1, 1), "1e-6");
    }
}
