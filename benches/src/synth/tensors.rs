//! The tensors of a model: names, shapes, what they are for, how large their values are. Names and order are those of
//! llama.cpp's converter. Knows nothing of types.

use super::geometry::{Arch, Attention, Geometry};

/// What the choice of a type goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Norms, routers, biases, factors: F32 always.
    Float,
    /// The output matrix, or the embedding that serves as one.
    Output,
    /// The value projection.
    Value,
    /// MLA's up-projections per head.
    MlaUp,
    /// Any other matrix.
    Matrix,
}

/// A tensor to be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Dimensions, innermost first.
    pub dims: Vec<u64>,
    /// What it is for.
    pub role: Role,
    /// Mean of its values; other than 0 for F32 tensors alone.
    pub mean: f32,
    /// Standard deviation of its values.
    pub deviation: f32,
}

struct List {
    tensors: Vec<Tensor>,
    /// Factor on what goes back into the residual stream, so that it does not grow with depth.
    back: f32,
}

impl List {
    fn push(&mut self, name: String, dims: &[usize], role: Role, mean: f32, deviation: f32) {
        let dims = dims.iter().map(|&n| n as u64).collect();
        self.tensors.push(Tensor { name, dims, role, mean, deviation });
    }

    /// A matrix `[rows, cols]`, or a stack of them: deviation 1/sqrt(cols).
    fn matrix(&mut self, name: String, cols: usize, rows: usize, count: Option<usize>, role: Role) {
        let back = name.contains("attn_output") || name.contains("ffn_down");
        let deviation = (if back { self.back } else { 1.0 }) / (cols as f32).sqrt();
        let dims: Vec<usize> = [cols, rows].into_iter().chain(count).collect();
        self.push(name, &dims, role, 0.0, deviation);
    }

    fn norm(&mut self, name: String, len: usize) {
        self.push(name, &[len], Role::Float, 1.0, 0.05);
    }

    fn ffn(&mut self, layer: &str, suffix: &str, d: usize, hidden: usize, count: Option<usize>) {
        let name = |part: &str| format!("{layer}ffn_{part}{suffix}.weight");
        self.matrix(name("gate"), d, hidden, count, Role::Matrix);
        self.matrix(name("up"), d, hidden, count, Role::Matrix);
        self.matrix(name("down"), hidden, d, count, Role::Matrix);
    }
}

/// All tensors of a model, in file order.
pub fn tensors(g: &Geometry) -> Vec<Tensor> {
    let mut list = List { tensors: Vec::new(), back: 1.0 / (2.0 * g.layers as f32).sqrt() };
    let embedding = if g.tied { Role::Output } else { Role::Matrix };
    list.matrix("token_embd.weight".into(), g.d, g.vocab, None, embedding);
    if !g.tied {
        list.matrix("output.weight".into(), g.d, g.vocab, None, Role::Output);
    }
    list.norm("output_norm.weight".into(), g.d);
    if let (Some(_), Attention::Grouped { head_dim, .. }) = (g.llama3_rope, g.attention) {
        // Between 1 and the factor as real ones are, in no particular order: no speed depends on them.
        list.push("rope_freqs.weight".into(), &[head_dim / 2], Role::Float, 4.0, 1.0);
    }
    for i in 0..g.layers {
        let p = format!("blk.{i}.");
        list.norm(format!("{p}attn_norm.weight"), g.d);
        attention(&mut list, g, &p);
        list.norm(format!("{p}ffn_norm.weight"), g.d);
        feed_forward(&mut list, g, i, &p);
    }
    list.tensors
}

fn attention(list: &mut List, g: &Geometry, p: &str) {
    let name = |part: &str| format!("{p}{part}.weight");
    match g.attention {
        Attention::Grouped { kv_heads, head_dim, .. } => {
            list.matrix(name("attn_q"), g.d, g.heads * head_dim, None, Role::Matrix);
            list.matrix(name("attn_k"), g.d, kv_heads * head_dim, None, Role::Matrix);
            list.matrix(name("attn_v"), g.d, kv_heads * head_dim, None, Role::Value);
            list.matrix(name("attn_output"), g.heads * head_dim, g.d, None, Role::Matrix);
            if matches!(g.arch, Arch::Qwen3 | Arch::Gemma3) {
                list.norm(name("attn_q_norm"), head_dim);
                list.norm(name("attn_k_norm"), head_dim);
            }
            if g.arch == Arch::Gemma3 {
                list.norm(name("post_attention_norm"), g.d);
                list.norm(name("post_ffw_norm"), g.d);
            }
        }
        Attention::Latent { q_lora, latent, nope, rope, value, .. } => {
            let queries = g.heads * (nope + rope);
            match q_lora {
                None => list.matrix(name("attn_q"), g.d, queries, None, Role::Matrix),
                Some(r) => {
                    list.matrix(name("attn_q_a"), g.d, r, None, Role::Matrix);
                    list.norm(name("attn_q_a_norm"), r);
                    list.matrix(name("attn_q_b"), r, queries, None, Role::Matrix);
                }
            }
            list.matrix(name("attn_kv_a_mqa"), g.d, latent + rope, None, Role::Matrix);
            list.norm(name("attn_kv_a_norm"), latent);
            list.matrix(name("attn_k_b"), nope, latent, Some(g.heads), Role::MlaUp);
            list.matrix(name("attn_v_b"), latent, value, Some(g.heads), Role::MlaUp);
            list.matrix(name("attn_output"), g.heads * value, g.d, None, Role::Matrix);
        }
    }
}

fn feed_forward(list: &mut List, g: &Geometry, layer: usize, p: &str) {
    match g.experts {
        Some(e) if layer >= e.dense_layers => {
            list.matrix(format!("{p}ffn_gate_inp.weight"), g.d, e.count, None, Role::Float);
            if e.sigmoid {
                list.push(format!("{p}exp_probs_b.bias"), &[e.count], Role::Float, 0.0, 0.05);
            }
            list.ffn(p, "_exps", g.d, e.hidden, Some(e.count));
            list.ffn(p, "_shexp", g.d, e.shared * e.hidden, None);
        }
        _ => list.ffn(p, "", g.d, g.ff, None),
    }
}
