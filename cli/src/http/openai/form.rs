//! How OpenAI's chat and text completions are written: whole, and as chunks.

use crate::http::error;
use crate::http::stream::{self, Out};
use crate::serve::answer::{Answer, End, Said, Whole};
use crate::serve::failure::Failure;
use crate::serve::prompt::App;
use crate::serve::request::{Reason, TokenLogprob};
use crate::serve::tools::{Piece, ToolCall};
use serde_json::{Map, Value, json};
use std::sync::atomic::Ordering;

/// What is the same in all objects of an answer.
pub struct Form {
    id: String,
    created: i64,
    model: String,
    chat: bool,
    /// Streams end with what they cost.
    pub usage: bool,
    /// Prompts are repeated; their texts, unless they came as tokens.
    pub echo: Option<Vec<Option<String>>>,
    /// Answers to each prompt.
    pub n: usize,
}

impl Form {
    pub fn new(app: &App, model: String, chat: bool) -> Self {
        let n = app.counter.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{n}", if chat { "chatcmpl" } else { "cmpl" });
        Self { id, created: jiff::Timestamp::now().as_second(), model, chat, usage: false, echo: None, n: 1 }
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

    /// What comes before the answer of number `i`.
    fn before(&self, i: usize, answer: &Answer) -> Option<String> {
        let text = self.echo.as_ref()?.get(i / self.n)?;
        let decoded = || answer.lease.loaded.worker.model().vocab().decode(&answer.prompt, true);
        Some(text.clone().unwrap_or_else(decoded))
    }

    /// `offset`: characters of tokens before these.
    fn logprobs(&self, probs: &[TokenLogprob], offset: &mut usize) -> Value {
        if probs.is_empty() {
            return Value::Null;
        }
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        if !self.chat {
            let mut place = |p: &TokenLogprob| {
                let before = *offset;
                *offset += text(&p.bytes).chars().count();
                before
            };
            let offsets: Vec<usize> = probs.iter().map(&mut place).collect();
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

    /// Of all answers; a prompt counts once, however many answers it has.
    fn usage(&self, ends: &[End]) -> Value {
        let sum = |f: fn(&End) -> usize| ends.iter().map(f).sum::<usize>();
        let once = |f: fn(&End) -> usize| ends.iter().step_by(self.n).map(f).sum::<usize>();
        let (prompt, made) = (once(|e| e.finish.prompt_tokens), sum(|e| e.finish.new_tokens));
        let mut v = json!({"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": once(|e| e.finish.cached_tokens)},
            "completion_tokens_details": {"reasoning_tokens": sum(|e| e.finish.thought_tokens)},
            "evicted_tokens": sum(|e| e.finish.evicted)});
        let head = sum(|e| e.finish.head_evicted);
        if head > 0 {
            v["system_evicted_tokens"] = head.into();
        }
        v
    }

    /// All answers at once.
    pub fn whole(&self, answers: &[Answer], all: &[(Whole, End)]) -> Value {
        let each = answers.iter().zip(all).enumerate();
        let choices: Vec<Value> =
            each.map(|(i, (a, (w, end)))| choice(self, i, self.before(i, a), w, end)).collect();
        let ends: Vec<End> = all.iter().map(|a| a.1.clone()).collect();
        let mut o = self.object(false, choices.into());
        o.insert("usage".into(), self.usage(&ends));
        o.extend(ends.first().map(|e| ("timings".into(), timings(e))));
        o.into()
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
        "queued_ms": ms(f.queued), "load_ms": ms(e.load), "reloaded": e.reloaded, "evicted_n": f.evicted,
        "system_evicted_n": f.head_evicted})
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

fn choice(form: &Form, index: usize, before: Option<String>, all: &Whole, end: &End) -> Value {
    let logprobs = form.logprobs(&all.logprobs, &mut 0);
    let mut v = json!({"index": index, "finish_reason": reason(end), "logprobs": logprobs});
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
        v["text"] = (before.unwrap_or_default() + &all.text).into();
    }
    v
}

/// The chunks of answers that come side by side.
pub struct Chunks {
    form: Form,
    /// Of each answer: tool calls, and characters of tokens, so far; its end.
    so_far: Vec<(usize, usize, Option<End>)>,
}

impl Chunks {
    pub fn new(form: Form) -> Self {
        Self { form, so_far: Vec::new() }
    }

    /// A chunk of the answer `i`; `delta` is text where this is no chat.
    fn say(&mut self, i: usize, delta: Value, probs: &[TokenLogprob], finish: Value, out: &mut Out) {
        let logprobs = self.form.logprobs(probs, &mut self.so_far[i].1);
        let mut choice = json!({"index": i, "finish_reason": finish, "logprobs": logprobs});
        choice[if self.form.chat { "delta" } else { "text" }] = delta;
        let mut o = self.form.object(true, json!([choice]));
        if self.form.usage {
            o.insert("usage".into(), Value::Null);
        }
        out.push_back(stream::data(&o.into()));
    }
}

impl stream::Dialect for Chunks {
    fn begin(&mut self, answers: &[Answer], out: &mut Out) {
        self.so_far = answers.iter().map(|_| Default::default()).collect();
        for (i, a) in answers.iter().enumerate() {
            let first = match self.form.chat {
                true => Some(json!({"role": "assistant", "content": ""})),
                false => self.form.before(i, a).map(Into::into),
            };
            if let Some(delta) = first {
                self.say(i, delta, &[], Value::Null, out);
            }
        }
    }

    fn said(&mut self, i: usize, said: Said, out: &mut Out) {
        let mut probs = &said.logprobs[..];
        for p in said.pieces {
            let delta = match p {
                Piece::Text(t) if self.form.chat => json!({"content": t}),
                Piece::Text(t) => json!(t),
                Piece::Thinking(t) => json!({"reasoning": t, "reasoning_content": t}),
                Piece::Call(c) => {
                    self.so_far[i].0 += 1;
                    json!({"tool_calls": [call(Some(self.so_far[i].0 - 1), &c)]})
                }
            };
            self.say(i, delta, std::mem::take(&mut probs), Value::Null, out);
        }
        if !probs.is_empty() {
            let nothing = if self.form.chat { json!({"content": ""}) } else { json!("") };
            self.say(i, nothing, probs, Value::Null, out);
        }
    }

    fn done(&mut self, i: usize, end: End, out: &mut Out) {
        let nothing = if self.form.chat { json!({}) } else { json!("") };
        self.say(i, nothing, &[], reason(&end).into(), out);
        self.so_far[i].2 = Some(end);
    }

    fn over(&mut self, out: &mut Out) {
        if self.form.usage {
            let ends: Vec<End> = self.so_far.drain(..).filter_map(|s| s.2).collect();
            let mut o = self.form.object(true, json!([]));
            o.insert("usage".into(), self.form.usage(&ends));
            o.extend(ends.first().map(|e| ("timings".into(), timings(e))));
            out.push_back(stream::data(&o.into()));
        }
        out.push_back("data: [DONE]\n\n".into());
    }

    fn failed(&mut self, f: &Failure, out: &mut Out) {
        out.push_back(stream::data(&error::openai(f)));
    }
}
