//! Any bytes as a GGUF file: an error, or a file all of whose promises hold (engine/tests/gguf_check).
//!
//! `cd ref-tests && cargo +nightly fuzz run gguf_open -- -max_len=4096 -malloc_limit_mb=64`; on a stable compiler
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run gguf_open ...` does the same. What it finds goes to corpus/gguf_open, which the
//! tests replay.
#![no_main]

#[path = "../../../engine/tests/gguf_check/mod.rs"]
mod gguf_check;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    gguf_check::check(data);
});
