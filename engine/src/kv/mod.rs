//! The KV cache: what a model keeps of past tokens, and which of it each new token sees.
//!
//! A program can bring a policy of its own. It is registered under a name and from then on taken wherever a `--kv` string is:
//! alone, with a budget, inside wrappers. This one keeps every other entry of what is too much; docs/kv-policies.md has one
//! that looks at attention.
//!
//! ```
//! use engine::kv::policy::{KvPolicy, LayerView, Needs, PolicyInfo, register};
//! use engine::{LoadOptions, Model, Session, SessionOptions};
//! use std::sync::Arc;
//!
//! #[derive(Debug)]
//! struct Alternate;
//!
//! impl KvPolicy for Alternate {
//!     fn needs(&self) -> Needs {
//!         Needs::default()
//!     }
//!     fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
//!         for (score, position) in out.iter_mut().zip(view.positions(head)) {
//!             *score = (position % 2) as f32;
//!         }
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! register(PolicyInfo {
//!     idea: "every other entry stays",
//!     ..PolicyInfo::policy("alternate", |_| Ok(Arc::new(Alternate)))
//! })?;
//! let file = "../ref-tests/demo-model/demo-q8_0.gguf";
//! let model = Model::load(file.as_ref(), &LoadOptions::default())?;
//! let kv = "keep-first:4(alternate:budget=32,every=8)".parse()?;
//! let mut session = Session::new(&model, &SessionOptions { kv, ctx: 256, ..SessionOptions::default() })?;
//! let story = model.vocab().encode_prompt(&"Once upon a time there was a king. ".repeat(12));
//! session.eval(&story)?;
//! // The prompt was read, then all but 32 entries of every layer went.
//! assert_eq!(session.evicted(), story.len() - 32);
//! assert_eq!(session.policy(), "keep-first:4(alternate:budget=32,every=8)");
//! # Ok(())
//! # }
//! ```

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
pub(crate) use evict::zeros;
pub(crate) use file::Origin;
pub use geometry::CacheTypes;
pub(crate) use geometry::{KvSize, LayerSpec, SecondKind};
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
