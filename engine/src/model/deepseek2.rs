//! DeepSeek-V2, V2-Lite, V3, R1, V3.1 and models of their shape (Kimi-K2): multi-head latent attention and a mixture of
//! experts after some dense layers (arXiv:2405.04434, arXiv:2412.19437).

use super::{Dims, Extras, Network, Piece, Runner};
use crate::EngineError;
use crate::config::Hyper;
use crate::kv::{Arena, LayerSpec};
use crate::layers::ffn::Dense;
use crate::layers::head::{Head, HeadBufs, Output};
use crate::layers::mla::{Mla, MlaBufs, Shape};
use crate::layers::moe::{FeedForward, Moe, Routing};
use crate::layers::rope::{Rope, RopeTable, Scaling, yarn_mscale};
use crate::pager::Pager;
use crate::stages::{Devices, Stage, Stages};
use crate::weights::Loader;
use kernels::{Activation, Device, Gating, GroupScore, Groups, Limits, Routes, Vector, Weight};
use std::sync::Arc;

struct Layer {
    attn_norm: Vector,
    attn: Mla,
    ffn_norm: Vector,
    ffn: FeedForward,
}

/// Weights and configuration.
pub struct DeepSeek2 {
    pager: Arc<Pager>,
    attn: Shape,
    rope: Rope,
    embed: Weight,
    layers: Vec<Layer>,
    head: Head,
}

impl DeepSeek2 {
    /// Reads configuration and weights.
    pub fn load(h: &Hyper<'_>, w: &Loader<'_>) -> Result<Self, EngineError> {
        let d = h.need("embedding_length")?;
        let n_layers = h.need("block_count")?;
        let dense_layers = h.opt("leading_dense_block_count")?.unwrap_or(0);
        let dense_hidden = h.need_uniform("feed_forward_length")?;
        let (attn, rope) = Self::attention(h, d)?;
        let routing = if dense_layers < n_layers { Some(Self::routing(h)?) } else { None };
        let embed = w.table("token_embd.weight", w.rows("token_embd.weight")?, d)?;
        let mut layers = Vec::new();
        for i in 0..n_layers {
            let p = format!("blk.{i}.");
            layers.push(Layer {
                attn_norm: w.vector(&format!("{p}attn_norm.weight"), d)?,
                attn: Mla::load(w, &p, &attn)?,
                ffn_norm: w.vector(&format!("{p}ffn_norm.weight"), d)?,
                ffn: match &routing {
                    Some(r) if i >= dense_layers => FeedForward::Moe(Box::new(Moe::load(w, i, d, *r)?)),
                    _ => FeedForward::Dense(Box::new(Dense::load(
                        w,
                        &p,
                        "",
                        d,
                        dense_hidden,
                        Activation::Silu,
                    )?)),
                },
            });
        }
        let head = Head::load(w, &embed, attn.eps)?;
        Ok(Self { pager: w.pager(), attn, rope, embed, layers, head })
    }

    /// Head dimensions and the rotary embedding with YaRN's two conventions.
    fn attention(h: &Hyper<'_>, d: usize) -> Result<(Shape, Rope), EngineError> {
        let heads = h.need_uniform("attention.head_count")?;
        let latent = h.need("attention.kv_lora_rank")?;
        let rope_dims = h.need("rope.dimension_count")?;
        // Older files give the heads' own lengths; newer ones those of the absorbed form, and the heads' under *_mla.
        let (key, value) = (h.need("attention.key_length")?, h.need("attention.value_length")?);
        let key = h.opt("attention.key_length_mla")?.unwrap_or(key);
        let value = h.opt("attention.value_length_mla")?.unwrap_or(value);
        h.opt("attention.head_count_kv")?;
        if key <= rope_dims {
            return Err(h.bad(
                "attention.key_length",
                &key.to_string(),
                "it must exceed the rotary dimensions",
            ));
        }
        let mut scale = 1.0 / (key as f64).sqrt();
        let mut rope = h.rope(rope_dims, None)?;
        let log_multiplier = h.opt_f32("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        if let Scaling::Yarn { factor, .. } = h.rope_scaling()?
            && log_multiplier != 0.0
        {
            // The multiplier is 0.1 mscale_all_dim. With it, the whole correction sits in the softmax scale, squared
            // (queries and keys), and cos and sin carry none. Without it, cos and sin carry 1 + 0.1 ln factor.
            scale *= yarn_mscale(factor, f64::from(log_multiplier) / 0.1).powi(2);
            rope = rope.with_magnitude(1.0);
        }
        let shape = Shape {
            d,
            heads,
            // Decided by the key: some readers guess it from the number of layers.
            q_lora: h.opt("attention.q_lora_rank")?.filter(|r| *r > 0),
            latent,
            nope: key - rope_dims,
            rope: rope_dims,
            value,
            scale: scale as f32,
            eps: h.need_f32("attention.layer_norm_rms_epsilon")?,
        };
        Ok((shape, rope))
    }

    fn routing(h: &Hyper<'_>) -> Result<Routing, EngineError> {
        // Files of V2's time have no gating key.
        let gating = match h.opt("expert_gating_func")? {
            None | Some(0 | 1) => Gating::Softmax,
            Some(2) => Gating::Sigmoid,
            Some(f) => {
                return Err(h.bad(
                    "expert_gating_func",
                    &f.to_string(),
                    "softmax (1) and sigmoid (2) are implemented",
                ));
            }
        };
        let experts = h.need("expert_count")?;
        let used = h.need("expert_used_count")?;
        let count = h.opt("expert_group_count")?.unwrap_or(1).max(1);
        let groups_used = h.opt("expert_group_used_count")?.unwrap_or(count).max(1);
        if experts % count != 0 || groups_used > count || used > groups_used * (experts / count) {
            let value = format!("{count} groups, {groups_used} used, {experts} experts, {used} used");
            return Err(h.bad("expert_group_count", &value, "these do not fit each other"));
        }
        let score = if gating == Gating::Sigmoid { GroupScore::Top2Sum } else { GroupScore::Max };
        Ok(Routing {
            experts,
            used,
            hidden: h.need_uniform("expert_feed_forward_length")?,
            shared: h.opt("expert_shared_count")?.unwrap_or(0),
            gating,
            groups: (groups_used < count).then_some(Groups { count, used: groups_used, score }),
            normalize: h.opt_bool("expert_weights_norm")?.unwrap_or(false),
            scale: h.opt_f32("expert_weights_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0),
        })
    }
}

impl Network for DeepSeek2 {
    fn dims(&self) -> Dims {
        Dims { n_layers: self.layers.len(), d_model: self.attn.d, n_vocab: self.head.n_vocab() }
    }

    fn cache_specs(&self) -> Vec<LayerSpec> {
        let n = self.layers.len();
        (0..n).map(|l| self.attn.cache(&self.rope, (l, n))).collect()
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
                attn: MlaBufs::new(dev, &self.attn, n, x)?,
            })
        };
        let stages = Stages::new(on, self.layers.len(), (n, self.attn.d), bufs)?;
        let head = self.head.bufs(on.head(), n)?;
        Ok(Box::new(DeepSeek2Runner { stages, head, routes: Routes::default(), m: self }))
    }
}

struct Bufs {
    rope: RopeTable,
    attn: MlaBufs,
}

struct DeepSeek2Runner {
    m: Arc<DeepSeek2>,
    stages: Stages<Bufs>,
    head: HeadBufs,
    routes: Routes,
}

impl Runner for DeepSeek2Runner {
    fn forward(&mut self, tokens: &[u32], cache: &mut Arena) -> Result<(), EngineError> {
        let Self { m, stages, routes, .. } = self;
        let n = tokens.len();
        stages.embed(&m.embed, tokens, 1.0, cache.prompts())?;
        for (i, layer) in m.layers.iter().enumerate() {
            m.pager.layer(i);
            let Stage { dev, x, h, bufs: Bufs { rope, attn }, experts } = stages.layer(i)?;
            dev.rms_norm(x.view(n), &layer.attn_norm, m.attn.eps, h.view_mut(n))?;
            let angles = rope.at(dev, cache, i)?;
            layer.attn.forward(dev, &m.attn, attn, h.view(n), angles, cache, i, x.view_mut(n))?;
            dev.rms_norm(x.view(n), &layer.ffn_norm, m.attn.eps, h.view_mut(n))?;
            layer.ffn.forward(dev, n, h, x, experts, routes)?;
        }
        Ok(())
    }

    fn output(&mut self) -> Output<'_> {
        Output { head: &self.m.head, x: self.stages.last(), bufs: &mut self.head }
    }
}
