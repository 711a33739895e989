//! The engine thread of a loaded model: owns its context, takes requests from a channel, runs passes over all of them, sends
//! tokens out. A request that fails ends alone; a pass that panics ends those in it, and the model is loaded anew.

use super::failure::Failure;
use super::request::{Event, Generate, Reason};
use super::running::{Running, Taken, Ticket, is_exact};
use super::status::{SlotStatus, Status};
use engine::schedule::{Admission, Cancelled, Job, Limits, Piece, Scheduler, Start};
use engine::{Context, EngineError, Model, Rows, SeqId};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// Events that a reader may be behind. A sequence whose reader has no room waits, and nobody waits for it.
const BACKLOG: usize = 512;
/// Room for what one pass can send.
const ROOM: usize = 4;
/// How long a reader may take nothing before its request is given up.
const STALL: Duration = Duration::from_secs(60);
/// Policies that do not choose compute every prompt as one of at least this length, so that what one prompt leaves in the
/// cache has the bits that any other would give it (docs/numerics.md).
const LONG_PROMPT: usize = 512;

/// What the thread computes with. Tests put faults in between.
pub trait Passes {
    fn context(&mut self) -> &mut Context;

    fn forward(&mut self, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        self.context().forward(rows)
    }

    fn logits(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.context().logits(rows, out)
    }
}

impl Passes for Context {
    fn context(&mut self) -> &mut Context {
        self
    }
}

/// A loaded model with a context.
pub struct Opened {
    pub model: Arc<Model>,
    pub passes: Box<dyn Passes>,
}

/// Loads; called again if the model must be loaded anew.
pub type Open = Box<dyn FnMut() -> anyhow::Result<Opened> + Send>;

/// Sizes that the context does not know.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences at a time.
    pub parallel: usize,
    /// Rows of prompts in a pass while others decode.
    pub chunk: usize,
    /// Requests that may wait.
    pub queue: usize,
}

/// Something to run on the engine's thread, between two passes.
pub type Call = Box<dyn FnOnce(&mut Context) + Send>;

enum Command {
    Generate(Box<Ticket>),
    Call(Call),
}

struct Shared {
    model: Mutex<Arc<Model>>,
    status: Mutex<Status>,
    next: AtomicU64,
    dead: AtomicBool,
}

/// A handle of the thread, which ends when the last handle is gone.
#[derive(Clone)]
pub struct Worker {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    /// Closed by the thread's end.
    life: watch::Receiver<()>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    /// Starts a thread that loads a model and serves it.
    ///
    /// # Errors
    /// What loading reports.
    pub async fn start(name: &str, mut open: Open, sizes: Sizes) -> anyhow::Result<Self> {
        let (commands, inbox) = channel();
        let (ready, loaded) = oneshot::channel();
        let (alive, life) = watch::channel(());
        let thread = std::thread::Builder::new().name(format!("engine {name}"));
        thread.spawn(move || {
            let opened = match guarded(&mut open) {
                Ok(o) => o,
                Err(e) => return drop(ready.send(Err(e))),
            };
            let shared = Arc::new(Shared {
                model: Mutex::new(opened.model.clone()),
                status: Mutex::default(),
                next: AtomicU64::new(0),
                dead: AtomicBool::new(false),
            });
            if ready.send(Ok(shared.clone())).is_ok() {
                serve(opened, open, &inbox, &shared, sizes);
            }
            drop(alive);
        })?;
        let shared = loaded.await.map_err(|_| anyhow::anyhow!("the engine's thread is gone"))??;
        Ok(Self { commands, shared, life })
    }

    /// Waits for the thread's end, when the memory is free again.
    pub fn exited(&self) -> impl Future<Output = ()> + use<> {
        let mut life = self.life.clone();
        async move { while life.changed().await.is_ok() {} }
    }

    /// The model. It changes when it is loaded anew.
    pub fn model(&self) -> Arc<Model> {
        lock(&self.shared.model).clone()
    }

    /// What the thread last said of itself.
    pub fn status(&self) -> Status {
        lock(&self.shared.status).clone()
    }

    /// Whether the thread has given up.
    pub fn is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::Acquire)
    }

    /// Sends a request; dropping the receiver cancels it.
    pub fn generate(&self, request: Generate) -> mpsc::Receiver<Event> {
        let (out, events) = mpsc::channel(BACKLOG);
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let ticket = Ticket { id, request, out, since: Instant::now() };
        if let Err(e) = self.commands.send(Command::Generate(Box::new(ticket)))
            && let Command::Generate(t) = e.0
        {
            let _ = t.out.try_send(Event::Failed(gone()));
        }
        events
    }

    /// Runs something on the engine's thread, between two passes.
    pub fn call(&self, call: Call) {
        let _ = self.commands.send(Command::Call(call));
    }
}

fn gone() -> Failure {
    Failure::Internal("the model is no longer loaded; try again".into())
}

fn panic_text(p: &(dyn std::any::Any + Send)) -> String {
    let text = p.downcast_ref::<String>().cloned();
    text.or_else(|| p.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "unknown".into())
}

fn guarded(open: &mut Open) -> anyhow::Result<Opened> {
    catch_unwind(AssertUnwindSafe(&mut **open))
        .unwrap_or_else(|p| Err(anyhow::anyhow!("loading failed: panic: {}", panic_text(&*p))))
}

/// Serves until all handles are gone, loading anew after panics.
fn serve(mut opened: Opened, mut open: Open, inbox: &Receiver<Command>, shared: &Shared, sizes: Sizes) {
    loop {
        let broken = {
            let model = opened.model.clone();
            Engine::new(&model, &mut *opened.passes, inbox, shared, sizes).run()
        };
        if !broken {
            return;
        }
        metrics::counter!("rsinfer_model_reloads_total").increment(1);
        drop(opened);
        opened = match guarded(&mut open) {
            Ok(o) => o,
            Err(e) => {
                tracing::error!("the model cannot be loaded anew: {e:#}");
                shared.dead.store(true, Ordering::Release);
                while let Ok(c) = inbox.recv() {
                    if let Command::Generate(t) = c {
                        let _ = t.out.try_send(Event::Failed(gone()));
                    }
                }
                return;
            }
        };
        *lock(&shared.model) = opened.model.clone();
    }
}

/// One life of a context.
struct Engine<'a> {
    model: &'a Model,
    passes: &'a mut dyn Passes,
    inbox: &'a Receiver<Command>,
    shared: &'a Shared,
    scheduler: Scheduler,
    /// The context keeps everything up to here.
    end: Option<usize>,
    chooses: bool,
    waiting: HashMap<u64, Ticket>,
    slots: Vec<Slot<'a>>,
    pass: Vec<Piece>,
    logits: Vec<f32>,
}

#[derive(Default)]
struct Slot<'a> {
    seq: Option<SeqId>,
    running: Option<Running<'a>>,
}

impl<'a> Engine<'a> {
    fn new(
        model: &'a Model,
        passes: &'a mut dyn Passes,
        inbox: &'a Receiver<Command>,
        shared: &'a Shared,
        sizes: Sizes,
    ) -> Self {
        let c = passes.context();
        let limits = Limits {
            slots: sizes.parallel,
            rows: c.max_rows(),
            batch: c.batch(),
            chunk: sizes.chunk,
            queue: sizes.queue,
        };
        let (end, chooses) = (c.cache().options().end(), c.policy().chooses());
        let slots = (0..sizes.parallel.max(1)).map(|_| Slot::default()).collect();
        let scheduler = Scheduler::new(limits);
        let waiting = HashMap::new();
        let (pass, logits) = (Vec::new(), Vec::new());
        Self { model, passes, inbox, shared, scheduler, end, chooses, waiting, slots, pass, logits }
    }

    /// Until all handles are gone (false), or the context cannot be trusted any more (true).
    fn run(&mut self) -> bool {
        loop {
            if self.scheduler.is_idle() {
                self.report();
                match self.inbox.recv() {
                    Ok(c) => self.receive(c),
                    Err(_) => return false,
                }
            }
            while let Ok(c) = self.inbox.try_recv() {
                self.receive(c);
            }
            self.sweep();
            while let Some(a) = self.scheduler.admit() {
                self.admit(a);
            }
            let slots = &self.slots;
            let ready = |i: usize| slots[i].running.as_ref().is_some_and(|r| r.out.capacity() >= ROOM);
            self.scheduler.plan(&mut self.pass, ready);
            self.report();
            if self.pass.is_empty() {
                // All readers are slow: look again soon.
                match self.inbox.recv_timeout(Duration::from_millis(5)) {
                    Ok(c) => self.receive(c),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) if self.scheduler.is_idle() => return false,
                    Err(RecvTimeoutError::Disconnected) => std::thread::sleep(Duration::from_millis(5)),
                }
                continue;
            }
            match catch_unwind(AssertUnwindSafe(|| self.compute())) {
                Ok(Ok(())) => self.take(),
                Ok(Err(e)) => self.fail_pass(&Failure::internal(e)),
                Err(p) => {
                    let why = panic_text(&*p);
                    tracing::error!("a pass panicked, the model is loaded anew: {why}");
                    let f = Failure::Internal(format!("the engine failed ({why}); try again"));
                    for s in &mut self.slots {
                        if let Some(r) = s.running.take() {
                            r.fail(f.clone());
                        }
                    }
                    for (_, t) in self.waiting.drain() {
                        let _ = t.out.try_send(Event::Failed(f.clone()));
                    }
                    return true;
                }
            }
        }
    }

    fn receive(&mut self, c: Command) {
        match c {
            Command::Generate(t) => {
                let prompt = t.request.prompt.as_slice().into();
                let job = Job { id: t.id, prompt, exact: is_exact(&t.request.sampler) };
                match self.scheduler.submit(job) {
                    Ok(()) => {
                        let _ = t.out.try_send(Event::Queued);
                        self.waiting.insert(t.id, *t);
                    }
                    Err(_) => drop(t.out.try_send(Event::Failed(Failure::Busy))),
                }
            }
            Command::Call(f) => {
                // What it calls may panic; nothing of ours is half done here.
                let context = self.passes.context();
                if let Err(p) = catch_unwind(AssertUnwindSafe(|| f(context))) {
                    tracing::error!("a call on the engine's thread panicked: {}", panic_text(&*p));
                }
            }
        }
    }

    /// Frees what nobody waits for any more.
    fn sweep(&mut self) {
        let gone: Vec<u64> = self.waiting.values().filter(|t| t.out.is_closed()).map(|t| t.id).collect();
        for id in gone {
            self.waiting.remove(&id);
            if self.scheduler.cancel(id) == Some(Cancelled::Waiting) {
                metrics::counter!("rsinfer_requests_total", "outcome" => "cancelled").increment(1);
            }
        }
        let now = Instant::now();
        for i in 0..self.slots.len() {
            let Some(r) = &mut self.slots[i].running else { continue };
            let full = r.out.capacity() < ROOM;
            r.stalled = if full { r.stalled.or(Some(now)) } else { None };
            if r.out.is_closed() || r.stalled.is_some_and(|s| now - s > STALL) {
                self.slots[i].running = None;
                self.scheduler.end(i);
                metrics::counter!("rsinfer_requests_total", "outcome" => "cancelled").increment(1);
            }
        }
    }

    fn admit(&mut self, a: Admission) {
        let Some(t) = self.waiting.remove(&a.job) else {
            self.scheduler.end(a.slot);
            return;
        };
        let exact = is_exact(&t.request.sampler);
        let out = t.out.clone();
        let begun = self.prepare(a, exact).map_err(Failure::internal).and_then(|kept| {
            self.scheduler.admitted(a.slot, kept);
            Ok((Running::new(self.model.vocab(), t, kept)?, kept))
        });
        match begun {
            Ok((r, kept)) => {
                let _ = out.try_send(Event::Started);
                metrics::counter!("rsinfer_prompt_tokens_total").increment(r.prompt_tokens as u64);
                metrics::counter!("rsinfer_prompt_tokens_cached_total").increment(kept as u64);
                self.slots[a.slot].running = Some(r);
            }
            Err(f) => {
                self.scheduler.end(a.slot);
                let _ = out.try_send(Event::Failed(f));
            }
        }
    }

    /// Prepares the cache of a place; how many tokens it holds now. If it fails, the place is empty.
    fn prepare(&mut self, a: Admission, exact: bool) -> Result<usize, EngineError> {
        let donor = match a.start {
            Start::Own { .. } => None,
            Start::Fork { of, .. } => self.slots[of].seq,
        };
        let old = self.slots[a.slot].seq.take();
        let cache = self.passes.context().cache_mut();
        let made = match (old, donor) {
            (Some(s), None) => Ok(s),
            (None, None) => cache.admit(0),
            (old, Some(d)) => old.map_or(Ok(()), |s| cache.free(s)).and_then(|()| cache.fork(d)),
        };
        let (Start::Own { keep } | Start::Fork { keep, .. }) = a.start;
        // What a policy chose to keep depends on what came before.
        let keep = if exact && self.chooses { 0 } else { keep };
        let kept = made.and_then(|s| Ok((s, cache.truncate(s, keep)?)));
        match kept {
            Ok((s, n)) => {
                self.slots[a.slot].seq = Some(s);
                Ok(n)
            }
            Err(e) => {
                self.scheduler.forget(a.slot);
                Err(e)
            }
        }
    }

    /// The pass, and the logits that are wanted of it.
    fn compute(&mut self) -> Result<(), EngineError> {
        let (mut rows, mut wanted, mut at) = (Vec::with_capacity(self.pass.len()), Vec::new(), 0);
        for p in &self.pass {
            let slot = &self.slots[p.slot];
            let tokens = self.scheduler.tokens(p);
            let prompt = match (&p.prompt, &slot.running) {
                (Some(_), Some(r)) if self.chooses => r.prompt_tokens - r.cached(),
                (Some(_), _) => LONG_PROMPT,
                (None, _) => 0,
            };
            rows.push(Rows { seq: slot.seq.ok_or(EngineError::NoSequence)?, tokens, prompt });
            at += tokens.len();
            if p.logits {
                wanted.push(at as u32 - 1);
            }
        }
        let start = Instant::now();
        self.passes.forward(&rows)?;
        self.logits.clear();
        if !wanted.is_empty() {
            self.passes.logits(&wanted, &mut self.logits)?;
        }
        metrics::histogram!("rsinfer_pass_seconds").record(start.elapsed());
        metrics::counter!("rsinfer_rows_total").increment(at as u64);
        Ok(())
    }

    /// What the logits of a pass lead to.
    fn take(&mut self) {
        self.scheduler.done(&self.pass);
        let n_vocab = self.model.info().n_vocab;
        let pass = std::mem::take(&mut self.pass);
        let mut all = std::mem::take(&mut self.logits);
        for (p, logits) in pass.iter().filter(|p| p.logits).zip(all.chunks_exact_mut(n_vocab)) {
            let Some(r) = &mut self.slots[p.slot].running else { continue };
            let taken = catch_unwind(AssertUnwindSafe(|| r.take(logits)));
            let taken = taken.unwrap_or_else(|e| {
                Err(Failure::Internal(format!("the request failed ({})", panic_text(&*e))))
            });
            metrics::counter!("rsinfer_tokens_generated_total").increment(1);
            let cached = r.prompt_tokens + r.made.saturating_sub(1);
            match taken {
                Ok(Taken::Next(_)) if self.end.is_some_and(|end| cached >= end) => {
                    self.end(p.slot, Reason::Length);
                }
                Ok(Taken::Next(token)) => self.scheduler.push(p.slot, token),
                Ok(Taken::Ended(reason)) => self.end(p.slot, reason),
                Err(f) => self.fail(p.slot, f),
            }
        }
        (self.pass, self.logits) = (pass, all);
    }

    fn evicted(&mut self, slot: usize) -> usize {
        let seq = self.slots[slot].seq;
        seq.and_then(|s| self.passes.context().cache().evicted(s).ok()).unwrap_or(0)
    }

    fn end(&mut self, slot: usize, reason: Reason) {
        let evicted = self.evicted(slot);
        self.scheduler.end(slot);
        if let Some(r) = self.slots[slot].running.take() {
            r.finish(reason, evicted);
        }
    }

    /// Ends a request with an error. What it left in the cache is not used again: it may be the cause.
    fn fail(&mut self, slot: usize, f: Failure) {
        self.scheduler.end(slot);
        self.scheduler.forget(slot);
        if let Some(s) = self.slots[slot].seq.take() {
            let _ = self.passes.context().cache_mut().free(s);
        }
        if let Some(r) = self.slots[slot].running.take() {
            r.fail(f);
        }
    }

    /// A pass that reported an error: those in it end.
    fn fail_pass(&mut self, f: &Failure) {
        for p in std::mem::take(&mut self.pass) {
            self.fail(p.slot, f.clone());
        }
    }

    fn report(&mut self) {
        let cache = self.passes.context().cache();
        let slots = self.scheduler.places().zip(&self.slots).map(|(p, s)| SlotStatus {
            seq: s.seq,
            job: p.job,
            cached: p.cached,
            prompt_left: p.prompt_left,
            evicted: s.seq.and_then(|s| cache.evicted(s).ok()).unwrap_or(0),
            made: s.running.as_ref().map_or(0, |r| r.made),
        });
        let (slots, kv) = (slots.collect(), cache.entries());
        let waiting = self.scheduler.waiting();
        metrics::gauge!("rsinfer_requests_running").set(self.scheduler.running() as f64);
        metrics::gauge!("rsinfer_requests_waiting").set(waiting as f64);
        metrics::gauge!("rsinfer_kv_entries_used").set(kv.0 as f64);
        metrics::gauge!("rsinfer_kv_entries").set(kv.1 as f64);
        let paging = self.passes.context().model().pager().stats();
        metrics::gauge!("rsinfer_weights_mapped_bytes").set(paging.mapped as f64);
        metrics::gauge!("rsinfer_experts_resident_bytes").set(paging.experts_here as f64);
        metrics::gauge!("rsinfer_weights_read_ahead_bytes").set(paging.asked as f64);
        metrics::gauge!("rsinfer_experts_given_up").set(paging.evicted as f64);
        *lock(&self.shared.status) = Status { waiting, slots, kv };
    }
}
