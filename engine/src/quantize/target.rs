//! The file types that `rsinfer quantize` can make: llama-quantize's names, ids and the type that most tensors get.

use quant::DType;

/// A file type: what to make of a model. Most tensors get [`Target::dtype`]; `mix.rs` says which get another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum Target {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q2_K_S,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
    /// Every tensor as it is; joins split files.
    Copy,
}

/// A row of the table of targets.
pub struct TargetInfo {
    /// The target of this row.
    pub target: Target,
    /// llama-quantize's name.
    pub name: &'static str,
    /// Another name for the same.
    pub alias: Option<&'static str>,
    /// `general.file_type` (enum llama_ftype in llama.h); `None` for COPY.
    pub file_type: Option<u32>,
    /// The type of most tensors; `None` for COPY.
    pub dtype: Option<DType>,
}

macro_rules! row {
    ($target:ident, $name:literal, $alias:expr, $id:literal, $dtype:ident) => {
        TargetInfo {
            target: Target::$target,
            name: $name,
            alias: $alias,
            file_type: Some($id),
            dtype: Some(DType::$dtype),
        }
    };
}

/// All targets, in the order in which a help text lists them.
pub static TARGETS: &[TargetInfo] = &[
    row!(Q4_0, "Q4_0", None, 2, Q4_0),
    row!(Q4_1, "Q4_1", None, 3, Q4_1),
    row!(Q5_0, "Q5_0", None, 8, Q5_0),
    row!(Q5_1, "Q5_1", None, 9, Q5_1),
    row!(Q2_K, "Q2_K", None, 10, Q2_K),
    row!(Q2_K_S, "Q2_K_S", None, 21, Q2_K),
    row!(Q3_K_S, "Q3_K_S", None, 11, Q3_K),
    row!(Q3_K_M, "Q3_K_M", Some("Q3_K"), 12, Q3_K),
    row!(Q3_K_L, "Q3_K_L", None, 13, Q3_K),
    row!(Q4_K_S, "Q4_K_S", None, 14, Q4_K),
    row!(Q4_K_M, "Q4_K_M", Some("Q4_K"), 15, Q4_K),
    row!(Q5_K_S, "Q5_K_S", None, 16, Q5_K),
    row!(Q5_K_M, "Q5_K_M", Some("Q5_K"), 17, Q5_K),
    row!(Q6_K, "Q6_K", None, 18, Q6_K),
    row!(Q8_0, "Q8_0", None, 7, Q8_0),
    row!(F16, "F16", None, 1, F16),
    row!(BF16, "BF16", None, 32, BF16),
    row!(F32, "F32", None, 0, F32),
    TargetInfo { target: Target::Copy, name: "COPY", alias: None, file_type: None, dtype: None },
];

impl Target {
    /// The target called `name` in any letter case, or with llama.cpp's number for it.
    pub fn from_name(name: &str) -> Option<Self> {
        let id = name.parse::<u32>().ok();
        let row = TARGETS.iter().find(|r| {
            r.name.eq_ignore_ascii_case(name)
                || r.alias.is_some_and(|a| a.eq_ignore_ascii_case(name))
                || (id.is_some() && r.file_type == id)
        })?;
        Some(row.target)
    }

    /// This target's row of [`TARGETS`].
    pub fn info(self) -> &'static TargetInfo {
        TARGETS.iter().find(|r| r.target == self).expect("every target has a row: a test says so")
    }

    /// llama-quantize's name.
    pub fn name(self) -> &'static str {
        self.info().name
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::file_type_name;

    #[test]
    fn names_and_ids_lead_to_their_row() {
        for row in TARGETS {
            assert_eq!(Target::from_name(&row.name.to_lowercase()), Some(row.target));
            assert_eq!(row.target.info().name, row.name);
            if let Some(id) = row.file_type {
                assert_eq!(file_type_name(id), Some(row.name));
                assert_eq!(Target::from_name(&id.to_string()), Some(row.target));
            }
        }
        assert_eq!(Target::from_name("q4_k"), Some(Target::Q4_K_M));
        assert_eq!(Target::from_name("Q3_K"), Some(Target::Q3_K_M));
        assert_eq!(Target::from_name("IQ1_S"), None);
    }
}
