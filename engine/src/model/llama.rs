//! Llama 1, 2 and 3.x, and Mistral (arXiv:2302.13971, arXiv:2407.21783): pre-norm, rotary GQA, SwiGLU.

use super::{Dims, Extras, Network, Piece, Runner};
use crate::EngineError;
use crate::config::Hyper;
use crate::kv::{Arena, LayerSpec};
use crate::layers::attention::{Gqa, GqaBufs, Shape};
use crate::layers::ffn::Dense;
use crate::layers::head::{Head, HeadBufs, Output};
use crate::layers::rope::{Rope, RopeTable};
use crate::pager::Pager;
use crate::stages::{Devices, Stage, Stages};
use crate::weights::Loader;
use kernels::{Activation, Device, Limits, RopeStyle, Vector, Weight, Write};
use std::sync::Arc;

struct Layer {
    attn_norm: Vector,
    attn: Gqa,
    ffn_norm: Vector,
    ffn: Dense,
}

/// Weights and configuration.
pub struct Llama {
    pager: Arc<Pager>,
    attn: Shape,
    eps: f32,
    window: Option<usize>,
    rope: Rope,
    embed: Weight,
    layers: Vec<Layer>,
    head: Head,
}

impl Llama {
    /// Reads configuration and weights.
    pub fn load(h: &Hyper<'_>, w: &Loader<'_>) -> Result<Self, EngineError> {
        let d = h.need("embedding_length")?;
        let n_layers = h.need("block_count")?;
        let hidden = h.need_uniform("feed_forward_length")?;
        let eps = h.need_f32("attention.layer_norm_rms_epsilon")?;
        // Files of llama's converter permute Q and K so that rotary pairs are adjacent.
        let attn = Shape::read(h, d, RopeStyle::Adjacent)?;
        let window = h.opt("attention.sliding_window")?.filter(|w| *w > 0);
        if let Some(e) = h.opt("expert_count")?.filter(|e| *e > 0) {
            return Err(h.bad(
                "expert_count",
                &e.to_string(),
                "mixtures of experts are not implemented for llama",
            ));
        }
        h.opt("expert_used_count")?;
        // Llama 3's frequency factors exist only as a tensor.
        let factors = match w.has("rope_freqs.weight") {
            true => Some(w.values("rope_freqs.weight", attn.rope_dims / 2)?),
            false => None,
        };
        let rope = h.rope(attn.rope_dims, factors)?;
        let embed = w.table("token_embd.weight", w.rows("token_embd.weight")?, d)?;
        let mut layers = Vec::new();
        for i in 0..n_layers {
            let p = format!("blk.{i}.");
            layers.push(Layer {
                attn_norm: w.vector(&format!("{p}attn_norm.weight"), d)?,
                attn: Gqa::load(w, &p, &attn, None)?,
                ffn_norm: w.vector(&format!("{p}ffn_norm.weight"), d)?,
                ffn: Dense::load(w, &p, "", d, hidden, Activation::Silu)?,
            });
        }
        let head = Head::load(w, &embed, eps)?;
        Ok(Self { pager: w.pager(), attn, eps, window, rope, embed, layers, head })
    }
}

impl Network for Llama {
    fn dims(&self) -> Dims {
        Dims { n_layers: self.layers.len(), d_model: self.attn.d, n_vocab: self.head.n_vocab() }
    }

    fn cache_specs(&self) -> Vec<LayerSpec> {
        let n = self.layers.len();
        (0..n).map(|l| self.attn.cache(self.window, &self.rope, (l, n))).collect()
    }

    fn limits(&self, piece: Piece, l: &mut Limits) {
        match piece {
            Piece::Layer(i) => {
                self.layers[i].attn.limits(&self.attn, l);
                l.ffn(self.layers[i].ffn.op());
            }
            Piece::Experts(_) => {}
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
        Ok(Box::new(LlamaRunner { stages, head: self.head.bufs(on.head(), n)?, m: self }))
    }
}

struct Bufs {
    rope: RopeTable,
    attn: GqaBufs,
}

struct LlamaRunner {
    m: Arc<Llama>,
    stages: Stages<Bufs>,
    head: HeadBufs,
}

impl Runner for LlamaRunner {
    fn forward(&mut self, tokens: &[u32], cache: &mut Arena) -> Result<(), EngineError> {
        let Self { m, stages, .. } = self;
        let n = tokens.len();
        stages.embed(&m.embed, tokens, 1.0, cache.prompts())?;
        for (i, layer) in m.layers.iter().enumerate() {
            m.pager.layer(i);
            let Stage { dev, x, h, bufs: Bufs { rope, attn }, .. } = stages.layer(i)?;
            dev.rms_norm(x.view(n), &layer.attn_norm, m.eps, h.view_mut(n))?;
            let (hv, angles, out) = (h.view(n), rope.at(dev, cache, i)?, x.view_mut(n));
            layer.attn.forward(dev, &m.attn, attn, hv, angles, cache, i, out, Write::Add)?;
            dev.rms_norm(x.view(n), &layer.ffn_norm, m.eps, h.view_mut(n))?;
            dev.ffn(layer.ffn.op(), h.view(n), x.view_mut(n), Write::Add)?;
        }
        Ok(())
    }

    fn output(&mut self) -> Output<'_> {
        Output { head: &self.m.head, x: self.stages.last(), bufs: &mut self.head }
    }
}
