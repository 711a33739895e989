//! Opening what MODEL names: a GGUF file or the embedded demo model; sessions on it. Knows nothing of flags.

use anyhow::{Context, Result, bail};
use engine::gguf::{File, OpenMode};
use engine::{DType, EngineError, KvSpec, LoadOptions, Model, Session, SessionOptions};
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
    pub mmap: bool,
    pub threads: usize,
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

impl Source {
    pub fn parse(s: &str) -> Self {
        if s == crate::demo::NAME { Self::Demo } else { Self::File(s.into()) }
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
    /// Loads, telling how long it takes; a terminal is shown that something happens if that is more than a second.
    pub fn load(&self) -> Result<(Arc<Model>, Duration)> {
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
        let options = LoadOptions { mmap: self.mmap, threads: self.threads };
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
