//! Memory that cannot be had is an error, wherever it ends: an allocator refuses all large allocations from the first on, then
//! from the second on, and so forth, while a model is loaded, a session opened, a prompt read and tokens decoded. A session
//! opened before goes on as if nothing had been.

use benches::synth::{self, Geometry, Types};
use engine::plan::PlanModel;
use engine::{EngineError, LoadOptions, Model, Session, SessionOptions};
use ref_tests::{fixture, root};
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// What counts as large: more than the lists of this model's vocabulary take, whose growth nobody can be asked about.
const LARGE: usize = 256 << 10;

/// Large allocations that are still granted.
static LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Refusing;

fn refused(size: usize) -> bool {
    size >= LARGE
        && LEFT.load(SeqCst) != usize::MAX
        && LEFT.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_err()
}

// SAFETY: every call goes to the system's allocator unchanged, or gets null, which stands for no memory.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, l: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        if refused(l.size()) { std::ptr::null_mut() } else { unsafe { System.alloc(l) } }
    }
    unsafe fn alloc_zeroed(&self, l: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        if refused(l.size()) { std::ptr::null_mut() } else { unsafe { System.alloc_zeroed(l) } }
    }
    unsafe fn realloc(&self, p: *mut u8, l: Layout, n: usize) -> *mut u8 {
        // SAFETY: the caller's.
        if refused(n) { std::ptr::null_mut() } else { unsafe { System.realloc(p, l, n) } }
    }
    unsafe fn dealloc(&self, p: *mut u8, l: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(p, l) }
    }
}

#[global_allocator]
static ALLOC: Refusing = Refusing;

/// A whole request on a model of its own; the logits after the last token.
fn request(path: &Path, kv: &str, mmap: bool) -> Result<Vec<f32>, EngineError> {
    let model = Model::load(path, &LoadOptions { mmap, threads: 2, ..LoadOptions::default() })?;
    let kv = kv.parse().expect("a policy");
    let mut s =
        Session::new(&model, &SessionOptions { ctx: 700, batch: 256, kv, ..SessionOptions::default() })?;
    let ids: Vec<u32> = (0..600).map(|i| 3 + i % 200).collect();
    s.eval(&ids)?;
    let mut last = Vec::new();
    for t in 0..40 {
        let logits = s.eval(&[5 + t])?;
        last.clear();
        last.try_reserve_exact(logits.len())
            .map_err(|_| EngineError::Option("the test cannot allocate".into()))?;
        last.extend_from_slice(logits);
    }
    Ok(last)
}

/// What was refused from each large allocation on must be an error, until there are no more: the number of them.
fn refuse_each(mut attempt: impl FnMut() -> Result<(), EngineError>, mut after: impl FnMut()) -> usize {
    for failed in 0..10_000 {
        LEFT.store(failed, SeqCst);
        let got = attempt();
        LEFT.store(usize::MAX, SeqCst);
        match got {
            Ok(()) => return failed,
            Err(e) => {
                let e = e.to_string();
                assert!(!e.contains('\n') && (e.contains("allocate") || e.contains("memory")), "{e}");
            }
        }
        after();
    }
    panic!("no end");
}

/// One test at a time: the count is the process's.
static ALONE: Mutex<()> = Mutex::new(());

/// Lists as long as a vocabulary, from the header to the logits.
#[test]
fn a_large_vocabulary_may_not_fit() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let g = Geometry::named("llama-3.2-1b").expect("in the table").tiny();
    let g = Geometry { layers: 1, vocab: 100_000, ..g };
    synth::write(&g, Types::from_name("Q4_0").expect("a type"), 1, &path).expect("written");
    let plan = || PlanModel::open(&path).map(drop);
    let n = refuse_each(plan, || ());
    assert!(n >= 2, "{n} large allocations of a header");
    // What the process makes once stays.
    request(&path, "full", true).expect("with memory it works");
    let n = refuse_each(|| request(&path, "full", true).map(drop), || ());
    assert!(n >= 8, "{n} large allocations of a vocabulary and logits");
}

#[test]
fn every_large_allocation_may_fail() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let demo: PathBuf = root().join("ref-tests/demo-model/demo-q8_0.gguf");
    let llama = fixture("llama3").join("model.gguf");
    let model = Model::load(&demo, &LoadOptions { threads: 2, ..LoadOptions::default() })
        .expect("the demo model loads");
    let mut other = Session::new(&model, &SessionOptions::default()).expect("a session");
    let ids: Vec<u32> = (0..40).map(|i| 3 + i % 200).collect();
    let before = other.eval(&ids).expect("a prompt").to_vec();
    for (path, kv, mmap) in [
        (&demo, "full", true),
        (&demo, "sinks:4+window:200", false),
        (&demo, "h2o:budget=200,every=8", true),
        (&demo, "tova:budget=200,every=8,positions=compact", true),
        (&llama, "snapkv:budget=200,evict=both,every=8", false),
        (&llama, "keydiff:budget=200,every=8", true),
    ] {
        let want = request(path, kv, mmap).expect("with memory it works");
        let attempt = || {
            let got = request(path, kv, mmap)?;
            assert!(got == want, "{kv}: other logits");
            Ok(())
        };
        let failed = refuse_each(attempt, || {
            other.truncate(0);
            assert!(other.eval(&ids).expect("others go on") == before, "{kv}: another session was disturbed");
        });
        println!("{} {kv}: {failed} large allocations, refused from each on", path.display());
        assert!(failed > 4, "{kv}: {failed}");
    }
}
