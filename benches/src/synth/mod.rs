//! Models with the geometry of public ones and random weights, for work on speed and memory: a GGUF that llama.cpp and
//! this engine load, written as fast as the disk takes it.
//!
//! Every matrix has a standard deviation near 1/sqrt(columns), so that activations stay of the size that trained weights
//! give them and logits are finite and spread. The same geometry, types and seed give the same file.

mod blocks;
mod geometry;
mod tensors;
mod vocabulary;

use engine::gguf::{Array, GgufError, Metadata, NewTensor, TensorInfo, Value, Writer};
use engine::quantize::{Options, QuantizeError, Target, choose};
use kernels::testing::Rng;
use quant::DType;
use std::path::Path;

pub use blocks::Blocks;
pub use geometry::{Arch, Attention, Experts, GEOMETRIES, Geometry};
pub use tensors::{Role, Tensor, tensors};

/// Which type each matrix gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Types {
    /// One type for all, rows too short for it excepted; of a K type the output and value matrices are Q6_K, as in the mixes.
    Plain(DType),
    /// One type for all, rows too short for it excepted.
    Pure(DType),
    /// llama-quantize's mix for a file type (`Q4_K_M`).
    Mix(Target),
}

impl Types {
    /// The name of a tensor type (`Q4_K`: plain) or of one of llama-quantize's file types (`Q4_K_M`). A name that is both
    /// is the tensor type's.
    pub fn from_name(name: &str) -> Option<Self> {
        let dtype = DType::from_name(name).filter(|t| *t != DType::Q8_K).map(Self::Plain);
        let target = Target::from_name(name).filter(|t| t.info().dtype.is_some()).map(Self::Mix);
        dtype.or(target)
    }
}

impl std::fmt::Display for Types {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // Upper case, as people write types: Q4_K, not q4_K.
            Self::Plain(t) => f.write_str(&t.name().to_uppercase()),
            Self::Pure(t) => write!(f, "{} pure", t.name().to_uppercase()),
            Self::Mix(t) => write!(f, "{t}"),
        }
    }
}

/// Why a model could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// The file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The mix.
    #[error(transparent)]
    Mix(#[from] QuantizeError),
    /// No type fits a row.
    #[error(
        "tensor {tensor}: a row of {len} values cannot be stored as {dtype}, and {dtype} has no fallback"
    )]
    Row {
        /// The tensor.
        tensor: String,
        /// Its row length.
        len: u64,
        /// The type asked for.
        dtype: DType,
    },
    /// A type whose blocks cannot be drawn.
    #[error("{0} is a type of intermediate results: models are not stored in it")]
    Type(DType),
}

/// A file begun: its header is written.
fn begin(g: &Geometry, types: Types, out: &Path) -> Result<(Writer, Vec<(Tensor, DType)>), SynthError> {
    let mut metadata = metadata(g);
    if let Types::Mix(target) = types
        && let Some(id) = target.info().file_type
    {
        metadata.insert("general.file_type", Value::U32(id));
    }
    let tensors = typed(g, &metadata, types)?;
    let new: Vec<NewTensor> = tensors
        .iter()
        .map(|(t, dtype)| NewTensor { name: t.name.clone(), dtype: *dtype, dims: t.dims.clone() })
        .collect();
    Ok((Writer::create(out, &metadata, &new)?, tensors))
}

/// Writes the model's header alone: for plans, which need no weights. Returns the file's length in bytes.
///
/// # Errors
/// As [`write`].
pub fn write_header(g: &Geometry, types: Types, out: &Path) -> Result<u64, SynthError> {
    Ok(begin(g, types, out)?.0.finish_header()?)
}

/// Writes the model. Returns the file's length in bytes.
///
/// # Errors
/// See [`SynthError`]; on error no file is left behind.
pub fn write(g: &Geometry, types: Types, seed: u64, out: &Path) -> Result<u64, SynthError> {
    let (mut writer, tensors) = begin(g, types, out)?;
    let mut rng = Rng(seed);
    let mut buffer = vec![0; PIECE];
    for (t, dtype) in &tensors {
        let blocks = Blocks::new(*dtype).ok_or(SynthError::Type(*dtype))?;
        let f = dtype.format();
        let mut left = t.dims.iter().product::<u64>() as usize / f.block_len * f.block_bytes;
        while left > 0 {
            let piece = &mut buffer[..left.min(PIECE / f.block_bytes * f.block_bytes)];
            blocks.fill(t.mean, t.deviation, &mut rng, piece);
            writer.write(piece)?;
            left -= piece.len();
        }
    }
    Ok(writer.finish()?)
}

/// Bytes drawn before they are written.
const PIECE: usize = 4 << 20;

/// What a tensor gets whose rows are not whole super-blocks: llama-quantize's rule.
const FALLBACK: [(DType, DType); 6] = [
    (DType::Q2_K, DType::Q4_0),
    (DType::Q3_K, DType::Q4_0),
    (DType::Q4_K, DType::Q5_0),
    (DType::Q5_K, DType::Q5_1),
    (DType::Q6_K, DType::Q8_0),
    (DType::IQ4_XS, DType::IQ4_NL),
];

/// Every tensor with its type.
fn typed(g: &Geometry, metadata: &Metadata, types: Types) -> Result<Vec<(Tensor, DType)>, SynthError> {
    let all = tensors(g);
    if let Types::Mix(target) = types {
        let infos: Vec<TensorInfo> = all
            .iter()
            .map(|t| TensorInfo {
                name: t.name.clone(),
                dtype: if t.role == Role::Float { DType::F32 } else { DType::F16 },
                dims: t.dims.clone(),
                n_bytes: 0,
                part: 0,
                offset: 0,
            })
            .collect();
        let choices = choose(metadata, &infos, &Options::new(target))?;
        return Ok(all.into_iter().zip(choices).map(|(t, c)| (t, c.dtype)).collect());
    }
    all.into_iter()
        .map(|t| {
            let dtype = plain(types, &t)?;
            Ok((t, dtype))
        })
        .collect()
}

fn plain(types: Types, t: &Tensor) -> Result<DType, SynthError> {
    let (wanted, pure) = match types {
        Types::Plain(d) => (d, false),
        Types::Pure(d) => (d, true),
        Types::Mix(_) => unreachable!("mixes are chosen by the engine"),
    };
    let k = matches!(wanted, DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K);
    let dtype = match t.role {
        Role::Float => return Ok(DType::F32),
        Role::Output | Role::Value if k && !pure => DType::Q6_K,
        // The absorbed up-projections have rows of one head: too short for super-blocks, and few.
        Role::MlaUp if wanted.format().block_len > 1 && !pure => DType::Q8_0,
        _ => wanted,
    };
    let fits = |d: DType| t.dims[0].is_multiple_of(d.format().block_len as u64);
    let fallback = || FALLBACK.iter().find(|(from, _)| *from == dtype).map(|(_, to)| *to);
    [Some(dtype), fallback(), Some(DType::F16)]
        .into_iter()
        .flatten()
        .find(|d| fits(*d))
        .ok_or_else(|| SynthError::Row { tensor: t.name.clone(), len: t.dims[0], dtype })
}

fn metadata(g: &Geometry) -> Metadata {
    let mut m = Metadata::default();
    let arch = g.arch.name();
    m.insert("general.architecture", Value::String(arch.into()));
    m.insert("general.name", Value::String(format!("synthetic {}", g.name)));
    m.insert("general.quantization_version", Value::U32(2));
    let mut set = |key: &str, v: Value| {
        m.insert(format!("{arch}.{key}"), v);
    };
    let n = |v: usize| Value::U32(v as u32);
    set("block_count", n(g.layers));
    set("context_length", n(g.context));
    set("embedding_length", n(g.d));
    set("feed_forward_length", n(g.ff));
    set("vocab_size", n(g.vocab));
    set("attention.head_count", n(g.heads));
    set("attention.layer_norm_rms_epsilon", Value::F32(g.eps));
    set("rope.freq_base", Value::F32(g.rope_base));
    match g.attention {
        Attention::Grouped { kv_heads, head_dim, window } => {
            set("attention.head_count_kv", n(kv_heads));
            set("attention.key_length", n(head_dim));
            set("attention.value_length", n(head_dim));
            if g.arch != Arch::Gemma3 {
                set("rope.dimension_count", n(head_dim));
            }
            if let Some(w) = window {
                set("attention.sliding_window", n(w));
            }
        }
        Attention::Latent { q_lora, latent, nope, rope, value, yarn_log_multiplier } => {
            set("attention.head_count_kv", n(1));
            if let Some(r) = q_lora {
                set("attention.q_lora_rank", n(r));
            }
            set("attention.kv_lora_rank", n(latent));
            set("attention.key_length", n(latent + rope));
            set("attention.value_length", n(latent));
            set("attention.key_length_mla", n(nope + rope));
            set("attention.value_length_mla", n(value));
            set("rope.dimension_count", n(rope));
            set("rope.scaling.type", Value::String("yarn".into()));
            set("rope.scaling.factor", Value::F32(40.0));
            set("rope.scaling.original_context_length", n(4096));
            set("rope.scaling.yarn_log_multiplier", Value::F32(yarn_log_multiplier));
        }
    }
    if let Some(factor) = g.linear_rope {
        set("rope.scaling.type", Value::String("linear".into()));
        set("rope.scaling.factor", Value::F32(factor));
    }
    if let Some(e) = g.experts {
        set("leading_dense_block_count", n(e.dense_layers));
        set("expert_feed_forward_length", n(e.hidden));
        set("expert_count", n(e.count));
        set("expert_used_count", n(e.used));
        set("expert_shared_count", n(e.shared));
        set("expert_weights_scale", Value::F32(e.scale));
        if e.sigmoid {
            set("expert_weights_norm", Value::Bool(true));
            set("expert_gating_func", Value::U32(2));
        }
        if let Some((groups, used)) = e.groups {
            set("expert_group_count", n(groups));
            set("expert_group_used_count", n(used));
        }
    }
    let v = vocabulary::tokens(g.vocab);
    m.insert("tokenizer.ggml.model", Value::String("gpt2".into()));
    m.insert("tokenizer.ggml.pre", Value::String(g.arch.pre_tokenizer().into()));
    m.insert("tokenizer.ggml.tokens", Value::Array(Array::String(v.tokens)));
    m.insert("tokenizer.ggml.token_type", Value::Array(Array::I32(v.types)));
    m.insert("tokenizer.ggml.merges", Value::Array(Array::String(v.merges)));
    m.insert("tokenizer.ggml.bos_token_id", Value::U32(0));
    m.insert("tokenizer.ggml.eos_token_id", Value::U32(1));
    m
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_types() {
        assert_eq!(Types::from_name("q4_k"), Some(Types::Plain(DType::Q4_K)));
        assert_eq!(Types::from_name("Q4_K_M"), Some(Types::Mix(Target::Q4_K_M)));
        assert_eq!(Types::from_name("MXFP4"), Some(Types::Plain(DType::MXFP4)));
        for no in ["Q8_K", "COPY", "", "Q9"] {
            assert_eq!(Types::from_name(no), None, "{no}");
        }
        assert_eq!(Types::Plain(DType::Q4_K).to_string(), "Q4_K");
    }

    /// Parameters of the public models, embedding counted once where it is tied (Hugging Face's model cards).
    #[test]
    fn parameters_are_those_of_the_public_models() {
        let millions = |name: &str| {
            let g = Geometry::named(name).expect("in the table");
            let elements = tensors(&g).iter().map(|t| t.dims.iter().product::<u64>()).sum::<u64>();
            (elements as f64 / 1e6).round() as u64
        };
        for (name, want) in [
            ("llama-3.2-1b", 1236),
            ("llama-3.1-8b", 8030),
            ("gemma-3-1b", 1000),
            ("gemma-3-4b", 3880),
            ("gemma-3-27b", 27_009),
            ("llama-3.3-70b", 70_554),
            ("qwen3-0.6b", 596),
            ("deepseek-v2-lite", 15706),
            ("deepseek-v3", 671_026),
        ] {
            assert_eq!(millions(name), want, "{name}");
        }
    }
}
