//! Ollama's `/api/generate` and `/api/chat`: fields in, lines or one object out.

use super::fields::Fields;
use super::stream::{self, Out};
use super::{error, messages};
use crate::serve::answer::{Answer, End, Said, Whole};
use crate::serve::constrain::Format;
use crate::serve::duration::KeepAlive;
use crate::serve::failure::Failure;
use crate::serve::options::Options;
use crate::serve::prompt::{App, Ask, Input, Thinking};
use crate::serve::request::{Reason, TokenLogprob};
use crate::serve::tools::ToolCall;
use crate::store::Resolved;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Now, as Ollama writes it.
pub fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// Nanoseconds; integrations divide by them.
fn ns(d: Duration) -> u64 {
    (d.as_nanos() as u64).max(1)
}

/// `keep_alive` of any route.
pub fn keep_alive(f: &mut Fields) -> Result<Option<KeepAlive>, Failure> {
    let Some(v) = f.take("keep_alive") else { return Ok(None) };
    let k = KeepAlive::from_json(&v);
    k.map(Some).ok_or_else(|| {
        Failure::field("keep_alive", format!("{v} is no duration such as \"5m\", nor seconds"))
    })
}

fn format(f: &mut Fields) -> Result<Option<Format>, Failure> {
    Ok(match f.take("format") {
        None => None,
        Some(Value::String(s)) if s.is_empty() => None,
        Some(Value::String(s)) if s == "json" => Some(Format::Json),
        Some(v @ Value::Object(_)) => Some(Format::Schema(v)),
        Some(v) => {
            return Err(Failure::field("format", format!("{v} is neither \"json\" nor a JSON schema")));
        }
    })
}

fn think(f: &mut Fields) -> Result<Option<Thinking>, Failure> {
    Ok(match f.take("think") {
        None => None,
        Some(Value::Bool(b)) => Some(if b { Thinking::On } else { Thinking::Off }),
        Some(Value::String(s)) if ["low", "medium", "high", "max"].contains(&s.as_str()) => {
            Some(Thinking::Level(s))
        }
        Some(v) => {
            let why = format!("{v} is none of true, false, \"low\", \"medium\", \"high\", \"max\"");
            return Err(Failure::field("think", why));
        }
    })
}

/// The fields that all of Ollama's generating routes have.
fn common(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    ask.keep_alive = keep_alive(f)?;
    ask.options = f.object("options")?.unwrap_or_default();
    ask.format = format(f)?;
    ask.think = think(f)?;
    ask.truncate = f.boolean("truncate")?.unwrap_or(true);
    ask.shift = f.boolean("shift")?.unwrap_or(true);
    let top = f.within("top_logprobs", 0..=20)?;
    ask.logprobs = f.boolean("logprobs")?.unwrap_or(false).then(|| top.unwrap_or(0));
    Ok(())
}

/// How an answer is written.
struct Form {
    model: String,
    /// `message` or `response`.
    chat: bool,
    /// The prompt's tokens, for `context`.
    context: bool,
}

impl Form {
    fn line(&self) -> Map<String, Value> {
        let mut m = Map::new();
        m.insert("model".into(), self.model.as_str().into());
        m.insert("created_at".into(), now().into());
        m
    }

    /// What was said; `first_call`: calls before.
    fn said(&self, said: &Whole, first_call: usize) -> Map<String, Value> {
        let calls: Vec<Value> = said.calls.iter().enumerate().map(|(i, c)| call(first_call + i, c)).collect();
        let mut m = self.line();
        let mut inner = Map::new();
        inner.insert(if self.chat { "content" } else { "response" }.into(), said.text.as_str().into());
        if !said.thinking.is_empty() {
            inner.insert("thinking".into(), said.thinking.as_str().into());
        }
        if !calls.is_empty() {
            inner.insert("tool_calls".into(), calls.into());
        }
        if self.chat {
            inner.insert("role".into(), "assistant".into());
            m.insert("message".into(), inner.into());
        } else {
            m.extend(inner);
        }
        m.insert("done".into(), false.into());
        if !said.logprobs.is_empty() {
            m.insert("logprobs".into(), said.logprobs.iter().map(logprob).collect());
        }
        m
    }

    fn done(&self, mut m: Map<String, Value>, end: &End, tokens: Vec<u32>) -> Value {
        let f = &end.finish;
        m.insert("done".into(), true.into());
        m.insert("done_reason".into(), if f.reason == Reason::Length { "length" } else { "stop" }.into());
        if self.context {
            m.insert("context".into(), tokens.into());
        }
        for (name, value) in [
            ("total_duration", ns(end.total)),
            ("load_duration", ns(end.load)),
            ("prompt_eval_count", f.prompt_tokens as u64),
            ("prompt_eval_duration", ns(f.prompt_time)),
            ("eval_count", f.new_tokens as u64),
            ("eval_duration", ns(f.decode_time)),
            ("cached_tokens", f.cached_tokens as u64),
            ("evicted_tokens", f.evicted as u64),
        ] {
            m.insert(name.into(), value.into());
        }
        if f.head_evicted > 0 {
            m.insert("system_evicted_tokens".into(), f.head_evicted.into());
        }
        if end.reloaded {
            m.insert("reloaded".into(), true.into());
        }
        m.into()
    }
}

fn call(index: usize, c: &ToolCall) -> Value {
    json!({"id": c.id, "function": {"index": index, "name": c.name, "arguments": c.arguments}})
}

fn logprob(p: &TokenLogprob) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes});
    let mut v = one(&p.bytes, p.logprob);
    v["top_logprobs"] = p.top.iter().map(|(_, b, l)| one(b, *l)).collect();
    v
}

/// The lines of an answer.
struct Lines {
    form: Form,
    /// The prompt's, and those of the answer so far.
    tokens: Vec<u32>,
    calls: usize,
}

impl stream::Dialect for Lines {
    fn begin(&mut self, answers: &[Answer], _: &mut Out) {
        self.tokens = answers.iter().flat_map(|a| a.prompt.iter().copied()).collect();
    }

    fn said(&mut self, _: usize, said: Said, out: &mut Out) {
        let mut all = Whole::default();
        all.take(said);
        self.tokens.extend(&all.tokens);
        if all.text.is_empty() && all.thinking.is_empty() && all.calls.is_empty() && all.logprobs.is_empty() {
            return;
        }
        out.push_back(format!("{}\n", Value::from(self.form.said(&all, self.calls))));
        self.calls += all.calls.len();
    }

    fn done(&mut self, _: usize, end: End, out: &mut Out) {
        let line = self.form.said(&Whole::default(), 0);
        out.push_back(format!("{}\n", self.form.done(line, &end, std::mem::take(&mut self.tokens))));
    }

    fn failed(&mut self, f: &Failure, out: &mut Out) {
        out.push_back(format!("{}\n", error::ollama(f)));
    }
}

async fn respond(mut answer: Answer, form: Form, streamed: bool) -> Result<Response, Failure> {
    if streamed {
        return Ok(stream::ndjson(vec![answer], Lines { form, tokens: Vec::new(), calls: 0 }));
    }
    let (all, end) = answer.whole().await?;
    let line = form.said(&all, 0);
    let tokens = [answer.prompt, all.tokens].concat();
    Ok(Json(form.done(line, &end, tokens)).into_response())
}

/// A request without a prompt: the model is loaded, or unloaded.
async fn touch(app: &App, model: &Resolved, ask: &Ask, form: &Form) -> Result<Response, Failure> {
    let mut m = form.said(&Whole::default(), 0);
    m.insert("done".into(), true.into());
    if ask.keep_alive == Some(KeepAlive(Some(Duration::ZERO))) {
        app.models.stop(&model.source);
        m.insert("done_reason".into(), "unload".into());
    } else {
        drop(app.load(model, ask).await?);
        m.insert("done_reason".into(), "load".into());
    }
    Ok(Json(Value::from(m)).into_response())
}

/// `POST /api/chat`.
pub async fn chat(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let said = messages::normalise(f.array("messages")?.unwrap_or_default())?;
    let empty = said.is_empty();
    let mut ask = Ask::new(Input::Chat(messages::with_models(&model, said)), Options::ollama());
    common(&mut f, &mut ask)?;
    ask.tools = f.tools("tools")?;
    let streamed = f.boolean("stream")?.unwrap_or(true);
    let form = Form { model: name, chat: true, context: false };
    if empty {
        return touch(&app, &model, &ask, &form).await;
    }
    let answer = app.ask(&model, ask, 1).await?.remove(0);
    respond(answer, form, streamed).await
}

/// `POST /api/generate`.
pub async fn generate(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let prompt = f.string("prompt")?.unwrap_or_default();
    let suffix = f.string("suffix")?.filter(|s| !s.is_empty());
    let raw = f.boolean("raw")?.unwrap_or(false);
    let system = f.string("system")?.filter(|s| !s.is_empty());
    let template = f.string("template")?.filter(|s| !s.is_empty());
    let context = f.tokens("context")?;
    if f.array("images")?.is_some_and(|i| !i.is_empty()) {
        return Err(Failure::field("images", "models here read text alone"));
    }
    if raw && (system.is_some() || template.is_some() || !context.is_empty()) {
        return Err(Failure::invalid("raw mode does not support template, system, or context"));
    }
    let empty = prompt.is_empty() && suffix.is_none();
    let input = if let Some(suffix) = suffix {
        Input::Fill { prefix: prompt, suffix }
    } else if raw {
        Input::Text { text: prompt, special: true }
    } else {
        let mut said = messages::with_models(&model, vec![json!({"role": "user", "content": prompt})]);
        if let Some(s) = system {
            said.retain(|m| m["role"] != "system");
            said.insert(0, json!({"role": "system", "content": s}));
        }
        Input::Chat(said)
    };
    let mut ask = Ask::new(input, Options::ollama());
    common(&mut f, &mut ask)?;
    (ask.context, ask.template) = (context, template);
    let streamed = f.boolean("stream")?.unwrap_or(true);
    let form = Form { model: name, chat: false, context: !raw };
    if empty {
        return touch(&app, &model, &ask, &form).await;
    }
    let answer = app.ask(&model, ask, 1).await?.remove(0);
    respond(answer, form, streamed).await
}
