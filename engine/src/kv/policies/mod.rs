//! The built-in policies, one small file each: idea, source and parameters on top.

mod expected;
mod h2o;
mod keydiff;
mod knorm;
mod random;
mod snapkv;
pub(super) mod streaming;
#[cfg(test)]
pub(super) mod testing;
mod tova;
mod wrappers;

use super::policy::PolicyInfo;

/// All of them, in the order in which they are listed.
pub(super) const BUILT_IN: &[PolicyInfo] = &[
    streaming::FULL,
    streaming::WINDOW,
    streaming::SINKS,
    random::INFO,
    knorm::INFO,
    keydiff::INFO,
    tova::INFO,
    h2o::INFO,
    snapkv::INFO,
    expected::INFO,
    wrappers::PYRAMID,
    wrappers::PER_LAYER,
    wrappers::KEEP_PROMPT,
    wrappers::KEEP_FIRST,
];
