//! Whole models through the engine: logits against Hugging Face's with the CPU's bars, and sequences that outlive their cache.

use crate::gpu;
use engine::{Devices, EngineError, LoadOptions, Model, Session, SessionOptions};
use kernels::Device;
use quant::DType;
use ref_tests::gpu::{Call, Interpreted};
use ref_tests::{compare, fixture, read_npy, read_tokens};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

pub fn load(name: &str, devices: Option<Devices>) -> Arc<Model> {
    let options = LoadOptions { threads: 1, devices, ..Default::default() };
    Model::load(&fixture(name).join("model.gguf"), &options).expect("the fixture loads")
}

pub fn eval(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut out = Vec::new();
    let keep = |_, row: &[f32]| {
        out.extend_from_slice(row);
        Ok::<_, EngineError>(())
    };
    session.eval_all(tokens, keep).expect("evaluation");
    out
}

pub fn options(ctx: usize, batch: usize, cache: DType) -> SessionOptions {
    SessionOptions { ctx, batch, cache_k: cache, cache_v: cache, ..Default::default() }
}

/// Logits of the first `n` tokens, in batches of `batch`.
fn logits(name: &str, device: Option<&Device>, n: usize, batch: usize, cache: DType) -> Vec<f32> {
    let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..n];
    let mut session = Session::new(&load(name, device.cloned().map(Into::into)), &options(n, batch, cache))
        .expect("a session");
    eval(&mut session, tokens)
}

#[test]
fn logits_are_hugging_faces() {
    // More tokens than gemma3's window of 16, and than a product's eight columns.
    for (name, n) in [
        ("llama3", 11),
        ("mistral", 9),
        ("qwen2", 9),
        ("qwen3", 9),
        ("qwen3moe", 10),
        ("gemma3", 19),
        ("deepseek2-v2-lite", 9),
        ("deepseek2-v2-lite-old", 9),
        ("deepseek2-v3", 10),
        ("deepseek2-v3-heads", 10),
    ] {
        let (_, vocab, reference) = read_npy(&fixture(name).join("logits.npy"));
        let start = std::time::Instant::now();
        let d = compare(&reference[..n * vocab], &logits(name, Some(&gpu()), n, n, DType::F32), vocab);
        println!("{name}: {d:?}, {:.1?}", start.elapsed());
        assert!(d.max_kl <= 1e-6 && d.top1 == 1.0, "{name}: {d:?}");
    }
}

/// Quantised weights and caches, token by token: a prompt's rows the CPU may compute by MLA's expanded form, which rounds less.
#[test]
fn quantised_models_are_the_cpus() {
    for (name, cache) in [
        ("quantised/q-llama-q4_k_m", DType::F16),
        ("quantised/q-llama-q4_0", DType::Q8_0),
        ("quantised/q-gemma3-qat", DType::BF16),
        ("quantised/q-deepseek2-q4_k_m", DType::F16),
        ("quantised/q-deepseek2-mxfp4", DType::Q8_0),
    ] {
        one_by_one(name, cache, &gpu());
    }
}

fn one_by_one(name: &str, cache: DType, device: &Device) {
    let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..6];
    let run = |device: Option<&Device>| {
        let mut session = Session::new(&load(name, device.cloned().map(Into::into)), &options(8, 1, cache))
            .expect("a session");
        let rows = tokens.iter().map(|t| session.eval(&[*t]).expect("evaluation").to_vec());
        rows.collect::<Vec<_>>().concat()
    };
    let want = run(None);
    let d = compare(&want, &run(Some(device)), want.len() / tokens.len());
    println!("{name}: {d:?}");
    assert!(d.max_kl <= 1e-5 && d.top1 == 1.0, "{name}: {d:?}");
}

/// MLA over f16 caches on tensor cores, with the shared memory of either kind of GPU that has its own kernels.
#[test]
fn newer_gpus_compute_mla_on_tensor_cores() {
    for capability in [(8, 9), (9, 0)] {
        let dev = Interpreted::like(capability, 1 << 30).device().expect("the kernels load");
        one_by_one("quantised/q-deepseek2-q4_k_m", DType::F16, &dev);
        one_by_one("deepseek2-v3-heads", DType::F16, &dev);
        for kv in ["sinks:2+window:6", "h2o:budget=8,positions=compact"] {
            // Prompts round activations to f16 there.
            forgetting("deepseek2-v2-lite", kv, DType::F16, &dev, 1e-5);
        }
        same_in_batches("deepseek2-v3", &dev);
    }
}

/// 40 heads: prompts of few rows go to blocks of 16 heads, of more to blocks of 32, of many to such of 64; with the same bits, and as near to
/// Hugging Face's logits as activations in f16 are, which cost more than the f16 cache does on the CPU.
#[test]
fn blocks_of_all_sizes_share_heads() {
    let (name, n) = ("deepseek2-v3-heads", 66);
    let (_, vocab, reference) = read_npy(&fixture(name).join("logits.npy"));
    let distance = |got: &[f32]| compare(&reference[..n * vocab], got, vocab);
    let on = Interpreted::like((9, 0), 1 << 30);
    let (dev, launched) = (on.device().expect("the kernels load"), Arc::<Mutex<BTreeSet<String>>>::default());
    let log = launched.clone();
    on.watch(move |call| {
        if let Call::Launch(entry) = call {
            log.lock().expect("a log").insert(entry);
        }
    });
    let mut all = Vec::new();
    for (batch, entries) in [(n, ["mla_64"].as_slice()), (40, &["mla_16", "mla_32"])] {
        all.push(logits(name, Some(&dev), n, batch, DType::F16));
        let launched = std::mem::take(&mut *launched.lock().expect("a log"));
        assert_eq!(launched.iter().filter(|e| e.starts_with("mla")).collect::<Vec<_>>(), entries);
    }
    assert!(all[0].iter().zip(&all[1]).all(|(a, b)| a.to_bits() == b.to_bits()));
    let (d, cpu) = (distance(&all[0]), distance(&logits(name, None, n, n, DType::F16)));
    println!("{d:?}, the CPU with such a cache: {cpu:?}");
    assert!(d.top1 == 1.0 && d.mean_kl <= 5e-6 && d.max_kl <= 2e-5, "{d:?}");
}

/// Attention on tensor cores, of prompts longer than gemma3's window and of what is decoded: as near to Hugging Face as the CPU over the same
/// caches, whose rounding is what is left.
#[test]
fn newer_gpus_attend_on_tensor_cores() {
    let dev = Interpreted::like((9, 0), 1 << 30).device().expect("the kernels load");
    for (name, cache) in [("gemma3", DType::F16), ("gemma3", DType::Q8_0), ("llama3", DType::Q8_0)] {
        let (_, vocab, reference) = read_npy(&fixture(name).join("logits.npy"));
        let distance = |dev| compare(&reference[..19 * vocab], &logits(name, dev, 19, 19, cache), vocab);
        let (cpu, gpu) = (distance(None), distance(Some(&dev)));
        println!("{name}, {cache}: {gpu:?}, the CPU {cpu:?}");
        assert!(gpu.mean_kl <= 2.0 * cpu.mean_kl && gpu.top1 == 1.0, "{name}, {cache}: {gpu:?}, not {cpu:?}");
    }
    one_by_one("quantised/q-gemma3-qat", DType::F16, &dev);
    forgetting("llama3", "sinks:2+window:6", DType::F16, &dev, 1e-5);
    same_in_batches("gemma3", &dev);
}

/// Neither the batch nor what was computed before changes a bit.
#[test]
fn batches_do_not_change_a_bit() {
    for name in ["llama3", "deepseek2-v3"] {
        same_in_batches(name, &gpu());
    }
}

fn same_in_batches(name: &str, dev: &Device) {
    let whole = logits(name, Some(dev), 10, 10, DType::F16);
    for batch in [1, 3] {
        let other = logits(name, Some(dev), 10, batch, DType::F16);
        let differs = whole.iter().zip(&other).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name}: batches of {batch}");
    }
}

/// Rings with sinks, policies that measure, evict, move and turn: what the cache does with its own rows.
#[test]
fn caches_that_forget_are_the_cpus() {
    for (name, kv) in [
        ("llama3", "sinks:2+window:6"),
        ("deepseek2-v2-lite", "sinks:2+window:6"),
        ("llama3", "h2o:budget=8"),
        ("deepseek2-v2-lite", "h2o:budget=8,positions=compact"),
        ("qwen3", "snapkv:budget=8"),
    ] {
        forgetting(name, kv, DType::F32, &gpu(), 1e-6);
    }
}

fn forgetting(name: &str, kv: &str, cache: DType, device: &Device, bar: f64) {
    let tokens = &read_tokens(&fixture(name).join("tokens.json"))[..16];
    let run = |device: Option<&Device>| {
        let kv = kv.parse().unwrap_or_else(|e| panic!("{kv}: {e:?}"));
        let o = SessionOptions { kv, ..options(64, 4, cache) };
        eval(&mut Session::new(&load(name, device.cloned().map(Into::into)), &o).expect("a session"), tokens)
    };
    let (want, got) = (run(None), run(Some(device)));
    let d = compare(&want, &got, want.len() / tokens.len());
    println!("{name}, {kv}: {d:?}");
    assert!(d.max_kl <= bar && d.top1 == 1.0, "{name}, {kv}: {d:?}");
}

/// A saved sequence goes on with the same bits, on the GPU as on the CPU that read its file.
#[test]
fn saved_sequences_go_on() {
    let dev = gpu();
    let model = load("llama3", Some(dev.clone().into()));
    let tokens = &read_tokens(&fixture("llama3").join("tokens.json"))[..8];
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("saved");
    let o = options(16, 8, DType::Q8_0);
    let mut session = Session::new(&model, &o).expect("a session");
    eval(&mut session, &tokens[..5]);
    session.save(&path).expect("saved");
    let want = eval(&mut session, &tokens[5..]);
    for device in [Some(&dev), None] {
        let mut other =
            Session::new(&load("llama3", device.cloned().map(Into::into)), &o).expect("a session");
        other.load(&path).expect("loaded");
        let got = eval(&mut other, &tokens[5..]);
        match device {
            Some(_) => assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits())),
            None => assert!(compare(&want, &got, want.len() / 3).max_kl <= 1e-6),
        }
    }
}
