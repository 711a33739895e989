//! The KV cache: what a model keeps of past tokens, and which of it each new token sees.

mod arena;
mod evict;
mod file;
mod geometry;
mod options;
mod policies;
pub mod policy;
mod pool;
mod registry;
mod ring;
mod set;
mod spec;
mod step;
mod vector;

pub use arena::{Arena, Eviction, SeqId, Watcher};
pub(crate) use file::Origin;
pub use geometry::CacheTypes;
pub(crate) use geometry::{LayerSpec, SecondKind};
pub use options::ArenaOptions;
pub use policy::{KvError, KvPolicy};
pub use registry::{
    Evict, Made, Make, MakePolicy, MakeWrapper, ParamError, ParamInfo, Params, PolicyInfo, register,
    registered,
};
pub use spec::{Budget, KvPlan, KvSpec, Positions, SetPlan, SpecError, Trigger};
pub use step::Rows;

/// The examples of docs/kv-policies.md, so that they are compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/kv-policies.md")]
struct Document;
