//! The KV cache: what a model keeps of past tokens, and which of it each new token sees.

mod cache;
mod policies;
pub mod policy;
mod registry;
mod spec;
mod vector;

pub use cache::CacheTypes;
pub(crate) use cache::{Cache, LayerSpec, SecondKind};
pub use policy::{KvError, KvPolicy};
pub use registry::{
    Evict, Made, Make, MakePolicy, MakeWrapper, ParamError, ParamInfo, Params, PolicyInfo, register,
    registered,
};
pub use spec::{Budget, KvPlan, KvSpec, Positions, SetPlan, SpecError, Trigger};
