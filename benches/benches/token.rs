//! Whole tokens: decoding and a prompt through the engine, on the embedded demo model (every overhead shows) and on half of
//! Qwen3-0.6B's layers with random weights (memory shows). Decoding counts bytes of weights per second, a prompt tokens.
//!
//! `cargo bench -p rsinfer-benches --bench token`; threads: `RSINFER_THREADS`, all cores otherwise. The read bandwidth of the
//! same run is printed first.

use benches::synth::{self, Geometry, Types};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::{LoadOptions, Model, Session, SessionOptions};
use kernels::cpu::machine;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn measure(c: &mut Criterion, name: &str, model: &Arc<Model>) {
    let mut g = c.benchmark_group(format!("token/{name}"));
    g.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    let mut session = Session::new(model, &SessionOptions { ctx: 512, ..Default::default() }).unwrap();
    let prompt: Vec<u32> = (0..128).map(|i| 3 + 7 * i % 250).collect();
    g.throughput(Throughput::Elements(prompt.len() as u64));
    g.bench_function("prompt128", |b| {
        b.iter(|| {
            session.truncate(0);
            session.eval(&prompt).unwrap()[0]
        })
    });
    g.throughput(Throughput::Bytes(model.info().read_bytes_per_token));
    g.bench_function("decode@128", |b| {
        b.iter(|| {
            session.truncate(128);
            session.eval(&[5]).unwrap()[0]
        })
    });
}

fn tokens(c: &mut Criterion) {
    let threads = std::env::var("RSINFER_THREADS").ok().and_then(|t| t.parse().ok());
    let options =
        LoadOptions { threads: threads.unwrap_or(LoadOptions::default().threads), ..Default::default() };
    let bandwidth = machine::read_bandwidth(options.threads);
    println!("{} threads read {:.1} GB/s", options.threads, bandwidth / 1e9);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/demo-model/demo-q8_0.gguf");
    measure(c, "demo", &Model::load(&demo, &options).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let geometry = Geometry { layers: 14, ..Geometry::named("qwen3-0.6b").unwrap() };
    synth::write(&geometry, Types::from_name("Q4_K").unwrap(), 1, &path).unwrap();
    measure(c, "qwen3-0.6b-half", &Model::load(&path, &options).unwrap());
}

criterion_group!(benches, tokens);
criterion_main!(benches);
