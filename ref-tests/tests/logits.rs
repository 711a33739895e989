//! Logits of the tiny reference models against Hugging Face's, in f32 (bars: docs/numerics.md).

use engine::{EngineError, LoadOptions, Model, Session, SessionOptions};
use quant::DType;
use ref_tests::{Difference, compare, fixture, read_npy, read_tokens};
use std::path::{Path, PathBuf};

/// Evaluates all tokens in batches of `batch`; returns `[n, vocab]`.
fn logits(model: &Path, tokens: &[u32], batch: usize, cache: DType, threads: usize) -> Vec<f32> {
    let model =
        Model::load(model, &LoadOptions { threads, ..Default::default() }).expect("the fixture loads");
    let options =
        SessionOptions { ctx: tokens.len(), batch, cache_k: cache, cache_v: cache, ..Default::default() };
    let mut session = Session::new(&model, &options).expect("a session");
    let mut out = Vec::new();
    session
        .eval_all(tokens, |_, row| {
            out.extend_from_slice(row);
            Ok::<_, EngineError>(())
        })
        .expect("evaluation");
    out
}

fn against_reference(dir: &Path, cache: DType) -> Difference {
    let tokens = read_tokens(&dir.join("tokens.json"));
    let (rows, vocab, reference) = read_npy(&dir.join("logits.npy"));
    assert_eq!(rows, tokens.len());
    compare(&reference, &logits(&dir.join("model.gguf"), &tokens, 512, cache, 2), vocab)
}

/// Every folder of a fixture folder that holds a model.
fn models(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixture(folder)).expect("fixtures");
    let mut dirs: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
    dirs.retain(|d| d.join("model.gguf").exists());
    dirs.sort();
    dirs
}

fn name(dir: &Path) -> String {
    dir.file_name().expect("a name").to_string_lossy().into_owned()
}

#[test]
fn full_precision_files_give_hugging_face_logits() {
    let dirs = models("");
    assert!(dirs.len() >= 14, "fixtures are missing");
    for dir in dirs {
        let d = against_reference(&dir, DType::F32);
        println!("{}: {d:?}", name(&dir));
        assert!(d.max_kl <= 1e-6 && d.top1 == 1.0, "{}: {d:?}", name(&dir));
    }
}

#[test]
fn quantised_files_are_no_further_from_hugging_face_than_llama_cpp() {
    let peer = std::fs::read(fixture("quantised/llama_cpp.json")).expect("llama.cpp's figures");
    let peer: serde_json::Value = serde_json::from_slice(&peer).expect("JSON");
    let dirs = models("quantised");
    assert!(dirs.len() >= 15, "fixtures are missing");
    let mut far = Vec::new();
    for dir in dirs {
        let theirs = peer[name(&dir)]["cache_f16"]["mean_kl"].as_f64().expect("llama.cpp's mean KL");
        let d = against_reference(&dir, DType::F16);
        println!("{}: {d:?}, llama.cpp {theirs:.3e}, ratio {:.3}", name(&dir), d.mean_kl / theirs);
        far.extend((d.mean_kl > theirs + 1e-6).then(|| name(&dir)));
    }
    assert!(far.is_empty(), "further than llama.cpp: {far:?}");
}

#[test]
fn chunking_the_prompt_and_threads_do_not_change_a_bit() {
    for dir in models("").into_iter().chain(models("quantised")) {
        let tokens = read_tokens(&dir.join("tokens.json"));
        let model = dir.join("model.gguf");
        let whole = logits(&model, &tokens, 512, DType::F16, 1);
        for (batch, threads) in [(1, 1), (7, 2), (64, 3)] {
            let other = logits(&model, &tokens, batch, DType::F16, threads);
            let differs = whole.iter().zip(&other).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{}: batch {batch}, {threads} threads", dir.display());
        }
    }
}
