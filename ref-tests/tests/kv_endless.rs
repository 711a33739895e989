//! Text without end from the demo model, trained on 512 tokens: constant memory, constant time per token, and perplexity that
//! stays flat where the full cache past the trained context blows up.

use engine::text::EncodeOptions;
use engine::{
    EngineError, FinishReason, GenerateOptions, LoadOptions, Model, Sampler, SamplerOptions, Session,
    SessionOptions,
};
use ref_tests::{log_softmax, root};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

const KV: &str = "sinks:4+window:256";

/// Tokens to generate; fewer for a quick look: RSINFER_ENDLESS=10000.
fn tokens() -> usize {
    std::env::var("RSINFER_ENDLESS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000)
}

fn demo() -> Arc<Model> {
    let path = root().join("ref-tests/demo-model/demo-q8_0.gguf");
    Model::load(&path, &LoadOptions { threads: 2, ..Default::default() }).expect("the demo model loads")
}

fn session(model: &Arc<Model>, kv: &str, ctx: usize) -> Session {
    let kv = kv.parse().expect("a configuration");
    Session::new(model, &SessionOptions { ctx, batch: 128, kv, ..SessionOptions::default() }).unwrap()
}

/// Bytes of memory that the process holds, if the system says.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib << 10)
}

/// The fastest hundred of a thousand: what else the machine does must not decide the test.
fn pace(times: &[Instant]) -> Duration {
    times.windows(101).step_by(100).map(|w| w[100] - w[0]).min().expect("a thousand tokens")
}

/// The same for tokens given one by one, in pieces of a hundred.
fn hundred(s: &mut Session, tokens: &[u32]) -> Duration {
    let one = |s: &mut Session, part: &[u32]| {
        let start = Instant::now();
        for t in part {
            s.eval(&[*t]).expect("no end");
        }
        start.elapsed()
    };
    tokens.chunks_exact(100).map(|part| one(s, part)).min().expect("a hundred tokens")
}

#[test]
fn a_hundred_thousand_tokens_in_constant_memory_and_time() {
    let total = tokens();
    let model = demo();
    let mut s = session(&model, KV, 512);
    let bytes = s.cache_bytes();
    let prompt = model.vocab().encode_prompt("Once upon a time");
    let mut sampler = Sampler::new(SamplerOptions { seed: Some(7), ..SamplerOptions::default() }).unwrap();
    let options = GenerateOptions {
        max_tokens: Some(total),
        ignore_eos: true,
        special: true,
        ..GenerateOptions::default()
    };
    let (mut times, mut memory) = (Vec::with_capacity(total), Vec::new());
    let done = s
        .generate(&prompt, &mut sampler, &options, |_| {
            times.push(Instant::now());
            if times.len() == 2000 || times.len() % 10_000 == 0 {
                memory.push(resident());
            }
            ControlFlow::Continue(())
        })
        .expect("no end");
    assert_eq!((done.new_tokens, &done.reason), (total, &FinishReason::Length));
    // The last token is not evaluated any more.
    assert_eq!(done.evicted_tokens, prompt.len() + total - 1 - 260);
    assert_eq!(done.policy, KV);
    assert_eq!(s.cache_bytes(), bytes);
    let n = times.len();
    assert!(n > total * 9 / 10, "{n} pieces of text");
    let (second, last) = (pace(&times[1000..2000]), pace(&times[n - 1000..]));
    println!(
        "{total} tokens at {:.0} tokens/s; fastest 100 of the second thousand {second:.1?}, of the last {last:.1?}",
        total as f64 / done.decode_time.as_secs_f64(),
    );
    if let (Some(Some(early)), Some(Some(late))) = (memory.first(), memory.last()) {
        println!("resident: {early} bytes after 2000 tokens, {late} at the end");
        // Lists of tokens are kept, 4 bytes a token, and this test's times, 16.
        assert!(*late < early + 32 * total, "{early} bytes, then {late}");
    }
    // A busy machine must not decide the test: the endless session and a young one, in its second thousand, take turns.
    let mut young = session(&model, KV, 512);
    let text = &done.tokens[..2000];
    young.eval(&text[..1000]).unwrap();
    let (mut old_pace, mut young_pace) = (Duration::MAX, Duration::MAX);
    for part in text[1000..].chunks(200) {
        young_pace = young_pace.min(hundred(&mut young, part));
        old_pace = old_pace.min(hundred(&mut s, part));
    }
    println!("taking turns: young {young_pace:.1?}, after {total} tokens {old_pace:.1?}");
    assert!(old_pace.as_secs_f64() < 1.25 * young_pace.as_secs_f64(), "{young_pace:?}, {old_pace:?}");
}

#[test]
fn perplexity_stays_flat_where_the_full_cache_blows_up() {
    const TEXT: usize = 6144;
    const BUCKET: usize = 512;
    let Some(path) = ref_tests::shared("corpus/shakespeare.txt") else { return };
    let text: Vec<char> = std::fs::read_to_string(path).unwrap().chars().collect();
    // The part that the model was not trained on.
    let text: String = text[(text.len() as f64 * 0.9) as usize..].iter().collect();
    let model = demo();
    let ids = model.vocab().encode(&text, EncodeOptions { add_special: true, parse_special: true });
    // With `fresh`, every bucket begins anew: what its text costs within the trained context.
    let nats = |kv: &str, fresh: bool| -> Vec<f64> {
        let mut sums = vec![0.0; TEXT / BUCKET];
        let mut s = session(&model, kv, TEXT);
        for (b, chunk) in ids[..TEXT].chunks(BUCKET).enumerate() {
            if fresh {
                s.truncate(0);
            }
            s.eval_all(chunk, |i, logits| {
                let next = ids[b * BUCKET + i + 1];
                sums[b] -= log_softmax(logits)[next as usize] / BUCKET as f64;
                Ok::<_, EngineError>(())
            })
            .unwrap();
        }
        sums
    };
    let (full, ring, fresh) = (nats("full", false), nats(KV, false), nats("full", true));
    println!("nats per token: full, {KV}, begun anew every {BUCKET}");
    for (i, ((f, r), w)) in full.iter().zip(&ring).zip(&fresh).enumerate() {
        println!("{:>6}..{:<6} {f:>7.3} {r:>7.3} {w:>7.3}", i * BUCKET, (i + 1) * BUCKET);
    }
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    // Flat: it costs what the text costs, wherever it stands.
    for (i, (r, w)) in ring.iter().zip(&fresh).enumerate() {
        assert!(r / w < 1.06, "bucket {i}: {r} against {w}");
    }
    assert!(mean(&full[1..]) > 1.25 * mean(&ring[1..]), "{full:?}");
}
