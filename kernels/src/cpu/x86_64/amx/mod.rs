//! AMX tiles with bf16 products (and AVX-512 with its bf16 conversions): weights and activations of prompts rounded to bf16,
//! `tdpbf16ps` sums in f32. All else of this set is AVX-512's.

mod product;
mod widen;

pub use product::{PEAK_ROUND, SCRATCH_BYTES, interleave, peak, reserve, rows};
