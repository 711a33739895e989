//! Bounded caches against from-scratch forward passes with the same mask and positions (`ref-tests/kv/make.py`), in f32.

use engine::{DType, EngineError, KvSpec, LoadOptions, Model, Session, SessionOptions};
use ref_tests::{compare, fixture, read_npy};
use std::sync::Arc;

struct Case {
    name: String,
    model: Arc<Model>,
    sinks: usize,
    window: usize,
    spec: KvSpec,
    tokens: Vec<u32>,
    rows: Vec<usize>,
    reference: Vec<f32>,
}

fn cases() -> Vec<Case> {
    let entries = std::fs::read_dir(fixture("kv")).expect("fixtures");
    let mut paths: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    paths.sort();
    assert!(paths.len() >= 7, "fixtures are missing");
    let case = |p: &std::path::PathBuf| {
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(p).unwrap()).expect("JSON");
        let list = |k: &str| -> Vec<u64> {
            json[k].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
        };
        let number = |k: &str| json[k].as_u64().unwrap() as usize;
        let (sinks, window) = (number("sinks"), number("window"));
        let spec =
            if sinks == 0 { format!("window:{window}") } else { format!("sinks:{sinks}+window:{window}") };
        let path = fixture(json["model"].as_str().unwrap()).join("model.gguf");
        Case {
            name: p.file_stem().unwrap().to_string_lossy().into_owned(),
            model: Model::load(&path, &LoadOptions { threads: 2, ..Default::default() })
                .expect("the fixture loads"),
            sinks,
            window,
            spec: spec.parse().expect("a configuration"),
            tokens: list("tokens").iter().map(|t| *t as u32).collect(),
            rows: list("rows").iter().map(|t| *t as usize).collect(),
            reference: read_npy(&p.with_extension("npy")).2,
        }
    };
    paths.iter().map(case).collect()
}

impl Case {
    fn session(&self, batch: usize) -> Session {
        let (cache_k, cache_v) = (DType::F32, DType::F32);
        let o =
            SessionOptions { ctx: 64, batch, cache_k, cache_v, kv: self.spec.clone(), ..Default::default() };
        Session::new(&self.model, &o).expect("a session")
    }

    /// Logits of all rows.
    fn logits(&self, session: &mut Session) -> Vec<f32> {
        let mut out = Vec::new();
        let each = |_: usize, row: &[f32]| {
            out.extend_from_slice(row);
            Ok::<_, EngineError>(())
        };
        session.eval_all(&self.tokens, each).expect("evaluation");
        out
    }

    /// The largest KL divergence of the reference's rows.
    fn distance(&self, logits: &[f32]) -> f64 {
        let vocab = self.model.info().n_vocab;
        let rows: Vec<f32> =
            self.rows.iter().flat_map(|r| logits[r * vocab..][..vocab].iter().copied()).collect();
        compare(&self.reference, &rows, vocab).max_kl
    }
}

/// What f32 arithmetic may differ from f64 (the full caches of these models differ by up to 1e-10).
const ROUNDING: f64 = 1e-9;

#[test]
fn sinks_and_windows_equal_a_forward_pass_with_the_same_mask_however_the_prompt_is_cut() {
    for c in cases() {
        assert!(c.tokens.len() >= 5 * (c.sinks + c.window));
        let whole = c.logits(&mut c.session(512));
        let d = c.distance(&whole);
        println!("{}: max KL {d:.1e}", c.name);
        assert!(d <= ROUNDING, "{}: {d}", c.name);
        for batch in [1, 7, 33, 64] {
            let cut = c.logits(&mut c.session(batch));
            let differs = whole.iter().zip(&cut).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{}: batch {batch}", c.name);
        }
    }
}

#[test]
fn decoding_one_by_one_equals_it_too() {
    for c in cases() {
        let mut s = c.session(16);
        let mut logits = Vec::new();
        for t in &c.tokens {
            logits.extend_from_slice(s.eval(&[*t]).expect("evaluation"));
        }
        let d = c.distance(&logits);
        assert!(d <= ROUNDING, "{}: {d}", c.name);
        assert_eq!(s.evicted(), c.tokens.len() - c.sinks - c.window);
    }
}

#[test]
fn positions_may_pass_2_to_the_31() {
    for c in cases() {
        for start in [(1 << 31) - 100, 1 << 33, (1 << 45) + 12_345] {
            let mut s = c.session(64);
            s.restart(start).unwrap();
            let d = c.distance(&c.logits(&mut s));
            println!("{} from {start}: max KL {d:.1e}", c.name);
            assert!(d <= ROUNDING, "{} from {start}: {d}", c.name);
        }
    }
}

#[test]
fn local_layers_hold_only_their_window() {
    let path = fixture("gemma3/model.gguf");
    let model = Model::load(&path, &LoadOptions::default()).unwrap();
    let bytes = |ctx, kv: &str| {
        let kv = kv.parse().unwrap();
        let o = SessionOptions { ctx, batch: 32, kv, ..SessionOptions::default() };
        let session = Session::new(&model, &o).unwrap();
        assert_eq!(session.cache_bytes(), model.cache_bytes(&o, 1).unwrap());
        session.cache_bytes()
    };
    // An entry: keys and values of two heads of 32 halves. One of eight layers is global; the others have a window of 16
    // and a batch of 32, 47 entries, which need at most three blocks of 32.
    let entry = 2 * 2 * 32 * 2;
    assert_eq!(bytes(4096, "full"), entry * (4096 + 7 * 96));
    assert_eq!(bytes(8192, "full"), entry * (8192 + 7 * 96));
    // A window of 64, 95 entries with the batch: four blocks, and one for the sinks.
    assert_eq!(bytes(8192, "sinks:4+window:64"), entry * (5 * 32 + 7 * 96));
}
