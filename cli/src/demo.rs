//! The embedded demo model: a small DeepSeek-V3 (ref-tests/demo-model), so that `rsinfer run demo` needs no download.

/// The name that stands for the embedded model wherever a model file is asked for.
pub const NAME: &str = "demo";

/// GGUF tensors are aligned to 32 bytes within the file; the file itself must be aligned for that to mean anything.
#[repr(C, align(64))]
struct Aligned<B: ?Sized>(B);

static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!("../../ref-tests/demo-model/demo-q8_0.gguf"));

/// The GGUF file's bytes.
pub fn bytes() -> &'static [u8] {
    &FILE.0
}
