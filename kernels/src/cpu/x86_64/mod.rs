//! Hand-written kernels for x86-64. The folders have the same names; only the instruction set differs. Functions here are
//! `unsafe` for one reason each: pointers into blocks that must hold the bytes named, and an instruction set that must be there.

// Arrays of registers are indexed by constants; iterators hide that from the optimiser.
#![allow(clippy::needless_range_loop)]

/// Runs the block for `$i` = 0, 1, ... below the constant `$n` (at most 8), written out: arrays of registers indexed by `$i`
/// must stay in registers, and the optimiser does not unroll every loop by itself.
macro_rules! each {
    ($i:ident < $n:expr, $body:block) => {
        each!(@ $i, $n, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $i:ident, $n:expr, $body:block, $($k:literal)*) => {
        $(if $k < $n {
            let $i: usize = $k;
            $body
        })*
    };
}

pub mod amx;
pub mod avx2;
pub mod avx512;
mod scales;
