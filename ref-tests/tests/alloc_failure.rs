//! Memory that cannot be had is an error, wherever it ends: an allocator refuses all large allocations from the first on, then
//! from the second on, and so forth, while a model is loaded, a session opened, a prompt read and tokens decoded. A session
//! opened before goes on as if nothing had been.

use engine::{EngineError, LoadOptions, Model, Session, SessionOptions};
use ref_tests::{fixture, root};
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
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
        last = s.eval(&[5 + t])?.to_vec();
    }
    Ok(last)
}

#[test]
fn every_large_allocation_may_fail() {
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
        let mut failed = 0;
        loop {
            LEFT.store(failed, SeqCst);
            let got = request(path, kv, mmap);
            LEFT.store(usize::MAX, SeqCst);
            match got {
                Ok(got) => {
                    assert!(got == want, "{kv}: other logits");
                    break;
                }
                Err(e) => {
                    let e = e.to_string();
                    assert!(
                        !e.contains('\n') && (e.contains("allocate") || e.contains("memory")),
                        "{kv}: {e}"
                    );
                }
            }
            other.truncate(0);
            assert!(other.eval(&ids).expect("others go on") == before, "{kv}: another session was disturbed");
            failed += 1;
            assert!(failed < 10_000);
        }
        println!("{} {kv}: {failed} large allocations, refused from each on", path.display());
        assert!(failed > 4, "{kv}: {failed}");
    }
}
