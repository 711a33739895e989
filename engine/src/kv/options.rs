//! What a cache is made for, and which layers keep the same entries. Plain data; allocates nothing.

use super::geometry::{CacheTypes, KvSize, LayerSpec};
use super::pool::BLOCK;
use super::ring::Reach;
use super::set::SetShape;
use super::spec::{KvPlan, Positions};
use crate::EngineError;
use crate::model::Extras;
use kernels::KvBuf;

/// How large a cache is and what it keeps.
#[derive(Clone, Debug)]
pub struct ArenaOptions {
    /// Tokens of a sequence, where what it keeps sets no bound of its own.
    pub ctx: usize,
    /// Tokens of one sequence in one forward pass at most.
    pub chunk: usize,
    /// Sequences at a time.
    pub sequences: usize,
    /// What layers without local attention keep.
    pub keep: KvPlan,
}

/// What the layers of a group keep.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Ring(Reach),
    /// A group of one layer.
    Set(SetShape),
}

impl ArenaOptions {
    /// Tokens after which a sequence is full; `None`: never.
    pub fn end(&self) -> Option<usize> {
        matches!(self.keep, KvPlan::Full).then_some(self.ctx)
    }

    /// Local attention looks at its own window under every policy, or at the policy's where that is shorter; sinks lie
    /// outside of it.
    fn kind(&self, spec: &LayerSpec, rank: usize) -> Kind {
        match (&self.keep, spec.window) {
            (KvPlan::Ring { window, .. }, Some(w)) => {
                Kind::Ring(Reach { sinks: 0, window: Some(w.min(*window)) })
            }
            (_, Some(w)) => Kind::Ring(Reach { sinks: 0, window: Some(w) }),
            (KvPlan::Full, None) => Kind::Ring(Reach { sinks: 0, window: None }),
            (KvPlan::Ring { sinks, window }, None) => {
                Kind::Ring(Reach { sinks: *sinks, window: Some(*window) })
            }
            (KvPlan::Set(p), None) => {
                let budget = p.budgets[rank];
                let chunked = budget + self.chunk.max(p.trigger.every.unwrap_or(1));
                Kind::Set(SetShape {
                    geometry: spec.geometry.clone(),
                    policy: p.policy.clone(),
                    needs: p.needs,
                    budget,
                    capacity: if p.needs.whole_prompt { chunked.max(self.ctx) } else { chunked },
                    trigger: p.trigger,
                    compact: p.positions == Positions::Compact,
                })
            }
        }
    }

    /// The groups of layers that keep the same entries. A policy chooses for every layer on its own.
    pub(super) fn groups(&self, specs: &[LayerSpec]) -> Vec<(Kind, Vec<usize>)> {
        let mut groups: Vec<(Kind, Vec<usize>)> = Vec::new();
        let mut rank = 0;
        for (l, s) in specs.iter().enumerate() {
            let kind = self.kind(s, rank);
            rank += usize::from(s.window.is_none());
            let same = |g: &&mut (Kind, _)| match (&g.0, &kind) {
                (Kind::Ring(a), Kind::Ring(b)) => a == b,
                _ => false,
            };
            match groups.iter_mut().find(same) {
                Some(g) => g.1.push(l),
                None => groups.push((kind, vec![l])),
            }
        }
        groups
    }

    pub(super) fn check(&self) -> Result<(), EngineError> {
        let fail = |s: String| Err(EngineError::Option(s));
        if self.ctx == 0 || u32::try_from(self.ctx).is_err() {
            return fail(format!("a context of {} entries is not possible", self.ctx));
        }
        if self.chunk == 0 {
            return fail("a batch size of 0 is not possible".into());
        }
        if self.sequences == 0 {
            return fail("a cache for 0 sequences is not possible".into());
        }
        if matches!(self.keep, KvPlan::Ring { window: 0, .. }) {
            return fail("a window of 0 tokens is not possible".into());
        }
        Ok(())
    }

    /// Blocks of a group that one sequence holds at most.
    pub(super) fn blocks(&self, kind: &Kind) -> usize {
        match kind {
            Kind::Ring(r) => r.blocks(self.chunk, self.end()),
            Kind::Set(s) => s.blocks(),
        }
    }

    pub(super) fn slots(&self, kind: &Kind) -> Result<usize, EngineError> {
        let blocks = self.blocks(kind).checked_mul(self.sequences);
        let slots = blocks.and_then(|b| b.checked_mul(BLOCK)).filter(|s| u32::try_from(*s).is_ok());
        slots.ok_or_else(|| {
            EngineError::Option(format!(
                "{} sequences of {} entries are not possible",
                self.sequences, self.ctx
            ))
        })
    }

    /// Entries that a query sees at most in layer `l`, of those there are after `depth` tokens.
    pub(crate) fn seen(&self, specs: &[LayerSpec], l: usize, depth: usize) -> usize {
        let rank = specs[..l].iter().filter(|s| s.window.is_none()).count();
        match self.kind(&specs[l], rank) {
            Kind::Ring(r) => r.window.map_or(depth, |w| depth.min(w + r.sinks)),
            Kind::Set(s) => depth.min(s.capacity),
        }
    }

    /// The most that any query of any layer sees.
    pub(crate) fn most_seen(&self, specs: &[LayerSpec]) -> usize {
        let depth = self.end().unwrap_or(usize::MAX);
        (0..specs.len()).map(|l| self.seen(specs, l, depth)).max().unwrap_or(0)
    }

    /// Bytes of keys, values and attention masses that a cache takes.
    ///
    /// # Errors
    /// Sizes or types that are not possible.
    pub(crate) fn bytes(&self, specs: &[LayerSpec], types: CacheTypes) -> Result<usize, EngineError> {
        Ok(self.layer_bytes(KvBuf::size, specs, types)?.iter().sum())
    }

    /// The same for each layer, with buffers as large as `size` says.
    pub(crate) fn layer_bytes(
        &self,
        size: KvSize,
        specs: &[LayerSpec],
        types: CacheTypes,
    ) -> Result<Vec<usize>, EngineError> {
        self.check()?;
        let mut all = vec![0; specs.len()];
        for (kind, layers) in self.groups(specs) {
            let slots = self.slots(&kind)?;
            for l in layers {
                all[l] = types.bytes_by(size, &specs[l], slots)?;
                if let Kind::Set(s) = &kind {
                    let masses = usize::from(s.needs.mass_total) + usize::from(s.needs.mass_recent > 0);
                    all[l] += masses * s.geometry.kv_heads * slots * 4;
                }
            }
        }
        Ok(all)
    }

    /// Bytes beside the cache that a policy which chooses takes: what all sequences' layers keep of positions and queries, and
    /// what the largest eviction, or the recording of a pass's queries (`rows` of them), takes while it lasts.
    ///
    /// # Errors
    /// Sizes that are not possible.
    pub(crate) fn policy_bytes(&self, specs: &[LayerSpec], rows: usize) -> Result<usize, EngineError> {
        let (mut kept, mut most) = (0, 0);
        for (kind, _) in self.groups(specs) {
            if let Kind::Set(s) = &kind {
                kept += self.sequences * s.record_bytes();
                let recording = if s.needs.queries > 0 { rows * s.query_bytes() } else { 0 };
                most = most.max(s.eviction_bytes(self.slots(&kind)?)).max(recording);
            }
        }
        Ok(kept + most)
    }

    /// What it asks of forward passes, and whether attention mass is recorded.
    pub(crate) fn extras(&self) -> (Extras, bool) {
        match &self.keep {
            KvPlan::Full => (Extras::default(), false),
            KvPlan::Ring { sinks, .. } => (Extras { sinks: *sinks > 0, queries: false }, false),
            KvPlan::Set(p) => {
                let mass = p.needs.mass_total || p.needs.mass_recent > 0;
                (Extras { sinks: false, queries: p.needs.queries > 0 }, mass)
            }
        }
    }
}
