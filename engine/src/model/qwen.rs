//! Qwen2 (arXiv:2407.10671: biases on Q, K, V), Qwen3 (arXiv:2505.09388: per-head norms instead) and Qwen3-MoE.

use super::{Dims, Extras, Network, Piece, Runner};
use crate::EngineError;
use crate::config::Hyper;
use crate::kv::{Arena, LayerSpec};
use crate::layers::attention::{Gqa, GqaBufs, Shape};
use crate::layers::ffn::Dense;
use crate::layers::head::{Head, HeadBufs, Output};
use crate::layers::moe::{FeedForward, Moe, Routing};
use crate::layers::rope::{Rope, RopeTable};
use crate::pager::Pager;
use crate::stages::{Devices, Stage, Stages};
use crate::weights::Loader;
use kernels::{Activation, Device, Gating, Limits, RopeStyle, Routes, Vector, Weight, Write};
use std::sync::Arc;

struct Layer {
    attn_norm: Vector,
    attn: Gqa,
    ffn_norm: Vector,
    ffn: FeedForward,
}

/// Weights and configuration.
pub struct Qwen {
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
    pub fn load(h: &Hyper<'_>, w: &Loader<'_>) -> Result<Self, EngineError> {
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
        Ok(Self { pager: w.pager(), attn, eps, rope, embed, layers, head })
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

    fn limits(&self, piece: Piece, l: &mut Limits) {
        match piece {
            Piece::Layer(i) => {
                self.layers[i].attn.limits(&self.attn, l);
                self.layers[i].ffn.limits(l);
            }
            Piece::Experts(i) => self.layers[i].ffn.expert_limits(l),
            Piece::Head => self.head.limits(l),
        }
    }

    fn runner(self: Arc<Self>, on: &Devices, n: usize, x: Extras) -> Result<Box<dyn Runner>, EngineError> {
        let bufs = |dev: &Device| {
            Ok(Bufs {
                rope: RopeTable::new(dev, &self.rope, n, x.sinks)?,
                attn: GqaBufs::new(dev, &self.attn, n, x.sinks)?,
            })
        };
        let stages = Stages::new(on, self.layers.len(), (n, self.attn.d), bufs)?;
        let head = self.head.bufs(on.head(), n)?;
        Ok(Box::new(QwenRunner { stages, head, routes: Routes::default(), m: self }))
    }
}

struct Bufs {
    rope: RopeTable,
    attn: GqaBufs,
}

struct QwenRunner {
    m: Arc<Qwen>,
    stages: Stages<Bufs>,
    head: HeadBufs,
    routes: Routes,
}

impl Runner for QwenRunner {
    fn forward(&mut self, tokens: &[u32], cache: &mut Arena) -> Result<(), EngineError> {
        let Self { m, stages, routes, .. } = self;
        let n = tokens.len();
        stages.embed(&m.embed, tokens, 1.0, cache.prompts())?;
        for (i, layer) in m.layers.iter().enumerate() {
            m.pager.layer(i);
            let Stage { dev, x, h, bufs: Bufs { rope, attn }, experts } = stages.layer(i)?;
            dev.rms_norm(x.view(n), &layer.attn_norm, m.eps, h.view_mut(n))?;
            let (hv, angles, out) = (h.view(n), rope.at(dev, cache, i)?, x.view_mut(n));
            layer.attn.forward(dev, &m.attn, attn, hv, angles, cache, i, out, Write::Add)?;
            dev.rms_norm(x.view(n), &layer.ffn_norm, m.eps, h.view_mut(n))?;
            layer.ffn.forward(dev, n, h, x, experts, routes)?;
        }
        Ok(())
    }

    fn output(&mut self) -> Output<'_> {
        Output { head: &self.m.head, x: self.stages.last(), bufs: &mut self.head }
    }
}
