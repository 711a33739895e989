//! The gated feed-forward layer (arXiv:2002.05202): `down(act(gate x) * up x)`.

use crate::EngineError;
use crate::weights::Loader;
use kernels::{Activation, Ffn, Weight};

/// Weights of a dense feed-forward layer.
pub struct Dense {
    gate: Weight,
    up: Weight,
    down: Weight,
    act: Activation,
}

impl Dense {
    /// Takes `{prefix}ffn_{gate,up,down}{suffix}.weight` with `hidden` features between.
    pub fn load(
        w: &Loader<'_>,
        prefix: &str,
        suffix: &str,
        d: usize,
        hidden: usize,
        act: Activation,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            gate: w.matrix(&format!("{prefix}ffn_gate{suffix}.weight"), hidden, d)?,
            up: w.matrix(&format!("{prefix}ffn_up{suffix}.weight"), hidden, d)?,
            down: w.matrix(&format!("{prefix}ffn_down{suffix}.weight"), d, hidden)?,
            act,
        })
    }

    /// The operation for a device.
    pub fn op(&self) -> Ffn<'_> {
        Ffn { gate: &self.gate, up: &self.up, down: &self.down, act: self.act }
    }
}
