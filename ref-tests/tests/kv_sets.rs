//! Caches whose entries a policy chooses, and several sequences in one cache, on the tiny reference models in f32: against
//! the full cache, the ring, the NumPy references of `kv_windows`, and sequences on their own.

use engine::kv::policy::{KvPolicy, LayerView, Needs};
use engine::kv::{Eviction, Made, PolicyInfo, register};
use engine::{Context, DType, EngineError, LoadOptions, Model, Rows, Session, SessionOptions};
use ref_tests::{compare, fixture, read_npy};
use std::sync::{Arc, Mutex};

fn model(name: &str) -> Arc<Model> {
    Model::load(&fixture(name).join("model.gguf"), &LoadOptions { threads: 2, ..Default::default() })
        .expect("a fixture")
}

fn options(kv: &str, batch: usize) -> SessionOptions {
    let kv = kv.parse().unwrap_or_else(|e| panic!("{e}"));
    SessionOptions { ctx: 256, batch, cache_k: DType::F32, cache_v: DType::F32, kv, ..Default::default() }
}

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        3 + ((x >> 33) % 300) as u32
    };
    (0..n).map(|_| next()).collect()
}

/// Logits of a prompt, then of tokens decoded one by one.
fn run(s: &mut Session, prompt: &[u32], decoded: &[u32]) -> Vec<f32> {
    let mut out = Vec::new();
    if !prompt.is_empty() {
        let each = |_: usize, row: &[f32]| {
            out.extend_from_slice(row);
            Ok::<_, EngineError>(())
        };
        s.eval_all(prompt, each).expect("evaluation");
    }
    for t in decoded {
        out.extend_from_slice(s.eval(&[*t]).expect("evaluation"));
    }
    out
}

fn same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    assert_eq!(a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits()), None, "{what}");
}

const MODELS: [&str; 4] = ["llama3", "gemma3", "deepseek2-v2-lite", "deepseek2-v3"];

#[test]
fn with_a_budget_of_the_whole_text_every_policy_equals_the_full_cache_bit_for_bit() {
    let ids = tokens(120, 1);
    for name in MODELS {
        let m = model(name);
        let full = run(&mut Session::new(&m, &options("full", 32)).unwrap(), &ids[..90], &ids[90..]);
        for info in engine::kv::registered() {
            let spec = match info.make {
                engine::kv::Make::Policy(_) if info.name == "full" => continue,
                engine::kv::Make::Policy(_) => format!("{}:budget=120,every=3", info.name),
                engine::kv::Make::Wrapper(_) => continue,
            };
            let mut s = match Session::new(&m, &options(&spec, 32)) {
                Ok(s) => s,
                Err(EngineError::Kv(e)) => {
                    println!("{name}: {e}");
                    continue;
                }
                Err(e) => panic!("{e}"),
            };
            let got = run(&mut s, &ids[..90], &ids[90..]);
            same_bits(&full, &got, &format!("{name}, {spec}"));
            assert_eq!(s.evicted(), 0);
        }
    }
}

/// The windows of a set that evicts after every token, and of the ring, differ by the query's own entry.
#[test]
fn a_window_kept_as_a_set_equals_the_ring_bit_for_bit() {
    let ids = tokens(150, 2);
    for name in MODELS {
        let m = model(name);
        let ring = run(&mut Session::new(&m, &options("window:21", 8)).unwrap(), &[], &ids);
        let mut s = Session::new(&m, &options("window:20,every=1", 8)).unwrap();
        // Gemma's local layers have a window of 16 under both.
        same_bits(&ring, &run(&mut s, &[], &ids), name);
        assert_eq!(s.evicted(), ids.len() - 20);
        let no_sinks = run(&mut Session::new(&m, &options("sinks:0,budget=21", 8)).unwrap(), &[], &ids);
        same_bits(&ring, &no_sinks, "sinks:0");
    }
}

/// Kept keys turned to 0, 1, 2, ... after every token are what StreamingLLM describes, and what the ring's second rotation of
/// queries must equal.
#[test]
fn sinks_kept_as_a_set_with_compact_positions_equal_the_reference() {
    for (name, sinks, window) in
        [("llama", 4, 24), ("gemma3", 4, 24), ("deepseek2-v2-lite", 4, 24), ("deepseek2-v3", 5, 27)]
    {
        let path = fixture(&format!("kv/{name}-s{sinks}-w{window}.json"));
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let list = |k: &str| -> Vec<usize> {
            json[k].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
        };
        let ids: Vec<u32> = list("tokens").iter().map(|t| *t as u32).collect();
        let m = model(name);
        let spec = format!("sinks:{sinks}+window:{},every=1,positions=compact", window - 1);
        let got = run(&mut Session::new(&m, &options(&spec, 8)).unwrap(), &[], &ids);
        let vocab = m.info().n_vocab;
        let rows: Vec<f32> =
            list("rows").iter().flat_map(|r| got[r * vocab..][..vocab].iter().copied()).collect();
        let d = compare(&read_npy(&path.with_extension("npy")).2, &rows, vocab);
        println!("{name}: max KL {:.1e}", d.max_kl);
        // Each key is turned some twenty times in f32.
        assert!(d.max_kl <= 1e-8, "{name}: {d:?}");
    }
}

/// Keeps what drew most attention; notes what it was shown.
#[derive(Debug)]
struct Probe(Needs);

impl KvPolicy for Probe {
    fn needs(&self) -> Needs {
        self.0
    }

    fn score(&self, view: &LayerView<'_>, head: usize, out: &mut [f32]) {
        match self.0.mass_recent > 0 {
            true => out.copy_from_slice(view.mass_recent(head)),
            false => out.copy_from_slice(view.mass_total(head)),
        }
    }
}

fn register_probes() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    fn total(_: &engine::kv::Params<'_>) -> Made {
        Ok(Arc::new(Probe(Needs { mass_total: true, ..Needs::default() })))
    }
    fn both(_: &engine::kv::Params<'_>) -> Made {
        Ok(Arc::new(Probe(Needs {
            mass_total: true,
            mass_recent: 5,
            keys: true,
            values: true,
            ..Needs::default()
        })))
    }
    fn all(_: &engine::kv::Params<'_>) -> Made {
        let needs = Needs { keys: true, values: true, mass_total: true, mass_recent: 16, ..Needs::default() };
        Ok(Arc::new(Probe(Needs { queries: 96, ..needs })))
    }
    fn nan(_: &engine::kv::Params<'_>) -> Made {
        Ok(Arc::new(Nan))
    }
    ONCE.call_once(|| {
        register(PolicyInfo::policy("probe-total", total)).unwrap();
        register(PolicyInfo::policy("probe-both", both)).unwrap();
        register(PolicyInfo::policy("probe-all", all)).unwrap();
        register(PolicyInfo::policy("probe-nan", nan)).unwrap();
    });
}

/// A policy that is broken.
#[derive(Debug)]
struct Nan;

impl KvPolicy for Nan {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn score(&self, view: &LayerView<'_>, _: usize, out: &mut [f32]) {
        out.fill(if view.geometry.layer == 1 { f32::NAN } else { 0.0 });
    }
}

/// What a watcher notes of an eviction.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    layer: usize,
    positions: Vec<u64>,
    total: Vec<f32>,
    recent: Vec<f32>,
    kept: Vec<u32>,
}

fn watch(context: &mut Context) -> Arc<Mutex<Vec<Seen>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let to = seen.clone();
    context.cache_mut().watch(Some(Box::new(move |e: &Eviction<'_>| {
        to.lock().unwrap().push(Seen {
            layer: e.view.geometry.layer,
            positions: e.view.positions.to_vec(),
            total: e.view.mass_total.to_vec(),
            recent: e.view.mass_recent.to_vec(),
            kept: e.kept.kept.clone(),
        });
    })));
    seen
}

fn feed(c: &mut Context, seq: engine::SeqId, ids: &[u32], chunk: usize, prompt: usize) {
    for tokens in ids.chunks(chunk) {
        c.forward(&[Rows { seq, tokens, prompt }]).expect("a pass");
    }
}

#[test]
fn masses_add_up_and_do_not_depend_on_how_the_prompt_is_cut() {
    register_probes();
    for name in MODELS {
        let m = model(name);
        // Query heads of a key head.
        let group = if name.starts_with("deepseek2") { 4.0 } else { 2.0 };
        let ids = tokens(70, 3);
        let evictions = |chunk: usize| {
            let mut c = Context::new(&m, &options("probe-both:budget=24,evict=both,every=7", 64), 1).unwrap();
            let seen = watch(&mut c);
            let seq = c.cache_mut().admit(0).unwrap();
            feed(&mut c, seq, &ids[..48], chunk, 48);
            assert_eq!(c.cache().evicted(seq).unwrap(), 24);
            feed(&mut c, seq, &ids[48..], 1, 0);
            std::mem::take(&mut *seen.lock().unwrap())
        };
        let whole = evictions(64);
        // At the end of the prompt, and after 7, 14 and 21 tokens.
        let layers = whole.iter().filter(|s| s.layer == whole[0].layer).count();
        assert_eq!(layers, 4, "{name}");
        for s in whole.iter().filter(|s| s.positions.len().is_multiple_of(48) && s.positions[47] == 47) {
            let heads = s.positions.len() / 48;
            for h in 0..heads {
                let total: f32 = s.total[h * 48..][..48].iter().sum();
                let recent: f32 = s.recent[h * 48..][..48].iter().sum();
                assert!((total - 48.0 * group).abs() < 1e-2, "{name}: {total}");
                assert!((recent - 5.0 * group).abs() < 1e-3, "{name}: {recent}");
            }
        }
        for chunk in [1, 5, 13] {
            assert!(evictions(chunk) == whole, "{name}: chunks of {chunk}");
        }
    }
}

/// Everything a policy may ask for of one layer, owned.
struct Recorded {
    geometry: engine::kv::policy::LayerGeometry,
    entries: usize,
    keys: Vec<f32>,
    k_pe: Vec<f32>,
    queries: Vec<f32>,
    total: Vec<f32>,
    recent: Vec<f32>,
}

impl Recorded {
    /// Scores of a query head: `[queries, entries]`.
    fn scores(&self, head: usize) -> Vec<f64> {
        let (g, n) = (&self.geometry, self.entries);
        let kv = head / (g.heads / g.kv_heads);
        let dim = g.key + g.k_pe;
        let m = self.queries.len() / g.heads / dim;
        let mut out = Vec::new();
        for q in self.queries[head * m * dim..][..m * dim].chunks_exact(dim) {
            for e in 0..n {
                let key = &self.keys[(kv * n + e) * g.key..][..g.key];
                let pe = if g.k_pe > 0 { &self.k_pe[e * g.k_pe..][..g.k_pe] } else { &[] };
                let dot: f64 =
                    q.iter().zip(key.iter().chain(pe)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                out.push(dot * f64::from(g.scale));
            }
        }
        out
    }

    /// What 96 queries in a row give to 96 entries by these scores, counting the last `count` queries.
    fn masses(&self, count: usize) -> Vec<f64> {
        let (g, n) = (&self.geometry, self.entries);
        let mut out = vec![0.0; g.kv_heads * n];
        for head in 0..g.heads {
            let scores = self.scores(head);
            let kv = head / (g.heads / g.kv_heads);
            for t in n - count..n {
                let seen = &scores[t * n..][..t + 1];
                let max = seen.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = seen.iter().map(|s| (s - max).exp()).sum();
                seen.iter().enumerate().for_each(|(e, s)| out[kv * n + e] += (s - max).exp() / sum);
            }
        }
        out
    }
}

fn near(a: &[f32], b: impl IntoIterator<Item = f64>, what: &str) {
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((f64::from(*a) - b).abs() <= 2e-3 + 1e-3 * b.abs(), "{what}: {a} and {b} at {i}");
    }
}

/// Recorded queries and cached keys explain the recorded masses; and masses and scores are those that transformers had
/// (`kv/record.py`), where they were recorded.
#[test]
fn what_is_recorded_for_policies_is_what_attention_did() {
    register_probes();
    for name in ["llama3", "qwen2", "gemma3", "deepseek2-v2-lite", "deepseek2-v2-lite-old", "deepseek2-v3"] {
        let m = model(name);
        let ids: Vec<u32> = ref_tests::read_tokens(&fixture(name).join("tokens.json"))[..96].to_vec();
        for chunk in [96, 20] {
            let mut c = Context::new(&m, &options("probe-all:budget=40", 96), 1).unwrap();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let to = seen.clone();
            c.cache_mut().watch(Some(Box::new(move |e: &Eviction<'_>| {
                to.lock().unwrap().push(Recorded {
                    geometry: e.view.geometry.clone(),
                    entries: e.view.entries,
                    keys: e.view.keys.to_vec(),
                    k_pe: e.view.k_pe.to_vec(),
                    queries: e.view.queries.to_vec(),
                    total: e.view.mass_total.to_vec(),
                    recent: e.view.mass_recent.to_vec(),
                });
            })));
            let seq = c.cache_mut().admit(0).unwrap();
            feed(&mut c, seq, &ids, chunk, 96);
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            assert!(!seen.is_empty());
            for r in &seen {
                let what = format!("{name}, layer {}, chunks of {chunk}", r.geometry.layer);
                assert_eq!(r.entries, 96, "{what}");
                near(&r.total, r.masses(96), &what);
                near(&r.recent, r.masses(16), &what);
            }
            if name == "llama3" || name == "deepseek2-v2-lite" {
                let r = seen.iter().find(|r| r.geometry.layer == 1).unwrap();
                let read = |what: &str| read_npy(&fixture(&format!("kv-policies/{name}/{what}.npy"))).2;
                let theirs = Recorded {
                    geometry: r.geometry.clone(),
                    entries: 96,
                    keys: read("keys"),
                    k_pe: if name == "llama3" { Vec::new() } else { read("k_pe") },
                    queries: read("queries"),
                    total: read("mass_total"),
                    recent: read("mass_recent_16"),
                };
                near(&r.total, theirs.total.iter().map(|x| f64::from(*x)), name);
                near(&r.recent, theirs.recent.iter().map(|x| f64::from(*x)), name);
                for h in 0..r.geometry.heads {
                    let ours: Vec<f32> = r.scores(h).iter().map(|s| *s as f32).collect();
                    near(&ours, theirs.scores(h), &format!("{name}, head {h}"));
                }
            }
        }
    }
}

#[test]
fn a_policy_s_nan_is_an_error_and_the_rest_goes_on() {
    register_probes();
    let m = model("llama3");
    let mut c = Context::new(&m, &options("probe-nan:budget=10,every=4", 16), 2).unwrap();
    let a = c.cache_mut().admit(0).unwrap();
    let ids = tokens(16, 4);
    let e = c.forward(&[Rows { seq: a, tokens: &ids, prompt: 16 }]).unwrap_err();
    assert!(e.to_string().contains("layer 1") && e.to_string().contains("NaN"), "{e}");
    assert_eq!(c.cache().tokens(a).unwrap().len(), 16);
    c.cache_mut().free(a).unwrap();
    let b = c.cache_mut().admit(0).unwrap();
    c.forward(&[Rows { seq: b, tokens: &ids[..8], prompt: 8 }]).unwrap();
    assert!(matches!(c.cache().tokens(a), Err(EngineError::NoSequence)));
}

/// Sequences of different lengths decoded together, one forked from another in the middle.
#[test]
fn sequences_decoded_together_get_the_bits_they_get_alone() {
    register_probes();
    for name in MODELS {
        let m = model(name);
        let vocab = m.info().n_vocab;
        for kv in ["full", "sinks:4+window:20", "window:9", "probe-total:budget=18,every=5"] {
            let texts: Vec<Vec<u32>> =
                [(40, 5), (13, 6), (60, 7)].iter().map(|(n, seed)| tokens(n + 30, *seed)).collect();
            let alone: Vec<Vec<f32>> = texts
                .iter()
                .map(|t| {
                    let n = t.len() - 30;
                    run(&mut Session::new(&m, &options(kv, 16)).unwrap(), &t[..n], &t[n..])[n * vocab..]
                        .to_vec()
                })
                .collect();
            let mut c = Context::new(&m, &options(kv, 16), 4).unwrap();
            let mut seqs = Vec::new();
            for t in &texts {
                let seq = c.cache_mut().admit(0).unwrap();
                feed(&mut c, seq, &t[..t.len() - 30], 16, t.len() - 30);
                seqs.push(seq);
            }
            let mut together = vec![Vec::new(); 4];
            for i in 0..30 {
                if i == 10 {
                    seqs.push(c.cache_mut().fork(seqs[0]).unwrap());
                    together[3] = together[0].clone();
                    assert!(matches!(c.cache_mut().admit(0), Err(EngineError::NoRoom { sequences: 4 })));
                }
                if i == 20 {
                    // A shared block is not lost when its first holder goes.
                    c.cache_mut().free(seqs.remove(0)).unwrap();
                    together.remove(0);
                }
                let of = |k: usize| &texts[(if i < 20 { [0, 1, 2, 0] } else { [1, 2, 0, 0] })[k]];
                let next: Vec<u32> = (0..seqs.len()).map(|k| of(k)[of(k).len() - 30 + i]).collect();
                let rows: Vec<Rows<'_>> = seqs
                    .iter()
                    .zip(&next)
                    .map(|(seq, t)| Rows { seq: *seq, tokens: std::slice::from_ref(t), prompt: 0 })
                    .collect();
                c.forward(&rows).unwrap();
                for (k, out) in together.iter_mut().enumerate().take(rows.len()) {
                    c.logits(&[k as u32], out).unwrap();
                }
            }
            for (k, text) in [(0, 1), (1, 2), (2, 0)] {
                same_bits(&alone[text], &together[k], &format!("{name}, {kv}, sequence {text}"));
            }
            seqs.iter().for_each(|s| c.cache_mut().free(*s).unwrap());
            assert_eq!(c.cache().entries().0, 0);
        }
    }
}

#[test]
fn a_prefix_is_used_again_where_its_entries_are_there() {
    let m = model("deepseek2-v2-lite");
    let ids = tokens(140, 8);
    let other = tokens(20, 9);
    for (kv, batch, keep, usable) in [
        ("full", 16, 60, 60),
        ("sinks:4+window:20", 16, 137, 137),
        ("sinks:4+window:20", 16, 50, 4),
        ("window:20", 16, 50, 0),
        ("knorm:budget=30", 16, 140, 140),
        ("knorm:budget=30", 16, 139, 0),
    ] {
        let mut s = Session::new(&m, &options(kv, batch)).unwrap();
        run(&mut s, &ids, &[]);
        assert_eq!(s.truncate(keep), usable, "{kv}");
        let again = run(&mut s, &[&ids[usable..keep], &other].concat(), &[]);
        if usable < 140 {
            let mut fresh = Session::new(&m, &options(kv, batch)).unwrap();
            let all = run(&mut fresh, &[&ids[..keep], &other].concat(), &[]);
            let (tail, vocab) = (20, m.info().n_vocab);
            let d = compare(&all[all.len() - tail * vocab..], &again[again.len() - tail * vocab..], vocab);
            // Absorbed or expanded attention is chosen by the length of what is new.
            assert!(d.max_kl < 1e-9, "{kv}: {d:?}");
        }
    }
}

#[test]
fn a_saved_sequence_goes_on_with_the_same_bits_and_a_wrong_file_changes_nothing() {
    register_probes();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sequence.kv");
    let (m, other) = (model("deepseek2-v3"), model("deepseek2-v2-lite"));
    let ids = tokens(120, 10);
    for kv in ["full", "sinks:4+window:20", "probe-all:budget=24,every=5", "h2o:budget=24,positions=compact"]
    {
        let mut s = Session::new(&m, &options(kv, 16)).unwrap();
        run(&mut s, &ids[..70], &ids[70..90]);
        s.save(&path).unwrap();
        let on = run(&mut s, &[], &ids[90..]);
        let mut t = Session::new(&m, &options(kv, 16)).unwrap();
        run(&mut t, &ids[..7], &[]);
        t.load(&path).unwrap();
        assert_eq!(t.tokens(), &ids[..90]);
        same_bits(&on, &run(&mut t, &[], &ids[90..]), kv);

        let mut wrong = Session::new(&other, &options(kv, 16)).unwrap();
        run(&mut wrong, &ids[..7], &[]);
        let e = wrong.load(&path).unwrap_err().to_string();
        assert!(e.contains("another model"), "{e}");
        assert_eq!(wrong.tokens(), &ids[..7]);
        let mut wrong = Session::new(&m, &options("window:9", 16)).unwrap();
        let e = wrong.load(&path).unwrap_err().to_string();
        assert!(e.contains("--kv window:9"), "{e}");
        let e = wrong.load(&dir.path().join("none")).unwrap_err().to_string();
        assert!(e.contains("none"), "{e}");
    }
    let whole = std::fs::read(&path).unwrap();
    let mut s = Session::new(&m, &options("h2o:budget=24,positions=compact", 16)).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 50) {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, &bad).unwrap();
        assert!(matches!(s.load(&path), Err(EngineError::CacheFile { .. })), "byte {at}");
        std::fs::write(&path, &whole[..at]).unwrap();
        assert!(matches!(s.load(&path), Err(EngineError::CacheFile { .. })), "{at} bytes");
        assert!(s.tokens().is_empty());
    }
}

#[test]
fn impossible_configurations_are_refused_when_the_session_opens() {
    for bad in [
        "sinks:8+window:8",
        "sinks:8,budget=16",
        "window:0",
        "h2o:budget=0",
        "h2o:budget=0%",
        "nonsense:budget=5",
    ] {
        let e = bad.parse::<engine::KvSpec>().expect_err(bad).to_string();
        assert!(e.contains('^'), "{e}");
    }
    // Heads of 16 cannot be chosen for one by one in blocks of 32.
    let o = SessionOptions { cache_k: DType::Q8_0, cache_v: DType::Q8_0, ..options("knorm:budget=20", 16) };
    let e = Session::new(&model("llama"), &o).err().expect("an error").to_string();
    assert!(e.contains("f16"), "{e}");
    let mut s = Session::new(&model("llama"), &options("knorm:budget=20", 16)).unwrap();
    assert!(s.restart(5).is_err());
    run(&mut s, &tokens(40, 11), &[]);
    assert_eq!(s.evicted(), 20);
}
