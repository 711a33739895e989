//! A sequence's cache: two buffers per layer, slots handed out to new tokens, and the view each query row gets.
//!
//! This is the seam for bounded caches: models ask only for the slots to write and for what is visible; they never
//! compute either. Here every token keeps its slot (slot = position) until the context is full.

use crate::EngineError;
use kernels::{Device, KvBuf, Span, Visible};
use quant::DType;

/// What a layer's second buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondKind {
    /// Values, of the value cache type.
    Values,
    /// MLA's shared rotary key: kept at f16 or better, since it carries the positions.
    SharedRotaryKey,
}

/// A layer's cache geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Width of the keys (all kv heads), or of MLA's latent.
    pub first: usize,
    /// Width of the values, or of MLA's shared rotary key.
    pub second: usize,
    /// What the second buffer is.
    pub second_kind: SecondKind,
    /// Local attention: a query sees this many latest positions, itself included.
    pub window: Option<usize>,
}

/// Element types of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheTypes {
    /// Keys, or MLA's latent.
    pub k: DType,
    /// Values.
    pub v: DType,
}

impl CacheTypes {
    fn second(self, kind: SecondKind) -> DType {
        match kind {
            SecondKind::Values => self.v,
            SecondKind::SharedRotaryKey if matches!(self.k, DType::F32 | DType::BF16) => self.k,
            SecondKind::SharedRotaryKey => DType::F16,
        }
    }
}

/// One layer's buffers, `[slots, width]` each.
pub struct LayerKv {
    /// Keys, or latents.
    pub first: KvBuf,
    /// Values, or shared rotary keys.
    pub second: KvBuf,
    view: usize,
}

/// The cache of one sequence.
pub struct Cache {
    layers: Vec<LayerKv>,
    /// One view per distinct window among the layers.
    views: Vec<(Option<usize>, Visible)>,
    capacity: usize,
    len: usize,
    positions: Vec<u64>,
    slots: Vec<u32>,
}

impl Cache {
    /// Bytes that [`Cache::new`] will allocate.
    pub fn size(specs: &[LayerSpec], types: CacheTypes, capacity: usize) -> Result<usize, EngineError> {
        let mut sum = 0usize;
        for s in specs {
            sum += KvBuf::size(types.k, capacity, s.first)?;
            sum += KvBuf::size(types.second(s.second_kind), capacity, s.second)?;
        }
        Ok(sum)
    }

    /// A cache of `capacity` entries per layer.
    pub fn new(
        device: &Device,
        specs: &[LayerSpec],
        types: CacheTypes,
        capacity: usize,
    ) -> Result<Self, EngineError> {
        if capacity == 0 || u32::try_from(capacity).is_err() {
            return Err(EngineError::Option(format!("a context of {capacity} entries is not possible")));
        }
        let mut views: Vec<(Option<usize>, Visible)> = Vec::new();
        let mut layers = Vec::with_capacity(specs.len());
        for s in specs {
            let view = views.iter().position(|v| v.0 == s.window).unwrap_or_else(|| {
                views.push((s.window, Visible::default()));
                views.len() - 1
            });
            layers.push(LayerKv {
                first: device.alloc_kv(types.k, capacity, s.first)?,
                second: device.alloc_kv(types.second(s.second_kind), capacity, s.second)?,
                view,
            });
        }
        Ok(Self { layers, views, capacity, len: 0, positions: Vec::new(), slots: Vec::new() })
    }

    /// Entries it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.first.bytes() + l.second.bytes()).sum()
    }

    /// Reserves slots for the next `n` tokens and works out what each of them sees. They count only after
    /// [`Cache::commit`]; until then another `begin` replaces this one. `prompt` is the length of the prompt that they are
    /// part of, however it is cut, or 0 when decoding: backends choose their method by it.
    ///
    /// # Errors
    /// [`EngineError::Context`] if they do not fit.
    pub fn begin(&mut self, n: usize, prompt: usize) -> Result<(), EngineError> {
        let need = self.len + n;
        if need > self.capacity {
            return Err(EngineError::Context { need, ctx: self.capacity });
        }
        self.positions.clear();
        self.positions.extend(self.len as u64..need as u64);
        self.slots.clear();
        self.slots.extend(self.len as u32..need as u32);
        for (window, view) in &mut self.views {
            view.clear();
            view.set_prompt(prompt);
            for slot in self.len..need {
                let from = window.map_or(0, |w| (slot + 1).saturating_sub(w));
                view.push([Span { start: from as u32, len: (slot + 1 - from) as u32, sink: false }]);
            }
        }
        Ok(())
    }

    /// Makes the tokens of the last [`Cache::begin`] part of the sequence.
    pub fn commit(&mut self) {
        self.len += self.slots.len();
        self.slots.clear();
        self.positions.clear();
    }

    /// Forgets all but the first `len` entries.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Positions of the tokens begun.
    pub fn positions(&self) -> &[u64] {
        &self.positions
    }

    /// Stores this batch's rows in layer `l` and returns the layer and what its queries see.
    pub fn append(
        &mut self,
        device: &Device,
        l: usize,
        first: kernels::View<'_>,
        second: kernels::View<'_>,
    ) -> Result<(&LayerKv, &Visible), EngineError> {
        let layer = &mut self.layers[l];
        device.kv_write(first, &mut layer.first, &self.slots)?;
        device.kv_write(second, &mut layer.second, &self.slots)?;
        Ok((layer, &self.views[layer.view].1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::cpu::CpuBackend;

    fn cache(window: Option<usize>) -> Cache {
        let spec = LayerSpec { first: 32, second: 32, second_kind: SecondKind::Values, window };
        let types = CacheTypes { k: DType::F32, v: DType::F32 };
        Cache::new(&Device::new(CpuBackend::new(1)), &[spec], types, 8).unwrap()
    }

    #[test]
    fn a_local_layer_sees_its_window_itself_included() {
        let mut c = cache(Some(3));
        c.begin(5, 5).unwrap();
        let seen: Vec<_> =
            (0..5).map(|i| (c.views[0].1.row(i)[0].start, c.views[0].1.row(i)[0].len)).collect();
        assert_eq!(seen, [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_nothing_changes() {
        let mut c = cache(None);
        c.begin(6, 6).unwrap();
        c.commit();
        assert!(matches!(c.begin(3, 3), Err(EngineError::Context { need: 9, ctx: 8 })));
        assert_eq!(c.len, 6);
        c.truncate(2);
        c.begin(6, 6).unwrap();
        assert_eq!(c.positions(), [2, 3, 4, 5, 6, 7]);
    }
}
