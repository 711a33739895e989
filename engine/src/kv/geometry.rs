//! What a layer's cache must hold, and as which types. Knows widths; nothing of slots.

use super::policy::LayerGeometry;
use crate::EngineError;
use kernels::{KernelError, KvBuf};
use quant::DType;

/// What a layer's second buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondKind {
    /// Values, of the value cache type.
    Values,
    /// MLA's shared rotary key: kept at f16 or better unless asked otherwise, since it carries the positions.
    SharedRotaryKey,
}

/// A layer's cache geometry.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Width of the keys (all kv heads), or of MLA's latent.
    pub first: usize,
    /// Width of the values, or of MLA's shared rotary key.
    pub second: usize,
    /// What the second buffer is.
    pub second_kind: SecondKind,
    /// Local attention: a query sees this many latest positions, itself included.
    pub window: Option<usize>,
    /// What policies are told of it.
    pub geometry: LayerGeometry,
}

/// Bytes of a cache buffer of a type, so many slots and this width.
pub type KvSize = fn(DType, usize, usize) -> Result<usize, KernelError>;

/// Element types of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTypes {
    /// Keys, or MLA's latent.
    pub k: DType,
    /// Values.
    pub v: DType,
    /// MLA's shared rotary key; `None`: that of `k` if it is f32, f16 or bf16, else f16.
    pub k_pe: Option<DType>,
}

impl CacheTypes {
    /// The type of a layer's second buffer.
    pub fn second(self, kind: SecondKind) -> DType {
        match kind {
            SecondKind::Values => self.v,
            SecondKind::SharedRotaryKey => self.k_pe.unwrap_or(match self.k {
                DType::F32 | DType::BF16 => self.k,
                _ => DType::F16,
            }),
        }
    }

    /// Bytes of `slots` entries of a layer, on the host.
    pub fn bytes(self, s: &LayerSpec, slots: usize) -> Result<usize, EngineError> {
        self.bytes_by(KvBuf::size, s, slots)
    }

    /// The same where a buffer of so many slots and of this width takes what `size` says.
    pub fn bytes_by(self, size: KvSize, s: &LayerSpec, slots: usize) -> Result<usize, EngineError> {
        Ok(size(self.k, slots, s.first)? + size(self.second(s.second_kind), slots, s.second)?)
    }
}
