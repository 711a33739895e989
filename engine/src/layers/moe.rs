//! Mixture of experts: router, routed experts and shared experts (DeepSeekMoE, arXiv:2401.06066; DeepSeek-V3,
//! arXiv:2412.19437, section 2.1.2).

use super::ffn::Dense;
use crate::EngineError;
use crate::pager::Pager;
use crate::stages::Far;
use crate::weights::Loader;
use kernels::{Activation, Buf, Device, Ffn, Gating, Groups, Limits, Router, Routes, Vector, Weight, Write};
use std::sync::Arc;

/// The routing rules of a model.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// Routed experts.
    pub experts: usize,
    /// Routed experts per token.
    pub used: usize,
    /// Hidden features of one expert.
    pub hidden: usize,
    /// Shared experts, always used; one layer of `shared * hidden` features in the file.
    pub shared: usize,
    /// Scores to probabilities.
    pub gating: Gating,
    /// Group limits.
    pub groups: Option<Groups>,
    /// Whether chosen weights are divided by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// Weights of one mixture-of-experts layer.
pub struct Moe {
    rules: Routing,
    router: Weight,
    correction: Option<Vector>,
    gate: Weight,
    up: Weight,
    down: Weight,
    shared: Option<Dense>,
    layer: usize,
    pager: Arc<Pager>,
}

impl Moe {
    /// Takes the tensors of layer `layer`.
    pub fn load(w: &Loader<'_>, layer: usize, d: usize, rules: Routing) -> Result<Self, EngineError> {
        let prefix = &format!("blk.{layer}.");
        let (e, f) = (rules.experts, rules.hidden);
        let shared = match rules.shared {
            0 => None,
            n => Some(Dense::load(w, prefix, "_shexp", d, n * f, Activation::Silu)?),
        };
        Ok(Self {
            rules,
            router: w.matrix(&format!("{prefix}ffn_gate_inp.weight"), e, d)?,
            correction: w.opt_vector(&format!("{prefix}exp_probs_b.bias"), e)?,
            gate: w.stack(&format!("{prefix}ffn_gate_exps.weight"), e, f, d)?,
            up: w.stack(&format!("{prefix}ffn_up_exps.weight"), e, f, d)?,
            down: w.stack(&format!("{prefix}ffn_down_exps.weight"), e, d, f)?,
            shared,
            layer,
            pager: w.pager(),
        })
    }

    fn experts(&self) -> Ffn<'_> {
        Ffn { gate: &self.gate, up: &self.up, down: &self.down, act: Activation::Silu }
    }

    fn router(&self) -> Router<'_> {
        let r = &self.rules;
        Router {
            weight: &self.router,
            gating: r.gating,
            correction: self.correction.as_ref(),
            groups: r.groups,
            used: r.used,
            normalize: r.normalize,
            scale: r.scale,
        }
    }

    /// `x +=` the weighted experts' and the shared experts' outputs for h `[n, d]`, which may be overwritten. `elsewhere`: where the
    /// routed experts are, if not on `dev`.
    pub fn forward(
        &self,
        dev: &Device,
        n: usize,
        h: &mut Buf,
        x: &mut Buf,
        elsewhere: Option<Far<'_>>,
        routes: &mut Routes,
    ) -> Result<(), EngineError> {
        let shared = self.shared.as_ref().map(Dense::op);
        let Some(far) = elsewhere else {
            dev.route(self.router(), h.view(n), routes)?;
            self.pager.experts(self.layer, &routes.ids);
            return Ok(dev.moe(self.experts(), routes, shared, h.view(n), x.view_mut(n), Write::Add)?);
        };
        // The copy waits for what `dev` has been asked for so far. The shared experts, asked for next, run while the others are
        // computed.
        far.dev.receive(dev, h.view(n), far.h.view_mut(n))?;
        if let Some(shared) = shared {
            dev.ffn(shared, h.view(n), x.view_mut(n), Write::Add)?;
            dev.start()?;
        }
        far.dev.route(self.router(), far.h.view(n), routes)?;
        self.pager.experts(self.layer, &routes.ids);
        far.dev.moe(self.experts(), routes, None, far.h.view(n), far.out.view_mut(n), Write::Set)?;
        dev.receive(far.dev, far.out.view(n), h.view_mut(n))?;
        Ok(dev.add(h.view(n), x.view_mut(n))?)
    }
}

/// A layer's feed-forward part.
pub enum FeedForward {
    /// One gated layer.
    Dense(Box<Dense>),
    /// Routed experts.
    Moe(Box<Moe>),
}

impl FeedForward {
    /// Adds what it will ask of the layer's device.
    pub fn limits(&self, l: &mut Limits) {
        match self {
            Self::Dense(f) => l.ffn(f.op()),
            Self::Moe(m) => m.shared.iter().for_each(|f| l.ffn(f.op())),
        }
    }

    /// Adds what its routed experts will ask of theirs.
    pub fn expert_limits(&self, l: &mut Limits) {
        if let Self::Moe(m) = self {
            l.experts(m.experts(), m.rules.used);
        }
    }

    /// `x += ffn(h)`, h and x `[n, d]`; see [`Moe::forward`].
    pub fn forward(
        &self,
        dev: &Device,
        n: usize,
        h: &mut Buf,
        x: &mut Buf,
        elsewhere: Option<Far<'_>>,
        routes: &mut Routes,
    ) -> Result<(), EngineError> {
        match self {
            Self::Dense(f) => Ok(dev.ffn(f.op(), h.view(n), x.view_mut(n), Write::Add)?),
            Self::Moe(m) => m.forward(dev, n, h, x, elsewhere, routes),
        }
    }
}
