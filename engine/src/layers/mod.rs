//! The parts that forward passes share: each is one paper's idea, with its weights and its steps.

pub mod attention;
pub mod ffn;
pub mod head;
pub mod mla;
pub mod moe;
pub mod rope;
