//! The memory plan: where every byte goes before anything is allocated, and what to change when it does not fit.
//!
//! [`PlanModel`] reads a file's headers and answers, for any [`PlanOptions`], what a run [`Needs`]: the code that allocates runs
//! on a device that only counts, so plan and allocation cannot part. [`place`] puts that on devices that need not exist: plain
//! data in, plain data out. [`fit()`] searches for changes that fit. [`available_memory`] says what this machine has left.

mod fit;
mod machine;
mod model;
mod place;

pub use crate::context::Work;
pub use fit::{Change, Fit, Way, fit, plan};
pub use machine::available_memory;
pub(crate) use machine::room_for_files;
pub(crate) use model::of_context;
pub use model::{Needs, Part, PlanModel, Sizing, WeightFact};
pub use place::{Device, DevicePlan, Gpu, Load, Machine, PartBytes, Plan, Rules, place};

use crate::SessionOptions;

/// How weights get into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Mapped: pages come from the file when they are used, and go when memory is short.
    #[default]
    Mapped,
    /// Mapped, and kept in memory (`--mlock`).
    Locked,
    /// Read into memory (`--no-mmap`).
    Read,
}

/// What a run is asked to do, as far as memory goes.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Size and types of each sequence.
    pub session: SessionOptions,
    /// Sequences at a time.
    pub parallel: usize,
    /// How weights are read.
    pub access: Access,
    /// Bytes of experts kept in memory (`--pin-experts`), where weights are mapped.
    pub pinned: u64,
    /// Compute threads.
    pub threads: usize,
}

#[cfg(test)]
mod tests;
