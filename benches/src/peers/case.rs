//! What is compared: models and types, and how much work a token of each is, from its file alone.

use crate::synth::{Geometry, Types};
use engine::gguf::File;
use quant::DType;

/// A model in one type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// The model.
    pub geometry: Geometry,
    /// Its types.
    pub types: Types,
    /// Whether decoding at depth is measured too.
    pub deep: bool,
}

/// The table's rows: (model, type, decoding at depth).
const TABLE: [(&str, &str, bool); 9] = [
    ("llama-3.2-1b", "Q2_K", false),
    ("llama-3.2-1b", "Q3_K", false),
    ("llama-3.2-1b", "Q4_K", true),
    ("llama-3.2-1b", "Q5_K", false),
    ("llama-3.2-1b", "Q6_K", false),
    ("llama-3.2-1b", "Q8_0", false),
    ("llama-3.2-1b", "Q4_0", false),
    ("gemma-3-1b", "Q4_0", true),
    ("deepseek-v2-lite", "Q4_K", true),
];

impl Case {
    /// The rows of the table.
    pub fn table() -> Vec<Self> {
        TABLE
            .iter()
            .map(|(model, types, deep)| Self::new(model, types, *deep).expect("known names"))
            .collect()
    }

    fn new(model: &str, types: &str, deep: bool) -> Option<Self> {
        Some(Self { geometry: Geometry::named(model)?, types: Types::from_name(types)?, deep })
    }

    /// `MODEL:TYPE`, measured at depth too.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(s: &str) -> Result<Self, String> {
        let (model, types) =
            s.split_once(':').ok_or_else(|| format!("{s:?} is not of the form MODEL:TYPE"))?;
        Self::new(model, types, true).ok_or_else(|| format!("{s:?}: no such model or no such type"))
    }

    /// `llama-3.2-1b-Q4_K`.
    pub fn name(&self) -> String {
        format!("{}-{}", self.geometry.name, self.types)
    }

    /// Whether its matrices are floats, which are multiplied in f32.
    pub fn float(&self) -> bool {
        matches!(self.types, Types::Plain(DType::F32 | DType::F16 | DType::BF16))
    }
}

/// What a token of a model costs at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Multiply-adds with weights per token of a prompt. Attention itself is left out, and the output matrix counts once a
    /// prompt.
    pub multiply_adds: f64,
}

impl Work {
    /// Of a prompt of `tokens`.
    pub fn of(file: &File, tokens: usize) -> Self {
        let meta = file.metadata();
        let arch = meta.str("general.architecture").ok().flatten().unwrap_or_default();
        let number = |key: &str| meta.u32(&format!("{arch}.{key}")).ok().flatten();
        let share = match (number("expert_used_count"), number("expert_count")) {
            (Some(used), Some(count)) if count > 0 => f64::from(used) / f64::from(count),
            _ => 1.0,
        };
        let tied = file.tensor("output.weight").is_none();
        let multiply_adds = file.tensors().iter().filter(|t| t.dims.len() > 1).map(|t| {
            let n = t.n_elements() as f64;
            match t.name.as_str() {
                "output.weight" => n / tokens as f64,
                "token_embd.weight" => {
                    if tied {
                        n / tokens as f64
                    } else {
                        0.0
                    }
                }
                name if name.contains("_exps.") => n * share,
                _ => n,
            }
        });
        Self { multiply_adds: multiply_adds.sum() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth;

    #[test]
    fn cases_are_read() {
        assert_eq!(Case::table().len(), TABLE.len());
        let c = Case::parse("deepseek-v2-lite:F16").expect("a case");
        assert!(c.deep && c.float() && c.name() == "deepseek-v2-lite-F16");
        for wrong in ["llama-3.2-1b", "nothing:Q4_K", "llama-3.2-1b:Q9"] {
            assert!(Case::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn experts_count_as_far_as_they_are_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("m.gguf");
        let g = Geometry { layers: 2, ..Geometry::named("deepseek-v2-lite").expect("in the table").tiny() };
        synth::write(&g, Types::from_name("F16").expect("a type"), 1, &path).expect("written");
        let file = File::open(&path, Default::default()).expect("it opens");
        // By hand: attention of both layers, the dense layer, router, 2 of 8 experts and 2 shared ones, the output matrix.
        let attention = 256 * (4 * 64) + 256 * (256 + 32) + 4 * (32 * 256 + 256 * 32) + 4 * 32 * 256;
        let (dense, moe) = (3 * 256 * 512, 256 * 8 + 3 * 256 * 128 * (2 + 2));
        let want = (2 * attention + dense + moe) as f64 + (1000 * 256) as f64 / 10.0;
        assert_eq!(Work::of(&file, 10).multiply_adds, want);
    }
}
