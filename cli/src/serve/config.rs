//! What `rsinfer serve` was told, resolved: flags, environment, defaults. Knows nothing of requests.

use super::duration::KeepAlive;
use crate::model::MemoryConfig;
use engine::{DType, KvSpec};
use std::time::Duration;

/// See the module.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen, `host:port`.
    pub host: String,
    /// Files served under the names of their stems, the first loaded at once.
    pub models: Vec<std::path::PathBuf>,
    /// Compute threads.
    pub threads: usize,
    pub memory: MemoryConfig,
    /// Context of a sequence where a request does not say; `None`: what the model was trained for, at most 4096.
    pub ctx: Option<usize>,
    /// Rows of a pass.
    pub batch: usize,
    /// Rows of prompts in a pass while others decode.
    pub chunk: usize,
    pub cache_k: DType,
    pub cache_v: DType,
    pub cache_k_pe: Option<DType>,
    /// What caches keep; `None`: the system prompt and the latest tokens.
    pub kv: Option<KvSpec>,
    /// Sequences at a time, per model.
    pub parallel: usize,
    pub keep_alive: KeepAlive,
    /// Requests that may wait, per model and for models.
    pub max_queue: usize,
    pub max_loaded: usize,
    /// A load that makes no progress for so long has failed; `None`: never.
    pub load_timeout: Option<Duration>,
    pub api_key: Option<String>,
    /// Origins of pages that may ask, beside local ones.
    pub origins: Vec<String>,
    /// 0: what happens; 1: more; 2: everything.
    pub debug: u8,
}
