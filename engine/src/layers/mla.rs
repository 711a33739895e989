//! Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): the cache holds, per token, the normalised
//! latent and one rotated key shared by all heads; keys and values of heads are never stored.

use crate::EngineError;
use crate::kv::policy::{AttentionKind, LayerGeometry, Rotary};
use crate::kv::{Arena, LayerSpec, SecondKind, zeros};
use crate::layers::rope::{Angles, Rope};
use crate::model::Extras;
use crate::weights::Loader;
use kernels::{
    Buf, Device, Limits, Mla as MlaOp, MlaUp, RopeHeads, RopeStyle, Vector, View, ViewMut, Weight, Write,
};

/// The attention geometry of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Model width.
    pub d: usize,
    /// Query heads.
    pub heads: usize,
    /// Width of the compressed query; `None`: queries straight from the hidden state (V2-Lite).
    pub q_lora: Option<usize>,
    /// Width of the latent (kv_lora_rank).
    pub latent: usize,
    /// Key dimensions of a head without rotation.
    pub nope: usize,
    /// Rotary dimensions.
    pub rope: usize,
    /// Value dimensions of a head.
    pub value: usize,
    /// Factor on the scores, YaRN's included.
    pub scale: f32,
    /// Epsilon of the norms.
    pub eps: f32,
}

impl Shape {
    /// The cache that layer `layer` of `n_layers` needs.
    pub fn cache(&self, rope: &Rope, (layer, n_layers): (usize, usize)) -> LayerSpec {
        LayerSpec {
            geometry: LayerGeometry {
                layer,
                n_layers,
                kind: AttentionKind::Mla,
                heads: self.heads,
                kv_heads: 1,
                key: self.latent,
                k_pe: self.rope,
                value: 0,
                scale: self.scale,
                rotary: Rotary { start: self.latent, freqs: rope.freqs().into(), adjacent: true },
                records_queries: true,
            },
            first: self.latent,
            second: self.rope,
            second_kind: SecondKind::SharedRotaryKey,
            window: None,
        }
    }
}

enum Query {
    Direct(Weight),
    Compressed { a: Weight, norm: Vector, b: Weight },
}

enum Up {
    /// The heads' `[latent, nope]` of `k_b` once more, one by one.
    Split {
        k_b: Weight,
        v_b: Weight,
        k_heads: Vec<Weight>,
    },
    Joint {
        kv_b: Weight,
    },
}

/// Weights of one layer.
pub struct Mla {
    q: Query,
    kv_a: Weight,
    kv_norm: Vector,
    up: Up,
    o: Weight,
}

/// Buffers, reused by all layers.
pub struct MlaBufs {
    /// `[n, q_lora]`, before and after its norm.
    qa: Option<(Buf, Buf)>,
    /// `[n, heads * (nope + rope)]`.
    q: Buf,
    /// The same, rotated to look at sinks.
    q_sink: Option<Buf>,
    /// `[n, heads * (latent + rope)]`, queries in the coordinates of what is cached, and `[nope, latent]`, a head's weights:
    /// only for policies that ask for queries.
    absorbed: Option<(Buf, Buf)>,
    /// `[n, latent + rope]`: the latent and the shared key as projected.
    kv: Buf,
    /// `[n, latent]`: the latent, normalised.
    c: Buf,
    /// `[n, heads * value]`.
    o: Buf,
}

impl MlaBufs {
    /// Buffers for `n` rows.
    pub fn new(dev: &Device, s: &Shape, n: usize, x: Extras) -> Result<Self, EngineError> {
        let heads = s.heads * (s.nope + s.rope);
        let qa = match s.q_lora {
            Some(r) => Some((dev.alloc(n, r)?, dev.alloc(n, r)?)),
            None => None,
        };
        Ok(Self {
            qa,
            q: dev.alloc(n, heads)?,
            q_sink: if x.sinks { Some(dev.alloc(n, heads)?) } else { None },
            absorbed: match x.queries {
                true => Some((dev.alloc(n, s.heads * (s.latent + s.rope))?, dev.alloc(s.nope, s.latent)?)),
                false => None,
            },
            kv: dev.alloc(n, s.latent + s.rope)?,
            c: dev.alloc(n, s.latent)?,
            o: dev.alloc(n, s.heads * s.value)?,
        })
    }
}

impl Mla {
    /// Takes the tensors of layer `prefix`: `attn_k_b` and `attn_v_b`, or the older files' `attn_kv_b`.
    pub fn load(w: &Loader<'_>, prefix: &str, s: &Shape) -> Result<Self, EngineError> {
        let name = |n: &str| format!("{prefix}{n}.weight");
        let head = s.nope + s.rope;
        let q = match s.q_lora {
            None => Query::Direct(w.matrix(&name("attn_q"), s.heads * head, s.d)?),
            Some(r) => Query::Compressed {
                a: w.matrix(&name("attn_q_a"), r, s.d)?,
                norm: w.vector(&name("attn_q_a_norm"), r)?,
                b: w.matrix(&name("attn_q_b"), s.heads * head, r)?,
            },
        };
        let up = if w.has(&name("attn_k_b")) {
            // Some files carry both forms; the split one needs no transposed product.
            w.ignore(&name("attn_kv_b"));
            let k_b = w.stack(&name("attn_k_b"), s.heads, s.latent, s.nope)?;
            let all = k_b.flat();
            Up::Split {
                k_heads: (0..s.heads).map(|h| all.slice_rows(h * s.latent..(h + 1) * s.latent)).collect(),
                k_b,
                v_b: w.stack(&name("attn_v_b"), s.heads, s.value, s.latent)?,
            }
        } else {
            Up::Joint { kv_b: w.matrix(&name("attn_kv_b"), s.heads * (s.nope + s.value), s.latent)? }
        };
        Ok(Self {
            q,
            kv_a: w.matrix(&name("attn_kv_a_mqa"), s.latent + s.rope, s.d)?,
            kv_norm: w.vector(&name("attn_kv_a_norm"), s.latent)?,
            up,
            o: w.matrix(&name("attn_output"), s.d, s.heads * s.value)?,
        })
    }

    /// Adds what it will ask of a device.
    pub fn limits(&self, s: &Shape, l: &mut Limits) {
        l.heads = l.heads.max(s.heads);
        l.max_heads_out = l.max_heads_out.max(s.heads * s.latent.max(s.value));
        l.latent = l.latent.max(s.latent);
        match &self.q {
            Query::Direct(w) => l.product(w),
            Query::Compressed { a, b, .. } => [a, b].into_iter().for_each(|w| l.product(w)),
        }
        match &self.up {
            Up::Split { k_b, v_b, .. } => [k_b, v_b].into_iter().for_each(|w| l.product(w)),
            Up::Joint { kv_b } => l.product(kv_b),
        }
        [&self.kv_a, &self.o].into_iter().for_each(|w| l.product(w));
    }

    /// Queries as keys are cached: per head `[W_k^b q_nope | q_pe]`, q rotated; into the first of `to`.
    fn absorb(
        &self,
        dev: &Device,
        s: &Shape,
        q: &Buf,
        (out, weights): &mut (Buf, Buf),
        n: usize,
    ) -> Result<(), EngineError> {
        for h in 0..s.heads {
            let (from, to) = (h * (s.nope + s.rope), h * (s.latent + s.rope));
            let (nope, pe) = (from..from + s.nope, from + s.nope..from + s.nope + s.rope);
            let latent = to..to + s.latent;
            match &self.up {
                Up::Split { k_heads, .. } => {
                    dev.linear(&k_heads[h], q.part(n, nope), out.part_mut(n, latent), Write::Set)?;
                }
                Up::Joint { kv_b } => {
                    // Stored the other way round: the sum over its rows, on the host, in f64.
                    let first = h * (s.nope + s.value);
                    let ids: Vec<u32> = (first as u32..(first + s.nope) as u32).collect();
                    dev.embed(kv_b, &ids, 1.0, weights.view_mut(s.nope))?;
                    let (mut w, mut rows) = (zeros(s.nope * s.latent)?, zeros(n * s.nope)?);
                    dev.read(weights.view(s.nope), &mut w)?;
                    dev.read(q.part(n, nope), &mut rows)?;
                    let mut c = zeros(n * s.latent)?;
                    for (q, c) in rows.chunks_exact(s.nope).zip(c.chunks_exact_mut(s.latent)) {
                        let mut sum = vec![0.0f64; s.latent];
                        for (q, w) in q.iter().zip(w.chunks_exact(s.latent)) {
                            sum.iter_mut().zip(w).for_each(|(s, w)| *s += f64::from(*q) * f64::from(*w));
                        }
                        c.iter_mut().zip(&sum).for_each(|(c, s)| *c = *s as f32);
                    }
                    dev.write(out.part_mut(n, latent), &c)?;
                }
            }
            dev.copy(q.part(n, pe), out.part_mut(n, to + s.latent..to + s.latent + s.rope))?;
        }
        Ok(())
    }

    /// `out += W_o attention(h)`; h `[n, d]` is normed.
    pub fn forward(
        &self,
        dev: &Device,
        s: &Shape,
        b: &mut MlaBufs,
        h: View<'_>,
        angles: Angles<'_>,
        cache: &mut Arena,
        layer: usize,
        out: ViewMut<'_>,
    ) -> Result<(), EngineError> {
        let n = h.rows();
        match (&self.q, &mut b.qa) {
            (Query::Compressed { a, norm, b: q_b }, Some((qa, qn))) => {
                // One pass over h for both compressions.
                dev.matmul(h, &mut [set(a, qa.view_mut(n)), set(&self.kv_a, b.kv.view_mut(n))])?;
                dev.rms_norm(qa.view(n), norm, s.eps, qn.view_mut(n))?;
                dev.matmul(qn.view(n), &mut [set(q_b, b.q.view_mut(n))])?;
            }
            (Query::Direct(q), _) => {
                dev.matmul(h, &mut [set(q, b.q.view_mut(n)), set(&self.kv_a, b.kv.view_mut(n))])?;
            }
            (Query::Compressed { .. }, None) => unreachable!("buffers are made from the same shape"),
        }
        dev.rms_norm(b.kv.part(n, 0..s.latent), &self.kv_norm, s.eps, b.c.view_mut(n))?;
        let q_heads =
            RopeHeads { head_dim: s.nope + s.rope, offset: s.nope, dims: s.rope, style: RopeStyle::Adjacent };
        let mut q_sink = None;
        if let (Some(at), Some(q)) = (angles.sink, &mut b.q_sink) {
            dev.copy(b.q.view(n), q.view_mut(n))?;
            dev.rope(q.view_mut(n), q_heads, at)?;
            q_sink = Some(q.view(n));
        }
        let k_pe = s.latent..s.latent + s.rope;
        let k_head = RopeHeads { head_dim: s.rope, offset: 0, dims: s.rope, style: RopeStyle::Adjacent };
        let keys = (b.kv.part_mut(n, k_pe.clone()), k_head);
        dev.rope_both((b.q.view_mut(n), q_heads), keys, angles.own)?;
        if let Some(absorbed) = b.absorbed.as_mut().filter(|_| cache.wants_queries(layer)) {
            self.absorb(dev, s, &b.q, absorbed, n)?;
            cache.record_queries(layer, absorbed.0.view(n))?;
        }
        let stored = cache.append(dev, layer, b.c.view(n), b.kv.part(n, k_pe))?;
        let op = MlaOp {
            heads: s.heads,
            nope: s.nope,
            rope: s.rope,
            value: s.value,
            scale: s.scale,
            q: b.q.view(n),
            q_sink,
            latent: stored.first,
            k_pe: stored.second,
            up: match &self.up {
                Up::Split { k_b, v_b, .. } => MlaUp::Split { k_b, v_b },
                Up::Joint { kv_b } => MlaUp::Joint { kv_b },
            },
            visible: stored.visible,
        };
        stored.attend(|mass| dev.mla_mass(op, b.o.view_mut(n), mass))?;
        dev.linear(&self.o, b.o.view(n), out, Write::Add)?;
        Ok(())
    }
}

fn set<'a>(weight: &'a Weight, out: ViewMut<'a>) -> kernels::Product<'a> {
    kernels::Product { weight, bias: None, out, write: Write::Set }
}
