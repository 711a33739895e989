//! The models that are loaded: by plan, as many as fit; the least recently used idle one goes, one in use never. Knows nothing
//! of requests but what they ask of loading.

use super::config::Config;
use super::constrain::{FormatError, Grammars};
use super::duration::KeepAlive;
use super::failure::Failure;
use super::options::LoadWish;
use super::worker::{Open, Opened, Sizes, Worker};
use crate::cmd::plan::refusal;
use crate::memory::Resident;
use crate::model::{LoadConfig, Source};
use crate::store::Resolved;
use engine::device::Gpus;
use engine::gguf::Progress;
use engine::plan::{DevicePlan, Plan, PlanModel, PlanOptions, Way, available_memory};
use engine::text::ChatTemplate;
use engine::{Context, DType, KvSpec, SessionOptions};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Notify;

/// The least recently used idle one goes when there is no room.
pub struct Models {
    config: Arc<Config>,
    loaded: Mutex<Vec<Arc<Loaded>>>,
    /// One model is loaded at a time: this one.
    loading: tokio::sync::Mutex<()>,
    now: Mutex<Option<Loading>>,
    /// A model has become idle, or is gone.
    changed: Notify,
    waiting: AtomicUsize,
    /// Bytes promised to embeddings under way.
    lent: Mutex<u64>,
}

/// Memory promised beside the models' own.
pub struct Loan {
    bytes: u64,
    models: Arc<Models>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        *self.models.lent() -= self.bytes;
        self.models.changed.notify_waiters();
    }
}

/// A model that is being loaded.
#[derive(Clone)]
pub struct Loading {
    pub name: String,
    pub since: Instant,
    pub progress: Arc<Progress>,
}

/// A model that is loaded.
pub struct Loaded {
    /// By which it was asked for first.
    pub resolved: Resolved,
    pub worker: Worker,
    /// Of the store's, or of the file.
    pub template: ChatTemplate,
    /// Tokens of a sequence.
    pub ctx: usize,
    pub parallel: usize,
    /// What the cache keeps.
    pub kv: KvSpec,
    /// Nobody chose that: the server sees to it that system prompts stay.
    pub own_kv: bool,
    /// Types of the cache.
    types: [Option<DType>; 3],
    /// Its plan, in bytes: not mapped, and mapped.
    pub resident: u64,
    pub mapped: u64,
    /// The same, by what the memory is for.
    pub plan: DevicePlan,
    /// Bytes on GPUs, by their number at the driver.
    pub on_gpus: Vec<(usize, u64)>,
    grammars: OnceLock<Result<Grammars, FormatError>>,
    usage: Mutex<Usage>,
}

struct Usage {
    leases: usize,
    keep: KeepAlive,
    /// Since when nobody uses it.
    idle: Instant,
}

/// What a model is to take, and of what.
struct Planned {
    plan: Plan,
    gpus: Gpus,
    note: Option<String>,
}

/// Use of a loaded model: while there is one, the model stays.
pub struct Lease {
    pub loaded: Arc<Loaded>,
    /// How long loading took, if this request caused it.
    pub load_time: Duration,
    /// A model with a smaller context, or another policy, had to go for this request.
    pub reloaded: bool,
    models: Arc<Models>,
}

/// Takes a number back.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Loaded {
    fn usage(&self) -> std::sync::MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What constraints of its vocabulary share.
    ///
    /// # Errors
    /// A vocabulary that constraints cannot be made for.
    pub fn grammars(&self) -> Result<&Grammars, Failure> {
        let made = self.grammars.get_or_init(|| Grammars::new(self.worker.model().vocab()));
        made.as_ref().map_err(|e| Failure::Internal(e.to_string()))
    }

    /// When it goes if nobody asks for it; `None`: never.
    pub fn expires(&self) -> Option<SystemTime> {
        let u = self.usage();
        let left = u.keep.0?;
        let idle = if u.leases > 0 { Duration::ZERO } else { u.idle.elapsed() };
        SystemTime::now().checked_add(left.saturating_sub(idle))
    }

    fn due(&self) -> Option<Instant> {
        let u = self.usage();
        if u.leases > 0 { None } else { u.idle.checked_add(u.keep.0?) }
    }

    fn serves(&self, source: &Source, wish: &LoadWish) -> bool {
        let fits = wish.ctx.is_none_or(|n| n <= self.ctx) && wish.kv.as_ref().is_none_or(|k| *k == self.kv);
        let wanted = [wish.cache_k, wish.cache_v, wish.cache_k_pe];
        let same = wanted.iter().zip(&self.types).all(|(wish, is)| wish.is_none() || wish == is);
        self.resolved.source == *source && fits && same && !self.worker.is_dead()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut u = self.loaded.usage();
        u.leases -= 1;
        u.idle = Instant::now();
        drop(u);
        self.models.changed.notify_waiters();
    }
}

impl Models {
    /// None loaded yet. Models that are idle for too long go by themselves, as long as a runtime is there.
    pub fn new(config: Arc<Config>) -> Arc<Self> {
        let models = Arc::new(Self {
            config,
            loaded: Mutex::default(),
            loading: tokio::sync::Mutex::default(),
            now: Mutex::default(),
            changed: Notify::new(),
            waiting: AtomicUsize::new(0),
            lent: Mutex::default(),
        });
        let weak = Arc::downgrade(&models);
        tokio::spawn(async move {
            while let Some(models) = weak.upgrade() {
                let changed = models.changed.notified();
                models.unload_if(|l| l.due().is_some_and(|d| d <= Instant::now())).await;
                let next = models.list().iter().filter_map(|l| l.due()).min();
                let most = Instant::now() + Duration::from_secs(60);
                let next = next.map_or(most, |n| n.min(most));
                tokio::select! {
                    () = changed => {}
                    () = tokio::time::sleep_until(next.into()) => {}
                }
            }
        });
        models
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Loaded>>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is loaded.
    pub fn list(&self) -> Vec<Arc<Loaded>> {
        self.lock().clone()
    }

    /// What is being loaded.
    pub fn loading(&self) -> Option<Loading> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_loading(&self, now: Option<Loading>) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// Lets all idle models go for which `which` holds, and waits until their memory is free.
    async fn unload_if(&self, which: impl Fn(&Loaded) -> bool) {
        let gone: Vec<Arc<Loaded>> = {
            let mut all = self.lock();
            let idle = |l: &mut Arc<Loaded>| l.usage().leases == 0 && which(l);
            all.extract_if(.., idle).collect()
        };
        for l in gone {
            tracing::info!(model = l.resolved.name, "unloaded");
            release(l).await;
        }
        metrics::gauge!("rsinfer_models_loaded").set(self.lock().len() as f64);
    }

    fn lease(self: &Arc<Self>, source: &Source, wish: &LoadWish, keep: Option<KeepAlive>) -> Option<Lease> {
        let all = self.lock();
        let loaded = all.iter().find(|l| l.serves(source, wish))?.clone();
        let mut u = loaded.usage();
        u.leases += 1;
        u.keep = keep.unwrap_or(u.keep);
        drop(u);
        Some(Lease { loaded, load_time: Duration::ZERO, reloaded: false, models: self.clone() })
    }

    /// A model to use, loaded if it is not. It stays for `keep` after its last use; `None`: for what was said before.
    ///
    /// # Errors
    /// What cannot be loaded, or [`Failure::Busy`].
    pub async fn acquire(
        self: &Arc<Self>,
        model: &Resolved,
        wish: &LoadWish,
        keep: Option<KeepAlive>,
    ) -> Result<Lease, Failure> {
        if let Some(l) = self.lease(&model.source, wish, keep) {
            return Ok(l);
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.config.max_queue {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Failure::Busy);
        }
        let _waiting = Counted(&self.waiting);
        let _one = self.loading.lock().await;
        // Another request may have loaded it meanwhile.
        if let Some(l) = self.lease(&model.source, wish, keep) {
            return Ok(l);
        }
        let start = Instant::now();
        let planned = self.headers(model, wish).await?;
        // What cannot be must cost nobody a loaded model.
        self.plan(&planned.0, &planned.1, wish, &[])?;
        // One that does not serve goes when the requests it works on are done; new ones wait for the next.
        let old = {
            let mut all = self.lock();
            let at = all.iter().position(|l| l.resolved.source == model.source);
            at.map(|i| all.remove(i))
        };
        let reloaded = old.is_some();
        let mut wish = wish.clone();
        if let Some(old) = old {
            // Who asked for more before may ask again: the context never shrinks.
            wish.ctx = Some(wish.ctx.map_or(old.ctx, |n| n.max(old.ctx)));
            loop {
                let changed = self.changed.notified();
                if old.usage().leases == 0 {
                    break;
                }
                changed.await;
            }
            release(old).await;
        }
        let loaded = Arc::new(self.load(model, planned, &wish).await?);
        let load_time = start.elapsed();
        loaded.usage().keep = keep.unwrap_or(self.config.keep_alive);
        loaded.usage().leases = 1;
        metrics::counter!("rsinfer_model_loads_total").increment(1);
        tracing::info!(model = model.name, ctx = loaded.ctx, parallel = loaded.parallel,
            kv = %loaded.kv, resident = loaded.resident, mapped = loaded.mapped, ?load_time, "loaded");
        self.lock().push(loaded.clone());
        metrics::gauge!("rsinfer_models_loaded").set(self.lock().len() as f64);
        Ok(Lease { loaded, load_time, reloaded, models: self.clone() })
    }

    /// A model's headers, and how to load it.
    async fn headers(&self, model: &Resolved, wish: &LoadWish) -> Result<(PlanModel, LoadConfig), Failure> {
        let load = LoadConfig {
            source: model.source.clone(),
            memory: wish.memory(self.config.memory.clone()),
            threads: wish.threads.unwrap_or(self.config.threads).min(1024),
        };
        let read = tokio::task::spawn_blocking(move || load.headers().map(|h| (h, load)));
        read.await.map_err(Failure::internal)?.map_err(|e| Failure::Internal(format!("{e:#}")))
    }

    /// Makes room by plan, and loads.
    async fn load(
        &self,
        model: &Resolved,
        (headers, load): (PlanModel, LoadConfig),
        wish: &LoadWish,
    ) -> Result<Loaded, Failure> {
        let c = &self.config;
        let (options, plan) = loop {
            let changed = self.changed.notified();
            let others = self.list();
            let full = others.len() >= c.max_loaded;
            let why = match self.plan(&headers, &load, wish, &others) {
                Ok(planned) if !full => break planned,
                Ok(_) => None,
                Err(e) => Some(e),
            };
            let idle = others.iter().filter(|l| l.usage().leases == 0);
            let victim = idle.min_by_key(|l| l.usage().idle).map(|l| l.resolved.source.clone());
            let none = others.is_empty();
            // What is held is not freed.
            drop(others);
            match victim {
                Some(source) => self.unload_if(move |l| l.resolved.source == source).await,
                None if none => {
                    return Err(why.unwrap_or_else(|| Failure::internal("no model may be loaded")));
                }
                None => changed.await,
            }
        };
        let own_kv = wish.kv.is_none() && c.kv.is_none();
        self.start(model, load, (options, own_kv), plan).await
    }

    /// Sizes that fit what memory is left, and the bytes they take. Memory that others were promised counts as taken.
    fn plan(
        &self,
        headers: &PlanModel,
        load: &LoadConfig,
        wish: &LoadWish,
        others: &[Arc<Loaded>],
    ) -> Result<(SessionOptions, Planned), Failure> {
        let c = &self.config;
        let trained = headers.ctx_train();
        let ctx = match wish.ctx.or(c.ctx) {
            None | Some(0) if trained == 0 => 4096,
            None => trained.min(4096),
            Some(0) => trained,
            Some(n) => n,
        };
        let session = SessionOptions {
            ctx,
            batch: wish.batch.unwrap_or(c.batch).clamp(1, 4096),
            cache_k: wish.cache_k.unwrap_or(c.cache_k),
            cache_v: wish.cache_v.unwrap_or(c.cache_v),
            cache_k_pe: wish.cache_k_pe.or(c.cache_k_pe),
            kv: KvSpec::default(),
        };
        let mut options = PlanOptions {
            session,
            parallel: c.parallel,
            access: load.memory.access,
            pinned: load.memory.pin_experts,
            threads: load.threads,
        };
        options.session.kv = self.keep(wish, ctx);
        let internal = |e: engine::EngineError| Failure::Internal(e.to_string());
        let mut gpus = load.memory.device.look().map_err(internal)?;
        // Those that are to go give back what they hold.
        for l in self.list().iter().filter(|l| !others.iter().any(|o| Arc::ptr_eq(o, l))) {
            l.on_gpus.iter().for_each(|(index, bytes)| gpus.give_back(*index, *bytes));
        }
        let room = self.room(others, *self.lent());
        let invalid = |e: anyhow::Error| Failure::invalid(format!("{e:#}"));
        let (found, note) = load.fit(&gpus, headers, &options, room).map_err(invalid)?;
        // Smaller sizes, where none was asked for.
        let same = |w: &&Way| w.options.parallel == options.parallel && w.options.access == options.access;
        let way = found.ways.iter().find(same).filter(|_| wish.ctx.is_none() && others.is_empty());
        let plan = match way {
            _ if found.plan.fits() => &found.plan,
            None => {
                let why = format!("{}: {}", headers.name(), refusal(&found));
                // A context that a request asks for is the request's to change.
                let asked = wish.ctx.is_some();
                return Err(if asked { Failure::field("num_ctx", why) } else { Failure::Internal(why) });
            }
            Some(w) => {
                tracing::warn!("to fit the memory: {}", w.flags());
                options = w.options.clone();
                options.session.kv = self.keep(wish, options.session.ctx);
                &w.plan
            }
        };
        Ok((options.session, Planned { plan: plan.clone(), gpus, note }))
    }

    /// Bytes left when `others` and embeddings have all that they were promised.
    fn room(&self, others: &[Arc<Loaded>], lent: u64) -> u64 {
        let own = Resident::now().map_or(0, |r| r.anon);
        let promised = |all: &[Arc<Loaded>]| lent + all.iter().map(|l| l.resident).sum::<u64>();
        let held = own.min(promised(&self.list()));
        available_memory().map_or(u64::MAX, |m| (m + held).saturating_sub(promised(others)))
    }

    fn lent(&self) -> std::sync::MutexGuard<'_, u64> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory beside the models' own, for as long as the loan lives.
    ///
    /// # Errors
    /// There is not so much left.
    pub fn lend(self: &Arc<Self>, bytes: u64) -> Result<Loan, Failure> {
        let mut lent = self.lent();
        let room = self.room(&self.list(), *lent);
        if bytes > room {
            return Err(Failure::Unavailable(format!(
                "embedding this text takes {bytes} bytes of memory, {room} are left: try again later, or a shorter text"
            )));
        }
        *lent += bytes;
        Ok(Loan { bytes, models: self.clone() })
    }

    /// What the cache keeps. The beginning stays, and of the rest the latest; how much the beginning is, each request says
    /// that has a system prompt.
    fn keep(&self, wish: &LoadWish, ctx: usize) -> KvSpec {
        let own = wish.kv.as_ref().or(self.config.kv.as_ref());
        own.cloned().unwrap_or_else(|| {
            let sinks = ctx / 4;
            // Whole blocks of the cache: then what is cached serves also requests with other beginnings.
            let sinks = if sinks > 32 { sinks / 32 * 32 } else { sinks };
            format!("sinks:{sinks}+window:{}", (ctx - sinks).max(1)).parse().unwrap_or_default()
        })
    }

    async fn start(
        &self,
        model: &Resolved,
        load: LoadConfig,
        (session, own_kv): (SessionOptions, bool),
        planned: Planned,
    ) -> Result<Loaded, Failure> {
        let c = &self.config;
        let sizes = Sizes { parallel: c.parallel, chunk: c.chunk, queue: c.max_queue };
        let (ctx, kv) = (session.ctx, session.kv.clone());
        let types = [Some(session.cache_k), Some(session.cache_v), session.cache_k_pe];
        let host = planned.plan.devices[0].clone();
        let on_gpus = planned.gpus.held(&planned.plan);
        let progress = Arc::new(Progress::default());
        let read = progress.clone();
        let open: Open = Box::new(move || {
            let Planned { plan, gpus, note } = &planned;
            // Where `auto` finds that a driver refuses, the CPU has it all.
            let on = load.open(&mut gpus.clone(), plan, note.as_deref())?.unwrap_or_default();
            let (model, _) = load.load_with(on, &read)?;
            let context = Context::new(&model, &session, sizes.parallel)?;
            Ok(Opened { model, passes: Box::new(context) })
        });
        let now = Loading { name: model.name.clone(), since: Instant::now(), progress };
        let mut shown = Shown { models: self, now: now.clone(), over: false };
        self.set_loading(Some(now.clone()));
        let worker = watched(Worker::start(&model.name, open, sizes), &now, c.load_timeout).await;
        shown.over = true;
        drop(shown);
        let worker = worker?;
        let worker = worker.map_err(|e| Failure::Internal(format!("{e:#}")))?;
        let loaded = worker.model();
        let template =
            crate::chat::template(loaded.file().metadata(), loaded.vocab(), model.template.as_deref());
        Ok(Loaded {
            resolved: model.clone(),
            worker,
            template: template.map_err(|e| Failure::Internal(format!("{e:#}")))?,
            ctx,
            parallel: c.parallel,
            kv,
            own_kv,
            types,
            resident: host.resident(),
            mapped: host.mapped(),
            plan: host,
            on_gpus,
            grammars: OnceLock::new(),
            usage: Mutex::new(Usage { leases: 0, keep: c.keep_alive, idle: Instant::now() }),
        })
    }

    /// Lets a model go as soon as it is idle. False: it is not loaded.
    pub fn stop(&self, source: &Source) -> bool {
        let all = self.lock();
        let Some(l) = all.iter().find(|l| l.resolved.source == *source) else { return false };
        l.usage().keep = KeepAlive(Some(Duration::ZERO));
        drop(all);
        self.changed.notify_waiters();
        true
    }
}

/// A load that others can see; whoever asked for it may go away before its end.
struct Shown<'a> {
    models: &'a Models,
    now: Loading,
    over: bool,
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.now.progress.stop();
        }
        self.models.set_loading(None);
    }
}

/// Time between two looks at a load.
const LOOK: Duration = Duration::from_secs(1);

/// Waits for what loads as long as it gets on: `patience` without a byte read is an error (`None`: never).
async fn watched<T>(
    load: impl Future<Output = T>,
    now: &Loading,
    patience: Option<Duration>,
) -> Result<T, Failure> {
    let mut load = std::pin::pin!(load);
    let (mut read, mut moved, mut looks) = (0, Instant::now(), 0u32);
    loop {
        if let Ok(done) = tokio::time::timeout(LOOK.min(patience.unwrap_or(LOOK)), &mut load).await {
            metrics::gauge!("rsinfer_load_bytes_left").set(0.0);
            return Ok(done);
        }
        let (done, total) = (now.progress.done(), now.progress.total());
        metrics::gauge!("rsinfer_load_bytes_left").set(total.saturating_sub(done) as f64);
        if done != read {
            (read, moved) = (done, Instant::now());
        }
        looks += 1;
        if looks.is_multiple_of(5) {
            tracing::info!(model = now.name, done, total, seconds = now.since.elapsed().as_secs(), "loading");
        }
        if let Some(t) = patience.filter(|t| moved.elapsed() >= *t) {
            now.progress.stop();
            return Err(Failure::Unavailable(format!(
                "loading {} has made no progress for {t:?} (OLLAMA_LOAD_TIMEOUT): {done} of {total} bytes are read",
                now.name
            )));
        }
    }
}

/// Waits until an unused model's memory is free.
async fn release(l: Arc<Loaded>) {
    let exited = l.worker.exited();
    drop(l);
    let _ = tokio::time::timeout(Duration::from_secs(10), exited).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::gguf::{File, OpenMode};
    use std::io::Write;

    fn loading() -> Loading {
        Loading { name: "m".into(), since: Instant::now(), progress: Arc::default() }
    }

    #[tokio::test]
    async fn a_slow_load_is_waited_for_and_a_stuck_one_is_not() {
        // A file's bytes, read over and over, for longer than the patience.
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(crate::demo::bytes()).unwrap();
        let (now, patience) = (loading(), Some(Duration::from_millis(200)));
        let slow = async {
            for _ in 0..10 {
                File::open_with(file.path(), OpenMode::Read, &now.progress).unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        watched(slow, &now, patience).await.unwrap();
        let bytes = 10 * crate::demo::bytes().len() as u64;
        assert_eq!((now.progress.done(), now.progress.total()), (bytes, bytes));
        let now = loading();
        let stuck = watched(std::future::pending::<()>(), &now, patience).await.unwrap_err();
        assert!(stuck.status() == 503 && stuck.to_string().contains("no progress"), "{stuck}");
        // Who reads on is told.
        let e = File::open_with(file.path(), OpenMode::Read, &now.progress).unwrap_err();
        assert!(e.to_string().contains("given up"), "{e}");
        watched(async {}, &loading(), None).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_lent_is_taken_until_it_comes_back() {
        let models = Models::new(Arc::new(Config {
            host: String::new(),
            models: Vec::new(),
            threads: 1,
            memory: Default::default(),
            ctx: None,
            batch: 1,
            chunk: 1,
            cache_k: engine::DType::F16,
            cache_v: engine::DType::F16,
            cache_k_pe: None,
            kv: None,
            parallel: 1,
            keep_alive: KeepAlive(None),
            max_queue: 1,
            max_loaded: 1,
            load_timeout: None,
            api_key: None,
            origins: Vec::new(),
            debug: 0,
        }));
        // Half of it and three quarters, so that what others do meanwhile makes no difference.
        let room = models.room(&[], 0);
        let loan = models.lend(room / 2).expect("there is so much");
        assert!(models.lend(room / 4 * 3).is_err());
        drop(loan);
        assert!(models.lend(room / 4 * 3).is_ok());
    }
}
