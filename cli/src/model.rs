//! Opening what MODEL names (`store` finds it): a GGUF file or the embedded demo model; sessions on it. Knows nothing of flags.

use crate::cmd::plan::refusal;
use crate::store::Store;
use anyhow::{Context, Result, bail};
use engine::device::{DeviceChoice, Gpus};
use engine::gguf::{File, OpenMode, Progress};
use engine::pager::PagerOptions;
use engine::plan::{
    Access, Change, Device, DevicePlan, Fit, Part, Plan, PlanModel, PlanOptions, Rules, available_memory,
};
use engine::{DType, Devices, EngineError, KvSpec, LoadOptions, Model, Numa, Session, SessionOptions};
use std::collections::HashMap;
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

/// What computes what; how weights get into memory, and stay there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryConfig {
    pub device: DeviceChoice,
    pub place: Placement,
    pub access: Access,
    /// Bytes of the experts used most.
    pub pin_experts: u64,
    pub numa: Option<Numa>,
}

/// What computes, opened; nothing: the CPU.
#[derive(Debug, Default)]
pub struct Chosen(Option<Devices>);

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

impl PartialEq for Placement {
    fn eq(&self, other: &Self) -> bool {
        let numbers = |p: &Self| (p.gpu_layers, p.main_gpu, p.cpu_moe);
        let same = |(a, b): (&(regex::Regex, Device), &(regex::Regex, Device))| {
            a.0.as_str() == b.0.as_str() && a.1 == b.1
        };
        numbers(self) == numbers(other)
            && self.split == other.split
            && self.tensors.len() == other.tensors.len()
            && self.tensors.iter().zip(&other.tensors).all(same)
    }
}

impl Placement {
    /// The rules for a model on so many GPUs.
    ///
    /// # Errors
    /// GPUs that are not there; `-ot` patterns that take parts apart which stay together.
    pub fn rules(&self, model: &PlanModel, gpus: usize) -> Result<Rules> {
        let named = self.tensors.iter().filter_map(|(_, d)| match d {
            Device::Gpu(i) => Some(*i),
            Device::Cpu => None,
        });
        if let Some(i) = self.main_gpu.into_iter().chain(named).find(|i| *i >= gpus) {
            bail!("there is no GPU{i}: there are {gpus}, counted from 0 (--device, or --gpu of plan)");
        }
        if self.split.len() > gpus {
            bail!("--tensor-split has {} shares for {gpus} GPUs", self.split.len());
        }
        let mut rules = Rules {
            gpu_layers: self.gpu_layers,
            main_gpu: self.main_gpu,
            split: self.split.clone(),
            cpu_moe: self.cpu_moe,
            ..Rules::default()
        };
        let wanted = |name: &str| self.tensors.iter().find(|(p, _)| p.is_match(name)).map(|(_, d)| *d);
        // What lies on one device: a layer, its routed experts (their router goes with them), the output.
        let mut groups = HashMap::new();
        for w in model.weights() {
            let group = match (w.part, w.layer) {
                (Part::Router | Part::Embeddings, _) => continue,
                (Part::Output, _) => (Part::Output, None),
                (Part::Experts, layer) => (Part::Experts, layer),
                (_, None) => continue,
                (_, layer) => (Part::Attention, layer),
            };
            let device = wanted(&w.name);
            let (first, of) = *groups.entry(group).or_insert((&w.name, device));
            if of != device {
                let moved = if of.is_some() { first } else { &w.name };
                bail!(
                    "-ot moves {moved} without what lies beside it: it can move whole layers (blk.3.), the routed experts of layers \
                     (ffn_.*_exps) and the output (^output)"
                );
            }
        }
        for ((part, layer), (_, device)) in groups {
            match (part, layer, device) {
                (Part::Output, _, device) => rules.output = device,
                (Part::Experts, Some(i), Some(d)) => _ = rules.experts.insert(i, d),
                (_, Some(i), Some(d)) => _ = rules.layers.insert(i, d),
                _ => {}
            }
        }
        Ok(rules)
    }

    /// Whether it names something that only a GPU could do.
    pub fn asks_for_gpus(&self) -> bool {
        let gpu = self.tensors.iter().any(|(_, d)| *d != Device::Cpu);
        self.gpu_layers.is_some_and(|n| n > 0) || self.main_gpu.is_some() || !self.split.is_empty() || gpu
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

    /// Plans sessions of `parallel` sequences each with the GPUs that were looked at and so much memory of the host; also what
    /// `--device auto` came to.
    ///
    /// # Errors
    /// Options that no session accepts; placements that no model accepts.
    pub fn fit(
        &self,
        gpus: &Gpus,
        model: &PlanModel,
        options: &PlanOptions,
        memory: u64,
    ) -> Result<(Fit, Option<String>)> {
        let there = gpus.machine().len();
        let rules = if there == 0 { Rules::default() } else { self.memory.place.rules(model, there)? };
        let found = gpus.fit(model, options, memory, &rules);
        found.map_err(|e| name_the_file(e, &self.source))
    }

    /// Opens what a plan uses, telling what `auto` came to. Where that cannot be opened, `auto` goes on without GPUs: `None`, with `gpus`
    /// changed.
    pub fn open(&self, gpus: &mut Gpus, plan: &Plan, note: Option<&str>) -> Result<Option<Chosen>> {
        match gpus.open(plan, self.threads) {
            Ok(devices) => {
                note.iter().for_each(|n| eprintln!("note: {n}"));
                Ok(Some(Chosen(devices)))
            }
            Err(e) => {
                *gpus = gpus.without(&e.to_string()).ok_or(e)?;
                Ok(None)
            }
        }
    }

    fn options(&self, session: SessionOptions, parallel: usize) -> PlanOptions {
        let MemoryConfig { access, pin_experts: pinned, .. } = self.memory;
        PlanOptions { session, parallel, access, pinned, threads: self.threads }
    }

    /// Plans a session before anything is loaded, and opens what is to compute it. What does not fit the memory that is left is an
    /// error with the flags that would; with `choose` the first of them is taken, and told.
    pub fn plan(&mut self, session: &mut SessionConfig, choose: bool) -> Result<Chosen> {
        let model = self.headers()?;
        let options = self.options(session.options(session.ctx(model.ctx_train())?), 1);
        let memory = available_memory().unwrap_or(u64::MAX);
        let mut gpus = self.memory.device.look()?;
        loop {
            let (found, note) = match self.fit(&gpus, &model, &options, memory) {
                Ok(found) => found,
                // What no session accepts is reported where one is opened, as without a plan.
                Err(_) if self.memory.device == DeviceChoice::Cpu => return Ok(Chosen::default()),
                Err(e) => return Err(e),
            };
            let mut way = None;
            if !found.plan.fits() {
                // What is chosen leaves others some room.
                let roomy = self.fit(&gpus, &model, &options, memory - memory / 16)?.0;
                way = roomy.ways.into_iter().next().filter(|_| choose);
                if way.is_none() {
                    bail!("{}: {}", self.source.name(), refusal(&found));
                }
            }
            let plan = way.as_ref().map_or(&found.plan, |w| &w.plan);
            let Some(chosen) = self.open(&mut gpus, plan, note.as_deref())? else { continue };
            if let Some(w) = way {
                eprintln!("note: to fit {} of memory: {}", crate::output::bytes(memory), w.flags());
                let s = &w.options.session;
                (session.ctx, session.batch) = (Some(s.ctx), s.batch);
                (session.cache_k, session.cache_v) = (s.cache_k, s.cache_v);
                self.memory.access = w.options.access;
            }
            return Ok(chosen);
        }
    }

    /// The same for sessions, of so many sequences each, that follow one another and whose contexts and numbers of sequences
    /// are given: no flag that changes those is offered. The largest says what goes where.
    pub fn plan_all(&self, sessions: impl IntoIterator<Item = (SessionConfig, usize)>) -> Result<Chosen> {
        let model = self.headers()?;
        let memory = available_memory().unwrap_or(u64::MAX);
        let mut gpus = self.memory.device.look()?;
        let sessions: Vec<_> = sessions.into_iter().collect();
        loop {
            let mut largest: Option<(Plan, Option<String>)> = None;
            for (session, parallel) in &sessions {
                let options = self.options(session.options(session.ctx(model.ctx_train())?), *parallel);
                let (mut found, note) = match self.fit(&gpus, &model, &options, memory) {
                    Ok(found) => found,
                    Err(_) if self.memory.device == DeviceChoice::Cpu => continue,
                    Err(e) => return Err(e),
                };
                if !found.plan.fits() {
                    let given = |c: &Change| matches!(c, Change::Ctx(_) | Change::Parallel(_));
                    found.ways.retain(|w| !w.changes.iter().any(given));
                    bail!("{}: {}", self.source.name(), refusal(&found));
                }
                let size = |p: &Plan| p.devices.iter().map(DevicePlan::resident).sum::<u64>();
                if largest.as_ref().is_none_or(|l| size(&l.0) < size(&found.plan)) {
                    largest = Some((found.plan, note));
                }
            }
            let Some((plan, note)) = largest else { return Ok(Chosen::default()) };
            if let Some(chosen) = self.open(&mut gpus, &plan, note.as_deref())? {
                return Ok(chosen);
            }
        }
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
            devices: on.0,
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
