//! Which type each tensor gets: llama-quantize's mixes, which spend more bits where an error hurts most (the value
//! projection, the way down from the feed-forward network, the output matrix, the first and last layers).
//!
//! The rules are those of `llama_model_quantize` in llama.cpp, `src/llama-quant.cpp`; ref-tests holds the result
//! against the types it chooses, model by model. Knows names and shapes; reads no data.

use quant::DType;

use super::target::Target;
use super::{Options, QuantizeError};
use crate::gguf::{Array, Metadata, MetadataError, TensorInfo, Value};

/// What is to become of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The type it gets.
    pub dtype: DType,
    /// Whether the mix wanted another, which its row length does not allow.
    pub fallback: bool,
}

/// Chooses the type of each of `tensors`, in their order, from metadata, names and shapes alone.
///
/// # Errors
/// A key that the rules need is missing or of the wrong type, or a type asked for does not fit a tensor's rows.
pub fn choose(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    options: &Options,
) -> Result<Vec<Choice>, QuantizeError> {
    let mut choices: Vec<Choice> =
        tensors.iter().map(|t| Choice { dtype: t.dtype, fallback: false }).collect();
    let Some(default) = options.target.info().dtype else { return Ok(choices) };
    // The rules count tensors by layer, then by name, wherever they lie in the file.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (layer(&tensors[i].name), &tensors[i].name));
    let mut mix = None;
    for i in order {
        let t = &tensors[i];
        if !may_quantize(t, options) {
            continue;
        }
        let role = Role::of(&t.name);
        let asked = match role {
            Role::TokenEmbedding => options.token_embedding_type,
            Role::Output => options.output_tensor_type,
            _ => None,
        };
        choices[i] = match asked {
            Some(dtype) => Choice { dtype, fallback: false },
            // Floating-point targets have no mix.
            None if default.format().block_len == 1 => Choice { dtype: default, fallback: false },
            None if options.pure => fall_back(default, t.row_len()),
            None => {
                if mix.is_none() {
                    mix = Some(Mix::new(metadata, tensors, options, default)?);
                }
                let mix = mix.as_mut().expect("made above");
                fall_back(mix.choose(role, t), t.row_len())
            }
        };
        fits(t, choices[i].dtype)?;
    }
    Ok(choices)
}

/// What the mixes tell apart, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    TokenEmbedding,
    Output,
    /// The value projection, alone or inside a fused matrix (`attn_qkv`, MLA's `attn_kv_b`).
    AttentionValue,
    AttentionKey,
    AttentionOutput,
    /// The last matrix of a feed-forward network, dense, shared or expert.
    FfnDown,
    Other,
}

impl Role {
    fn of(name: &str) -> Self {
        let any = |parts: &[&str]| parts.iter().any(|p| name.contains(p));
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Self::TokenEmbedding,
            _ if any(&["attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"]) => Self::AttentionValue,
            _ if any(&["attn_k.weight"]) => Self::AttentionKey,
            _ if any(&["attn_output.weight"]) => Self::AttentionOutput,
            _ if any(&["ffn_down"]) => Self::FfnDown,
            _ => Self::Other,
        }
    }
}

/// The layer in `blk.12.…`; -1, before all layers, for other names.
fn layer(name: &str) -> i64 {
    let number = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    number.and_then(|(n, _)| n.parse().ok()).unwrap_or(-1)
}

/// Names of matrices that lose more than they save: norms, routers, position tables, short convolutions, the small
/// matrices of recurrent models.
const KEPT: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
];

fn may_quantize(t: &TensorInfo, options: &Options) -> bool {
    let name = t.name.as_str();
    // A matrix with one row counts as a vector.
    t.n_rows() > 1
        && name.ends_with("weight")
        && !(options.leave_output_tensor && name == "output.weight")
        && name != "position_embd.weight"
        && name != "token_types.weight"
        && !KEPT.iter().any(|k| name.contains(k))
}

/// A mix under way: the facts it goes by and what it has counted so far.
struct Mix {
    target: Target,
    default: DType,
    output_tensor_type: Option<DType>,
    importance: bool,
    /// The token embedding is the output matrix too.
    tied: bool,
    n_layer: i64,
    /// 0 without experts.
    n_expert: u32,
    /// Query heads that share a key-value head, in the first layer.
    n_gqa: u32,
    /// 80 layers of Llama or Qwen 2: many query heads on few values.
    large: bool,
    n_value: i64,
    i_value: i64,
    i_down: i64,
}

impl Mix {
    fn new(
        metadata: &Metadata,
        tensors: &[TensorInfo],
        options: &Options,
        default: DType,
    ) -> Result<Self, MetadataError> {
        let arch = metadata.need("general.architecture", metadata.str("general.architecture"))?;
        let key = |suffix: &str| format!("{arch}.{suffix}");
        let n_layer = metadata.need(&key("block_count"), metadata.u32(&key("block_count")))?;
        let n_expert = metadata.u32(&key("expert_count"))?.unwrap_or(0);
        let head_count = first(metadata, &key("attention.head_count"))?.unwrap_or(0);
        let head_count_kv = first(metadata, &key("attention.head_count_kv"))?.unwrap_or(head_count);
        let large = n_layer == 80
            && match arch {
                "llama" => n_expert != 8 && head_count != head_count_kv,
                "qwen2" => true,
                _ => false,
            };
        Ok(Self {
            target: options.target,
            default,
            output_tensor_type: options.output_tensor_type,
            importance: options.importance.is_some(),
            tied: !tensors.iter().any(|t| t.name == "output.weight"),
            n_layer: n_layer.into(),
            n_expert,
            n_gqa: head_count.checked_div(head_count_kv).unwrap_or(0),
            large,
            n_value: tensors.iter().filter(|t| Role::of(&t.name) == Role::AttentionValue).count() as i64,
            i_value: 0,
            i_down: 0,
        })
    }

    fn choose(&mut self, role: Role, t: &TensorInfo) -> DType {
        match role {
            Role::Output => self.output(t),
            Role::TokenEmbedding if self.tied => self.output(t),
            Role::AttentionValue => {
                self.i_value += 1;
                self.attention_value(self.i_value - 1)
            }
            Role::AttentionKey if self.n_expert == 8 => DType::Q8_0,
            Role::AttentionOutput => self.attention_output(),
            Role::FfnDown => {
                self.i_down += 1;
                // With experts a layer has several such matrices, so that counting them does not tell the layer.
                let i = if self.n_expert > 1 { layer(&t.name) } else { self.i_down - 1 };
                self.ffn_down(i)
            }
            _ => self.default,
        }
    }

    fn output(&self, t: &TensorInfo) -> DType {
        match self.output_tensor_type {
            Some(dtype) => dtype,
            None if !t.row_len().is_multiple_of(self.default.format().block_len as u64) => DType::Q8_0,
            None if self.default == DType::Q8_0 => DType::Q8_0,
            None => DType::Q6_K,
        }
    }

    fn attention_value(&self, i: i64) -> DType {
        let dtype = match self.target {
            Target::Q2_K if self.n_gqa >= 4 => DType::Q4_K,
            Target::Q2_K => DType::Q3_K,
            Target::Q2_K_S if self.n_gqa >= 4 => DType::Q4_K,
            Target::Q3_K_M if i < 2 => DType::Q5_K,
            Target::Q3_K_M => DType::Q4_K,
            Target::Q3_K_L => DType::Q5_K,
            Target::Q4_K_M | Target::Q5_K_M if more_bits(i, self.n_value) => DType::Q6_K,
            Target::Q4_K_S if i < 4 => DType::Q5_K,
            _ => self.default,
        };
        match dtype {
            // Eight experts: the attention is so small a part that 8 bits hardly show.
            _ if self.n_expert == 8 => DType::Q8_0,
            DType::Q3_K | DType::Q4_K if self.large => DType::Q5_K,
            _ => dtype,
        }
    }

    fn attention_output(&self) -> DType {
        match self.target {
            Target::Q2_K | Target::Q3_K_S | Target::Q3_K_M | Target::Q4_K_S | Target::Q4_K_M
                if self.n_expert == 8 =>
            {
                DType::Q5_K
            }
            _ if self.n_expert == 8 => self.default,
            Target::Q2_K => DType::Q3_K,
            Target::Q3_K_M => DType::Q4_K,
            Target::Q3_K_L => DType::Q5_K,
            _ => self.default,
        }
    }

    fn ffn_down(&self, i: i64) -> DType {
        let n = self.n_layer;
        match self.target {
            Target::Q2_K => DType::Q3_K,
            Target::Q2_K_S if i < n / 8 => DType::Q4_K,
            Target::Q3_K_M if i < n / 16 => DType::Q5_K,
            Target::Q3_K_M => DType::Q4_K,
            Target::Q3_K_L => DType::Q5_K,
            Target::Q4_K_M | Target::Q5_K_M if more_bits(i, n) => DType::Q6_K,
            Target::Q4_K_S if i < n / 8 => DType::Q5_K,
            // Importance weights can send the first layers astray in the formats without a minimum.
            Target::Q4_0 if self.importance && i < n / 8 => DType::Q4_1,
            Target::Q5_0 if self.importance && i < n / 8 => DType::Q5_1,
            _ => self.default,
        }
    }
}

/// The first and last eighth of the layers, and every third between them.
fn more_bits(i: i64, n: i64) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

/// An integer, or the first of an array of them (one a layer).
fn first(metadata: &Metadata, key: &str) -> Result<Option<u32>, MetadataError> {
    let Some(Value::Array(a)) = metadata.get(key) else { return metadata.u32(key) };
    let n = match a {
        Array::U32(v) => v.first().copied(),
        Array::I32(v) => v.first().and_then(|&n| n.try_into().ok()),
        _ => None,
    };
    let wrong = || MetadataError::Type {
        key: key.into(),
        expected: "an unsigned 32-bit integer or an array of them",
        found: Value::Array(a.clone()).type_name(),
    };
    n.map(Some).ok_or_else(wrong)
}

/// What a tensor gets whose rows are not whole super-blocks of 256.
const FALLBACK: &[(DType, DType)] = &[
    (DType::Q2_K, DType::Q4_0),
    (DType::Q3_K, DType::Q4_0),
    (DType::Q4_K, DType::Q5_0),
    (DType::Q5_K, DType::Q5_1),
    (DType::Q6_K, DType::Q8_0),
];

fn fall_back(wanted: DType, row_len: u64) -> Choice {
    let whole = |t: DType| row_len.is_multiple_of(t.format().block_len as u64);
    if whole(wanted) {
        return Choice { dtype: wanted, fallback: false };
    }
    let next = FALLBACK.iter().find(|(from, _)| *from == wanted).map(|(_, to)| *to);
    Choice { dtype: next.filter(|&t| whole(t)).unwrap_or(DType::F16), fallback: true }
}

/// A type that somebody asked for may not fit.
fn fits(t: &TensorInfo, dtype: DType) -> Result<(), QuantizeError> {
    let row = dtype.row_bytes(t.row_len() as usize);
    row.map(|_| ()).map_err(|error| QuantizeError::Row { tensor: t.name.clone(), error })
}
