//! Several sequences on one model: their cache, the buffers of a forward pass, and passes over rows of any of them. A row's
//! logits are the same bits alone or beside others. [`crate::Session`] is one sequence on a context of its own.

use crate::EngineError;
use crate::kv::{Arena, ArenaOptions, CacheTypes, KvPlan, KvSpec, LayerSpec, Origin, Rows, SeqId};
use crate::model::{Extras, Network, Runner};
use crate::session::{Model, SessionOptions};
use crate::stages::Devices;
use kernels::Limits;
use std::path::Path;
use std::sync::Arc;

/// See the module.
pub struct Context {
    model: Arc<Model>,
    runner: Box<dyn Runner>,
    arena: Arena,
    policy: KvSpec,
    batch: usize,
    rows: usize,
    scratch: usize,
    ids: Vec<u32>,
}

/// What a context takes of a device beside the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes of activations between operations.
    pub activations: usize,
    /// Bytes of working memory inside operations, which contexts share.
    pub scratch: usize,
}

impl Work {
    /// All of it.
    pub fn total(self) -> u64 {
        (self.activations + self.scratch) as u64
    }
}

/// What a context's passes are like.
#[derive(Clone, Copy)]
pub(crate) struct Passes {
    /// Rows of one at most: even with short batches, one token of every sequence.
    pub rows: usize,
    /// Cache entries that a row sees at most.
    seen: usize,
    extras: Extras,
    mass: bool,
}

impl Passes {
    pub fn of(options: &ArenaOptions, specs: &[LayerSpec]) -> Self {
        let (extras, mass) = options.extras();
        let rows = options.chunk.max(options.sequences);
        Self { rows, seen: options.most_seen(specs), extras, mass }
    }

    /// Allocates a runner for them and reserves the devices' working memory; devices that only count say how much that is.
    pub fn runner(
        &self,
        net: &Arc<dyn Network>,
        on: &Devices,
    ) -> Result<(Box<dyn Runner>, Vec<Work>), EngineError> {
        let on = on.counting();
        let runner = net.clone().runner(&on, self.rows, self.extras)?;
        let work = on.all().iter().enumerate().map(|(d, dev)| {
            let mut work = Work { activations: dev.allocated(), scratch: 0 };
            if on.uses(d, net.dims().n_layers) {
                let limits = on.layout().limits(&**net, d, self.rows, self.seen);
                let limits = Limits { mass: self.mass && limits.heads > 0, ..limits };
                dev.reserve(&limits)?;
                work.scratch = dev.scratch_bytes(&limits);
            }
            Ok(work)
        });
        let work = work.collect::<Result<_, EngineError>>()?;
        Ok((runner, work))
    }
}

impl Context {
    /// Allocates a cache for `sequences` sequences, each of the size that the options say, and the buffers.
    ///
    /// # Errors
    /// Impossible sizes or cache types, or memory that cannot be had.
    pub fn new(model: &Arc<Model>, o: &SessionOptions, sequences: usize) -> Result<Self, EngineError> {
        let specs = model.network().cache_specs();
        let options = arena_options(o, &specs, sequences)?;
        let types = CacheTypes { k: o.cache_k, v: o.cache_v, k_pe: o.cache_k_pe };
        let (batch, passes) = (options.chunk, Passes::of(&options, &specs));
        let arena = Arena::new(model.devices(), &specs, types, options)?;
        let (runner, work) = passes.runner(model.network(), model.devices())?;
        let (rows, scratch) = (passes.rows, work.iter().map(|w| w.activations + w.scratch).sum());
        let (model, policy) = (model.clone(), o.kv.clone());
        Ok(Self { model, runner, arena, policy, batch, rows, scratch, ids: Vec::new() })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// What the cache keeps.
    pub fn policy(&self) -> &KvSpec {
        &self.policy
    }

    /// The cache.
    pub fn cache(&self) -> &Arena {
        &self.arena
    }

    /// The same, to admit, fork, truncate and free sequences.
    pub fn cache_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }

    /// Bytes of the buffers beside the cache, on all devices: activations, and working memory, which contexts share.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    /// Rows of one sequence in a pass at most.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Rows of a pass at most.
    pub fn max_rows(&self) -> usize {
        self.rows
    }

    /// Checks that `tokens` are in the vocabulary and may be appended to `seq`.
    ///
    /// # Errors
    /// [`EngineError::TokenId`], [`EngineError::Context`], [`EngineError::NoSequence`].
    pub fn check(&self, seq: SeqId, tokens: &[u32]) -> Result<(), EngineError> {
        let n_vocab = self.model.info().n_vocab;
        if let Some(&id) = tokens.iter().find(|&&t| t as usize >= n_vocab) {
            return Err(EngineError::TokenId { id, n_vocab });
        }
        let need = self.arena.tokens(seq)?.len() + tokens.len();
        match self.arena.options().end() {
            Some(ctx) if need > ctx => Err(EngineError::Context { need, ctx }),
            _ => Ok(()),
        }
    }

    /// Appends the rows' tokens to their sequences, all in one pass.
    ///
    /// # Errors
    /// As [`Context::check`], and too many rows; then nothing has changed. What a policy reports that had to evict; it has
    /// evicted nothing then, and all sequences stay usable.
    pub fn forward(&mut self, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        self.ids.clear();
        for r in rows {
            self.check(r.seq, r.tokens)?;
            self.ids.extend_from_slice(r.tokens);
        }
        if self.ids.is_empty() || self.ids.len() > self.rows {
            let n = self.ids.len();
            return Err(EngineError::Option(format!(
                "{n} rows in one pass, 1 to {} are possible",
                self.rows
            )));
        }
        self.model.file().check()?;
        self.arena.begin(rows)?;
        self.runner.forward(&self.ids, &mut self.arena)?;
        // Weights that could not be read were zeros: nothing may be built on the result.
        self.model.file().check()?;
        self.arena.commit()
    }

    /// Appends tokens without computing anything: their entries hold what happened to be in the cache. Only for measuring how fast a
    /// sequence goes on at some depth; what it says then means nothing.
    ///
    /// # Errors
    /// As [`Context::check`].
    pub fn assume(&mut self, seq: SeqId, tokens: &[u32]) -> Result<(), EngineError> {
        self.check(seq, tokens)?;
        for tokens in tokens.chunks(self.batch) {
            self.arena.begin(&[Rows { seq, tokens, prompt: 0 }])?;
            self.arena.commit()?;
        }
        Ok(())
    }

    fn origin<'a>(&self, kv: &'a str) -> Origin<'a> {
        Origin { model: self.model.fingerprint(), kv, n_vocab: self.model.info().n_vocab }
    }

    /// Writes a sequence to a new file: tokens, positions and what its cache holds, so that it can go on with the same bits.
    ///
    /// # Errors
    /// [`EngineError::CacheFile`] if the file cannot be written, [`EngineError::NoSequence`].
    pub fn save(&self, seq: SeqId, path: &Path) -> Result<(), EngineError> {
        self.arena.save(seq, &self.origin(&self.policy.to_string()), path)
    }

    /// Puts what [`Context::save`] wrote in place of the sequence `seq`.
    ///
    /// # Errors
    /// [`EngineError::CacheFile`]: a file that is damaged, of another version, model or cache configuration; the sequence is
    /// untouched then. Should the disk fail after all checks, the sequence is empty.
    pub fn load(&mut self, seq: SeqId, path: &Path) -> Result<(), EngineError> {
        let kv = self.policy.to_string();
        let origin = self.origin(&kv);
        self.arena.load(seq, &origin, path)
    }

    /// Appends the logits `[rows.len(), vocab]` of the given rows of the last pass to `out`.
    pub fn logits(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.check_rows(rows)?;
        self.runner.output().logits(rows, out)?;
        Ok(self.model.file().check()?)
    }

    /// Appends the `k` best logits of each of the given rows of the last pass, ids and values, best first. False, and `out` is as it was: they
    /// are to be read whole, since they lie on the host anyway or since some are not finite.
    ///
    /// # Errors
    /// As [`Context::logits`]; `k` beyond the vocabulary or [`kernels::MOST_BEST`].
    pub fn best(&mut self, rows: &[u32], k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool, EngineError> {
        self.check_rows(rows)?;
        let before = out.len();
        let read = self.runner.output().best(rows, k, out)?;
        self.model.file().check()?;
        // A row's first is its largest, and NaN above all.
        let finite = out[before..].chunks(k.max(1)).all(|row| row[0].1 < f32::INFINITY);
        if !finite {
            out.truncate(before);
        }
        Ok(read && finite)
    }

    /// Appends the states `[rows.len(), d_model]` behind the last norm of the given rows of the last pass to `out`.
    pub fn states(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.check_rows(rows)?;
        self.runner.output().states(rows, out)?;
        Ok(self.model.file().check()?)
    }

    fn check_rows(&self, rows: &[u32]) -> Result<(), EngineError> {
        match rows.iter().find(|r| **r as usize >= self.ids.len()) {
            Some(r) => Err(EngineError::Option(format!("row {r} of a pass of {}", self.ids.len()))),
            None => Ok(()),
        }
    }
}

/// The cache that a session of these options asks for.
///
/// # Errors
/// A configuration that does not fit the context.
pub(crate) fn arena_options(
    o: &SessionOptions,
    specs: &[LayerSpec],
    sequences: usize,
) -> Result<ArenaOptions, EngineError> {
    let chosen: Vec<_> = specs.iter().filter(|s| s.window.is_none()).map(|s| s.geometry.clone()).collect();
    let keep = o.kv.plan(o.ctx, &chosen)?;
    if matches!(keep, KvPlan::Set(_)) && chosen.is_empty() {
        let why =
            format!("--kv {}: all layers of this model have local attention, nothing can be chosen", o.kv);
        return Err(EngineError::Option(why));
    }
    let chunk = if matches!(keep, KvPlan::Full) { o.batch.min(o.ctx) } else { o.batch };
    Ok(ArenaOptions { ctx: o.ctx, chunk, sequences, keep })
}
