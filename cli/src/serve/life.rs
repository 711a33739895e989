//! One life of a loaded model's context: takes requests in, runs passes over all of them, sends tokens out. A request that
//! fails ends alone; after a pass that panics nothing here can be trusted any more. Runs on the engine's thread (`worker`).

use super::failure::Failure;
use super::request::{Event, Reason};
use super::running::{Running, Taken, Ticket, is_exact};
use super::status::{SlotStatus, Status};
use super::worker::{Command, Passes, Shared, Sizes, lock, panic_text};
use engine::schedule::{Admission, Cancelled, Job, Limits, Piece, Scheduler, Start};
use engine::{EngineError, Logits, Model, Rows, SeqId};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Events that a reader must have room for: what one pass can send.
const ROOM: usize = 4;
/// How long a reader may take nothing before its request is given up.
const STALL: Duration = Duration::from_secs(60);
/// Policies that do not choose compute every prompt as one of at least this length, so that what one prompt leaves in the
/// cache has the bits that any other would give it (docs/numerics.md).
const LONG_PROMPT: usize = 512;
/// Rows of logits in memory at a time, where those of a whole prompt are wanted.
const ROWS: usize = 16;

/// See the module.
pub(super) struct Life<'a> {
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
    /// Of each row that is wanted the best logits, where nobody asked for more.
    best: Vec<(u32, f32)>,
}

#[derive(Default)]
struct Slot<'a> {
    seq: Option<SeqId>,
    running: Option<Running<'a>>,
}

impl<'a> Life<'a> {
    pub fn new(
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
        let (pass, logits, best) = (Vec::new(), Vec::new(), Vec::new());
        Self { model, passes, inbox, shared, scheduler, end, chooses, waiting, slots, pass, logits, best }
    }

    /// Until all handles are gone (false), or the context cannot be trusted any more (true).
    pub fn run(&mut self) -> bool {
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
                let (exact, whole) = (is_exact(&t.request.sampler), t.request.echo.is_some());
                let job = Job { id: t.id, prompt, exact, whole };
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
        let (exact, head) = (is_exact(&t.request.sampler), t.request.head);
        let out = t.out.clone();
        let begun = self.prepare(a, exact, head).map_err(Failure::internal).and_then(|kept| {
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

    /// Prepares the cache of a place for a request that wants its first `head` tokens kept; how many tokens it holds now. If
    /// it fails, the place is empty.
    fn prepare(&mut self, a: Admission, exact: bool, head: Option<usize>) -> Result<usize, EngineError> {
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
        let kept = made.and_then(|s| {
            let n = cache.truncate(s, keep)?;
            Ok((s, head.map_or(Ok(n), |head| cache.set_sinks(s, head))?))
        });
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
        // As many as the one with most asks for; all, where one does.
        let mut few = Some(1);
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
                few = few.zip(slot.running.as_ref().map_or(Some(1), Running::few)).map(|(a, b)| a.max(b));
            }
        }
        let start = Instant::now();
        self.passes.forward(&rows)?;
        self.logits.clear();
        self.best.clear();
        if !wanted.is_empty() && !few.map_or(Ok(false), |k| self.passes.best(&wanted, k, &mut self.best))? {
            self.passes.logits(&wanted, &mut self.logits)?;
        }
        metrics::histogram!("rsinfer_pass_seconds").record(start.elapsed());
        metrics::counter!("rsinfer_rows_total").increment(at as u64);
        self.echo()
    }

    /// Shows the logits of prompts' rows to those who want to see them.
    fn echo(&mut self) -> Result<(), EngineError> {
        let n_vocab = self.model.info().n_vocab;
        let (mut at, mut logits) = (0, Vec::new());
        for p in &self.pass {
            let n = p.prompt.as_ref().map_or(1, |r| r.len());
            if let (Some(prompt), Some(r)) = (&p.prompt, &mut self.slots[p.slot].running)
                && r.echoes()
            {
                for from in (0..n).step_by(ROWS) {
                    let rows: Vec<u32> = (at + from..at + n.min(from + ROWS)).map(|i| i as u32).collect();
                    logits.clear();
                    self.passes.logits(&rows, &mut logits)?;
                    for (i, row) in logits.chunks_exact(n_vocab).enumerate() {
                        r.echo(prompt.start + from + i, row);
                    }
                }
            }
            at += n;
        }
        Ok(())
    }

    /// What the logits of a pass lead to.
    fn take(&mut self) {
        self.scheduler.done(&self.pass);
        let n_vocab = self.model.info().n_vocab;
        let pass = std::mem::take(&mut self.pass);
        let (mut all, best) = (std::mem::take(&mut self.logits), std::mem::take(&mut self.best));
        let rows = pass.iter().filter(|p| p.logits).count().max(1);
        let whole = all.chunks_exact_mut(n_vocab).map(Logits::Whole);
        let some = best.chunks_exact((best.len() / rows).max(1)).map(|best| Logits::Best { best, n_vocab });
        for (p, logits) in pass.iter().filter(|p| p.logits).zip(whole.chain(some)) {
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
        (self.pass, self.logits, self.best) = (pass, all, best);
    }

    fn end(&mut self, slot: usize, reason: Reason) {
        let cache = self.passes.context().cache();
        let told = |s| Some((cache.evicted(s).ok()?, cache.sinks(s).ok()?));
        let (evicted, sinks) = self.slots[slot].seq.and_then(told).unwrap_or_default();
        self.scheduler.end(slot);
        if let Some(r) = self.slots[slot].running.take() {
            r.finish(reason, evicted, sinks);
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
