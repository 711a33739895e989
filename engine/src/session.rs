//! The API that programs use: load a [`Model`], open a [`Session`] on it, evaluate or generate.
//!
//! ```no_run
//! use engine::{GenerateOptions, LoadOptions, Model, SamplerOptions, Sampler, Session, SessionOptions};
//! # fn main() -> Result<(), engine::EngineError> {
//! let model = Model::load("model.gguf".as_ref(), &LoadOptions::default())?;
//! let mut session = Session::new(&model, &SessionOptions::default())?;
//! let prompt = model.vocab().encode_prompt("Once upon a time");
//! let mut sampler = Sampler::new(SamplerOptions::default())?;
//! session.generate(&prompt, &mut sampler, &GenerateOptions::default(), |text| {
//!     print!("{text}");
//!     std::ops::ControlFlow::Continue(())
//! })?;
//! # Ok(())
//! # }
//! ```

use crate::EngineError;
use crate::context::{Context, arena_options};
use crate::gguf::{File, OpenMode, Progress};
use crate::kv::{CacheTypes, KvSpec, Rows, SeqId, Watcher};
use crate::model::{self, Network};
use crate::pager::{Pager, PagerOptions};
use crate::sample::{Constraint, Logits, Sampler};
use crate::stages::Devices;
use crate::text::{ChatTemplate, Scanned, StopScanner, StreamDecoder, Vocab};
use crate::usage::{MemoryReport, Usage};
use kernels::Device;
use kernels::cpu::CpuBackend;
use quant::DType;
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How to load a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Map the file instead of reading it into memory.
    pub mmap: bool,
    /// Keep all of the mapped file in memory that the host computes with.
    pub lock: bool,
    /// What of a mapped file stays in memory where not all can.
    pub pager: PagerOptions,
    /// Compute threads.
    pub threads: usize,
    /// Is told of the bytes that loading reads, and may end it.
    pub progress: Arc<Progress>,
    /// What computes what; `None`: the CPU.
    pub devices: Option<Devices>,
}

impl Default for LoadOptions {
    /// Mapped, on the CPU, with one thread per core that the process may use.
    fn default() -> Self {
        Self {
            devices: None,
            mmap: true,
            lock: false,
            pager: PagerOptions::default(),
            threads: std::thread::available_parallelism().map_or(1, Into::into),
            progress: Arc::default(),
        }
    }
}

/// What a file says of itself, and what running it costs.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// `general.name`, or the file's name.
    pub name: String,
    /// `general.architecture`.
    pub arch: String,
    /// Transformer layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Entries of the vocabulary.
    pub n_vocab: usize,
    /// Context the model was trained for.
    pub ctx_train: usize,
    /// Parameters in the file.
    pub n_params: u64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Bytes of weights that one decoded token reads: the experts it uses, and no embedding table unless it is tied.
    pub read_bytes_per_token: u64,
    /// The compute devices: `cpu (avx512, 2 threads)`.
    pub device: String,
}

/// A loaded model: weights, vocabulary, chat template. Immutable and shared.
pub struct Model {
    info: ModelInfo,
    network: Arc<dyn Network>,
    devices: Devices,
    threads: usize,
    vocab: Vocab,
    chat: ChatTemplate,
    file: File,
    pager: Arc<Pager>,
}

impl Model {
    /// Loads the GGUF at `path` (any part of a split one).
    ///
    /// # Errors
    /// A file that is not a sound GGUF, or asks for something not implemented: the error names it.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Arc<Self>, EngineError> {
        let mode = if options.mmap { OpenMode::Mmap } else { OpenMode::Read };
        Self::from_file(File::open_with(path, mode, &options.progress)?, options)
    }

    /// Loads a GGUF embedded in the program.
    pub fn load_static(
        name: &str,
        bytes: &'static [u8],
        options: &LoadOptions,
    ) -> Result<Arc<Self>, EngineError> {
        Self::from_file(File::from_static(name, bytes)?, options)
    }

    fn from_file(file: File, options: &LoadOptions) -> Result<Arc<Self>, EngineError> {
        let cpu = || Device::new(CpuBackend::new(options.threads));
        let devices = options.devices.clone().unwrap_or_else(|| cpu().into());
        let mut paging = options.pager;
        if options.lock {
            // A GPU holds its own copy.
            file.lock(|name| devices.of(name).is_none_or(Device::is_host), &options.progress)?;
            paging = PagerOptions { memory: Some(u64::MAX), ..PagerOptions::default() };
        }
        let pager = Arc::new(Pager::new(&file, &devices, paging));
        let network = model::load(&file, &devices, pager.clone())?;
        let vocab = Vocab::from_metadata(file.metadata())?;
        let dims = network.dims();
        if vocab.len() != dims.n_vocab {
            return Err(EngineError::Unsupported(format!(
                "the vocabulary has {} tokens, the output layer {}",
                vocab.len(),
                dims.n_vocab
            )));
        }
        let chat = ChatTemplate::from_metadata(file.metadata(), &vocab)?;
        let info = describe(&file, &*network, &devices)?;
        // What was read of a file that was cut off meanwhile is not what it held.
        file.check()?;
        Ok(Arc::new(Self { info, network, devices, threads: options.threads, vocab, chat, file, pager }))
    }

    /// What the file says of itself.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// The chat template; a stated default where the file has none.
    pub fn chat_template(&self) -> &ChatTemplate {
        &self.chat
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What reads mapped weights ahead and gives them up, with its counts.
    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    pub(crate) fn network(&self) -> &Arc<dyn Network> {
        &self.network
    }

    pub(crate) fn devices(&self) -> &Devices {
        &self.devices
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// What tells this model from others: its architecture, its tensors' names, shapes and types, and the first bytes of each.
    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(&self.info.arch);
        for t in self.file.tensors() {
            hash.update(format!("\n{} {:?} {:?} ", t.name, t.dims, t.dtype));
            let bytes = self.file.bytes(t);
            hash.update(&bytes[..bytes.len().min(256)]);
        }
        hash.finalize().into()
    }

    /// Bytes of cache that a token decoded after `depth` others reads.
    pub fn read_bytes(&self, o: &SessionOptions, depth: usize) -> Result<usize, EngineError> {
        let types = CacheTypes { k: o.cache_k, v: o.cache_v, k_pe: o.cache_k_pe };
        let specs = self.network.cache_specs();
        let options = arena_options(o, &specs, 1)?;
        let seen = |l: usize| options.seen(&specs, l, depth);
        specs.iter().enumerate().map(|(l, s)| types.bytes(s, seen(l))).sum()
    }

    /// Bytes of the cache of `sequences` sequences of these options.
    pub fn cache_bytes(&self, o: &SessionOptions, sequences: usize) -> Result<usize, EngineError> {
        let types = CacheTypes { k: o.cache_k, v: o.cache_v, k_pe: o.cache_k_pe };
        let specs = self.network.cache_specs();
        arena_options(o, &specs, sequences)?.bytes(&specs, types)
    }
}

fn describe(file: &File, network: &dyn Network, on: &Devices) -> Result<ModelInfo, EngineError> {
    let meta = file.metadata();
    let arch = meta.str("general.architecture")?.unwrap_or_default().to_owned();
    let number = |key: &str| meta.u32(&format!("{arch}.{key}"));
    let (used, experts) = (number("expert_used_count")?, number("expert_count")?);
    let tied = file.tensor("output.weight").is_none();
    let (mut n_params, mut tensor_bytes, mut read) = (0, 0, 0);
    for t in file.tensors() {
        n_params += t.dims.iter().product::<u64>();
        tensor_bytes += t.n_bytes;
        read += match (used, experts) {
            _ if t.name == "token_embd.weight" && !tied => 0,
            (Some(used), Some(experts)) if t.name.contains("_exps.") && experts > 0 => {
                t.n_bytes * u64::from(used) / u64::from(experts)
            }
            _ => t.n_bytes,
        };
    }
    let dims = network.dims();
    let stem = || file.path().file_stem().map(|s| s.to_string_lossy().into_owned());
    Ok(ModelInfo {
        name: meta.str("general.name")?.map(Into::into).or_else(stem).unwrap_or_default(),
        n_layers: dims.n_layers,
        d_model: dims.d_model,
        n_vocab: dims.n_vocab,
        ctx_train: number("context_length")?.unwrap_or(0) as usize,
        arch,
        n_params,
        tensor_bytes,
        read_bytes_per_token: read,
        device: on.name(dims.n_layers),
    })
}

/// The size and types of a session.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Cache entries where everything is kept: prompt and answer together.
    pub ctx: usize,
    /// Prompt tokens per forward pass.
    pub batch: usize,
    /// Cache type of keys, or of MLA's latent.
    pub cache_k: DType,
    /// Cache type of values.
    pub cache_v: DType,
    /// Cache type of MLA's shared rotary key; `None`: that of the latent, but not below f16.
    pub cache_k_pe: Option<DType>,
    /// What the cache keeps of past tokens.
    pub kv: KvSpec,
}

impl Default for SessionOptions {
    /// 4096 entries of f16, all kept, prompts in batches of 512.
    fn default() -> Self {
        Self {
            ctx: 4096,
            batch: 512,
            cache_k: DType::F16,
            cache_v: DType::F16,
            cache_k_pe: None,
            kv: KvSpec::default(),
        }
    }
}

/// What ends a generation besides the model's own end.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// At most this many new tokens.
    pub max_tokens: Option<usize>,
    /// Strings that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after the model's end-of-generation tokens.
    pub ignore_eos: bool,
    /// Show control tokens in the text.
    pub special: bool,
    /// Control tokens to show even so, such as the tags around thinking.
    pub show: Vec<u32>,
}

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model said so.
    Eos,
    /// One of the stop strings appeared.
    StopString(String),
    /// `max_tokens` were made.
    Length,
    /// The context is full; only where the cache keeps everything.
    ContextFull,
    /// The caller broke off.
    Cancelled,
}

/// The outcome of a generation.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How many of them were cached already.
    pub cached_tokens: usize,
    /// Time spent on the rest.
    pub prompt_time: Duration,
    /// New tokens, the end token not counted.
    pub new_tokens: usize,
    /// Time spent on them.
    pub decode_time: Duration,
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Tokens of the conversation that the model does not see any more.
    pub evicted_tokens: usize,
    /// What decided that: the cache's policy.
    pub policy: String,
}

/// One sequence: its cache, its buffers, its tokens.
pub struct Session {
    context: Context,
    seq: SeqId,
    logits: Vec<f32>,
    /// The best of them, where a sampler asked for no more; else empty.
    best: Vec<(u32, f32)>,
}

impl Session {
    /// Allocates cache and buffers.
    ///
    /// # Errors
    /// Impossible sizes or cache types, or memory that cannot be had.
    pub fn new(model: &Arc<Model>, o: &SessionOptions) -> Result<Self, EngineError> {
        let mut context = Context::new(model, o, 1)?;
        let seq = context.cache_mut().admit(0)?;
        Ok(Self { context, seq, logits: Vec::new(), best: Vec::new() })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        self.context.model()
    }

    /// The tokens evaluated so far. The cache may have forgotten some: [`Session::evicted`].
    pub fn tokens(&self) -> &[u32] {
        self.context.cache().tokens(self.seq).unwrap_or_default()
    }

    /// Tokens that are not seen any more.
    pub fn evicted(&self) -> usize {
        self.context.cache().evicted(self.seq).unwrap_or_default()
    }

    /// The cache's policy.
    pub fn policy(&self) -> String {
        self.context.policy().to_string()
    }

    /// Tokens after which a cache that keeps everything is full.
    pub fn ctx(&self) -> usize {
        self.context.cache().options().ctx
    }

    /// Tokens after which no more fit; `None`: the cache forgets, and there is no end.
    pub fn end(&self) -> Option<usize> {
        self.context.cache().options().end()
    }

    /// Bytes of the buffers beside the cache: activations, a row of logits, and the device's working memory, which sessions
    /// share.
    pub fn scratch_bytes(&self) -> usize {
        self.context.scratch_bytes() + 4 * self.model().info().n_vocab
    }

    /// What is in memory, and what was read again and again.
    pub fn memory(&self) -> MemoryReport {
        let cache = self.context.cache();
        let ((held, all), bytes) = (cache.entries(), cache.bytes() as u64);
        MemoryReport {
            paging: self.model().pager().stats(),
            kv_used: if all == 0 { 0 } else { (u128::from(bytes) * held as u128 / all as u128) as u64 },
            kv_reserved: bytes,
            evicted: self.evicted() as u64,
            usage: Usage::now(),
        }
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.context.cache().bytes()
    }

    /// Forgets all but the first `len` tokens, or all but fewer if the cache lacks entries that the next token would see.
    /// Returns how many are left.
    pub fn truncate(&mut self, len: usize) -> usize {
        self.context.cache_mut().truncate(self.seq, len).unwrap_or_default()
    }

    /// Forgets everything; the next token has this position. The distance of tokens is all that counts: logits are the same
    /// but for rounding.
    pub fn restart(&mut self, position: u64) -> Result<(), EngineError> {
        self.context.cache_mut().restart(self.seq, position)
    }

    /// Writes the sequence to a new file; see [`Context::save`].
    ///
    /// # Errors
    /// [`EngineError::CacheFile`].
    pub fn save(&self, path: &Path) -> Result<(), EngineError> {
        self.context.save(self.seq, path)
    }

    /// Goes on with a sequence that [`Session::save`] wrote; see [`Context::load`].
    ///
    /// # Errors
    /// [`EngineError::CacheFile`]; the session is as it was.
    pub fn load(&mut self, path: &Path) -> Result<(), EngineError> {
        self.context.load(self.seq, path)
    }

    /// Has `watcher` told of every eviction that a policy makes from now on.
    pub fn watch(&mut self, watcher: Option<Watcher>) {
        self.context.cache_mut().watch(watcher);
    }

    fn check(&self, tokens: &[u32]) -> Result<(), EngineError> {
        self.context.check(self.seq, tokens)
    }

    /// One batch of a prompt of `prompt` tokens, or (0) a decoded token.
    fn forward(&mut self, tokens: &[u32], prompt: usize) -> Result<(), EngineError> {
        self.context.forward(&[Rows { seq: self.seq, tokens, prompt }])
    }

    /// Appends `tokens` (at least one) and returns the logits `[vocab]` after the last of them.
    pub fn eval(&mut self, tokens: &[u32]) -> Result<&mut [f32], EngineError> {
        self.eval_while(tokens, None, || true)?;
        Ok(&mut self.logits)
    }

    /// Appends `tokens` batch by batch for as long as `go` says so before each of them, and keeps the logits after the last, or so many
    /// of the best. False if it broke off.
    fn eval_while(
        &mut self,
        tokens: &[u32],
        few: Option<usize>,
        mut go: impl FnMut() -> bool,
    ) -> Result<bool, EngineError> {
        self.check(tokens)?;
        let Some(last) = tokens.len().checked_sub(1) else {
            return Err(EngineError::Option("there is no token to evaluate".into()));
        };
        let batch = self.context.batch();
        for chunk in tokens.chunks(batch) {
            if !go() {
                return Ok(false);
            }
            self.forward(chunk, if last == 0 { 0 } else { tokens.len() })?;
        }
        let row = [(last % batch) as u32];
        self.best.clear();
        if !few.map_or(Ok(false), |k| self.context.best(&row, k, &mut self.best))? {
            self.logits.clear();
            self.context.logits(&row, &mut self.logits)?;
        }
        Ok(true)
    }

    /// What was read of the last row of logits.
    fn row(&mut self) -> Logits<'_> {
        match &*self.best {
            [] => Logits::Whole(&mut self.logits),
            best => Logits::Best { best, n_vocab: self.context.model().info().n_vocab },
        }
    }

    /// Appends `tokens`, giving `each` the logits `[vocab]` after every one of them, in order.
    pub fn eval_all<E: From<EngineError>>(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(tokens)?;
        let (n_vocab, batch) = (self.model().info.n_vocab, self.context.batch());
        for (i, chunk) in tokens.chunks(batch).enumerate() {
            self.forward(chunk, tokens.len())?;
            let rows: Vec<u32> = (0..chunk.len() as u32).collect();
            for some in rows.chunks(crate::layers::head::HEAD_ROWS) {
                self.logits.clear();
                self.context.logits(some, &mut self.logits).map_err(E::from)?;
                for (row, logits) in some.iter().zip(self.logits.chunks_exact(n_vocab)) {
                    each(i * batch + *row as usize, logits)?;
                }
            }
        }
        Ok(())
    }

    /// Continues `prompt` (the whole conversation's tokens: what is cached of it already is not computed again) until
    /// something ends it, handing out text as soon as it is complete UTF-8 and no stop string can begin in it. Before each
    /// batch of the prompt `on_text` gets an empty text, so that a long prompt can be broken off too.
    ///
    /// # Errors
    /// [`EngineError::Context`] if the prompt leaves no room for a single new token.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        o: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, EngineError> {
        self.generate_constrained(prompt, sampler, None, o, on_text)
    }

    /// As [`Session::generate`], with the answer held to a constraint.
    ///
    /// # Errors
    /// As there, and what the constraint reports.
    pub fn generate_constrained(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        mut constraint: Option<&mut dyn Constraint>,
        o: &GenerateOptions,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::Option("the prompt is empty".into()));
        }
        // At least the last token is computed anew: its logits are needed.
        let common =
            self.tokens().iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        if let Some(ctx) = self.end().filter(|end| prompt.len() >= *end) {
            return Err(EngineError::Context { need: prompt.len() + 1, ctx });
        }
        let common = self.truncate(common);
        let start = Instant::now();
        sampler.prime(prompt);
        let n_vocab = self.model().info().n_vocab;
        // A constraint looks at all.
        let all = constraint.is_some();
        let few = |s: &Sampler| s.few(n_vocab).filter(|_| !all);
        let read = self.eval_while(&prompt[common..], few(sampler), || on_text("").is_continue())?;
        let mut out = Generated {
            reason: FinishReason::Cancelled,
            prompt_tokens: prompt.len(),
            cached_tokens: common,
            prompt_time: start.elapsed(),
            new_tokens: 0,
            decode_time: Duration::ZERO,
            tokens: Vec::new(),
            evicted_tokens: 0,
            policy: self.policy(),
        };
        if !read {
            out.evicted_tokens = self.evicted();
            return Ok(out);
        }
        let model = self.model().clone();
        let mut text = Tail {
            decoder: StreamDecoder::new(model.vocab(), o.special).showing(o.show.iter().copied()),
            scanner: StopScanner::new(&o.stop),
            stop: &o.stop,
        };
        let start = Instant::now();
        out.reason = loop {
            if o.max_tokens.is_some_and(|n| out.tokens.len() >= n) {
                break FinishReason::Length;
            }
            if let Some(c) = &mut constraint {
                c.mask(&mut self.logits)?;
            }
            let token = sampler.choose(self.row())?;
            if model.vocab().is_eog(token) && (!o.ignore_eos || constraint.is_some()) {
                break FinishReason::Eos;
            }
            sampler.accept(token);
            out.tokens.push(token);
            if let Some(reason) = text.push(token, &mut on_text) {
                break reason;
            }
            if let Some(c) = &mut constraint {
                c.accept(token)?;
                if c.is_done() {
                    break FinishReason::Eos;
                }
            }
            if self.end().is_some_and(|end| self.tokens().len() >= end) {
                break FinishReason::ContextFull;
            }
            if o.max_tokens.is_some_and(|n| out.tokens.len() >= n) {
                break FinishReason::Length;
            }
            self.eval_while(&[token], few(sampler), || true)?;
        };
        if let Some(reason) = text.finish(&out.reason, &mut on_text) {
            out.reason = reason;
        }
        out.new_tokens = out.tokens.len();
        out.evicted_tokens = self.evicted();
        out.decode_time = start.elapsed();
        Ok(out)
    }
}

/// The way of new tokens to the caller: bytes to text to what no stop string can still claim.
struct Tail<'a> {
    decoder: StreamDecoder<'a>,
    scanner: StopScanner,
    stop: &'a [String],
}

impl Tail<'_> {
    fn push(
        &mut self,
        token: u32,
        on_text: &mut impl FnMut(&str) -> ControlFlow<()>,
    ) -> Option<FinishReason> {
        let text = self.decoder.push(token);
        let scanned = self.scanner.push(&text);
        self.emit(scanned, on_text)
    }

    fn emit(&self, s: Scanned, on_text: &mut impl FnMut(&str) -> ControlFlow<()>) -> Option<FinishReason> {
        if !s.text.is_empty() && on_text(&s.text).is_break() {
            return Some(FinishReason::Cancelled);
        }
        s.stopped.map(|i| FinishReason::StopString(self.stop[i].clone()))
    }

    /// Hands out what was held back, unless a stop string or the caller ended it all.
    fn finish(
        &mut self,
        reason: &FinishReason,
        on_text: &mut impl FnMut(&str) -> ControlFlow<()>,
    ) -> Option<FinishReason> {
        if matches!(reason, FinishReason::StopString(_) | FinishReason::Cancelled) {
            return None;
        }
        let text = self.decoder.finish();
        let scanned = self.scanner.push(&text);
        self.emit(scanned, on_text).or_else(|| {
            let rest = self.scanner.finish();
            self.emit(rest, on_text)
        })
    }
}
