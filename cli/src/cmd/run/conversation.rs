//! A conversation: messages, the session that holds their tokens, and the next answer. What is cached of the conversation
//! is not computed again (`Session::generate` finds the common prefix). Knows nothing of line editing.

use super::display::Display;
use super::{RunConfig, ending, memory, timings};
use crate::chat;
use crate::serve::constrain::{Begin, Format, Grammars};
use crate::trace::Trace;
use anyhow::{Context, Result};
use engine::text::thinking::{Part, Splitter, ThinkTags};
use engine::text::{ChatTemplate, EncodeOptions};
use engine::{Constraint, FinishReason, Generated, Model, Sampler, Session, Usage};
use serde_json::{Map, Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// See the module.
pub struct Conversation {
    pub config: RunConfig,
    pub model: Arc<Model>,
    pub template: ChatTemplate,
    pub messages: Vec<Value>,
    session: Session,
    sampler: Sampler,
    /// What answers are held to, and the grammars of the vocabulary.
    format: Option<(Format, Grammars)>,
    load_time: Duration,
    /// The process before the last answer.
    usage: Option<Usage>,
}

impl Conversation {
    /// Loads the model and opens a session, an empty conversation.
    pub fn open(mut config: RunConfig) -> Result<Self> {
        // Before the slow part: an option out of range must not cost a load.
        let sampler = Sampler::new(config.sampler.clone())?;
        let on = config.load.plan(&mut config.session, config.fit)?;
        let (model, load_time) = config.load.load(on)?;
        let source = config.chat.template.as_deref();
        let template = chat::template(model.file().metadata(), model.vocab(), source)?;
        if !config.raw && template.is_default() {
            // ChatML is of use only to a model that has its marks as tokens.
            config.raw = model.vocab().token_id("<|im_start|>").is_none();
            let what = if config.raw {
                "prompts are continued as plain text (as with --raw)"
            } else {
                "ChatML is used"
            };
            eprintln!("note: {} has no chat template: {what}", config.load.source.name());
        }
        if config.chat.think == Some(true) && template.think_tags().is_none() {
            eprintln!("note: the chat template of {} knows no thinking", config.load.source.name());
        }
        let ctx = config.session.ctx(model.info().ctx_train)?;
        let trained = model.info().ctx_train;
        if trained > 0 && ctx > trained {
            eprintln!("note: the model was trained for {trained} tokens; beyond that its answers get worse");
        }
        let format = match config.format.clone() {
            None => None,
            Some(f) => {
                let grammars = Grammars::new(model.vocab())?;
                grammars.constraint(&f, Begin::Now)?;
                Some((f, grammars))
            }
        };
        let session = config.session.open(&model, ctx)?;
        let messages = config.chat.messages.clone();
        let c = Self { config, model, template, messages, session, sampler, format, load_time, usage: None };
        if c.config.verbose {
            c.announce();
        }
        Ok(c)
    }

    fn announce(&self) {
        let (info, s) = (self.model.info(), &self.config.session);
        let why = match s.ctx {
            Some(_) => "",
            None => ", the default; -c changes it",
        };
        eprintln!("model:    {} ({}, {} layers), {}", info.name, info.arch, info.n_layers, info.device);
        eprintln!("context:  {} of {} tokens{why}", self.session.ctx(), info.ctx_train);
        let cache = crate::output::bytes(self.session.cache_bytes() as u64);
        eprintln!("cache:    {cache}, {} and {}, keeps: {}", s.cache_k.name(), s.cache_v.name(), s.kv);
        eprintln!("sampling: seed {}", self.sampler.seed());
    }

    /// Starts the trace, if one is wanted.
    pub fn trace(&mut self) -> Result<Option<Trace>> {
        let Some(path) = &self.config.trace else { return Ok(None) };
        if !self.config.session.kv.chooses() {
            eprintln!("note: --kv {} chooses nothing: there is nothing to trace", self.config.session.kv);
        }
        let trace = Trace::create(path, &self.model, Map::new())?;
        trace.follow(&mut self.session);
        Ok(Some(trace))
    }

    /// Entries of the context.
    pub fn ctx(&self) -> usize {
        self.session.ctx()
    }

    /// Forgets all messages.
    pub fn clear(&mut self) {
        self.messages.clone_from(&self.config.chat.messages);
        self.session.truncate(0);
    }

    /// Takes changed settings over: a new sampler, and a new session if its size changed.
    pub fn apply(&mut self, config: RunConfig) -> Result<()> {
        let sampler = Sampler::new(config.sampler.clone())?;
        let ctx = config.session.ctx(self.model.info().ctx_train)?;
        if ctx != self.session.ctx() {
            self.session = config.session.open(&self.model, ctx)?;
        }
        self.sampler = sampler;
        self.config = config;
        Ok(())
    }

    fn prompt(&self) -> Result<(Vec<u32>, String)> {
        let vocab = self.model.vocab();
        if self.config.raw {
            let text = self.messages.last().and_then(|m| m["content"].as_str()).unwrap_or_default();
            let ids = vocab.encode(text, EncodeOptions { add_special: true, parse_special: true });
            return Ok((ids, text.to_owned()));
        }
        let system = self.config.chat.system.iter().map(|s| json!({"role": "system", "content": s}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        // What is read from a file or pasted must not end a turn.
        let messages = Value::Array(chat::guard(vocab, &messages));
        let mut kwargs = self.config.chat.kwargs.clone();
        if let Some(think) = self.config.chat.think {
            chat::set_thinking(&mut kwargs, think);
        }
        let text = chat::render(&self.template, &messages, None, true, &kwargs)?;
        Ok((chat::guarded_tokens(vocab, &text), text))
    }

    /// Answers `text`, showing the answer as it comes; `cancelled` is asked after every piece. If it fails, the
    /// conversation is as it was before.
    pub fn say(&mut self, text: &str, cancelled: impl Fn() -> bool) -> Result<Generated> {
        self.messages.push(json!({"role": "user", "content": text}));
        let said = self.answer(cancelled);
        if said.is_err() {
            self.messages.pop();
        }
        said
    }

    fn answer(&mut self, cancelled: impl Fn() -> bool) -> Result<Generated> {
        let (ids, rendered) = self.prompt()?;
        self.usage = Usage::now();
        let tags = self.template.think_tags().filter(|_| !self.config.raw);
        let mut options = self.config.generate.clone();
        options.show = tags.map(|t| t.tokens(self.model.vocab())).unwrap_or_default();
        let mut splitter = tags.map(|t: ThinkTags| Splitter::new(t, t.opened_by(&rendered)));
        let begin = match tags {
            Some(tags) if self.config.chat.think != Some(false) || tags.opened_by(&rendered) => {
                Begin::AfterThinking { tags, opened: tags.opened_by(&rendered) }
            }
            _ => Begin::Now,
        };
        let mut constraint = self.format.as_ref().map(|(f, g)| g.constraint(f, begin)).transpose()?;
        let mut display = Display::new(self.config.hide_thinking);
        let (mut thought, mut answer) = (String::new(), String::new());
        let mut take = |parts: Vec<Part>, display: &mut Display| {
            parts.iter().all(|p| {
                match p {
                    Part::Thinking(t) => thought.push_str(t),
                    Part::Answer(t) => answer.push_str(t),
                }
                display.show(p)
            })
        };
        let held = constraint.as_deref_mut().map(|c| c as &mut dyn Constraint);
        let done = self.session.generate_constrained(&ids, &mut self.sampler, held, &options, |text| {
            let parts = match &mut splitter {
                Some(s) => s.push(text),
                None => vec![Part::Answer(text.to_owned())],
            };
            match take(parts, &mut display) && !cancelled() {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        if let Some(s) = &mut splitter {
            take(s.finish(), &mut display);
        }
        display.finish();
        if let Some(e) = display.failed {
            return Err(e.into());
        }
        let done = done?;
        let mut message = json!({"role": "assistant", "content": answer});
        if !thought.is_empty() {
            message["reasoning_content"] = thought.into();
        }
        self.messages.push(message);
        Ok(done)
    }

    /// Says on stderr why the answer ended, if that needs saying, and the timings if they are wanted.
    pub fn explain(&mut self, done: &Generated) {
        let info = self.model.info();
        if let Some(note) = ending(&done.reason, self.session.ctx(), info.ctx_train) {
            eprintln!("note: {note}");
        }
        let silent = self.messages.last().is_some_and(|m| m["content"] == "");
        if done.reason == FinishReason::Length && silent {
            eprintln!(
                "note: the limit of {} new tokens (-n) came before the answer; thinking counts",
                done.new_tokens
            );
        }
        if self.config.verbose {
            if done.reason == FinishReason::Length {
                eprintln!("note: the answer ended at the limit of new tokens (-n)");
            }
            let depth = done.prompt_tokens + done.new_tokens / 2;
            let options = self.config.session.options(self.session.ctx());
            let cache = self.model.read_bytes(&options, depth).unwrap_or(0);
            let read = info.read_bytes_per_token as f64 + cache as f64;
            eprint!("\n{}", timings(done, std::mem::take(&mut self.load_time), read));
            eprint!("{}", memory(&self.session.memory(), self.usage, done));
        } else if done.evicted_tokens > 0 {
            eprintln!("note: {} tokens were evicted by {}", done.evicted_tokens, done.policy);
        }
    }

    /// Writes system prompt and messages as JSON.
    pub fn save(&self, path: &Path) -> Result<()> {
        let all = json!({
            "model": self.config.load.source.name(),
            "system": self.config.chat.system,
            "messages": self.messages,
        });
        let text = serde_json::to_string_pretty(&all)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads what [`Self::save`] wrote; the model stays.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let mut all = crate::text::read_json(path)?;
        let messages = chat::check_messages(all["messages"].take())
            .with_context(|| format!("{}: not a saved conversation", path.display()))?;
        self.clear();
        self.config.chat.system = all["system"].as_str().map(Into::into);
        self.messages = messages;
        Ok(())
    }
}
