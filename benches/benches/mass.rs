//! What attention mass costs whole tokens: sessions on one model, at depth 4096, decode in turns, under a policy that needs the
//! masses, under one that does not, and with the full cache. Nothing is evicted meanwhile.
//!
//! `cargo bench -p rsinfer-benches --bench mass -- MODEL.gguf ...` (made by `synth`)

use engine::{LoadOptions, Model, Session, SessionOptions};
use std::time::Instant;

const DEPTH: usize = 4096;
const ROUNDS: usize = 15;
const TOKENS: usize = 6;
/// The same sets of entries; `random` is shown nothing.
const KV: [&str; 4] = [
    "full",
    "random:budget=100%,evict=prompt",
    "h2o:budget=100%,evict=prompt",
    "tova:budget=100%,evict=prompt",
];

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn main() {
    let files: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if files.is_empty() {
        println!("no MODEL.gguf was given: nothing is measured");
    }
    for file in files {
        let model = Model::load(file.as_ref(), &LoadOptions::default()).expect("the model loads");
        let ids: Vec<u32> = (0..DEPTH as u32).map(|i| 3 + i * 7919 % 50_000).collect();
        let mut sessions = KV.map(|kv| {
            let kv = kv.parse().expect("a policy");
            let o = SessionOptions { ctx: DEPTH + (ROUNDS + 1) * TOKENS, kv, ..SessionOptions::default() };
            let mut s = Session::new(&model, &o).expect("a session");
            s.eval(&ids).expect("a prompt");
            s
        });
        let mut times = KV.map(|_| Vec::new());
        for round in 0..=ROUNDS {
            // Each goes first as often as the others.
            for i in (0..KV.len()).map(|i| (i + round) % KV.len()) {
                let start = Instant::now();
                for t in 0..TOKENS as u32 {
                    sessions[i].eval(&[100 + t]).expect("a token");
                }
                times[i].push(start.elapsed().as_secs_f64() / TOKENS as f64);
            }
        }
        println!(
            "{} ({}), decode from depth {DEPTH}, medians of {ROUNDS} rounds",
            model.info().name,
            model.info().device
        );
        for (kv, t) in KV.iter().zip(&times) {
            // The first round wakes everything up.
            let ratio = t[1..].iter().zip(&times[1][1..]).map(|(a, b)| a / b).collect();
            let (ms, ratio) = (1e3 * median(t[1..].to_vec()), median(ratio));
            println!("  {kv:<32} {ms:8.3} ms a token, {ratio:.4} of random's");
        }
    }
}
