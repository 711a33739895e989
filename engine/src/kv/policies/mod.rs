//! The built-in policies, one small file each: idea, source and parameters on top.

mod knorm;
mod random;
pub(super) mod streaming;
#[cfg(test)]
pub(super) mod testing;
mod wrappers;

use super::policy::PolicyInfo;

/// All of them, in the order in which they are listed.
pub(super) const BUILT_IN: &[PolicyInfo] = &[
    streaming::FULL,
    streaming::WINDOW,
    streaming::SINKS,
    random::INFO,
    knorm::INFO,
    wrappers::PYRAMID,
    wrappers::PER_LAYER,
    wrappers::KEEP_PROMPT,
    wrappers::KEEP_FIRST,
];
