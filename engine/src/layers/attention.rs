//! Grouped-query attention (arXiv:2305.13245) with rotary embedding and a KV cache; optional biases (Qwen2) and
//! per-head norms of queries and keys (Qwen3, Gemma 3).

use crate::EngineError;
use crate::config::Hyper;
use crate::kv::policy::{AttentionKind, LayerGeometry, Rotary};
use crate::kv::{Arena, LayerSpec, SecondKind};
use crate::layers::rope::{Angles, Rope};
use crate::weights::Loader;
use kernels::{Attention, Buf, Device, Limits, Product, RopeHeads, RopeStyle, Vector, View, Weight, Write};

/// The attention geometry of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Model width.
    pub d: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Key (and query) dimensions of a head.
    pub key: usize,
    /// Value dimensions of a head.
    pub value: usize,
    /// Rotary dimensions of a head.
    pub rope_dims: usize,
    /// Which dimensions are paired.
    pub style: RopeStyle,
    /// Factor on the scores.
    pub scale: f32,
}

impl Shape {
    /// Reads head counts and lengths; absent lengths are `d / heads`, as the GGUF document says.
    pub fn read(h: &Hyper<'_>, d: usize, style: RopeStyle) -> Result<Self, EngineError> {
        let heads = h.need_uniform("attention.head_count")?;
        let kv_heads = match h.opt("attention.head_count_kv") {
            Ok(None) => heads,
            _ => h.need_uniform("attention.head_count_kv")?,
        };
        if heads % kv_heads != 0 {
            return Err(h.bad(
                "attention.head_count_kv",
                &kv_heads.to_string(),
                "it must divide the head count",
            ));
        }
        let key = h.opt("attention.key_length")?.unwrap_or(d / heads);
        let value = h.opt("attention.value_length")?.unwrap_or(d / heads);
        let rope_dims = h.opt("rope.dimension_count")?.unwrap_or(key);
        if key == 0 || value == 0 || rope_dims > key || rope_dims % 2 != 0 {
            let value = format!("key {key}, value {value}, rotary {rope_dims}");
            return Err(h.bad("attention.key_length", &value, "impossible head dimensions"));
        }
        let scale = h.opt_f32("attention.scale")?.unwrap_or(1.0 / (key as f32).sqrt());
        Ok(Self { d, heads, kv_heads, key, value, rope_dims, style, scale })
    }

    /// The cache that layer `layer` of `n_layers` needs.
    pub fn cache(&self, window: Option<usize>, rope: &Rope, (layer, n_layers): (usize, usize)) -> LayerSpec {
        LayerSpec {
            geometry: LayerGeometry {
                layer,
                n_layers,
                kind: AttentionKind::Gqa,
                heads: self.heads,
                kv_heads: self.kv_heads,
                key: self.key,
                k_pe: 0,
                value: self.value,
                scale: self.scale,
                rotary: Rotary {
                    start: 0,
                    freqs: rope.freqs().into(),
                    adjacent: self.style == RopeStyle::Adjacent,
                },
                records_queries: true,
            },
            first: self.kv_heads * self.key,
            second: self.kv_heads * self.value,
            second_kind: SecondKind::Values,
            window,
        }
    }
}

/// Weights of one attention layer.
pub struct Gqa {
    q: (Weight, Option<Vector>),
    k: (Weight, Option<Vector>),
    v: (Weight, Option<Vector>),
    o: (Weight, Option<Vector>),
    /// Per-head norms of queries and keys, with their epsilon.
    norms: Option<(Vector, Vector, f32)>,
}

/// Buffers of an attention layer, reused by all layers.
pub struct GqaBufs {
    /// `[n, heads * key]`.
    q: Buf,
    /// The same, rotated to look at sinks.
    q_sink: Option<Buf>,
    /// `[n, kv_heads * key]`.
    k: Buf,
    /// `[n, kv_heads * value]`.
    v: Buf,
    /// `[n, heads * value]`.
    o: Buf,
}

impl GqaBufs {
    /// Buffers for `n` rows; `sinks`: the cache may have some.
    pub fn new(dev: &Device, s: &Shape, n: usize, sinks: bool) -> Result<Self, EngineError> {
        Ok(Self {
            q: dev.alloc(n, s.heads * s.key)?,
            q_sink: if sinks { Some(dev.alloc(n, s.heads * s.key)?) } else { None },
            k: dev.alloc(n, s.kv_heads * s.key)?,
            v: dev.alloc(n, s.kv_heads * s.value)?,
            o: dev.alloc(n, s.heads * s.value)?,
        })
    }
}

impl Gqa {
    /// Takes the tensors of layer `prefix`; biases where the file has them. `qk_norm` is the norms' epsilon.
    pub fn load(w: &Loader<'_>, prefix: &str, s: &Shape, qk_norm: Option<f32>) -> Result<Self, EngineError> {
        let linear = |name: &str, rows: usize, cols: usize| -> Result<_, EngineError> {
            let weight = w.matrix(&format!("{prefix}{name}.weight"), rows, cols)?;
            Ok((weight, w.opt_vector(&format!("{prefix}{name}.bias"), rows)?))
        };
        let norms = match qk_norm {
            None => None,
            Some(eps) => Some((
                w.vector(&format!("{prefix}attn_q_norm.weight"), s.key)?,
                w.vector(&format!("{prefix}attn_k_norm.weight"), s.key)?,
                eps,
            )),
        };
        Ok(Self {
            q: linear("attn_q", s.heads * s.key, s.d)?,
            k: linear("attn_k", s.kv_heads * s.key, s.d)?,
            v: linear("attn_v", s.kv_heads * s.value, s.d)?,
            o: linear("attn_output", s.d, s.heads * s.value)?,
            norms,
        })
    }

    /// Adds what it will ask of a device.
    pub fn limits(&self, s: &Shape, l: &mut Limits) {
        l.heads = l.heads.max(s.heads);
        l.max_heads_out = l.max_heads_out.max(s.heads * s.value);
        [&self.q, &self.k, &self.v, &self.o].into_iter().for_each(|w| l.product(&w.0));
    }

    /// `out (=|+=) W_o attention(h)`; h `[n, d]` is normed.
    pub fn forward(
        &self,
        dev: &Device,
        s: &Shape,
        b: &mut GqaBufs,
        h: View<'_>,
        angles: Angles<'_>,
        cache: &mut Arena,
        layer: usize,
        out: kernels::ViewMut<'_>,
        write: Write,
    ) -> Result<(), EngineError> {
        let n = h.rows();
        dev.matmul(
            h,
            &mut [
                product(&self.q, b.q.view_mut(n), Write::Set),
                product(&self.k, b.k.view_mut(n), Write::Set),
                product(&self.v, b.v.view_mut(n), Write::Set),
            ],
        )?;
        if let Some((q_norm, k_norm, eps)) = &self.norms {
            dev.rms_norm_heads(b.q.view_mut(n), q_norm, *eps)?;
            dev.rms_norm_heads(b.k.view_mut(n), k_norm, *eps)?;
        }
        let heads = RopeHeads { head_dim: s.key, offset: 0, dims: s.rope_dims, style: s.style };
        let mut q_sink = None;
        if let (Some(at), Some(q)) = (angles.sink, &mut b.q_sink) {
            dev.copy(b.q.view(n), q.view_mut(n))?;
            dev.rope(q.view_mut(n), heads, at)?;
            q_sink = Some(q.view(n));
        }
        dev.rope_both((b.q.view_mut(n), heads), (b.k.view_mut(n), heads), angles.own)?;
        if cache.wants_queries(layer) {
            cache.record_queries(layer, b.q.view(n))?;
        }
        let stored = cache.append(dev, layer, b.k.view(n), b.v.view(n))?;
        let attention = Attention {
            heads: s.heads,
            kv_heads: s.kv_heads,
            scale: s.scale,
            q: b.q.view(n),
            q_sink,
            k: stored.first,
            v: stored.second,
            visible: stored.visible,
        };
        stored.attend(|mass| dev.attention_mass(attention, b.o.view_mut(n), mass))?;
        dev.matmul(b.o.view(n), &mut [product(&self.o, out, write)])?;
        Ok(())
    }
}

fn product<'a>(w: &'a (Weight, Option<Vector>), out: kernels::ViewMut<'a>, write: Write) -> Product<'a> {
    Product { weight: &w.0, bias: w.1.as_ref(), out, write }
}
