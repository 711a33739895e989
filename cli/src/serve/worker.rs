//! The engine thread of a loaded model, which owns its context: a handle for others, and the loop that loads the model anew
//! after a panic. What it does with requests is in `life`.

use super::failure::Failure;
use super::life::Life;
use super::request::{Event, Generate};
use super::running::Ticket;
use super::status::Status;
use engine::{Context, EngineError, Model, Rows};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot, watch};

/// Events that a reader may be behind. A sequence whose reader has no room waits, and nobody waits for it.
const BACKLOG: usize = 512;
/// What the thread computes with. Tests put faults in between.
pub trait Passes {
    fn context(&mut self) -> &mut Context;

    fn forward(&mut self, rows: &[Rows<'_>]) -> Result<(), EngineError> {
        self.context().forward(rows)
    }

    fn logits(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        self.context().logits(rows, out)
    }

    fn best(&mut self, rows: &[u32], k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool, EngineError> {
        self.context().best(rows, k, out)
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

pub(super) enum Command {
    Generate(Box<Ticket>),
    Call(Call),
}

pub(super) struct Shared {
    model: Mutex<Arc<Model>>,
    pub status: Mutex<Status>,
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

pub(super) fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
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

pub(super) fn panic_text(p: &(dyn std::any::Any + Send)) -> String {
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
            Life::new(&model, &mut *opened.passes, inbox, shared, sizes).run()
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
