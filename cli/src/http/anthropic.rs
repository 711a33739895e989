//! Anthropic's `/v1/messages` and `/v1/messages/count_tokens`: content blocks to messages of chat templates, and back.

use super::fields::Fields;
use super::stream::{self, Out, event};
use super::{error, messages, openai};
use crate::serve::answer::{Answer, End, Said, Whole};
use crate::serve::constrain::Format;
use crate::serve::failure::Failure;
use crate::serve::options::Options;
use crate::serve::prompt::{App, Ask, Input, Thinking};
use crate::serve::request::Reason;
use crate::serve::tools::{Choice, Piece, ToolCall};
use crate::store::{Resolved, parameters};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Text of a string or of blocks of text.
fn text(at: &str, v: &Value) -> Result<String, Failure> {
    match v {
        Value::Null => Ok(String::new()),
        Value::String(s) => Ok(s.clone()),
        Value::Array(blocks) => {
            let one = |b: &Value| match (b["type"].as_str(), b["text"].as_str()) {
                (Some("text"), Some(t)) => Ok(t.to_owned()),
                (kind, _) => {
                    let kind = kind.unwrap_or("none");
                    Err(Failure::field(at, format!("blocks of type {kind:?} are not supported here")))
                }
            };
            Ok(blocks.iter().map(one).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        _ => Err(Failure::field(at, "it must be a string or an array of blocks")),
    }
}

/// One message of blocks is several of OpenAI's: results of tools come first, each its own.
fn translate(i: usize, m: &Value, out: &mut Vec<Value>) -> Result<(), Failure> {
    let at = format!("messages[{i}].content");
    let role = m["role"].as_str().filter(|r| ["user", "assistant"].contains(r));
    let role =
        role.ok_or_else(|| Failure::field(&format!("messages[{i}].role"), "it must be user or assistant"))?;
    if m["content"].is_null() {
        return Err(Failure::field(&at, "it is missing"));
    }
    let Some(blocks) = m["content"].as_array() else {
        out.push(json!({"role": role, "content": text(&at, &m["content"])?}));
        return Ok(());
    };
    let (mut said, mut thought, mut calls) = (Vec::new(), String::new(), Vec::new());
    for b in blocks {
        let string = |key: &str| {
            b[key].as_str().ok_or_else(|| Failure::field(&at, format!("a block has no {key}, a string")))
        };
        match b["type"].as_str() {
            Some("text") => said.push(string("text")?.to_owned()),
            Some("thinking") => thought.push_str(string("thinking")?),
            Some("redacted_thinking") => {}
            Some("tool_use") => calls.push(json!({"id": string("id")?, "type": "function",
                "function": {"name": string("name")?, "arguments": b["input"]}})),
            Some("tool_result") => out.push(json!({"role": "tool", "tool_call_id": string("tool_use_id")?,
                "content": text(&at, &b["content"])?})),
            kind => {
                let kind = kind.unwrap_or("none");
                return Err(Failure::field(&at, format!("blocks of type {kind:?} are not supported")));
            }
        }
    }
    if said.is_empty() && calls.is_empty() && thought.is_empty() {
        return Ok(());
    }
    let mut message = json!({"role": role, "content": said.join("\n")});
    if !thought.is_empty() {
        message["reasoning_content"] = thought.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    out.push(message);
    Ok(())
}

fn tools(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    for t in f.array("tools")?.unwrap_or_default() {
        if let Some(kind) = t["type"].as_str().filter(|k| *k != "custom") {
            return Err(Failure::field(
                "tools",
                format!("tools of type {kind:?} are not there: only your own"),
            ));
        }
        if !t["name"].is_string() || !(t["input_schema"].is_object() || t["input_schema"].is_null()) {
            return Err(Failure::field(
                "tools",
                "every tool needs a name, and an input_schema that is an object",
            ));
        }
        ask.tools.push(json!({"type": "function", "function": {"name": t["name"],
            "description": t["description"], "parameters": t["input_schema"]}}));
    }
    let choice = f.object("tool_choice")?.unwrap_or_default();
    match (choice.get("type").and_then(Value::as_str), choice.get("name").and_then(Value::as_str)) {
        (None | Some("auto"), _) => {}
        (Some("any"), _) => ask.choice = Choice::Required,
        (Some("tool"), Some(name)) => ask.choice = Choice::Named(name.into()),
        (Some("none"), _) => ask.tools.clear(),
        _ => {
            return Err(Failure::field(
                "tool_choice",
                "its type must be auto, any, none, or tool with a name",
            ));
        }
    }
    ask.one_call = choice.get("disable_parallel_tool_use") == Some(&json!(true));
    Ok(())
}

/// The request in the neutral form; what is said of streaming stays in `f`.
fn read(model: &Resolved, f: &mut Fields) -> Result<Ask, Failure> {
    let mut said = Vec::new();
    let system = text("system", &f.take("system").unwrap_or_default())?;
    if !system.is_empty() {
        said.push(json!({"role": "system", "content": system}));
    }
    let given = f.array("messages")?.unwrap_or_default();
    if given.is_empty() {
        return Err(Failure::field("messages", "at least one message is needed"));
    }
    for (i, m) in given.iter().enumerate() {
        translate(i, m, &mut said)?;
    }
    let said = messages::with_models(model, messages::normalise(said)?);
    let mut ask = Ask::new(Input::Chat(said), Options::openai());
    if let Some(stop) = f.array("stop_sequences")? {
        f.0.insert("stop".into(), stop.into());
    }
    openai::common(f, &mut ask)?;
    tools(f, &mut ask)?;
    let thinking = f.object("thinking")?.unwrap_or_default();
    ask.think = Some(match thinking.get("type").and_then(Value::as_str) {
        None | Some("disabled") => Thinking::Off,
        Some("enabled" | "adaptive") => Thinking::On,
        Some(_) => return Err(Failure::field("thinking", "its type must be enabled, adaptive or disabled")),
    });
    let mut output = Fields(f.object("output_config")?.unwrap_or_default());
    let effort = output.string("effort")?;
    if let (Some(Thinking::On), Some(level)) = (&ask.think, effort) {
        ask.think = Some(Thinking::Level(level));
    }
    if let Some(format) = output.take("format") {
        match (&format["type"], &format["schema"]) {
            (Value::String(t), schema @ Value::Object(_)) if t == "json_schema" => {
                ask.format = Some(Format::Schema(schema.clone()));
            }
            _ => {
                return Err(Failure::field("output_config.format", "it must be a json_schema with a schema"));
            }
        }
    }
    output.nothing_else()?;
    f.refuse("context_management", |v| v["edits"].as_array().is_none_or(Vec::is_empty))?;
    Ok(ask)
}

struct Form {
    id: String,
    model: String,
}

fn reason(end: &End) -> (&'static str, Value) {
    match &end.finish.reason {
        Reason::Length => ("max_tokens", Value::Null),
        _ if end.calls > 0 => ("tool_use", Value::Null),
        Reason::StopString(s) => ("stop_sequence", s.as_str().into()),
        Reason::Stop => ("end_turn", Value::Null),
    }
}

fn usage(end: &End) -> Value {
    let f = &end.finish;
    json!({"input_tokens": f.prompt_tokens - f.cached_tokens, "cache_read_input_tokens": f.cached_tokens,
        "cache_creation_input_tokens": 0, "output_tokens": f.new_tokens, "evicted_tokens": f.evicted})
}

impl Form {
    fn message(&self, content: Vec<Value>, usage: Value) -> Value {
        json!({"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": null, "stop_sequence": null, "usage": usage})
    }

    fn whole(&self, all: &Whole, end: &End) -> Value {
        let mut content = Vec::new();
        if !all.thinking.is_empty() {
            content.push(json!({"type": "thinking", "thinking": all.thinking, "signature": ""}));
        }
        if !all.text.is_empty() || all.calls.is_empty() {
            content.push(json!({"type": "text", "text": all.text}));
        }
        content.extend(all.calls.iter().map(|c| tool_use(c, c.arguments.clone())));
        let mut m = self.message(content, usage(end));
        let (why, stop) = reason(end);
        (m["stop_reason"], m["stop_sequence"]) = (why.into(), stop);
        m
    }
}

fn tool_use(c: &ToolCall, input: Value) -> Value {
    json!({"type": "tool_use", "id": c.id, "name": c.name, "input": input})
}

/// Blocks, as they are written.
struct Blocks {
    form: Form,
    /// The block that is open, and blocks so far.
    open: Option<&'static str>,
    blocks: usize,
}

impl Blocks {
    fn close(&mut self, out: &mut Out) {
        if self.open.take().is_some() {
            out.push_back(event(&json!({"type": "content_block_stop", "index": self.blocks})));
            self.blocks += 1;
        }
    }

    /// Opens a block unless one of its kind is open.
    fn open(&mut self, kind: &'static str, block: Value, out: &mut Out) {
        if self.open != Some(kind) || kind == "tool_use" {
            self.close(out);
            let v = json!({"type": "content_block_start", "index": self.blocks, "content_block": block});
            out.push_back(event(&v));
            self.open = Some(kind);
        }
    }

    fn delta(&self, delta: Value, out: &mut Out) {
        out.push_back(event(&json!({"type": "content_block_delta", "index": self.blocks, "delta": delta})));
    }

    fn piece(&mut self, p: Piece, out: &mut Out) {
        match p {
            Piece::Thinking(t) => {
                self.open("thinking", json!({"type": "thinking", "thinking": "", "signature": ""}), out);
                self.delta(json!({"type": "thinking_delta", "thinking": t}), out);
            }
            Piece::Text(t) => {
                self.open("text", json!({"type": "text", "text": ""}), out);
                self.delta(json!({"type": "text_delta", "text": t}), out);
            }
            Piece::Call(c) => {
                self.open("tool_use", tool_use(&c, json!({})), out);
                let json = c.arguments.to_string();
                self.delta(json!({"type": "input_json_delta", "partial_json": json}), out);
                self.close(out);
            }
        }
    }
}

impl stream::Dialect for Blocks {
    fn begin(&mut self, answers: &[Answer], out: &mut Out) {
        let n: usize = answers.iter().map(|a| a.prompt.len()).sum();
        let message = self.form.message(Vec::new(), json!({"input_tokens": n, "output_tokens": 0}));
        out.push_back(event(&json!({"type": "message_start", "message": message})));
    }

    fn said(&mut self, _: usize, said: Said, out: &mut Out) {
        said.pieces.into_iter().for_each(|p| self.piece(p, out));
    }

    fn done(&mut self, _: usize, end: End, out: &mut Out) {
        if self.blocks == 0 && self.open.is_none() {
            self.open("text", json!({"type": "text", "text": ""}), out);
        }
        self.close(out);
        let (why, stop) = reason(&end);
        out.push_back(event(&json!({"type": "message_delta", "usage": usage(&end),
            "delta": {"stop_reason": why, "stop_sequence": stop}})));
        out.push_back(event(&json!({"type": "message_stop"})));
    }

    fn failed(&mut self, f: &Failure, out: &mut Out) {
        out.push_back(event(&error::anthropic(f)));
    }
}

/// `POST /v1/messages`.
pub async fn create(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    if f.0.get("max_tokens").and_then(parameters::whole).is_none_or(|n| n < 1) {
        return Err(Failure::field("max_tokens", "it is required, and must be 1 or more"));
    }
    let ask = read(&model, &mut f)?;
    let streamed = f.boolean("stream")?.unwrap_or(false);
    f.nothing_else()?;
    let form = Form { id: format!("msg_{}", app.counter.fetch_add(1, Ordering::Relaxed)), model: name };
    if streamed {
        let asked = async move { app.ask(&model, ask, 1).await };
        return stream::events(asked, Blocks { form, open: None, blocks: 0 }).await;
    }
    let (all, end) = app.ask(&model, ask, 1).await?.remove(0).whole().await?;
    Ok(Json(form.whole(&all, &end)).into_response())
}

/// `POST /v1/messages/count_tokens`.
pub async fn count(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let ask = read(&model, &mut f)?;
    f.nothing_else()?;
    Ok(Json(json!({"input_tokens": app.prompt(&model, ask).await?.0.len()})))
}
