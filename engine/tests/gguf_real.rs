//! Reads the real files of the shared material: a model and vocabularies without tensors.

use std::path::{Path, PathBuf};

use engine::gguf::{File, OpenMode};

/// The shared folder beside the repository; `None` (said on stdout) where it is absent.
fn shared() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    if dir.is_dir() {
        return Some(dir);
    }
    assert!(std::env::var_os("CI").is_none(), "../shared is not here");
    println!("skipped: ../shared is not here");
    None
}

#[test]
fn stories() {
    let Some(shared) = shared() else { return };
    let path = shared.join("models/stories260K.gguf");
    let mapped = File::open(&path, OpenMode::Mmap).unwrap();
    let read = File::open(&path, OpenMode::Read).unwrap();
    assert_eq!(mapped.metadata().str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(mapped.metadata().u32("llama.block_count").unwrap(), Some(5));
    assert_eq!(mapped.tensors().len(), 48);
    assert_eq!(mapped.total_bytes(), std::fs::metadata(&path).unwrap().len());
    for t in mapped.tensors() {
        let bytes = mapped.bytes(t);
        assert_eq!(bytes.len() as u64, t.n_bytes);
        assert_eq!(bytes[..], read.bytes(read.tensor(&t.name).unwrap())[..], "{}", t.name);
        assert!(bytes.as_ptr().addr().is_multiple_of(32));
    }
}

#[test]
fn vocabularies_without_tensors() {
    let Some(shared) = shared() else { return };
    for name in ["deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "qwen2"] {
        for mode in [OpenMode::Mmap, OpenMode::Read] {
            let file = File::open(shared.join(format!("vocab/ggml-vocab-{name}.gguf")), mode).unwrap();
            assert!(file.tensors().is_empty());
            assert!(file.metadata().strings("tokenizer.ggml.tokens").unwrap().unwrap().len() > 30_000);
        }
    }
}
