//! What a model needs, from its headers. Knows nothing of devices and their sizes.

use super::PlanOptions;
use crate::context::{Passes, Work, arena_options};
use crate::gguf::{Array, File, Metadata, TensorInfo, Value};
use crate::kv::{CacheTypes, KvSize, LayerSpec};
use crate::model::{self, Network};
use crate::stages::{Devices, Layout};
use crate::{EngineError, SessionOptions};
use kernels::{KvBuf, cuda, gpu_meter, meter};
use std::path::Path;
use std::sync::Arc;

/// What a weight is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The table of token embeddings.
    Embeddings,
    /// Attention's projections.
    Attention,
    /// Dense feed-forward layers.
    Dense,
    /// Routers of experts.
    Router,
    /// Shared experts.
    SharedExperts,
    /// Routed experts.
    Experts,
    /// Norms and other vectors of layers.
    Norms,
    /// The output matrix and its norm.
    Output,
}

impl Part {
    /// All of them, in the order of a forward pass.
    pub const ALL: [Self; 8] = [
        Self::Embeddings,
        Self::Attention,
        Self::Dense,
        Self::Router,
        Self::SharedExperts,
        Self::Experts,
        Self::Norms,
        Self::Output,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embeddings => "embeddings",
            Self::Attention => "attention",
            Self::Dense => "dense ffn",
            Self::Router => "router",
            Self::SharedExperts => "shared experts",
            Self::Experts => "experts",
            Self::Norms => "norms",
            Self::Output => "output",
        }
    }

    /// The layer of a tensor by its name; `None`: before or after all.
    pub fn layer(name: &str) -> Option<usize> {
        name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
    }

    /// Of a tensor by its name in GGUF files.
    pub fn of(name: &str) -> Self {
        match name {
            "token_embd.weight" => Self::Embeddings,
            n if n.starts_with("output") => Self::Output,
            n if n.contains("_exps.") => Self::Experts,
            n if n.contains("_shexp.") => Self::SharedExperts,
            n if n.contains("ffn_gate_inp") || n.contains("exp_probs_b") => Self::Router,
            n if n.contains("norm") || !n.starts_with("blk.") => Self::Norms,
            n if n.contains(".ffn_") => Self::Dense,
            _ => Self::Attention,
        }
    }
}

/// A tensor as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightFact {
    /// Its name in the file.
    pub name: String,
    /// Its layer; `None`: before or after all.
    pub layer: Option<usize>,
    /// What it is for.
    pub part: Part,
    /// Bytes in the file.
    pub bytes: u64,
    /// Bytes of the f32 copy that is made of vectors; 0 for matrices.
    pub copy: u64,
    /// Bytes on a GPU; 0: it is never copied there.
    pub gpu: u64,
}

/// What a run needs besides weights, wherever they lie, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The cache of all sequences, for each layer.
    pub kv: Vec<u64>,
    /// The same on a GPU.
    pub kv_on_gpu: Vec<u64>,
    /// Logits and what sampling sorts.
    pub sampling: u64,
    /// Metadata, vocabulary, stacks of threads.
    pub host: u64,
    /// What a cache policy that chooses keeps beside the cache, and looks at while it chooses.
    pub policy: u64,
}

/// A model's headers.
pub struct PlanModel {
    name: String,
    arch: String,
    ctx_train: usize,
    guessed: usize,
    weights: Vec<WeightFact>,
    texts: u64,
    n_vocab: usize,
    n_layers: usize,
    tied: bool,
    network: Arc<dyn Network>,
}

/// What a text value costs as metadata, and again in the vocabulary: pointers, lengths and entries of tables besides the bytes.
const TEXT: u64 = 40;
const TOKEN: u64 = 110;
/// What a thread touches of its stack.
const STACK: u64 = 64 << 10;

impl PlanModel {
    /// Reads the headers of the file at `path`: the first part of a split file, or a file without its data, is enough.
    ///
    /// # Errors
    /// As [`crate::Model::load`], as far as headers go.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        Self::of(&File::headers(path)?)
    }

    /// The same of an open file.
    ///
    /// # Errors
    /// As [`crate::Model::load`].
    pub fn of(file: &File) -> Result<Self, EngineError> {
        let (device, _) = meter(1);
        let (network, seen) = model::load_any(file, &device.into())?;
        let meta = file.metadata();
        let arch = meta.str("general.architecture")?.unwrap_or_default().to_owned();
        let fact = |t: &TensorInfo| WeightFact {
            name: t.name.clone(),
            layer: Part::layer(&t.name),
            part: Part::of(&t.name),
            bytes: t.n_bytes,
            copy: if t.dims.len() == 1 { t.n_elements() * 4 } else { 0 },
            gpu: seen.on_gpu.get(&t.name).copied().unwrap_or(0),
        };
        let weights: Vec<_> = file.tensors().iter().chain(&seen.guessed).map(fact).collect();
        let stem = || file.path().file_stem().map(|s| s.to_string_lossy().into_owned());
        let dims = network.dims();
        Ok(Self {
            name: meta.str("general.name")?.map(Into::into).or_else(stem).unwrap_or_default(),
            ctx_train: meta.u32(&format!("{arch}.context_length"))?.unwrap_or(0) as usize,
            arch,
            guessed: seen.guessed.len(),
            tied: !weights.iter().any(|w| w.name == "output.weight"),
            weights,
            texts: texts(meta),
            n_vocab: dims.n_vocab,
            n_layers: dims.n_layers,
            network,
        })
    }

    /// `general.name`, or the file's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `general.architecture`.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Context that the model was trained for; 0: the file does not say.
    pub fn ctx_train(&self) -> usize {
        self.ctx_train
    }

    /// Transformer layers.
    pub fn n_layers(&self) -> usize {
        self.n_layers
    }

    /// All tensors.
    pub fn weights(&self) -> &[WeightFact] {
        &self.weights
    }

    /// Tensors that are in parts of the model that are not there: their types are those of other layers.
    pub fn guessed(&self) -> usize {
        self.guessed
    }

    /// Whether the output is the embedding table.
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// Whether the cache has values (of a type of their own), as all but MLA have.
    pub fn has_values(&self) -> bool {
        self.network.cache_specs().iter().any(|s| s.second_kind == crate::kv::SecondKind::Values)
    }

    /// What a run needs besides the weights.
    ///
    /// # Errors
    /// Options that no session accepts.
    pub fn sizing(&self, o: &PlanOptions) -> Result<Sizing<'_>, EngineError> {
        let vocab = self.n_vocab as u64;
        let tokens = (4 * o.parallel as u64).saturating_mul(o.session.ctx as u64);
        let (needs, passes) = of_context(&self.network, &o.session, o.parallel)?;
        let needs = Needs {
            // Logits of a sequence, and candidates of a sampler that looks at all of them.
            sampling: o.parallel as u64 * vocab * (4 + 32),
            host: (self.texts + STACK * o.threads as u64).saturating_add(tokens),
            ..needs
        };
        let sizing = Sizing { needs, network: &self.network, passes, threads: o.threads };
        // What is not possible under one layout is not under any.
        sizing.try_work(&Layout::default())?;
        Ok(sizing)
    }
}

/// What a run needs besides the weights.
pub struct Sizing<'a> {
    /// Wherever they lie.
    pub needs: Needs,
    network: &'a Arc<dyn Network>,
    passes: Passes,
    threads: usize,
}

impl Sizing<'_> {
    /// What each device works in under a layout, the CPU first.
    pub fn work(&self, layout: &Layout) -> Vec<Work> {
        self.try_work(layout).unwrap_or_default()
    }

    fn try_work(&self, layout: &Layout) -> Result<Vec<Work>, EngineError> {
        let spots = layout.layers.iter().flat_map(|s| [s.layer, s.experts]);
        let gpus = spots.chain([layout.head]).max().unwrap_or(0);
        let all = std::iter::once(meter(self.threads).0).chain((0..gpus).map(|_| gpu_meter().0)).collect();
        Ok(self.passes.runner(self.network, &Devices::new(all, layout.clone())?)?.1)
    }
}

/// What a context takes wherever layers lie, its cache and its policy's memory; and what its passes are like.
///
/// # Errors
/// Options that no session accepts.
pub(crate) fn of_context(
    network: &Arc<dyn Network>,
    s: &SessionOptions,
    sequences: usize,
) -> Result<(Needs, Passes), EngineError> {
    let specs: Vec<LayerSpec> = network.cache_specs();
    let options = arena_options(s, &specs, sequences)?;
    let types = CacheTypes { k: s.cache_k, v: s.cache_v, k_pe: s.cache_k_pe };
    let kv = |size: KvSize| -> Result<Vec<u64>, EngineError> {
        Ok(options.layer_bytes(size, &specs, types)?.into_iter().map(|b| b as u64).collect())
    };
    let passes = Passes::of(&options, &specs);
    let needs = Needs {
        kv: kv(KvBuf::size)?,
        kv_on_gpu: kv(cuda::kv_bytes)?,
        policy: options.policy_bytes(&specs, passes.rows)? as u64,
        ..Needs::default()
    };
    Ok((needs, passes))
}

/// Bytes that metadata and vocabulary take in memory.
fn texts(meta: &Metadata) -> u64 {
    let mut host = 0;
    for (key, value) in meta.iter() {
        match value {
            Value::Array(Array::String(all)) => {
                let n = all.len() as u64;
                let len: u64 = all.iter().map(|s| s.len() as u64).sum();
                host += n * TEXT + len;
                if key.starts_with("tokenizer.") {
                    host += n * TOKEN + len;
                }
            }
            Value::Array(a) => host += 4 * a.len() as u64,
            Value::String(s) => host += 2 * s.len() as u64,
            _ => {}
        }
    }
    host
}
