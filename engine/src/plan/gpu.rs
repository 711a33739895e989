//! What a run needs of a GPU that holds it all: the code that loads and allocates, run on a device that only counts. The table of token
//! embeddings stays on the host. Knows nothing of GPUs that are there.

use super::PlanOptions;
use crate::EngineError;
use crate::context::Memory;
use crate::gguf::File;
use crate::model;
use kernels::gpu_meter;
use std::sync::atomic::Ordering::Relaxed;

/// In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuNeeds {
    /// Weights as the device holds them.
    pub weights: u64,
    /// The cache of all sequences, and what policies record beside it.
    pub kv: u64,
    /// Activations between operations, and working memory inside them.
    pub scratch: u64,
}

impl GpuNeeds {
    /// Those of a run of the model whose headers `file` holds.
    ///
    /// # Errors
    /// As [`crate::Model::load`], as far as headers go; options that no session accepts.
    pub fn of(file: &File, o: &PlanOptions) -> Result<Self, EngineError> {
        let (device, asked) = gpu_meter();
        let (network, _) = model::load_any(file, &device.clone().into())?;
        let weights = asked.load(Relaxed);
        let memory = Memory::new(&network, &device.into(), &o.session, o.parallel)?;
        let work = memory.work[0];
        let kv = asked.load(Relaxed) - weights - work.activations;
        let scratch = work.activations + work.scratch;
        Ok(Self { weights: weights as u64, kv: kv as u64, scratch: scratch as u64 })
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch
    }
}
