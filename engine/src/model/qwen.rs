//! Qwen2 (arXiv:2407.10671: biases on Q, K, V), Qwen3 (arXiv:2505.09388: per-head norms instead) and Qwen3-MoE.

use super::{Dims, Extras, Network, Runner};
use crate::EngineError;
use crate::config::Hyper;
use crate::kv::{Arena, LayerSpec};
use crate::layers::attention::{Gqa, GqaBufs, Shape};
use crate::layers::ffn::Dense;
use crate::layers::head::{Head, HeadBufs};
use crate::layers::moe::{FeedForward, Moe, Routing};
use crate::layers::rope::{Rope, RopeTable};
use crate::pager::Pager;
use crate::weights::Loader;
use kernels::{Activation, Buf, Device, Gating, Limits, RopeStyle, Routes, Vector, Weight, Write};
use std::sync::Arc;

struct Layer {
    attn_norm: Vector,
    attn: Gqa,
    ffn_norm: Vector,
    ffn: FeedForward,
}

/// Weights and configuration.
pub struct Qwen {
    dev: Device,
    pager: Arc<Pager>,
    attn: Shape,
    eps: f32,
    rope: Rope,
    embed: Weight,
    layers: Vec<Layer>,
    head: Head,
}

impl Qwen {
    /// Reads configuration and weights.
    pub fn load(h: &Hyper<'_>, w: &Loader<'_>, dev: &Device) -> Result<Self, EngineError> {
        let d = h.need("embedding_length")?;
        let n_layers = h.need("block_count")?;
        let eps = h.need_f32("attention.layer_norm_rms_epsilon")?;
        let attn = Shape::read(h, d, RopeStyle::Halves)?;
        let routing = match h.arch() {
            "qwen3moe" => Some(Self::routing(h)?),
            _ => None,
        };
        let hidden = match &routing {
            // The dense width is in the file but no layer uses it.
            Some(r) => {
                h.opt("feed_forward_length")?;
                r.hidden * r.used
            }
            None => h.need_uniform("feed_forward_length")?,
        };
        let qk_norm = (h.arch() != "qwen2").then_some(eps);
        let rope = h.rope(attn.rope_dims, None)?;
        let embed = w.table("token_embd.weight", w.rows("token_embd.weight")?, d)?;
        let mut layers = Vec::new();
        for i in 0..n_layers {
            let p = format!("blk.{i}.");
            layers.push(Layer {
                attn_norm: w.vector(&format!("{p}attn_norm.weight"), d)?,
                attn: Gqa::load(w, &p, &attn, qk_norm)?,
                ffn_norm: w.vector(&format!("{p}ffn_norm.weight"), d)?,
                ffn: match &routing {
                    Some(r) => FeedForward::Moe(Box::new(Moe::load(w, i, d, *r)?)),
                    None => {
                        FeedForward::Dense(Box::new(Dense::load(w, &p, "", d, hidden, Activation::Silu)?))
                    }
                },
            });
        }
        let head = Head::load(w, &embed, eps)?;
        Ok(Self { dev: dev.clone(), pager: w.pager(), attn, eps, rope, embed, layers, head })
    }

    fn routing(h: &Hyper<'_>) -> Result<Routing, EngineError> {
        if let Some(s) = h.opt("expert_shared_count")?.filter(|s| *s > 0) {
            return Err(h.bad(
                "expert_shared_count",
                &s.to_string(),
                "shared experts are not implemented for qwen3moe",
            ));
        }
        Ok(Routing {
            experts: h.need("expert_count")?,
            used: h.need("expert_used_count")?,
            hidden: h.need_uniform("expert_feed_forward_length")?,
            shared: 0,
            gating: Gating::Softmax,
            groups: None,
            // Every released Qwen3-MoE normalises; no key says so.
            normalize: h.opt_bool("expert_weights_norm")?.unwrap_or(true),
            scale: h.opt_f32("expert_weights_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0),
        })
    }
}

impl Network for Qwen {
    fn dims(&self) -> Dims {
        Dims { n_layers: self.layers.len(), d_model: self.attn.d, n_vocab: self.head.n_vocab() }
    }

    fn cache_specs(&self) -> Vec<LayerSpec> {
        let n = self.layers.len();
        (0..n).map(|l| self.attn.cache(None, &self.rope, (l, n))).collect()
    }

    fn limits(&self, tokens: usize, slots: usize) -> Limits {
        let (heads, max_heads_out) = (self.attn.heads, self.attn.heads * self.attn.value);
        let mut l = Limits { tokens, slots, heads, max_heads_out, ..Limits::default() };
        for layer in &self.layers {
            layer.attn.limits(&mut l);
            layer.ffn.limits(&mut l);
        }
        self.head.limits(&mut l);
        l
    }

    fn runner(self: Arc<Self>, dev: &Device, n: usize, x: Extras) -> Result<Box<dyn Runner>, EngineError> {
        Ok(Box::new(QwenRunner {
            x: dev.alloc(n, self.attn.d)?,
            h: dev.alloc(n, self.attn.d)?,
            rope: RopeTable::new(dev, &self.rope, n, x.sinks)?,
            attn: GqaBufs::new(dev, &self.attn, n, x.sinks)?,
            head: self.head.bufs(dev, n)?,
            routes: Routes::default(),
            rows: 0,
            m: self,
        }))
    }
}

struct QwenRunner {
    m: Arc<Qwen>,
    /// `[n, d]`: the residual stream.
    x: Buf,
    /// `[n, d]`: a sub-layer's normed input.
    h: Buf,
    rope: RopeTable,
    attn: GqaBufs,
    head: HeadBufs,
    routes: Routes,
    rows: usize,
}

impl Runner for QwenRunner {
    fn forward(&mut self, tokens: &[u32], cache: &mut Arena) -> Result<(), EngineError> {
        let Self { m, x, h, rope, attn, routes, .. } = self;
        let (dev, n) = (&m.dev.for_rows(cache.prompts()), tokens.len());
        dev.embed(&m.embed, tokens, 1.0, x.view_mut(n))?;
        rope.begin();
        for (i, layer) in m.layers.iter().enumerate() {
            m.pager.layer(i);
            dev.rms_norm(x.view(n), &layer.attn_norm, m.eps, h.view_mut(n))?;
            let (hv, angles, out) = (h.view(n), rope.at(dev, cache, i)?, x.view_mut(n));
            layer.attn.forward(dev, &m.attn, attn, hv, angles, cache, i, out, Write::Add)?;
            dev.rms_norm(x.view(n), &layer.ffn_norm, m.eps, h.view_mut(n))?;
            layer.ffn.forward(dev, h.view(n), routes, x.view_mut(n), Write::Add)?;
        }
        self.rows = n;
        Ok(())
    }

    fn logits(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.m.head.logits(&self.m.dev, self.x.view(self.rows), rows, &mut self.head, out)
    }

    fn states(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.m.head.states(&self.m.dev, self.x.view(self.rows), rows, &mut self.head, out)
    }
}
