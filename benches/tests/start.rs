//! Starting up: the first token comes at once, and memory beyond the mapped weights is the plan's (cache and buffers) plus
//! little. One test alone in its process, whose memory it measures.

use benches::synth::{self, Geometry, Types};
use engine::{LoadOptions, Model, Session, SessionOptions};
use std::time::{Duration, Instant};

/// Resident bytes: of mapped files, and all else. Linux only.
fn resident() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
    };
    Some((field("RssFile:")?, field("RssAnon:")?))
}

#[test]
fn the_first_token_comes_at_once_and_memory_is_the_plan() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    // V2-Lite's vocabulary, which is what a start has to read, and enough weights for a copy of them to show.
    let lite = Geometry::named("deepseek-v2-lite").expect("in the table").tiny();
    let g = Geometry { layers: 4, d: 1024, ff: 4096, vocab: 102_400, ..lite };
    let bytes = synth::write(&g, Types::from_name("Q4_K").expect("a type"), 1, &path).expect("written");
    assert!(bytes > 150 << 20, "{bytes}");
    let before = resident();
    let mut best = Duration::MAX;
    let mut plan = 0;
    let mut after = None;
    // Other work on the machine may disturb one of three.
    for _ in 0..3 {
        let start = Instant::now();
        let model = Model::load(&path, &LoadOptions { threads: 2, ..Default::default() }).expect("it loads");
        let mut session = Session::new(&model, &SessionOptions::default()).expect("it opens");
        session.eval(&[5, 6, 7, 8]).expect("it runs");
        best = best.min(start.elapsed());
        plan = (session.cache_bytes() + session.scratch_bytes()) as u64;
        after = resident();
    }
    println!("first token after {best:?}; plan {plan} bytes; resident before {before:?}, after {after:?}");
    assert!(best < Duration::from_secs(1), "the first token took {best:?}");
    let (Some((file, anon)), Some((file_after, anon_after))) = (before, after) else {
        eprintln!("skipped: this system does not say how much memory is resident");
        return;
    };
    let grown = anon_after.saturating_sub(anon);
    assert!(grown < plan + (64 << 20), "{grown} bytes allocated, {plan} planned");
    let mapped = file_after.saturating_sub(file);
    assert!(mapped < bytes + (32 << 20), "{mapped} bytes of files mapped, the model has {bytes}");
    // Decoding four tokens reads all of this model but its embedding and some experts: it is mapped, not copied.
    assert!(mapped > bytes / 3, "only {mapped} bytes of files mapped");
}
