//! The plan is the allocation: what a session takes from the heap, counted by the allocator, against what was planned; and
//! nothing that stays is allocated once a session is open.

use benches::synth::{self, Experts, Geometry, Types};
use engine::plan::{Access, Machine, PlanModel, PlanOptions, Rules, fit};
use engine::{DType, Embedding, LoadOptions, Model, Pooling, Session, SessionOptions};
use ref_tests::root;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

fn add(n: usize) {
    let now = LIVE.fetch_add(n, Relaxed) + n;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged; only sizes are counted beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, l: Layout) -> *mut u8 {
        add(l.size());
        // SAFETY: the caller's.
        unsafe { System.alloc(l) }
    }
    unsafe fn alloc_zeroed(&self, l: Layout) -> *mut u8 {
        add(l.size());
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(l) }
    }
    unsafe fn dealloc(&self, p: *mut u8, l: Layout) {
        LIVE.fetch_sub(l.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(p, l) }
    }
}

#[global_allocator]
static ALLOC: Counting = Counting;

/// One at a time: the counts are the process's.
static ALONE: Mutex<()> = Mutex::new(());

struct Case {
    ctx: usize,
    batch: usize,
    k: DType,
    v: DType,
    kv: &'static str,
    mmap: bool,
}

fn check(path: &Path, c: &Case) {
    let name = format!(
        "{} -c {} -b {} -ctk {} -ctv {} --kv {} mmap {}",
        path.file_name().unwrap().to_string_lossy(),
        c.ctx,
        c.batch,
        c.k.name(),
        c.v.name(),
        c.kv,
        c.mmap
    );
    let session = SessionOptions {
        ctx: c.ctx,
        batch: c.batch,
        cache_k: c.k,
        cache_v: c.v,
        kv: c.kv.parse().unwrap(),
        ..SessionOptions::default()
    };
    let (planned, policy) = {
        let m = PlanModel::open(path).expect("headers");
        let access = if c.mmap { Access::Mapped } else { Access::Read };
        let o = PlanOptions { session: session.clone(), parallel: 1, access, pinned: 0, threads: 2 };
        let sizing = m.sizing(&o).expect("possible options");
        let machine = Machine { memory: u64::MAX, gpus: vec![] };
        let p = fit(&m, &o, &machine, &Rules::default()).expect("possible options").plan;
        // Nothing here samples.
        ((p.resident_bytes() - sizing.needs.sampling) as f64, sizing.needs.policy as usize)
    };
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let model = Model::load(path, &LoadOptions { mmap: c.mmap, threads: 2, ..Default::default() })
        .expect("the model loads");
    let mut s = Session::new(&model, &session).expect("a session");
    let n_vocab = model.info().n_vocab as u32;
    let tokens: Vec<u32> = (0..c.ctx as u32 - 8).map(|i| (i * 7 + 3) % n_vocab).collect();
    let open = LIVE.load(Relaxed);
    s.eval(&tokens).expect("a prompt");
    for t in 0..8 {
        s.eval(&[t]).expect("a token");
    }
    let (after, peak) = (LIVE.load(Relaxed), (PEAK.load(Relaxed) - before) as f64);
    println!(
        "{name}: planned {planned}, peak {peak}, ratio {:.3}, grown {}",
        peak / planned,
        after as i64 - open as i64
    );
    // Logits and the text itself, lists of a few entries per row (experts it chose), and what a policy records.
    let lists = policy + 4 * n_vocab as usize + 8 * c.ctx + 400 * c.batch.min(c.ctx) + (64 << 10);
    assert!(after <= open + lists, "{name}: {} bytes more after a prompt and eight tokens", after - open);
    assert!(peak <= planned * 1.02 + f64::from(1 << 20), "{name}: planned {planned}, peak {peak}");
    // The calling thread keeps its scratch memory from one case to the next.
    assert!(peak >= planned * 0.98 - f64::from(4 << 20), "{name}: planned {planned}, peak {peak}");
}

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

fn cases(path: &Path, longest: usize) {
    use DType::{F16, F32, Q8_0};
    for (ctx, batch, k, v, kv, mmap) in [
        (64, 8, F16, F16, "full", true),
        (longest, 64, F16, F16, "full", true),
        (longest, longest, F32, F32, "full", true),
        (longest, 32, Q8_0, Q8_0, "full", false),
        (longest, 32, F16, F16, "sinks:4+window:60", true),
        (longest, 512, Q8_0, F16, "window:100", true),
        (longest, 64, F16, F16, "h2o:budget=25%,every=4", true),
        (longest, 64, F16, F16, "expected:budget=25%,evict=both,every=4", true),
    ] {
        check(path, &Case { ctx, batch, k, v, kv, mmap });
    }
}

#[test]
fn the_demo_model_takes_what_was_planned() {
    let _alone = alone();
    cases(&root().join("ref-tests/demo-model/demo-q8_0.gguf"), 512);
}

#[test]
fn an_embedding_takes_what_was_planned() {
    let _alone = alone();
    let path = root().join("ref-tests/demo-model/demo-q8_0.gguf");
    let model =
        Model::load(&path, &LoadOptions { threads: 2, ..Default::default() }).expect("the model loads");
    for n in [3000, 100] {
        let planned = Embedding::bytes(&model, n).expect("a plan") as f64;
        let tokens: Vec<u32> = (0..n as u32).map(|i| 3 + i % 200).collect();
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        let mut text = Embedding::new(&model, tokens, Pooling::Mean).expect("memory");
        while text.step().expect("a batch").is_none() {}
        let peak = (PEAK.load(Relaxed) - before) as f64;
        println!("{n} tokens embedded: planned {planned}, peak {peak}");
        assert!(peak <= planned * 1.02 + f64::from(1 << 20), "planned {planned}, peak {peak}");
        // Scratch memory stays with the threads from the first text on.
        let stays = if n == 3000 { 8 << 20 } else { 20 << 20 };
        assert!(peak >= planned * 0.98 - f64::from(stays), "planned {planned}, peak {peak}");
    }
}

/// Rows as wide as those of public models, so that what is planned by width dwarfs what is not; fewer layers, experts, tokens.
#[test]
fn public_geometries_take_what_was_planned() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["llama-3.2-1b", "deepseek-v2-lite"] {
        let g = Geometry::named(name).expect("in the table");
        let experts = g.experts.map(|e| Experts { count: 16, ..e });
        let path = folder.path().join(format!("{name}.gguf"));
        let types = Types::from_name("Q4_K").expect("a type");
        synth::write(&Geometry { layers: 2, vocab: 30_000, experts, ..g }, types, 1, &path).expect("written");
        cases(&path, 512);
    }
}

#[test]
fn every_architecture_takes_what_was_planned() {
    let _alone = alone();
    for dir in std::fs::read_dir(root().join("ref-tests/fixtures")).expect("fixtures") {
        let path = dir.expect("an entry").path().join("model.gguf");
        if path.exists() {
            cases(&path, 200);
        }
    }
}
