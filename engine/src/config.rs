//! Reading hyper-parameters: typed, with every key of the architecture accounted for.
//!
//! A key that no code asked for is an error: it may change the mathematics. Knows nothing of tensors.

use crate::EngineError;
use crate::gguf::{Array, Metadata, MetadataError, Value};
use crate::layers::rope::{Rope, Scaling};
use std::cell::RefCell;
use std::collections::HashSet;

/// Keys that only describe a model, whatever the architecture.
const DESCRIPTIVE: &[&str] =
    &["vocab_size", "context_length", "rope.scaling.finetuned", "attention.causal", "pooling_type"];

/// Layers, heads, widths, windows are at most so many.
const MOST: usize = 1 << 22;

/// The metadata keys under `{arch}.`, each remembered once read.
pub struct Hyper<'a> {
    meta: &'a Metadata,
    arch: &'a str,
    read: RefCell<HashSet<String>>,
}

impl<'a> Hyper<'a> {
    /// A reader of the keys of `arch`.
    pub fn new(meta: &'a Metadata, arch: &'a str) -> Self {
        Self { meta, arch, read: RefCell::default() }
    }

    /// The architecture's name in the file.
    pub fn arch(&self) -> &'a str {
        self.arch
    }

    fn key(&self, name: &str) -> String {
        self.read.borrow_mut().insert(name.into());
        format!("{}.{name}", self.arch)
    }

    /// An optional count.
    pub fn opt(&self, name: &str) -> Result<Option<usize>, EngineError> {
        self.meta.u32(&self.key(name))?.map(|v| self.possible(name, v as usize)).transpose()
    }

    /// Refuses counts that no model has, before memory is taken by them.
    fn possible(&self, name: &str, v: usize) -> Result<usize, EngineError> {
        let most = || format!("at most {MOST} is possible");
        if v > MOST { Err(self.bad(name, &v.to_string(), &most())) } else { Ok(v) }
    }

    /// A count that must be there and be at least 1.
    pub fn need(&self, name: &str) -> Result<usize, EngineError> {
        let key = self.key(name);
        let v = self.meta.need(&key, self.meta.u32(&key))? as usize;
        if v == 0 { Err(self.bad(name, "0", "it must be at least 1")) } else { self.possible(name, v) }
    }

    /// A count given once, or once per layer with the same value in each.
    pub fn need_uniform(&self, name: &str) -> Result<usize, EngineError> {
        match self.meta.get(&self.key(name)) {
            Some(Value::Array(a)) => {
                let values: Vec<i128> = match a {
                    Array::I32(v) => v.iter().map(|&x| x.into()).collect(),
                    Array::U32(v) => v.iter().map(|&x| x.into()).collect(),
                    _ => return Err(self.bad(name, a.element_name(), "an array of integers is expected")),
                };
                match values.first() {
                    Some(&v) if values.iter().all(|x| *x == v) && v > 0 && v <= u32::MAX.into() => {
                        self.possible(name, v as usize)
                    }
                    _ => Err(self.bad(name, "an array", "different values per layer are not implemented")),
                }
            }
            _ => self.need(name),
        }
    }

    /// An optional float.
    pub fn opt_f32(&self, name: &str) -> Result<Option<f32>, EngineError> {
        match self.meta.f32(&self.key(name))? {
            Some(v) if !v.is_finite() => Err(self.bad(name, &v.to_string(), "it must be finite")),
            v => Ok(v),
        }
    }

    /// A float that must be there and be positive.
    pub fn need_f32(&self, name: &str) -> Result<f32, EngineError> {
        let missing = || MetadataError::Missing { key: format!("{}.{name}", self.arch) };
        let v = self.opt_f32(name)?.ok_or_else(missing)?;
        if v > 0.0 { Ok(v) } else { Err(self.bad(name, &v.to_string(), "it must be positive")) }
    }

    /// An optional bool.
    pub fn opt_bool(&self, name: &str) -> Result<Option<bool>, EngineError> {
        Ok(self.meta.bool(&self.key(name))?)
    }

    /// An optional string.
    pub fn opt_str(&self, name: &str) -> Result<Option<&'a str>, EngineError> {
        Ok(self.meta.str(&self.key(name))?)
    }

    /// An error about the value of a key.
    pub fn bad(&self, name: &str, value: &str, why: &str) -> EngineError {
        EngineError::Unsupported(format!("{}.{name} = {value}: {why}", self.arch))
    }

    /// Refuses the model if the file has a key of this architecture that nothing read.
    pub fn finish(self) -> Result<(), EngineError> {
        let read = self.read.into_inner();
        let prefix = format!("{}.", self.arch);
        for (key, _) in self.meta.iter() {
            if let Some(name) = key.strip_prefix(&prefix)
                && !read.contains(name)
                && !DESCRIPTIVE.contains(&name)
            {
                return Err(EngineError::Unsupported(format!(
                    "metadata key {key} is not one this engine implements"
                )));
            }
        }
        Ok(())
    }

    /// The rotary embedding for `dims` dimensions: base, scaling and, if the file has them, per-dimension factors.
    pub fn rope(&self, dims: usize, freq_factors: Option<Vec<f32>>) -> Result<Rope, EngineError> {
        let base = self.opt_f32("rope.freq_base")?.unwrap_or(10_000.0);
        let scaling = self.rope_scaling()?;
        Rope::new(dims, f64::from(base), scaling, freq_factors).map_err(|e| self.bad("rope", "", &e))
    }

    /// The scaling keys. Without a type, a factor means linear scaling, as in llama.cpp.
    pub fn rope_scaling(&self) -> Result<Scaling, EngineError> {
        let old = self.opt_f32("rope.scale_linear")?;
        let factor = f64::from(self.opt_f32("rope.scaling.factor")?.or(old).unwrap_or(1.0));
        let kind = self.opt_str("rope.scaling.type")?;
        if factor <= 0.0 {
            return Err(self.bad("rope.scaling.factor", &factor.to_string(), "it must be positive"));
        }
        if let Some(f) = self.opt_f32("rope.scaling.attn_factor")?
            && f != 1.0
            && kind != Some("yarn")
        {
            return Err(self.bad("rope.scaling.attn_factor", &f.to_string(), "implemented for yarn only"));
        }
        match kind {
            Some("none") => Ok(Scaling::None),
            None | Some("linear") if factor == 1.0 => Ok(Scaling::None),
            None | Some("linear") => Ok(Scaling::Linear(factor)),
            Some("yarn") => {
                if let Some(e) = self.opt_f32("rope.scaling.yarn_ext_factor")?
                    && e != 1.0
                {
                    return Err(self.bad(
                        "rope.scaling.yarn_ext_factor",
                        &e.to_string(),
                        "only 1 is implemented",
                    ));
                }
                let original = self.need("rope.scaling.original_context_length")?;
                Ok(Scaling::Yarn {
                    factor,
                    original_context: original as f64,
                    beta_fast: f64::from(self.opt_f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0)),
                    beta_slow: f64::from(self.opt_f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0)),
                    attn_factor: self.opt_f32("rope.scaling.yarn_attn_factor")?.map(f64::from),
                    extra_factor: f64::from(self.opt_f32("rope.scaling.attn_factor")?.unwrap_or(1.0)),
                })
            }
            Some(other) => Err(self.bad("rope.scaling.type", other, "none, linear and yarn are implemented")),
        }
    }
}
