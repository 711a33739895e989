//! How fast `serve` is, for docs/performance.md: `cargo test --release -p rsinfer --test serve_figures -- --ignored --nocapture`.

mod common;

use common::server::{Server, read};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

/// Seconds to the first token and between tokens of one streamed answer.
fn stream(s: &Server, seed: u64, n: usize) -> (f64, Vec<f64>) {
    let body = json!({"model": "demo", "prompt": format!("Once upon a time there were {seed} dogs"), "raw": true,
        "options": {"num_predict": n, "seed": seed, "ignore_eos": true}});
    let start = Instant::now();
    let lines =
        BufReader::new(s.open(&s.request("POST", "/api/generate", "", body.to_string().as_bytes()))).lines();
    let (mut first, mut last, mut gaps) = (0.0, start, Vec::new());
    for l in lines.map_while(Result::ok).filter(|l| l.starts_with('{') && l.contains("\"done\":false")) {
        let _: Value = serde_json::from_str(&l).expect("a line");
        let now = Instant::now();
        match gaps.is_empty() && first == 0.0 {
            true => first = (now - start).as_secs_f64(),
            false => gaps.push((now - last).as_secs_f64()),
        }
        last = now;
    }
    (first, gaps)
}

#[test]
#[ignore = "a measurement"]
fn figures() {
    println!("| clients | tokens/s | first token p50 | p99 | between tokens p50 | p99 |");
    for clients in [1u64, 4, 16] {
        let s = Server::start(&["--parallel", "16"], &[]);
        stream(&s, 0, 4);
        let (tokens, rounds) = (128, 4);
        let start = Instant::now();
        let all: Vec<(f64, Vec<f64>)> = std::thread::scope(|t| {
            let s = &s;
            let run = move |c: u64| (0..rounds).map(|i| stream(s, c * 100 + i, tokens)).collect::<Vec<_>>();
            let threads: Vec<_> = (0..clients).map(|c| t.spawn(move || run(c))).collect();
            threads.into_iter().flat_map(|h| h.join().unwrap()).collect()
        });
        let rate = (clients * rounds) as f64 * tokens as f64 / start.elapsed().as_secs_f64();
        let at = |mut v: Vec<f64>, p: f64| {
            v.sort_by(f64::total_cmp);
            1e3 * v[((v.len() - 1) as f64 * p) as usize]
        };
        let first: Vec<f64> = all.iter().map(|a| a.0).collect();
        let gaps: Vec<f64> = all.into_iter().flat_map(|a| a.1).collect();
        println!(
            "| {clients} | {rate:.0} | {:.1} ms | {:.1} ms | {:.2} ms | {:.2} ms |",
            at(first.clone(), 0.5),
            at(first, 0.99),
            at(gaps.clone(), 0.5),
            at(gaps, 0.99)
        );
    }
    // A long prompt beside an answer: how long the answer stands still.
    let s = Server::start(&["--parallel", "2", "-c", "8192"], &[]);
    stream(&s, 0, 4);
    let alone = stream(&s, 1, 200).1;
    let beside = std::thread::scope(|t| {
        let answer = t.spawn(|| stream(&s, 1, 200).1);
        std::thread::sleep(Duration::from_millis(40));
        let long = json!({"model": "demo", "prompt": "The dog ran to the barn. ".repeat(700), "raw": true, "stream": false, "options": {"num_predict": 1}});
        let mut all = Vec::new();
        s.open(&s.request("POST", "/api/generate", "", long.to_string().as_bytes()))
            .read_to_end(&mut all)
            .unwrap();
        println!("a prompt of {} tokens comes in between", read(&all).json()["prompt_eval_count"]);
        answer.join().unwrap()
    });
    let longest = |v: &[f64]| 1e3 * v.iter().copied().fold(0.0, f64::max);
    println!("longest gap: {:.1} ms alone, {:.1} ms beside a long prompt", longest(&alone), longest(&beside));
}
