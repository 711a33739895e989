//! OpenAI's `/v1/chat/completions` and `/v1/completions`. Every field is honoured, or refused by name.

use super::fields::Fields;
use super::ollama::keep_alive;
use super::{error, messages, stream};
use crate::serve::answer::{Answer, End, Step, Whole};
use crate::serve::constrain::Format;
use crate::serve::failure::Failure;
use crate::serve::options::{self, Options};
use crate::serve::prompt::{App, Ask, Input, Thinking};
use crate::serve::request::{Reason, TokenLogprob};
use crate::serve::tools::{Choice, Piece, ToolCall};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Answers to one request at most.
const MOST_ANSWERS: usize = 16;

/// Sampling fields by OpenAI's and llama.cpp's names, and Ollama's.
const SAMPLING: [(&str, &str); 17] = [
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("typical_p", "typical_p"),
    ("frequency_penalty", "frequency_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("repeat_penalty", "repeat_penalty"),
    ("repeat_last_n", "repeat_last_n"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("ignore_eos", "ignore_eos"),
    ("n_predict", "num_predict"),
    ("max_tokens", "num_predict"),
    ("max_completion_tokens", "num_predict"),
    ("num_ctx", "num_ctx"),
    ("kv", "kv"),
];

/// Fields of both routes, taken into `ask`.
pub fn common(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    ask.keep_alive = keep_alive(f)?;
    ask.options = f.object("options")?.unwrap_or_default();
    for (name, ours) in SAMPLING {
        if let Some(v) = f.take(name) {
            if ours == "num_predict" && name != "n_predict" && options::int(name, &v)? < 0 {
                return Err(Failure::field(name, "it must be 0 or more"));
            }
            // Checked here, where the client's own name for it is known.
            Options::openai().set(ours, &v).map_err(|e| Failure::field(name, e))?;
            ask.options.insert(ours.into(), v);
        }
    }
    for (token, bias) in f.object("logit_bias")?.unwrap_or_default() {
        let wrong = || Failure::field("logit_bias", "it must map token ids to numbers from -100 to 100");
        let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b)).ok_or_else(wrong)? as f32;
        // As OpenAI's documents say: -100 bans.
        let bias = if bias == -100.0 { f32::NEG_INFINITY } else { bias };
        ask.logit_bias.push((token.parse().map_err(|_| wrong())?, bias));
    }
    ask.truncate = f.boolean("truncate")?.unwrap_or(true);
    ask.shift = f.boolean("shift")?.unwrap_or(true);
    // Who asks, and what is kept elsewhere: nothing is done with it here, nor need it be.
    for name in [
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "cache_prompt",
    ] {
        f.take(name);
    }
    f.refuse("store", |v| *v == json!(false))?;
    f.refuse("service_tier", |v| *v == json!("auto") || *v == json!("default"))?;
    Ok(())
}

/// `reasoning_effort`, `reasoning.effort`, `think`.
pub fn effort(f: &mut Fields) -> Result<Option<Thinking>, Failure> {
    if let Some(v) = f.take("think") {
        return match v {
            Value::Bool(b) => Ok(Some(if b { Thinking::On } else { Thinking::Off })),
            _ => Err(Failure::field("think", "it must be true or false")),
        };
    }
    let object = f.object("reasoning")?.unwrap_or_default();
    let name = if object.contains_key("effort") { "reasoning.effort" } else { "reasoning_effort" };
    let level = f.string("reasoning_effort")?.or_else(|| object.get("effort")?.as_str().map(Into::into));
    Ok(match level.as_deref() {
        None => None,
        Some("none") => Some(Thinking::Off),
        Some("minimal" | "low") => Some(Thinking::Level("low".into())),
        Some(l @ ("medium" | "high" | "max")) => Some(Thinking::Level(l.into())),
        Some("xhigh") => Some(Thinking::Level("max".into())),
        Some(other) => {
            let why = format!("{other:?} is none of none, minimal, low, medium, high, xhigh, max");
            return Err(Failure::field(name, why));
        }
    })
}

fn response_format(f: &mut Fields) -> Result<Option<Format>, Failure> {
    let Some(v) = f.take("response_format") else { return Ok(None) };
    match v["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(match v.get("schema") {
            Some(s @ Value::Object(_)) => Format::Schema(s.clone()),
            _ => Format::Json,
        })),
        Some("json_schema") => match &v["json_schema"]["schema"] {
            s @ Value::Object(_) => Ok(Some(Format::Schema(s.clone()))),
            _ => Err(Failure::field("response_format", "json_schema needs a schema, an object")),
        },
        _ => Err(Failure::field("response_format", "its type must be text, json_object or json_schema")),
    }
}

/// Takes `tools` and `tool_choice`.
pub fn tools(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    ask.tools = f.array("tools")?.unwrap_or_default();
    for t in &ask.tools {
        if !t["function"]["name"].is_string() {
            return Err(Failure::field("tools", "every tool must be of type function, with a name"));
        }
    }
    match f.take("tool_choice") {
        None => {}
        Some(Value::String(s)) if s == "auto" => {}
        Some(Value::String(s)) if s == "none" => ask.tools.clear(),
        Some(Value::String(s)) if s == "required" => ask.choice = Choice::Required,
        Some(v) => match v["function"]["name"].as_str() {
            Some(name) => ask.choice = Choice::Named(name.into()),
            None => {
                let why = "it must be \"auto\", \"none\", \"required\", or name a function";
                return Err(Failure::field("tool_choice", why));
            }
        },
    }
    ask.one_call = f.boolean("parallel_tool_calls")? == Some(false);
    Ok(())
}

/// What is the same in all objects of an answer.
struct Form {
    id: String,
    created: i64,
    model: String,
    chat: bool,
    usage: bool,
    /// The prompt's text, where it is to be repeated.
    echo: Vec<String>,
}

impl Form {
    fn new(app: &App, model: String, chat: bool) -> Self {
        let n = app.counter.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{n}", if chat { "chatcmpl" } else { "cmpl" });
        Self { id, created: jiff::Timestamp::now().as_second(), model, chat, usage: false, echo: Vec::new() }
    }

    fn object(&self, streamed: bool, choices: Value) -> Map<String, Value> {
        let object = match (self.chat, streamed) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        };
        let v = json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": "fp_rsinfer", "choices": choices});
        match v {
            Value::Object(m) => m,
            _ => Map::new(),
        }
    }

    fn logprobs(&self, probs: &[TokenLogprob]) -> Value {
        if probs.is_empty() {
            return Value::Null;
        }
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        if !self.chat {
            let offsets = probs.iter().scan(0, |at, p| {
                let before = *at;
                *at += text(&p.bytes).chars().count();
                Some(before)
            });
            let offsets: Vec<usize> = offsets.collect();
            let top =
                |p: &TokenLogprob| p.top.iter().map(|(_, b, l)| (text(b), json!(l))).collect::<Map<_, _>>();
            return json!({"tokens": probs.iter().map(|p| text(&p.bytes)).collect::<Vec<_>>(),
                "token_logprobs": probs.iter().map(|p| p.logprob).collect::<Vec<_>>(),
                "top_logprobs": probs.iter().map(top).collect::<Vec<_>>(), "text_offset": offsets});
        }
        let one = |b: &[u8], l: f32| json!({"token": text(b), "logprob": l, "bytes": b});
        let all = probs.iter().map(|p| {
            let mut v = one(&p.bytes, p.logprob);
            v["top_logprobs"] = p.top.iter().map(|(_, b, l)| one(b, *l)).collect();
            v
        });
        json!({"content": all.collect::<Vec<_>>(), "refusal": null})
    }

    fn usage(ends: &[End]) -> Value {
        let prompt = ends.first().map_or(0, |e| e.finish.prompt_tokens);
        let sum = |f: fn(&End) -> usize| ends.iter().map(f).sum::<usize>();
        let made = sum(|e| e.finish.new_tokens);
        json!({"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": ends.first().map_or(0, |e| e.finish.cached_tokens)},
            "evicted_tokens": sum(|e| e.finish.evicted)})
    }
}

/// llama-server's timings.
pub fn timings(e: &End) -> Value {
    let f = &e.finish;
    let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
    let computed = f.prompt_tokens - f.cached_tokens;
    let per = |ms: f64, n: usize| if n == 0 { 0.0 } else { ms / n as f64 };
    let rate = |ms: f64, n: usize| if ms <= 0.0 { 0.0 } else { n as f64 * 1e3 / ms };
    let (p, d) = (ms(f.prompt_time), ms(f.decode_time));
    json!({"cache_n": f.cached_tokens, "prompt_n": computed, "prompt_ms": p, "prompt_per_token_ms": per(p, computed),
        "prompt_per_second": rate(p, computed), "predicted_n": f.new_tokens, "predicted_ms": d,
        "predicted_per_token_ms": per(d, f.new_tokens), "predicted_per_second": rate(d, f.new_tokens),
        "queued_ms": ms(f.queued), "load_ms": ms(e.load), "reloaded": e.reloaded, "evicted_n": f.evicted})
}

fn reason(e: &End) -> &'static str {
    match e.finish.reason {
        Reason::Length => "length",
        _ if e.calls > 0 => "tool_calls",
        _ => "stop",
    }
}

fn call(index: Option<usize>, c: &ToolCall) -> Value {
    let mut v = json!({"id": c.id, "type": "function",
        "function": {"name": c.name, "arguments": c.arguments.to_string()}});
    if let Some(i) = index {
        v["index"] = i.into();
    }
    v
}

fn choice(form: &Form, index: usize, all: &Whole, end: &End) -> Value {
    let mut v =
        json!({"index": index, "finish_reason": reason(end), "logprobs": form.logprobs(&all.logprobs)});
    if form.chat {
        let mut m = json!({"role": "assistant", "content": all.text});
        if !all.thinking.is_empty() {
            m["reasoning"] = all.thinking.as_str().into();
            m["reasoning_content"] = all.thinking.as_str().into();
        }
        if !all.calls.is_empty() {
            m["tool_calls"] = all.calls.iter().map(|c| call(None, c)).collect();
            if all.text.is_empty() {
                m["content"] = Value::Null;
            }
        }
        v["message"] = m;
    } else {
        let echo = form.echo.get(index).or(form.echo.first());
        v["text"] = (echo.cloned().unwrap_or_default() + &all.text).into();
    }
    v
}

/// The events of answers that come side by side.
struct Events {
    form: Form,
    /// Framed pieces of all answers, in the order in which they come.
    pieces: tokio::sync::mpsc::Receiver<Result<Vec<Value>, Failure>>,
    /// Ends, as they come.
    ends: Arc<std::sync::Mutex<Vec<End>>>,
    ready: std::collections::VecDeque<String>,
    over: bool,
}

impl stream::Source for Events {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(s) = self.ready.pop_front() {
                return Some(s);
            }
            if self.over {
                return None;
            }
            match self.pieces.recv().await {
                Some(Ok(choices)) => {
                    for c in choices {
                        let mut o = self.form.object(true, json!([c]));
                        if self.form.usage {
                            o.insert("usage".into(), Value::Null);
                        }
                        self.ready.push_back(stream::data(&o.into()));
                    }
                }
                Some(Err(f)) => {
                    stream::log(&f);
                    self.over = true;
                    return Some(stream::data(&error::openai(&f)));
                }
                None => {
                    self.over = true;
                    let ends = std::mem::take(&mut *self.ends.lock().unwrap_or_else(|e| e.into_inner()));
                    if self.form.usage {
                        let mut o = self.form.object(true, json!([]));
                        o.insert("usage".into(), Form::usage(&ends));
                        o.extend(ends.first().map(|e| ("timings".into(), timings(e))));
                        self.ready.push_back(stream::data(&o.into()));
                    }
                    self.ready.push_back("data: [DONE]\n\n".into());
                }
            }
        }
    }
}

/// The choices of one answer's chunks.
async fn feed(
    mut answer: Answer,
    index: usize,
    form: Arc<Form>,
    out: tokio::sync::mpsc::Sender<Result<Vec<Value>, Failure>>,
    ends: Arc<std::sync::Mutex<Vec<End>>>,
) {
    let chunk = |delta: Value, probs: &[TokenLogprob], finish: Value| {
        let mut v = json!({"index": index, "finish_reason": finish, "logprobs": form.logprobs(probs)});
        if form.chat {
            v["delta"] = delta;
        } else {
            v["text"] = delta;
        }
        v
    };
    let first = match form.chat {
        true => Some(json!({"role": "assistant", "content": ""})),
        false => form.echo.get(index).or(form.echo.first()).map(|e| json!(e)),
    };
    let mut pending: Vec<Value> = first.map(|d| chunk(d, &[], Value::Null)).into_iter().collect();
    let mut calls = 0;
    loop {
        if !pending.is_empty() && out.send(Ok(std::mem::take(&mut pending))).await.is_err() {
            return;
        }
        let step = tokio::select! {
            s = answer.next() => s,
            () = out.closed() => return,
        };
        match step {
            Ok(Step::Said { pieces, logprob, .. }) => {
                let mut probs = logprob.as_slice();
                for p in pieces {
                    let delta = match p {
                        Piece::Text(t) if form.chat => json!({"content": t}),
                        Piece::Text(t) => json!(t),
                        Piece::Thinking(t) => json!({"reasoning": t, "reasoning_content": t}),
                        Piece::Call(c) => {
                            calls += 1;
                            json!({"tool_calls": [call(Some(calls - 1), &c)]})
                        }
                    };
                    pending.push(chunk(delta, std::mem::take(&mut probs), Value::Null));
                }
                if !probs.is_empty() {
                    let nothing = if form.chat { json!({"content": ""}) } else { json!("") };
                    pending.push(chunk(nothing, probs, Value::Null));
                }
            }
            Ok(Step::Done(end)) => {
                let nothing = if form.chat { json!({}) } else { json!("") };
                let last = chunk(nothing, &[], reason(&end).into());
                ends.lock().unwrap_or_else(|e| e.into_inner()).push(end);
                let _ = out.send(Ok(vec![last])).await;
                return;
            }
            Err(f) => {
                let _ = out.send(Err(f)).await;
                return;
            }
        }
    }
}

async fn respond(mut answers: Vec<Answer>, form: Form, streamed: bool) -> Result<Response, Failure> {
    if !streamed {
        let all = join_all(answers.iter_mut().map(Answer::whole)).await;
        let all = all.into_iter().collect::<Result<Vec<_>, _>>()?;
        let choices: Vec<Value> = all.iter().enumerate().map(|(i, (w, e))| choice(&form, i, w, e)).collect();
        let ends: Vec<End> = all.into_iter().map(|(_, e)| e).collect();
        let mut o = form.object(false, choices.into());
        o.insert("usage".into(), Form::usage(&ends));
        o.extend(ends.first().map(|e| ("timings".into(), timings(e))));
        return Ok(Json(Value::from(o)).into_response());
    }
    let (out, pieces) = tokio::sync::mpsc::channel(16);
    let ends = Arc::default();
    let shared = Arc::new(Form { id: String::new(), model: String::new(), echo: form.echo.clone(), ..form });
    for (i, a) in answers.into_iter().enumerate() {
        tokio::spawn(feed(a, i, shared.clone(), out.clone(), Arc::clone(&ends)));
    }
    Ok(stream::events(Events { form, pieces, ends, ready: Default::default(), over: false }))
}

fn streaming(f: &mut Fields, form: &mut Form) -> Result<bool, Failure> {
    let streamed = f.boolean("stream")?.unwrap_or(false);
    let mut options = Fields(f.object("stream_options")?.unwrap_or_default());
    form.usage = options.boolean("include_usage")?.unwrap_or(false);
    options.take("include_obfuscation");
    options.nothing_else()?;
    Ok(streamed)
}

/// `POST /v1/chat/completions`.
pub async fn chat(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let said = messages::normalise(f.array("messages")?.unwrap_or_default())?;
    if said.is_empty() {
        return Err(Failure::field("messages", "at least one message is needed"));
    }
    let mut ask = Ask::new(Input::Chat(messages::with_models(&model, said)), Options::openai());
    common(&mut f, &mut ask)?;
    tools(&mut f, &mut ask)?;
    ask.think = effort(&mut f)?;
    ask.format = response_format(&mut f)?;
    ask.kwargs = f.object("chat_template_kwargs")?.unwrap_or_default();
    let top = f.within("top_logprobs", 0..=20)?;
    ask.logprobs = f.boolean("logprobs")?.unwrap_or(false).then(|| top.unwrap_or(0));
    let n = f.within("n", 1..=MOST_ANSWERS)?.unwrap_or(1);
    f.refuse("modalities", |v| *v == json!(["text"]))?;
    let mut form = Form::new(&app, name, true);
    let streamed = streaming(&mut f, &mut form)?;
    f.nothing_else()?;
    let answers = app.ask(&model, ask, n).await?;
    respond(answers, form, streamed).await
}

/// `POST /v1/completions`.
pub async fn completions(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let suffix = f.string("suffix")?.filter(|s| !s.is_empty());
    let wrong =
        || Failure::field("prompt", "it must be a string or an array of token ids (one prompt a request)");
    let (input, text) = match (f.take("prompt"), suffix) {
        (Some(Value::Array(a)), suffix) if a.len() == 1 && a[0].is_string() => {
            let prefix = a[0].as_str().unwrap_or_default().to_owned();
            (with_suffix(prefix.clone(), suffix), Some(prefix))
        }
        (Some(Value::Array(a)), None) if !a.is_empty() => {
            let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
            (Input::Tokens(a.iter().map(id).collect::<Option<_>>().ok_or_else(wrong)?), None)
        }
        (Some(Value::String(s)), suffix) => (with_suffix(s.clone(), suffix), Some(s)),
        _ => return Err(wrong()),
    };
    let mut ask = Ask::new(input, Options::openai());
    common(&mut f, &mut ask)?;
    // OpenAI's default, which is not the model's own end.
    ask.options.entry("num_predict").or_insert(json!(16));
    ask.logprobs = f.within("logprobs", 0..=20)?;
    let n = f.within("n", 1..=MOST_ANSWERS)?.unwrap_or(1);
    f.refuse("best_of", |v| v.as_u64() == Some(n as u64))?;
    let mut form = Form::new(&app, name, false);
    if f.boolean("echo")?.unwrap_or(false) {
        if ask.logprobs.is_some() {
            return Err(Failure::field("echo", "log-probabilities of the prompt are not supported"));
        }
        let text = text.ok_or_else(|| Failure::field("echo", "it needs a prompt that is a string"))?;
        form.echo = vec![text];
    }
    let streamed = streaming(&mut f, &mut form)?;
    f.nothing_else()?;
    let answers = app.ask(&model, ask, n).await?;
    respond(answers, form, streamed).await
}

fn with_suffix(prefix: String, suffix: Option<String>) -> Input {
    match suffix {
        Some(suffix) => Input::Fill { prefix, suffix },
        None => Input::Text { text: prefix, special: false },
    }
}
