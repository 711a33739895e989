//! From what a client asks to a request for the engine: the model, the chat template, tokens, limits. The same for all dialects.

use super::answer::Answer;
use super::constrain::{self, Begin, Format};
use super::duration::KeepAlive;
use super::failure::Failure;
use super::models::{Lease, Loaded, Models};
use super::options::Options;
use super::request::{Generate, Think};
use super::tools;
use crate::store::{Resolved, Store};
use engine::Model;
use engine::text::{ChatTemplate, EncodeOptions, Vocab};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;

/// The server's state, behind all routes.
pub struct App {
    pub config: super::config::Config,
    pub store: Store,
    pub models: Arc<Models>,
    pub metrics: super::metrics::Metrics,
    /// For ids of answers.
    pub counter: std::sync::atomic::AtomicU64,
    /// The model of the command line is not there yet.
    pub starting: std::sync::atomic::AtomicBool,
    pub known: crate::http::Known,
}

/// What the model is given.
#[derive(Clone, Debug)]
pub enum Input {
    /// Messages as in OpenAI's API, for the chat template.
    Chat(Vec<Value>),
    /// Text as it is; `special`: names of control tokens stand for these.
    Text {
        text: String,
        special: bool,
    },
    /// What is between two texts.
    Fill {
        prefix: String,
        suffix: String,
    },
    Tokens(Vec<u32>),
}

/// How a client wants the model to think.
#[derive(Clone, Debug, PartialEq)]
pub enum Thinking {
    On,
    Off,
    /// `low`, `medium`, `high`, `max`.
    Level(String),
}

/// A client's request, whatever its dialect.
#[derive(Clone, Debug)]
pub struct Ask {
    pub input: Input,
    /// Tokens before it.
    pub context: Vec<u32>,
    /// A Jinja template in place of the model's.
    pub template: Option<String>,
    /// As in OpenAI's API.
    pub tools: Vec<Value>,
    pub choice: tools::Choice,
    /// Of several calls only the first is given.
    pub one_call: bool,
    /// More variables for the chat template.
    pub kwargs: Map<String, Value>,
    /// `None`: as the template does.
    pub think: Option<Thinking>,
    pub format: Option<Format>,
    /// Defaults of the route, then of the model, then of the request, applied in this order.
    pub defaults: Options,
    /// The request's own options, by Ollama's names.
    pub options: Map<String, Value>,
    pub logit_bias: Vec<(u32, f32)>,
    pub keep_alive: Option<KeepAlive>,
    pub logprobs: Option<usize>,
    /// Those of the prompt's tokens, too.
    pub echo: bool,
    /// A prompt longer than the context may lose its middle.
    pub truncate: bool,
    /// An answer may go on past the context.
    pub shift: bool,
}

impl Ask {
    /// A request with nothing but an input.
    pub fn new(input: Input, defaults: Options) -> Self {
        Self {
            input,
            context: Vec::new(),
            template: None,
            tools: Vec::new(),
            choice: tools::Choice::Auto,
            one_call: false,
            kwargs: Map::new(),
            think: None,
            format: None,
            defaults,
            options: Map::new(),
            logit_bias: Vec::new(),
            keep_alive: None,
            logprobs: None,
            echo: false,
            truncate: true,
            shift: true,
        }
    }
}

impl App {
    /// What a name stands for.
    ///
    /// # Errors
    /// [`Failure::NoModel`], or a store that cannot be read.
    pub fn resolve(&self, name: &str) -> Result<Resolved, Failure> {
        if name.trim().is_empty() {
            return Err(Failure::field("model", "a model's name is required"));
        }
        let found = self.store.resolve(name).map_err(|e| Failure::Internal(format!("{e:#}")))?;
        found.ok_or_else(|| Failure::NoModel(crate::output::one_line(name)))
    }

    /// Options of the route, the model and the request.
    fn options(model: &Resolved, ask: &Ask) -> Result<Options, Failure> {
        let mut o = ask.defaults.clone();
        o.apply(&model.params)?;
        o.apply(&ask.options)?;
        o.sampler.logit_bias.clone_from(&ask.logit_bias);
        Ok(o)
    }

    /// Loads a model if it is not, without asking it anything.
    pub async fn load(&self, model: &Resolved, ask: &Ask) -> Result<Lease, Failure> {
        let o = Self::options(model, ask)?;
        self.models.acquire(model, &o.load, ask.keep_alive).await
    }

    /// The prompt's tokens, and what the chat template made of messages, without asking the model.
    pub async fn prompt(&self, model: &Resolved, ask: Ask) -> Result<(Vec<u32>, String), Failure> {
        let lease = self.load(model, &ask).await?;
        let made = tokio::task::spawn_blocking(move || {
            let model = lease.loaded.worker.model();
            let (tokens, _, _) = input(model.vocab(), &model, &lease.loaded, &ask)?;
            let text = model.vocab().decode(&tokens, true);
            Ok((tokens, text))
        });
        made.await.map_err(Failure::internal)?
    }

    /// Begins the answers: one, or `n` of them with seeds that follow each other.
    pub async fn ask(&self, model: &Resolved, ask: Ask, n: usize) -> Result<Vec<Answer>, Failure> {
        let since = Instant::now();
        let options = Arc::new(Self::options(model, &ask)?);
        let lease = Arc::new(self.models.acquire(model, &options.load, ask.keep_alive).await?);
        let (shared, asked, one_call) = (lease.clone(), options.clone(), ask.one_call);
        // Templates and long texts take their time: not on a thread that serves others.
        let prepared = tokio::task::spawn_blocking(move || {
            let all = (0..n as u64).map(|i| prepare(&shared, &ask, &asked, i));
            all.collect::<Result<Vec<_>, Failure>>()
        });
        let prepared = prepared.await.map_err(Failure::internal)??;
        let begin = |p: Prepared| {
            let events = lease.loaded.worker.generate(p.request);
            Answer::new(lease.clone(), p.prompt, since, options.clone(), p.parser, one_call, events)
        };
        let mut answers: Vec<Answer> = prepared.into_iter().map(begin).collect();
        for a in &mut answers {
            a.accepted().await?;
        }
        Ok(answers)
    }
}

struct Prepared {
    request: Generate,
    prompt: Vec<u32>,
    parser: Option<tools::Parser>,
}

/// What a client asks, for the engine.
fn prepare(lease: &Lease, ask: &Ask, options: &Options, index: u64) -> Result<Prepared, Failure> {
    let l = &lease.loaded;
    let model = l.worker.model();
    let vocab = model.vocab();
    let (mut prompt, think, mut head) = input(vocab, &model, l, ask)?;
    if !ask.context.is_empty() {
        head = None;
        let bos = usize::from(vocab.adds_bos() && prompt.first() == vocab.bos().as_ref());
        prompt.splice(..bos, ask.context.iter().copied());
    }
    if prompt.is_empty() {
        return Err(Failure::invalid("the prompt is empty"));
    }
    let n_vocab = vocab.len();
    if let Some(id) =
        prompt.iter().chain(ask.logit_bias.iter().map(|b| &b.0)).find(|t| **t as usize >= n_vocab)
    {
        return Err(Failure::invalid(format!("token {id} is out of range: the vocabulary has {n_vocab}")));
    }
    let endless = !l.kv.is_full();
    if prompt.len() >= l.ctx && !(endless && ask.truncate && ask.shift) {
        return Err(Failure::TooLong { prompt: prompt.len(), ctx: l.ctx });
    }
    // As in Ollama: what has no end is not worth waiting for.
    let mut most = l.ctx.saturating_mul(10);
    if !(endless && ask.shift) {
        most = l.ctx - prompt.len();
    }
    if let Some(n) = options.num_keep {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        head = Some(n.max(head.unwrap_or(0)).min(prompt.len()));
    }
    let bos =
        matches!(ask.input, Input::Text { .. }) && vocab.adds_bos() && prompt.first() == vocab.bos().as_ref();
    let mut sampler = options.sampler.clone();
    sampler.seed = sampler.seed.map(|s| s.wrapping_add(index));
    let begin = match (think, &ask.think) {
        (Some(t), w) if t.opened || *w != Some(Thinking::Off) => {
            Begin::AfterThinking { tags: t.tags, opened: t.opened }
        }
        _ => Begin::Now,
    };
    let invalid =
        |e: constrain::FormatError| Failure::Invalid { message: e.to_string(), param: Some("format".into()) };
    let forced = tools::forced(&ask.tools, &ask.choice).map_err(|e| Failure::field("tool_choice", e.0))?;
    if forced.is_some() && ask.format.is_some() {
        return Err(Failure::field("tool_choice", "a call cannot be held to a response format, too"));
    }
    let constraint = match forced.as_ref().or(ask.format.as_ref()) {
        Some(f) => Some(l.grammars()?.constraint(f, begin).map_err(invalid)?),
        None => None,
    };
    let parser = (!ask.tools.is_empty()).then(|| match forced {
        Some(_) => tools::Parser::forced(&ask.tools),
        None => tools::Parser::new(l.template.source(), &ask.tools),
    });
    let request = Generate {
        prompt: prompt.clone(),
        // A policy that was asked for says itself what stays.
        head: head.filter(|_| l.own_kv),
        echo: ask.echo.then_some(usize::from(bos)),
        sampler,
        max_tokens: usize::try_from(options.num_predict).map_or(most, |n| n.min(most)),
        stop: options.stop.clone(),
        ignore_eos: options.ignore_eos,
        special: false,
        show: if ask.tools.is_empty() { Vec::new() } else { tools::marks(vocab) },
        think,
        logprobs: ask.logprobs,
        constraint,
    };
    Ok(Prepared { request, prompt, parser })
}

/// A prompt's tokens, how thinking is found in its answer, and how many of the tokens are the system prompt and tools.
type Tokens = (Vec<u32>, Option<Think>, Option<usize>);

fn input(vocab: &Vocab, model: &Model, l: &Loaded, ask: &Ask) -> Result<Tokens, Failure> {
    match &ask.input {
        Input::Chat(messages) => {
            let own = ask.template.as_deref().map(|s| {
                let t = crate::chat::template(model.file().metadata(), vocab, Some(s));
                t.map_err(|e| Failure::field("template", format!("it must be a Jinja template ({e:#})")))
            });
            let own = own.transpose()?;
            let template = own.as_ref().unwrap_or(&l.template);
            let (text, think) = render(vocab, template, messages, ask)?;
            let prompt = crate::chat::guarded_tokens(vocab, &text);
            let head = head(vocab, template, messages, ask, &prompt);
            Ok((prompt, think, head))
        }
        Input::Text { text, special } => {
            let options = EncodeOptions { add_special: true, parse_special: *special };
            Ok((vocab.encode(text, options), None, None))
        }
        Input::Tokens(ids) => Ok((ids.clone(), None, None)),
        Input::Fill { prefix, suffix } => {
            let marks = fill_marks(vocab)
                .ok_or_else(|| Failure::field("suffix", "this model does not support insert"))?;
            let plain = |s: &str| vocab.encode(s, EncodeOptions { add_special: false, parse_special: false });
            let bos = vocab.bos().filter(|_| vocab.adds_bos());
            let [before, hole, after] = marks;
            let parts = [vec![before], plain(prefix), vec![hole], plain(suffix), vec![after]];
            Ok((bos.into_iter().chain(parts.concat()).collect(), None, None))
        }
    }
}

/// How many of a prompt's first tokens every conversation with the same system prompt and tools has: what it has in common
/// with one that then says something else. `None`: the template does not render that.
fn head(
    vocab: &Vocab,
    template: &ChatTemplate,
    messages: &[Value],
    ask: &Ask,
    prompt: &[u32],
) -> Option<usize> {
    let system = messages.iter().take_while(|m| m["role"] == "system").cloned();
    // Nobody's message begins like this.
    let other: Vec<Value> = system.chain([json!({"role": "user", "content": "\u{2}"})]).collect();
    let (text, _) = render(vocab, template, &other, ask).ok()?;
    let other = crate::chat::guarded_tokens(vocab, &text);
    Some(prompt.iter().zip(&other).take_while(|(a, b)| a == b).count())
}

/// The marks of fill-in-the-middle models: before the prefix, between the two, and where the model goes on.
pub fn fill_marks(vocab: &Vocab) -> Option<[u32; 3]> {
    const MARKS: [[&str; 3]; 4] = [
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ];
    MARKS.iter().find_map(|m| Some([vocab.token_id(m[0])?, vocab.token_id(m[1])?, vocab.token_id(m[2])?]))
}

/// The prompt's text, marks around what must not be read as control tokens, and how thinking is found in the answer.
pub fn render(
    vocab: &Vocab,
    template: &ChatTemplate,
    messages: &[Value],
    ask: &Ask,
) -> Result<(String, Option<Think>), Failure> {
    let tags = template.think_tags();
    let mut kwargs = ask.kwargs.clone();
    match &ask.think {
        Some(t) if tags.is_none() && *t != Thinking::Off => {
            return Err(Failure::field("think", "this model does not support thinking"));
        }
        Some(t) => {
            crate::chat::set_thinking(&mut kwargs, *t != Thinking::Off);
            if let Thinking::Level(level) = t {
                kwargs.entry("reasoning_effort").or_insert_with(|| json!(level));
            }
        }
        None if tags.is_some() => {
            for name in ["enable_thinking", "thinking"] {
                kwargs.entry(name).or_insert(Value::Bool(true));
            }
        }
        None => {}
    }
    let messages = Value::Array(crate::chat::guard(vocab, messages));
    let tools = (!ask.tools.is_empty()).then(|| Value::Array(crate::chat::guard(vocab, &ask.tools)));
    let text = crate::chat::render(template, &messages, tools.as_ref(), true, &kwargs)
        .map_err(|e| Failure::invalid(format!("{e:#}")))?;
    let think = tags.map(|tags| Think { tags, opened: tags.opened_by(&text) });
    Ok((text, think))
}
