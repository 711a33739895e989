//! The demo model, measured as its trainer measured it: Shakespeare in nats per character, and questions answered.

use engine::text::EncodeOptions;
use engine::{
    EngineError, FinishReason, GenerateOptions, LoadOptions, Model, Sampler, SamplerOptions, Session,
    SessionOptions,
};
use ref_tests::{log_softmax, root};
use std::ops::ControlFlow;
use std::sync::Arc;

/// The length of the trainer's chunks, which is the trained context.
const CHUNK: usize = 512;

fn demo() -> Arc<Model> {
    let path = root().join("ref-tests/demo-model/demo-q8_0.gguf");
    Model::load(&path, &LoadOptions::default()).expect("the demo model loads")
}

fn json(path: &str) -> serde_json::Value {
    let path = root().join("ref-tests/demo-model").join(path);
    serde_json::from_slice(&std::fs::read(&path).expect("a file of the demo model")).expect("JSON")
}

#[test]
fn shakespeare_costs_what_pytorch_says() {
    let Some(path) = ref_tests::shared("corpus/shakespeare.txt") else { return };
    let text: Vec<char> = std::fs::read_to_string(path).unwrap().chars().collect();
    let text: String = text[(text.len() as f64 * 0.9) as usize..].iter().collect();
    let model = demo();
    let ids = model.vocab().encode(&text, EncodeOptions { add_special: true, parse_special: true });
    let chunks = (ids.len() - 1) / CHUNK;
    let options = SessionOptions { ctx: CHUNK, ..SessionOptions::default() };
    let mut session = Session::new(&model, &options).unwrap();
    let mut nats = 0.0;
    for chunk in 0..chunks {
        let part = &ids[chunk * CHUNK..=(chunk + 1) * CHUNK];
        session.truncate(0);
        session
            .eval_all(&part[..CHUNK], |i, logits| {
                nats -= log_softmax(logits)[part[i + 1] as usize];
                Ok::<_, EngineError>(())
            })
            .unwrap();
    }
    let chars = model.vocab().decode(&ids[1..=chunks * CHUNK], false).chars().count();
    let ours = nats / chars as f64;
    let theirs = json("metrics.json")["shakespeare_nats_per_char"].as_f64().unwrap();
    println!("{ours:.4} nats/char, PyTorch {theirs:.4} ({chunks} chunks, {chars} characters)");
    assert!((ours / theirs - 1.0).abs() < 0.01);
}

#[test]
fn questions_are_answered_as_often_as_in_pytorch() {
    let model = demo();
    let questions = json("questions.json");
    let questions = questions.as_array().expect("a list");
    let options = SessionOptions { ctx: 640, ..SessionOptions::default() };
    let mut session = Session::new(&model, &options).unwrap();
    let mut right = 0;
    for q in questions {
        let (prompt, want) = (q["prompt"].as_str().unwrap(), q["answer"].as_str().unwrap());
        let prompt = model.vocab().encode(prompt, EncodeOptions { add_special: true, parse_special: true });
        let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
        let limit = GenerateOptions { max_tokens: Some(60), special: true, ..GenerateOptions::default() };
        let mut text = String::new();
        session
            .generate(&prompt, &mut sampler, &limit, |t| {
                text.push_str(t);
                ControlFlow::Continue(())
            })
            .unwrap();
        right += usize::from(text.rsplit("</think>").next().unwrap().trim() == want);
    }
    let theirs = json("metrics.json")["story_answers_right"].as_f64().unwrap() * questions.len() as f64;
    println!("{right} of {} right, PyTorch {theirs:.0}", questions.len());
    assert!(questions.len() == 60 && (right as f64 - theirs).abs() <= 2.0);
}

#[test]
fn a_prompt_broken_off_does_no_harm() {
    let model = demo();
    let prompt: Vec<u32> = (0..200).map(|i| 100 + i * 7 % 300).collect();
    for kv in ["full", "snapkv:budget=64", "h2o:budget=64,recent=16"] {
        let options =
            SessionOptions { ctx: 512, batch: 32, kv: kv.parse().unwrap(), ..SessionOptions::default() };
        let limit = GenerateOptions { max_tokens: Some(20), ignore_eos: true, ..GenerateOptions::default() };
        let run = |s: &mut Session, stop_at: usize| {
            let mut calls = 0;
            let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
            s.generate(&prompt, &mut sampler, &limit, |_| {
                calls += 1;
                if calls == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap()
        };
        let whole = run(&mut Session::new(&model, &options).unwrap(), 0);
        let mut s = Session::new(&model, &options).unwrap();
        let cut = run(&mut s, 3);
        assert_eq!(
            (&cut.reason, cut.new_tokens, s.tokens().len()),
            (&FinishReason::Cancelled, 0, 64),
            "{kv}"
        );
        s.truncate(0);
        assert_eq!(run(&mut s, 0).tokens, whole.tokens, "{kv}");
        if kv == "full" {
            s.truncate(0);
            run(&mut s, 3);
            let on = run(&mut s, 0);
            assert_eq!((on.cached_tokens, on.tokens), (64, whole.tokens), "what was read is used");
        }
    }
}
