//! Faults under the engine's thread: what breaks ends alone, and what comes after is as if nothing had been.

use super::failure::Failure;
use super::request::{Event, Finish, Generate, Reason};
use super::worker::{Open, Opened, Passes, Sizes, Worker};
use engine::text::EncodeOptions;
use engine::text::thinking::Part;
use engine::{
    Constraint, Context, EngineError, LoadOptions, Model, Rows, SampleError, SamplerOptions, SessionOptions,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::Receiver;

/// What goes wrong, once, in the pass of this number after it was armed.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Panic,
    Error,
    /// The first row of logits is NaN.
    NotANumber,
}

#[derive(Default)]
struct Plan {
    fault: Mutex<Option<(usize, Fault)>>,
    loads: AtomicUsize,
    /// Loading fails from this load on; 0: never.
    broken_from: AtomicUsize,
}

struct Faulty {
    context: Context,
    plan: Arc<Plan>,
    nan: bool,
}

impl Passes for Faulty {
    fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    fn forward(&mut self, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        let mut fault = self.plan.fault.lock().unwrap();
        match &mut *fault {
            Some((0, what)) => {
                let what = *what;
                *fault = None;
                drop(fault);
                match what {
                    Fault::Panic => panic!("injected"),
                    Fault::Error => return Err(EngineError::Option("injected".into())),
                    Fault::NotANumber => self.nan = true,
                }
            }
            Some((n, _)) => *n -= 1,
            None => {}
        }
        self.context.forward(rows)
    }

    fn logits(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.context.logits(rows, out)?;
        if std::mem::take(&mut self.nan) {
            out[0] = f32::NAN;
        }
        Ok(())
    }
}

async fn worker(parallel: usize, queue: usize) -> (Worker, Arc<Plan>) {
    let plan = Arc::new(Plan::default());
    let inner = plan.clone();
    let open: Open = Box::new(move || {
        let load = inner.loads.fetch_add(1, Ordering::Relaxed) + 1;
        let broken = inner.broken_from.load(Ordering::Relaxed);
        anyhow::ensure!(broken == 0 || load < broken, "injected");
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let model = Model::load_static("demo", crate::demo::bytes(), &options)?;
        let session = SessionOptions {
            ctx: 256,
            batch: 32,
            kv: "sinks:64+window:192".parse()?,
            ..SessionOptions::default()
        };
        let context = Context::new(&model, &session, parallel)?;
        Ok(Opened { model, passes: Box::new(Faulty { context, plan: inner.clone(), nan: false }) })
    });
    let sizes = Sizes { parallel, chunk: 8, queue };
    (Worker::start("test", open, sizes).await.unwrap(), plan)
}

fn request(w: &Worker, text: &str, seed: u64, max_tokens: usize) -> Generate {
    let options = EncodeOptions { add_special: true, parse_special: true };
    Generate {
        prompt: w.model().vocab().encode(text, options),
        head: None,
        echo: None,
        sampler: SamplerOptions { seed: Some(seed), temperature: 1.0, ..SamplerOptions::default() },
        max_tokens,
        stop: Vec::new(),
        ignore_eos: true,
        special: false,
        show: Vec::new(),
        think: None,
        logprobs: None,
        constraint: None,
    }
}

/// All text, and how it ended.
async fn read(mut events: Receiver<Event>) -> (String, Result<Finish, Failure>) {
    let mut text = String::new();
    loop {
        match events.recv().await.expect("an end") {
            Event::Queued | Event::Started => {}
            Event::Chunk(c) => text.extend(c.parts.into_iter().map(|p| match p {
                Part::Answer(t) | Part::Thinking(t) => t,
            })),
            Event::Done(f) => return (text, Ok(f)),
            Event::Failed(f) => return (text, Err(f)),
        }
    }
}

#[tokio::test]
async fn the_same_seed_gives_the_same_text_alone_and_beside_others() {
    let (w, _) = worker(8, 64).await;
    let long = "Once upon a time there was a dog. ".repeat(12);
    let prompts = ["Once upon a time", "The cat", &long, "A"];
    let mut alone = Vec::new();
    for (i, p) in prompts.iter().enumerate() {
        alone.push(read(w.generate(request(&w, p, i as u64, 60))).await.0);
    }
    // Each twice, so that pasts are used again too, and all at once.
    let events: Vec<_> =
        (0..16).map(|i| w.generate(request(&w, prompts[i % 4], (i % 4) as u64, 60))).collect();
    for (i, e) in events.into_iter().enumerate() {
        let (text, end) = read(e).await;
        let end = end.unwrap();
        assert_eq!((end.reason, end.new_tokens), (Reason::Length, 60));
        assert_eq!(text, alone[i % 4], "request {i}");
    }
}

#[tokio::test]
async fn a_panic_ends_those_in_the_pass_and_the_model_is_loaded_anew() {
    let (w, plan) = worker(2, 8).await;
    let good = read(w.generate(request(&w, "Once", 1, 20))).await.0;
    *plan.fault.lock().unwrap() = Some((3, Fault::Panic));
    let (a, b) = (w.generate(request(&w, "Once", 1, 20)), w.generate(request(&w, "The", 2, 20)));
    for e in [a, b] {
        let failure = read(e).await.1.unwrap_err();
        assert_eq!(failure.status(), 500);
        assert!(failure.to_string().contains("injected"), "{failure}");
    }
    assert_eq!(read(w.generate(request(&w, "Once", 1, 20))).await.0, good);
    assert_eq!(plan.loads.load(Ordering::Relaxed), 2);
    assert!(!w.is_dead());
    // And where it cannot be loaded anew, everybody is told.
    plan.broken_from.store(3, Ordering::Relaxed);
    *plan.fault.lock().unwrap() = Some((0, Fault::Panic));
    assert!(read(w.generate(request(&w, "Once", 1, 20))).await.1.is_err());
    assert!(read(w.generate(request(&w, "Once", 1, 20))).await.1.is_err());
    assert!(w.is_dead());
}

#[tokio::test]
async fn an_error_or_a_nan_ends_one_request_alone() {
    let (w, plan) = worker(2, 8).await;
    let good = read(w.generate(request(&w, "The cat sat", 2, 30))).await.0;
    for fault in [Fault::NotANumber, Fault::Error] {
        let slow = w.generate(request(&w, "Once upon a time", 1, 30));
        *plan.fault.lock().unwrap() = Some((5, fault));
        let other = w.generate(request(&w, "The cat sat", 2, 30));
        let ends = [read(slow).await, read(other).await];
        let failed = ends.iter().filter(|e| e.1.is_err()).count();
        assert!(failed >= 1 && (failed == 1 || fault == Fault::Error), "{failed}");
        for (text, end) in &ends {
            match end {
                Ok(_) => assert!(!text.is_empty()),
                Err(f) => assert_eq!(f.status(), 500, "{f}"),
            }
        }
        assert_eq!(read(w.generate(request(&w, "The cat sat", 2, 30))).await.0, good, "afterwards");
    }
    assert_eq!(plan.loads.load(Ordering::Relaxed), 1);
}

struct Bad(bool);

impl Constraint for Bad {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), SampleError> {
        assert!(!self.0, "injected");
        Err(SampleError::Constraint("injected".into()))
    }
    fn accept(&mut self, _: u32) -> Result<(), SampleError> {
        Ok(())
    }
    fn is_done(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_constraint_that_fails_or_panics_ends_its_request_alone() {
    let (w, plan) = worker(3, 8).await;
    let good = read(w.generate(request(&w, "The cat", 2, 30))).await.0;
    for panics in [false, true] {
        let beside = w.generate(request(&w, "The cat", 2, 30));
        let bad = Generate { constraint: Some(Box::new(Bad(panics))), ..request(&w, "Once", 1, 30) };
        let failure = read(w.generate(bad)).await.1.unwrap_err();
        assert!(failure.to_string().contains("injected"), "{failure}");
        assert_eq!(read(beside).await.0, good);
    }
    assert_eq!(plan.loads.load(Ordering::Relaxed), 1);
}

/// Waits until nothing runs, or fails.
async fn idle(w: &Worker) {
    for _ in 0..500 {
        let s = w.status();
        if s.waiting == 0 && s.slots.iter().all(|s| s.job.is_none()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("still running: {:?}", w.status());
}

#[tokio::test]
async fn readers_that_go_or_sleep_hold_nobody_up() {
    let (w, _) = worker(2, 2).await;
    let mut first = w.generate(request(&w, "Once", 1, 1 << 40));
    while !matches!(first.recv().await, Some(Event::Chunk(_))) {}
    // It reads no more: its place waits, the other one works.
    for i in 0..3 {
        let (_, end) = read(w.generate(request(&w, "The", i, 400))).await;
        assert_eq!(end.unwrap().new_tokens, 400);
    }
    let second = w.generate(request(&w, "The", 9, 1 << 40));
    let (third, fourth) = (w.generate(request(&w, "A", 1, 5)), w.generate(request(&w, "A", 2, 5)));
    // Two work, two wait.
    let (_, end) = read(w.generate(request(&w, "A", 3, 5))).await;
    assert_eq!(end.unwrap_err(), Failure::Busy);
    drop(third);
    drop(first);
    drop(second);
    assert_eq!(read(fourth).await.1.unwrap().new_tokens, 5);
    idle(&w).await;
}

#[tokio::test]
async fn answers_go_on_past_the_context() {
    let (w, _) = worker(1, 8).await;
    let (text, end) = read(w.generate(request(&w, "Once upon a time", 3, 600))).await;
    let end = end.unwrap();
    assert_eq!(end.new_tokens, 600);
    assert!(text.len() > 600);
    assert_eq!(end.evicted, end.prompt_tokens + 599 - 256);
    // A prompt longer than the context too.
    let (_, end) = read(w.generate(request(&w, &"The dog ran. ".repeat(150), 3, 5))).await;
    let end = end.unwrap();
    assert!(end.prompt_tokens > 400 && end.evicted > 100, "{end:?}");
    // What should stay does, as long as there is room: three quarters of the context.
    for (head, lost) in [(0, 0), (100, 0), (192, 0), (250, 250 - 192)] {
        let long = Generate { head: Some(head), ..request(&w, &"The dog ran. ".repeat(150), 3, 5) };
        let (text, end) = read(w.generate(long)).await;
        assert_eq!(end.unwrap().head_evicted, lost);
        // And again: what is cached of another beginning is not taken for this one's.
        let _ = read(w.generate(request(&w, &"The dog ran. ".repeat(150), 3, 5))).await;
        let long = Generate { head: Some(head), ..request(&w, &"The dog ran. ".repeat(150), 3, 5) };
        assert_eq!(read(w.generate(long)).await.0, text);
    }
}

#[tokio::test]
async fn stop_strings_end_an_answer_before_them() {
    let (w, _) = worker(1, 8).await;
    let whole = read(w.generate(request(&w, "Once upon a time", 4, 40))).await.0;
    let stop: String = whole.chars().skip(20).take(5).collect();
    let before = whole.split(&stop).next().unwrap().to_owned();
    let r =
        Generate { stop: vec!["never said".into(), stop.clone()], ..request(&w, "Once upon a time", 4, 40) };
    let (text, end) = read(w.generate(r)).await;
    assert_eq!((text, end.unwrap().reason), (before, Reason::StopString(stop)));
}
