//! The architectures: each file is one family's whole forward pass, in paper order.

mod deepseek2;
mod gemma3;
mod llama;
mod qwen;

use crate::EngineError;
use crate::config::Hyper;
use crate::gguf::File;
use crate::kv::{Arena, LayerSpec};
use crate::layers::head::Output;
use crate::pager::{Pager, PagerOptions};
use crate::stages::Devices;
use crate::weights::{Loader, Seen};
use kernels::Limits;
use std::sync::Arc;

/// What callers need to know of a loaded network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Transformer layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Entries of the vocabulary.
    pub n_vocab: usize,
}

/// What of a network runs on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A layer without its routed experts.
    Layer(usize),
    /// Its routed experts with their router.
    Experts(usize),
    /// The last norm and the output.
    Head,
}

/// What a cache asks of a forward pass besides attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Queries may look at sinks.
    pub sinks: bool,
    /// Queries are recorded.
    pub queries: bool,
}

/// A loaded network: immutable weights, shared by any number of runners.
pub trait Network: Send + Sync {
    /// Its dimensions.
    fn dims(&self) -> Dims;
    /// The cache each layer needs.
    fn cache_specs(&self) -> Vec<LayerSpec>;
    /// Adds what the operations of a piece will ask of their device, but for numbers of tokens and cache entries.
    fn limits(&self, piece: Piece, l: &mut Limits);
    /// A runner with buffers for batches of up to `tokens` rows, on the devices that its weights lie on.
    fn runner(
        self: Arc<Self>,
        on: &Devices,
        tokens: usize,
        extras: Extras,
    ) -> Result<Box<dyn Runner>, EngineError>;
}

/// A network with the buffers of a forward pass.
pub trait Runner: Send {
    /// Runs `tokens` through all layers; the cache has begun as many. The residual stream stays in the runner.
    fn forward(&mut self, tokens: &[u32], cache: &mut Arena) -> Result<(), EngineError>;
    /// What is made of the residual stream of the last batch.
    fn output(&mut self) -> Output<'_>;
}

/// Loads the network that `file` holds.
///
/// # Errors
/// An architecture, key, value or tensor that is not implemented is named.
pub fn load(file: &File, on: &Devices, pager: Arc<Pager>) -> Result<Arc<dyn Network>, EngineError> {
    Ok(load_with(file, on, pager)?.0)
}

/// The same for files of which only headers were read, for planning.
pub fn load_any(file: &File, on: &Devices) -> Result<(Arc<dyn Network>, Seen), EngineError> {
    load_with(file, on, Arc::new(Pager::new(file, on, PagerOptions::default())))
}

fn load_with(file: &File, on: &Devices, pager: Arc<Pager>) -> Result<(Arc<dyn Network>, Seen), EngineError> {
    let meta = file.metadata();
    let arch = meta.need("general.architecture", meta.str("general.architecture"))?;
    let hyper = Hyper::new(meta, arch);
    let weights = Loader::new(file, on, pager);
    let network: Arc<dyn Network> = match arch {
        "deepseek2" => Arc::new(deepseek2::DeepSeek2::load(&hyper, &weights)?),
        "gemma3" => Arc::new(gemma3::Gemma3::load(&hyper, &weights)?),
        "llama" => Arc::new(llama::Llama::load(&hyper, &weights)?),
        "qwen2" | "qwen3" | "qwen3moe" => Arc::new(qwen::Qwen::load(&hyper, &weights)?),
        other => {
            return Err(EngineError::Unsupported(format!(
                "architecture {other} (implemented: deepseek2, gemma3, llama, qwen2, qwen3, qwen3moe)"
            )));
        }
    };
    hyper.finish()?;
    let seen = weights.finish()?;
    Ok((network, seen))
}
