//! Gemma 3, text (arXiv:2503.19786): five local layers to one global, two rotary bases, norms before and after each
//! sub-layer, QK norm, GeGLU, scaled embedding. The norms in the file already contain their +1.

use super::{Dims, Extras, Network, Piece, Runner};
use crate::EngineError;
use crate::config::Hyper;
use crate::kv::{Arena, LayerSpec};
use crate::layers::attention::{Gqa, GqaBufs, Shape};
use crate::layers::ffn::Dense;
use crate::layers::head::{Head, HeadBufs, Output};
use crate::layers::rope::{Rope, RopeTable, Scaling};
use crate::pager::Pager;
use crate::stages::{Devices, Stage, Stages};
use crate::weights::Loader;
use kernels::{Activation, Buf, Device, Limits, RopeStyle, Vector, Weight, Write};
use std::sync::Arc;

/// Of each run of six layers the last is global; the file does not say so.
const PATTERN: usize = 6;

struct Layer {
    /// Whether it attends to everything, not just to the window.
    global: bool,
    attn_norm: Vector,
    attn: Gqa,
    post_attn_norm: Vector,
    ffn_norm: Vector,
    ffn: Dense,
    post_ffn_norm: Vector,
}

/// Weights and configuration.
pub struct Gemma3 {
    pager: Arc<Pager>,
    attn: Shape,
    eps: f32,
    window: Option<usize>,
    local_rope: Rope,
    global_rope: Rope,
    embed: Weight,
    layers: Vec<Layer>,
    head: Head,
}

impl Gemma3 {
    /// Reads configuration and weights.
    pub fn load(h: &Hyper<'_>, w: &Loader<'_>) -> Result<Self, EngineError> {
        let d = h.need("embedding_length")?;
        let n_layers = h.need("block_count")?;
        let hidden = h.need_uniform("feed_forward_length")?;
        let eps = h.need_f32("attention.layer_norm_rms_epsilon")?;
        let explicit_scale = h.opt_f32("attention.scale")?.is_some();
        let mut attn = Shape::read(h, d, RopeStyle::Halves)?;
        if n_layers == 62 && !explicit_scale {
            // The 27B model scales by d / heads instead of the head's length (query_pre_attn_scalar 168); its file
            // does not say so, and llama.cpp too tells it by its layer count.
            attn.scale = 1.0 / ((d / attn.heads) as f32).sqrt();
        }
        let window = h.opt("attention.sliding_window")?.filter(|w| *w > 0);
        if let Some(p) = h.opt("attention.sliding_window_pattern")?
            && p != PATTERN
        {
            return Err(h.bad("attention.sliding_window_pattern", &p.to_string(), "only 6 is implemented"));
        }
        if let Some(c) = h.opt_f32("final_logit_softcapping")?.filter(|c| *c != 0.0) {
            return Err(h.bad("final_logit_softcapping", &c.to_string(), "not implemented for gemma3"));
        }
        if h.opt_f32("rope.freq_base")?.is_none() {
            return Err(h.bad("rope.freq_base", "absent", "the base of the global layers is needed"));
        }
        let global_rope = h.rope(attn.rope_dims, None)?;
        // Scaling belongs to the global layers only.
        let local_base = f64::from(h.opt_f32("rope.freq_base_swa")?.unwrap_or(10_000.0));
        let local_rope = Rope::new(attn.rope_dims, local_base, Scaling::None, None)
            .map_err(|e| h.bad("rope.freq_base_swa", &local_base.to_string(), &e))?;
        let embed = w.table("token_embd.weight", w.rows("token_embd.weight")?, d)?;
        let mut layers = Vec::new();
        for i in 0..n_layers {
            let p = format!("blk.{i}.");
            layers.push(Layer {
                global: (i + 1) % PATTERN == 0,
                attn_norm: w.vector(&format!("{p}attn_norm.weight"), d)?,
                attn: Gqa::load(w, &p, &attn, Some(eps))?,
                post_attn_norm: w.vector(&format!("{p}post_attention_norm.weight"), d)?,
                ffn_norm: w.vector(&format!("{p}ffn_norm.weight"), d)?,
                ffn: Dense::load(w, &p, "", d, hidden, Activation::GeluTanh)?,
                post_ffn_norm: w.vector(&format!("{p}post_ffw_norm.weight"), d)?,
            });
        }
        let head = Head::load(w, &embed, eps)?;
        Ok(Self { pager: w.pager(), attn, eps, window, local_rope, global_rope, embed, layers, head })
    }
}

impl Network for Gemma3 {
    fn dims(&self) -> Dims {
        Dims { n_layers: self.layers.len(), d_model: self.attn.d, n_vocab: self.head.n_vocab() }
    }

    fn cache_specs(&self) -> Vec<LayerSpec> {
        let n = self.layers.len();
        let spec = |(i, l): (usize, &Layer)| match l.global {
            true => self.attn.cache(None, &self.global_rope, (i, n)),
            false => self.attn.cache(self.window, &self.local_rope, (i, n)),
        };
        self.layers.iter().enumerate().map(spec).collect()
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
        let d = self.attn.d;
        let bufs = |dev: &Device| {
            Ok(Bufs {
                y: dev.alloc(n, d)?,
                local: RopeTable::new(dev, &self.local_rope, n, x.sinks)?,
                global: RopeTable::new(dev, &self.global_rope, n, x.sinks)?,
                attn: GqaBufs::new(dev, &self.attn, n, x.sinks)?,
            })
        };
        let stages = Stages::new(on, self.layers.len(), (n, d), bufs)?;
        Ok(Box::new(Gemma3Runner { stages, head: self.head.bufs(on.head(), n)?, m: self }))
    }
}

struct Bufs {
    /// `[n, d]`: a sub-layer's output.
    y: Buf,
    /// Cosines and sines of the local layers.
    local: RopeTable,
    /// And of the global ones.
    global: RopeTable,
    attn: GqaBufs,
}

struct Gemma3Runner {
    m: Arc<Gemma3>,
    stages: Stages<Bufs>,
    head: HeadBufs,
}

impl Runner for Gemma3Runner {
    fn forward(&mut self, tokens: &[u32], cache: &mut Arena) -> Result<(), EngineError> {
        let Self { m, stages, .. } = self;
        let n = tokens.len();
        stages.embed(&m.embed, tokens, (m.attn.d as f32).sqrt(), cache.prompts())?;
        for (i, layer) in m.layers.iter().enumerate() {
            m.pager.layer(i);
            // In h there is a sub-layer's normed input, then its normed output.
            let Stage { dev, x, h, bufs: Bufs { y, local, global, attn }, .. } = stages.layer(i)?;
            dev.rms_norm(x.view(n), &layer.attn_norm, m.eps, h.view_mut(n))?;
            let angles = if layer.global { global } else { local }.at(dev, cache, i)?;
            layer.attn.forward(dev, &m.attn, attn, h.view(n), angles, cache, i, y.view_mut(n), Write::Set)?;
            dev.rms_norm(y.view(n), &layer.post_attn_norm, m.eps, h.view_mut(n))?;
            dev.add(h.view(n), x.view_mut(n))?;

            dev.rms_norm(x.view(n), &layer.ffn_norm, m.eps, h.view_mut(n))?;
            dev.ffn(layer.ffn.op(), h.view(n), y.view_mut(n), Write::Set)?;
            dev.rms_norm(y.view(n), &layer.post_ffn_norm, m.eps, h.view_mut(n))?;
            dev.add(h.view(n), x.view_mut(n))?;
        }
        Ok(())
    }

    fn output(&mut self) -> Output<'_> {
        Output { head: &self.m.head, x: self.stages.last(), bufs: &mut self.head }
    }
}
