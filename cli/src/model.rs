//! Opening what MODEL names (`store` finds it): a GGUF file or the embedded demo model; sessions on it. Knows nothing of flags.

use crate::cmd::plan::refusal;
use crate::store::Store;
use anyhow::{Context, Result, bail};
use engine::device::{Chosen, DeviceChoice};
use engine::gguf::{File, OpenMode, Progress};
use engine::pager::PagerOptions;
use engine::plan::{
    Access, Change, Device, Fit, GpuNeeds, Machine, PlanModel, PlanOptions, Rules, available_memory, fit,
};
use engine::{DType, EngineError, KvSpec, LoadOptions, Model, Numa, Session, SessionOptions};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What MODEL names.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A GGUF file, or any part of a split one.
    File(PathBuf),
    /// The embedded model.
    Demo,
}

/// A model and how to load it.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    pub source: Source,
    pub memory: MemoryConfig,
    pub threads: usize,
}

/// What computes; how weights get into memory, and stay there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MemoryConfig {
    pub device: DeviceChoice,
    pub access: Access,
    /// Bytes of the experts used most.
    pub pin_experts: u64,
    pub numa: Option<Numa>,
}

/// A session's size as asked for.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// `None`: the smaller of 4096 and what the model was trained for; 0: what it was trained for.
    pub ctx: Option<usize>,
    pub batch: usize,
    pub cache_k: DType,
    pub cache_v: DType,
    pub cache_k_pe: Option<DType>,
    pub kv: KvSpec,
}

/// Where weights should go.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    pub gpu_layers: Option<usize>,
    pub main_gpu: Option<usize>,
    pub split: Vec<f64>,
    /// Layers, from the first, whose experts stay on the CPU.
    pub cpu_moe: Option<usize>,
    /// Tensors by pattern; the first that matches counts.
    pub tensors: Vec<(regex::Regex, Device)>,
}

impl Placement {
    /// The rules for a model on a machine.
    pub fn rules(&self, model: &PlanModel, machine: &Machine) -> Result<Rules> {
        let there = |i: usize| i < machine.gpus.len();
        let named = self.tensors.iter().filter_map(|(_, d)| match d {
            Device::Gpu(i) => Some(*i),
            Device::Cpu => None,
        });
        if let Some(i) = self.main_gpu.into_iter().chain(named).find(|i| !there(*i)) {
            bail!("there is no GPU{i}: {} given with --gpu", machine.gpus.len());
        }
        if self.split.len() > machine.gpus.len() {
            bail!("--tensor-split has {} shares for {} GPUs", self.split.len(), machine.gpus.len());
        }
        let device = |name: &str| self.tensors.iter().find(|(p, _)| p.is_match(name)).map(|(_, d)| *d);
        let tensors = model.weights().iter().filter_map(|w| Some((w.name.clone(), device(&w.name)?)));
        Ok(Rules {
            gpu_layers: self.gpu_layers,
            main_gpu: self.main_gpu,
            split: self.split.clone(),
            cpu_moe: self.cpu_moe,
            tensors: tensors.collect(),
        })
    }

    /// Refuses what only a GPU could do.
    pub fn on_cpu(&self) -> Result<()> {
        let gpu = self.tensors.iter().any(|(_, d)| *d != Device::Cpu);
        if self.gpu_layers.is_some_and(|n| n > 0) || self.main_gpu.is_some() || !self.split.is_empty() || gpu
        {
            bail!(
                "a model runs whole on the CPU or on one GPU (--device cuda:0) so far; `rsinfer plan --gpu SIZE` plans for more"
            );
        }
        Ok(())
    }
}

impl Source {
    /// What MODEL names: `demo`, a file, or a model of a store.
    ///
    /// # Errors
    /// No such model.
    pub fn named(s: &str) -> Result<Self> {
        Ok(Store::from_env().named(s)?.source)
    }

    /// For messages and reports.
    pub fn name(&self) -> String {
        match self {
            Self::File(p) => p.display().to_string(),
            Self::Demo => crate::demo::NAME.into(),
        }
    }

    /// The file without its tensors: enough for metadata and vocabulary.
    pub fn open(&self) -> Result<File> {
        Ok(match self {
            Self::File(p) => File::open(p, OpenMode::Mmap)?,
            Self::Demo => File::from_static(crate::demo::NAME, crate::demo::bytes())?,
        })
    }
}

impl LoadConfig {
    /// The model's headers, for planning.
    pub fn headers(&self) -> Result<PlanModel> {
        let model = match &self.source {
            Source::File(p) => PlanModel::open(p),
            Source::Demo => PlanModel::of(&self.source.open()?),
        };
        model.map_err(|e| name_the_file(e, &self.source))
    }

    /// Opens what is to compute such sessions, of so many sequences each. A GPU must hold the largest of them.
    ///
    /// # Errors
    /// A GPU asked for by name that cannot be used.
    pub fn choose<'a>(
        &self,
        sessions: impl IntoIterator<Item = (&'a SessionOptions, usize)>,
    ) -> Result<Chosen> {
        let chosen = self.memory.device.open(|| self.gpu_needs(sessions))?;
        if let Some(note) = &chosen.note {
            eprintln!("note: {note}");
        }
        Ok(chosen)
    }

    /// What the largest of such sessions needs of a GPU.
    pub fn gpu_needs<'a>(
        &self,
        sessions: impl IntoIterator<Item = (&'a SessionOptions, usize)>,
    ) -> Result<GpuNeeds> {
        let file = match &self.source {
            Source::File(p) => File::headers(p)?,
            Source::Demo => self.source.open()?,
        };
        let mut most = GpuNeeds::default();
        for (session, parallel) in sessions {
            let options = PlanOptions { session: session.clone(), parallel, ..PlanOptions::default() };
            let needs = GpuNeeds::of(&file, &options).map_err(|e| name_the_file(e, &self.source))?;
            if needs.total() > most.total() {
                most = needs;
            }
        }
        Ok(most)
    }

    /// The same, with contexts as far as they are given.
    fn choose_all(&self, sessions: &[(SessionConfig, usize)]) -> Result<Chosen> {
        if self.memory.device == DeviceChoice::Cpu {
            return self.choose([]);
        }
        let trained = self.headers()?.ctx_train();
        let all = sessions.iter().map(|(s, n)| Ok((s.options(s.ctx(trained)?), *n)));
        let all = all.collect::<Result<Vec<_>>>()?;
        self.choose(all.iter().map(|(s, n)| (s, *n)))
    }

    /// Plans a session before anything is loaded, and opens what is to compute it. What does not fit the memory that is left is an
    /// error with the flags that would; with `choose` the first of them is taken, and told.
    pub fn plan(&mut self, session: &mut SessionConfig, choose: bool) -> Result<Chosen> {
        let chosen = self.choose_all(&[(session.clone(), 1)])?;
        if chosen.device.is_some() {
            return Ok(chosen);
        }
        let Some(memory) = available_memory() else { return Ok(chosen) };
        let model = self.headers()?;
        let Some(found) = self.misfit(&model, session, 1, memory)? else { return Ok(chosen) };
        // What is chosen leaves others some room.
        let roomy = self.misfit(&model, session, 1, memory - memory / 16)?;
        match roomy.and_then(|f| f.ways.into_iter().next()).filter(|_| choose) {
            None => bail!("{}: {}", self.source.name(), refusal(&found)),
            Some(w) => {
                eprintln!("note: to fit {} of memory: {}", crate::output::bytes(memory), w.flags());
                let s = &w.options.session;
                (session.ctx, session.batch) = (Some(s.ctx), s.batch);
                (session.cache_k, session.cache_v) = (s.cache_k, s.cache_v);
                self.memory.access = w.options.access;
                Ok(chosen)
            }
        }
    }

    /// The same for sessions, of so many sequences each, that follow one another and whose contexts and numbers of sequences
    /// are given: no flag that changes those is offered.
    pub fn plan_all(&self, sessions: impl IntoIterator<Item = (SessionConfig, usize)>) -> Result<Chosen> {
        let sessions: Vec<_> = sessions.into_iter().collect();
        let chosen = self.choose_all(&sessions)?;
        if chosen.device.is_some() {
            return Ok(chosen);
        }
        let Some(memory) = available_memory() else { return Ok(chosen) };
        let model = self.headers()?;
        for (session, parallel) in sessions {
            if let Some(mut found) = self.misfit(&model, &session, parallel, memory)? {
                let given = |c: &Change| matches!(c, Change::Ctx(_) | Change::Parallel(_));
                found.ways.retain(|w| !w.changes.iter().any(given));
                bail!("{}: {}", self.source.name(), refusal(&found));
            }
        }
        Ok(chosen)
    }

    /// What is wrong with a session in `memory` bytes; `None` if it fits.
    fn misfit(
        &self,
        model: &PlanModel,
        session: &SessionConfig,
        parallel: usize,
        memory: u64,
    ) -> Result<Option<Fit>> {
        let session = session.options(session.ctx(model.ctx_train())?);
        let MemoryConfig { access, pin_experts: pinned, .. } = self.memory;
        let options = PlanOptions { session, parallel, access, pinned, threads: self.threads };
        let machine = Machine { memory, gpus: Vec::new() };
        // What no session accepts is reported where one is opened, as without a plan.
        let found = fit(model, &options, &machine, &Rules::default()).ok();
        Ok(found.filter(|f| !f.plan.fits()))
    }

    /// Loads on what was chosen, telling how long it takes; a terminal is shown that something happens if that is more than a second.
    pub fn load(&self, on: Chosen) -> Result<(Arc<Model>, Duration)> {
        self.load_with(on, &Arc::default())
    }

    /// The same; `progress` is told of the bytes read.
    pub fn load_with(&self, on: Chosen, progress: &Arc<Progress>) -> Result<(Arc<Model>, Duration)> {
        let start = Instant::now();
        let (done, waiting) = channel::<()>();
        let name = self.source.name();
        let spinner = std::io::stderr().is_terminal().then(|| {
            std::thread::spawn(move || {
                if waiting.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                    let bar = indicatif::ProgressBar::new_spinner().with_message(format!("loading {name}"));
                    bar.enable_steady_tick(Duration::from_millis(100));
                    let _ = waiting.recv();
                    bar.finish_and_clear();
                }
            })
        });
        if let Some(numa) = self.memory.numa {
            numa.apply()?;
        }
        let options = LoadOptions {
            mmap: self.memory.access != Access::Read,
            lock: self.memory.access == Access::Locked,
            pager: PagerOptions { pin: self.memory.pin_experts, ..PagerOptions::default() },
            threads: self.threads,
            progress: progress.clone(),
            devices: on.device.map(Into::into),
        };
        let model = match &self.source {
            Source::File(p) => Model::load(p, &options),
            Source::Demo => Model::load_static(crate::demo::NAME, crate::demo::bytes(), &options),
        };
        drop(done);
        if let Some(s) = spinner {
            let _ = s.join();
        }
        let model = model.map_err(|e| name_the_file(e, &self.source))?;
        Ok((model, start.elapsed()))
    }
}

/// GGUF errors name their file; the others must be told.
fn name_the_file(e: EngineError, source: &Source) -> anyhow::Error {
    match e {
        EngineError::Gguf(_) => e.into(),
        e => anyhow::Error::new(e).context(source.name()),
    }
}

impl SessionConfig {
    /// The context to allocate.
    pub fn ctx(&self, trained: usize) -> Result<usize> {
        Ok(match self.ctx {
            None if trained == 0 => 4096,
            None => trained.min(4096),
            Some(0) if trained == 0 => bail!("the file does not say its context length: choose one with -c"),
            Some(0) => trained,
            Some(n) => n,
        })
    }

    /// The engine's options for a context of `ctx` entries.
    pub fn options(&self, ctx: usize) -> SessionOptions {
        let Self { batch, cache_k, cache_v, cache_k_pe, ref kv, .. } = *self;
        SessionOptions { ctx, batch, cache_k, cache_v, cache_k_pe, kv: kv.clone() }
    }

    /// Opens a session with `ctx` entries.
    pub fn open(&self, model: &Arc<Model>, ctx: usize) -> Result<Session> {
        Session::new(model, &self.options(ctx))
            .with_context(|| format!("cannot open a context of {ctx} tokens"))
    }
}
