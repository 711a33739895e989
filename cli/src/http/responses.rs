//! OpenAI's `/v1/responses`, without a memory: what came before is sent again by the client.

use super::fields::Fields;
use super::stream::{self, Out, event};
use super::{error, messages, openai};
use crate::serve::answer::{Answer, End, Said, Whole};
use crate::serve::constrain::Format;
use crate::serve::failure::Failure;
use crate::serve::options::Options;
use crate::serve::prompt::{App, Ask, Input};
use crate::serve::request::Reason;
use crate::serve::tools::{Piece, ToolCall};
use crate::store::Resolved;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Items of `input` as messages of chat templates.
fn items(v: Option<Value>) -> Result<Vec<Value>, Failure> {
    let list = match v {
        Some(Value::String(s)) => return Ok(vec![json!({"role": "user", "content": s})]),
        Some(Value::Array(a)) if !a.is_empty() => a,
        _ => return Err(Failure::field("input", "it must be a string or an array of items")),
    };
    let mut out: Vec<Value> = Vec::new();
    let mut thought = None;
    for (i, item) in list.into_iter().enumerate() {
        let wrong = |why: &str| Failure::field(&format!("input[{i}]"), why);
        match item["type"].as_str().unwrap_or("message") {
            "message" => {
                let mut m = json!({"role": item["role"], "content": item["content"]});
                if let Some(t) = thought.take().filter(|_| item["role"] == "assistant") {
                    m["reasoning_content"] = t;
                }
                out.push(m);
            }
            "reasoning" => {
                let texts =
                    item["content"].as_array().into_iter().flatten().filter_map(|c| c["text"].as_str());
                thought = Some(Value::from(texts.collect::<Vec<_>>().join("\n")));
            }
            "function_call" => {
                let (Some(name), Some(id)) = (item["name"].as_str(), item["call_id"].as_str()) else {
                    return Err(wrong("a function_call needs a name and a call_id"));
                };
                let call = json!({"id": id, "type": "function",
                    "function": {"name": name, "arguments": item["arguments"]}});
                // Calls of one turn are one message.
                match out.last_mut().filter(|m| m["role"] == "assistant") {
                    Some(m) => match m["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => m["tool_calls"] = json!([call]),
                    },
                    None => out.push(json!({"role": "assistant", "content": "", "tool_calls": [call]})),
                }
            }
            "function_call_output" => {
                out.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}));
            }
            kind => return Err(wrong(&format!("items of type {kind:?} are not supported"))),
        }
    }
    Ok(out)
}

fn format(f: &mut Fields) -> Result<(Option<Format>, Value), Failure> {
    let text = f.object("text")?.unwrap_or_default();
    let shown = text.get("format").cloned().unwrap_or_else(|| json!({"type": "text"}));
    Ok(match shown["type"].as_str() {
        Some("text") => (None, shown),
        Some("json_object") => (Some(Format::Json), shown),
        Some("json_schema") if shown["schema"].is_object() => {
            (Some(Format::Schema(shown["schema"].clone())), shown)
        }
        _ => {
            return Err(Failure::field(
                "text.format",
                "its type must be text, json_object, or json_schema with a schema",
            ));
        }
    })
}

/// Tools are flat here: OpenAI's other form has them below `function`.
fn tools(f: &mut Fields) -> Result<(), Failure> {
    let flat = f.array("tools")?.unwrap_or_default();
    let mut nested = Vec::new();
    for t in &flat {
        if t["type"] != "function" {
            return Err(Failure::field(
                "tools",
                format!("tools of type {} are not there: only functions", t["type"]),
            ));
        }
        nested.push(
            json!({"type": "function", "function": {"name": t["name"], "description": t["description"],
            "parameters": t["parameters"]}}),
        );
    }
    f.0.insert("tools".into(), nested.into());
    if let Some(Value::Object(c)) = f.0.get("tool_choice").cloned() {
        f.0.insert("tool_choice".into(), json!({"type": "function", "function": {"name": c.get("name")}}));
    }
    Ok(())
}

/// What is the same in all objects of a response.
struct Form {
    id: String,
    created: i64,
    model: String,
    /// Fields of the request that are repeated.
    said: Map<String, Value>,
}

impl Form {
    fn response(&self, status: &str, output: &[Value], end: Option<&End>) -> Value {
        let mut v = json!({"id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": null, "incomplete_details": null, "model": self.model, "output": output,
            "previous_response_id": null, "store": false, "truncation": "disabled", "usage": null});
        for (name, value) in &self.said {
            v[name] = value.clone();
        }
        if status == "incomplete" {
            v["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        if let Some(f) = end.map(|e| &e.finish) {
            v["usage"] = json!({"input_tokens": f.prompt_tokens, "output_tokens": f.new_tokens,
                "total_tokens": f.prompt_tokens + f.new_tokens,
                "input_tokens_details": {"cached_tokens": f.cached_tokens},
                "output_tokens_details": {"reasoning_tokens": f.thought_tokens}, "evicted_tokens": f.evicted});
        }
        v
    }

    fn reasoning(&self, n: usize, text: &str) -> Value {
        json!({"type": "reasoning", "id": format!("rs_{}_{n}", self.id), "summary": [],
            "content": [{"type": "reasoning_text", "text": text}]})
    }

    fn message(&self, n: usize, text: &str, status: &str) -> Value {
        let content = if status == "in_progress" { json!([]) } else { json!([part(text)]) };
        json!({"type": "message", "id": format!("msg_{}_{n}", self.id), "status": status, "role": "assistant",
            "content": content})
    }

    fn call(&self, n: usize, c: &ToolCall, arguments: &str) -> Value {
        json!({"type": "function_call", "id": format!("fc_{}_{n}", self.id), "call_id": c.id, "name": c.name,
            "arguments": arguments, "status": if arguments.is_empty() { "in_progress" } else { "completed" }})
    }

    fn whole(&self, all: &Whole, end: &End) -> Value {
        let mut output = Vec::new();
        if !all.thinking.is_empty() {
            output.push(self.reasoning(0, &all.thinking));
        }
        if !all.text.is_empty() || all.calls.is_empty() {
            output.push(self.message(output.len(), &all.text, status(end)));
        }
        for c in &all.calls {
            output.push(self.call(output.len(), c, &c.arguments.to_string()));
        }
        self.response(status(end), &output, Some(end))
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn status(end: &End) -> &'static str {
    if end.finish.reason == Reason::Length { "incomplete" } else { "completed" }
}

/// The item that is being written.
enum Open {
    Reasoning(String),
    Message(String),
}

/// Items, as they are written.
struct Items {
    form: Form,
    open: Option<Open>,
    output: Vec<Value>,
    /// Events so far, and those of them that are not sent.
    sequence: usize,
    said: Out,
}

impl Items {
    fn say(&mut self, kind: &str, fields: Value) {
        let mut v = json!({"type": kind, "sequence_number": self.sequence});
        if let (Value::Object(v), Value::Object(f)) = (&mut v, fields) {
            v.extend(f);
        }
        self.sequence += 1;
        self.said.push_back(event(&v));
    }

    fn id(&self, prefix: &str) -> String {
        format!("{prefix}_{}_{}", self.form.id, self.output.len())
    }

    fn add(&mut self, item: Value) {
        self.say("response.output_item.added", json!({"output_index": self.output.len(), "item": item}));
    }

    fn finish(&mut self, item: Value) {
        self.say("response.output_item.done", json!({"output_index": self.output.len(), "item": item}));
        self.output.push(item);
    }

    fn close(&mut self, end: &str) {
        let n = self.output.len();
        match self.open.take() {
            None => {}
            Some(Open::Reasoning(text)) => {
                let id = self.id("rs");
                self.say(
                    "response.reasoning_text.done",
                    json!({"item_id": id, "output_index": n, "content_index": 0, "text": text}),
                );
                let item = self.form.reasoning(n, &text);
                self.finish(item);
            }
            Some(Open::Message(text)) => {
                let at = json!({"item_id": self.id("msg"), "output_index": n, "content_index": 0});
                let with = |name: &str, v: Value| {
                    let mut at = at.clone();
                    at[name] = v;
                    at
                };
                self.say("response.output_text.done", with("text", json!(text)));
                self.say("response.content_part.done", with("part", part(&text)));
                let item = self.form.message(n, &text, end);
                self.finish(item);
            }
        }
    }

    fn piece(&mut self, p: Piece) {
        match p {
            Piece::Thinking(t) => {
                if !matches!(self.open, Some(Open::Reasoning(_))) {
                    self.close("completed");
                    let mut item = self.form.reasoning(self.output.len(), "");
                    item["content"] = json!([]);
                    self.add(item);
                    self.open = Some(Open::Reasoning(String::new()));
                }
                let id = self.id("rs");
                let n = self.output.len();
                self.say(
                    "response.reasoning_text.delta",
                    json!({"item_id": id, "output_index": n, "content_index": 0, "delta": t}),
                );
                if let Some(Open::Reasoning(all)) = &mut self.open {
                    all.push_str(&t);
                }
            }
            Piece::Text(t) => {
                if !matches!(self.open, Some(Open::Message(_))) {
                    self.close("completed");
                    self.open_message();
                }
                let (id, n) = (self.id("msg"), self.output.len());
                self.say(
                    "response.output_text.delta",
                    json!({"item_id": id, "output_index": n, "content_index": 0, "delta": t, "logprobs": []}),
                );
                if let Some(Open::Message(all)) = &mut self.open {
                    all.push_str(&t);
                }
            }
            Piece::Call(c) => {
                self.close("completed");
                let (n, id, arguments) = (self.output.len(), self.id("fc"), c.arguments.to_string());
                let begun = self.form.call(n, &c, "");
                self.add(begun);
                self.say(
                    "response.function_call_arguments.delta",
                    json!({"item_id": id, "output_index": n, "delta": arguments}),
                );
                self.say(
                    "response.function_call_arguments.done",
                    json!({"item_id": id, "output_index": n, "arguments": arguments}),
                );
                let item = self.form.call(n, &c, &arguments);
                self.finish(item);
            }
        }
    }

    fn open_message(&mut self) {
        let n = self.output.len();
        let item = self.form.message(n, "", "in_progress");
        self.add(item);
        let id = self.id("msg");
        self.say(
            "response.content_part.added",
            json!({"item_id": id, "output_index": n, "content_index": 0, "part": part("")}),
        );
        self.open = Some(Open::Message(String::new()));
    }
}

impl stream::Dialect for Items {
    fn begin(&mut self, _: &[Answer], out: &mut Out) {
        let begun = self.form.response("in_progress", &[], None);
        self.say("response.created", json!({"response": begun}));
        self.say("response.in_progress", json!({"response": begun}));
        out.append(&mut self.said);
    }

    fn said(&mut self, _: usize, said: Said, out: &mut Out) {
        said.pieces.into_iter().for_each(|p| self.piece(p));
        out.append(&mut self.said);
    }

    fn done(&mut self, _: usize, end: End, out: &mut Out) {
        if self.output.is_empty() && self.open.is_none() {
            self.open_message();
        }
        self.close(status(&end));
        let whole = self.form.response(status(&end), &self.output, Some(&end));
        self.say(&format!("response.{}", status(&end)), json!({"response": whole}));
        out.append(&mut self.said);
    }

    fn failed(&mut self, f: &Failure, out: &mut Out) {
        let mut whole = self.form.response("failed", &self.output, None);
        let e = error::openai(f);
        whole["error"] = json!({"code": e["error"]["type"], "message": e["error"]["message"]});
        self.say("response.failed", json!({"response": whole}));
        out.append(&mut self.said);
    }
}

fn read(model: &Resolved, f: &mut Fields, said: &mut Map<String, Value>) -> Result<Ask, Failure> {
    for name in [
        "instructions",
        "max_output_tokens",
        "temperature",
        "top_p",
        "metadata",
        "user",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning",
    ] {
        let absent = match name {
            "tools" => json!([]),
            "tool_choice" => json!("auto"),
            "parallel_tool_calls" => json!(true),
            "metadata" => json!({}),
            _ => Value::Null,
        };
        said.insert(name.into(), f.0.get(name).cloned().unwrap_or(absent));
    }
    let mut all = items(f.take("input"))?;
    if let Some(text) = f.string("instructions")? {
        all.insert(0, json!({"role": "system", "content": text}));
    }
    let all = messages::with_models(model, messages::normalise(all)?);
    let mut ask = Ask::new(Input::Chat(all), Options::openai());
    if let Some(n) = f.take("max_output_tokens") {
        f.0.insert("max_tokens".into(), n);
    }
    for name in ["previous_response_id", "conversation", "prompt"] {
        f.refuse(name, |_| false)?;
    }
    f.refuse("background", |v| *v == json!(false))?;
    f.refuse("truncation", |v| *v == json!("disabled") || *v == json!("auto"))?;
    f.refuse("include", |v| {
        v.as_array().is_some_and(|a| a.iter().all(|i| *i == json!("reasoning.encrypted_content")))
    })?;
    tools(f)?;
    openai::common(f, &mut ask)?;
    openai::tools(f, &mut ask)?;
    ask.think = openai::effort(f)?;
    let (format, shown) = format(f)?;
    ask.format = format;
    said.insert("text".into(), json!({"format": shown}));
    Ok(ask)
}

/// `POST /v1/responses`.
pub async fn create(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let mut said = Map::new();
    let ask = read(&model, &mut f, &mut said)?;
    let streamed = f.boolean("stream")?.unwrap_or(false);
    f.object("stream_options")?;
    f.nothing_else()?;
    let id = format!("resp_{}", app.counter.fetch_add(1, Ordering::Relaxed));
    let form = Form { id, created: jiff::Timestamp::now().as_second(), model: name, said };
    if streamed {
        let items = Items { form, open: None, output: Vec::new(), sequence: 0, said: Out::new() };
        return stream::events(async move { app.ask(&model, ask, 1).await }, items).await;
    }
    let (all, end) = app.ask(&model, ask, 1).await?.remove(0).whole().await?;
    Ok(Json(form.whole(&all, &end)).into_response())
}
