//! llama-server's own routes: `/props`, `/slots`, `/tokenize`, `/detokenize`, `/apply-template`, `/completion`. They name no
//! model, as llama-server has only one: here it is the one that was served by name on the command line, else the one that is
//! loaded, else the field `model` says.

use super::fields::Fields;
use super::stream::{self, Out};
use super::{error, messages, openai};
use crate::serve::answer::{Answer, End, Said, Whole};
use crate::serve::failure::Failure;
use crate::serve::options::Options;
use crate::serve::prompt::{App, Ask, Input};
use crate::serve::request::{Reason, TokenLogprob};
use crate::store::Resolved;
use axum::Json;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use engine::text::EncodeOptions;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

type Parameters = Query<HashMap<String, String>>;

fn model(app: &App, name: Option<&str>) -> Result<Resolved, Failure> {
    if let Some(name) = name {
        return app.resolve(name);
    }
    if let Some(path) = app.config.models.first() {
        return app.resolve(&path.display().to_string());
    }
    match &app.models.list()[..] {
        [one] => Ok(one.resolved.clone()),
        _ => Err(Failure::field("model", "no model, or several, are loaded: name one")),
    }
}

fn plain() -> Ask {
    Ask::new(Input::Tokens(Vec::new()), Options::llama())
}

/// `GET /props`.
pub async fn props(State(app): State<Arc<App>>, Query(q): Parameters) -> Result<Json<Value>, Failure> {
    let m = model(&app, q.get("model").map(String::as_str))?;
    let lease = app.load(&m, &plain()).await?;
    let l = &lease.loaded;
    Ok(Json(json!({
        "default_generation_settings": {"n_ctx": l.ctx, "params": settings(&Options::llama())},
        "total_slots": l.parallel, "model_alias": l.resolved.name, "model_path": l.resolved.source.name(),
        "chat_template": l.template.source(), "modalities": {"vision": false, "audio": false},
        "build_info": format!("rsinfer {}", env!("CARGO_PKG_VERSION")), "kv": l.kv.to_string(),
    })))
}

/// `GET /slots`.
pub async fn slots(State(app): State<Arc<App>>, Query(q): Parameters) -> Result<Json<Value>, Failure> {
    let (mut all, mut free) = (Vec::new(), 0);
    for l in app.models.list() {
        let status = l.worker.status();
        for s in &status.slots {
            free += usize::from(s.job.is_none());
            all.push(
                json!({"id": all.len(), "id_task": s.job.map_or(json!(-1), |j| json!(j)), "n_ctx": l.ctx,
                "is_processing": s.job.is_some(), "model": l.resolved.name, "n_past": s.cached,
                "n_prompt_left": s.prompt_left, "n_evicted": s.evicted,
                "next_token": {"n_decoded": s.made, "has_next_token": s.job.is_some()}}),
            );
        }
    }
    if q.contains_key("fail_on_no_slot") && free == 0 && !all.is_empty() {
        return Err(Failure::Unavailable("no slot available".into()));
    }
    Ok(Json(all.into()))
}

/// `POST /tokenize`.
pub async fn tokenize(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let m = model(&app, f.string("model")?.as_deref())?;
    let text = f.string("content")?.unwrap_or_default();
    let add_special = f.boolean("add_special")?.unwrap_or(false);
    let parse_special = f.boolean("parse_special")?.unwrap_or(true);
    let pieces = f.boolean("with_pieces")?.unwrap_or(false);
    f.nothing_else()?;
    let lease = app.load(&m, &plain()).await?;
    let model = lease.loaded.worker.model();
    let vocab = model.vocab();
    let ids = vocab.encode(&text, EncodeOptions { add_special, parse_special });
    if !pieces {
        return Ok(Json(json!({"tokens": ids})));
    }
    let piece = |id: &u32| {
        let bytes = vocab.bytes(*id).unwrap_or_default();
        // Part of a character has no text: its bytes.
        let piece = std::str::from_utf8(&bytes).map_or_else(|_| json!(bytes), |s| json!(s));
        json!({"id": id, "piece": piece})
    };
    Ok(Json(json!({"tokens": ids.iter().map(piece).collect::<Vec<_>>()})))
}

/// `POST /detokenize`.
pub async fn detokenize(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let m = model(&app, f.string("model")?.as_deref())?;
    let ids = f.tokens("tokens")?;
    f.nothing_else()?;
    let lease = app.load(&m, &plain()).await?;
    Ok(Json(json!({"content": lease.loaded.worker.model().vocab().decode(&ids, true)})))
}

/// `POST /apply-template`.
pub async fn apply_template(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let m = model(&app, f.string("model")?.as_deref())?;
    let said = messages::normalise(f.array("messages")?.unwrap_or_default())?;
    let mut ask = Ask::new(Input::Chat(said), Options::llama());
    ask.tools = f.tools("tools")?;
    ask.kwargs = f.object("chat_template_kwargs")?.unwrap_or_default();
    f.refuse("add_generation_prompt", |v| *v == json!(true))?;
    f.nothing_else()?;
    Ok(Json(json!({"prompt": app.prompt(&m, ask).await?.1})))
}

/// A prompt: text, ids, both mixed, or a list of one.
async fn input(app: &App, m: &Resolved, v: Option<Value>) -> Result<Input, Failure> {
    let wrong =
        || Failure::field("prompt", "it must be a string, token ids, or both mixed (one prompt a request)");
    match v {
        Some(Value::String(text)) => Ok(Input::Text { text, special: true }),
        Some(Value::Array(a)) if a.len() == 1 && (a[0].is_string() || a[0].is_array()) => {
            Box::pin(input(app, m, a.into_iter().next())).await
        }
        Some(Value::Array(a)) if !a.is_empty() => {
            let lease = app.load(m, &plain()).await?;
            let model = lease.loaded.worker.model();
            let mut ids = Vec::new();
            for (i, v) in a.iter().enumerate() {
                match (v.as_str(), v.as_u64().and_then(|n| u32::try_from(n).ok())) {
                    (Some(text), _) => {
                        let options = EncodeOptions { add_special: i == 0, parse_special: true };
                        ids.extend(model.vocab().encode(text, options));
                    }
                    (_, Some(id)) => ids.push(id),
                    _ => return Err(wrong()),
                }
            }
            Ok(Input::Tokens(ids))
        }
        _ => Err(wrong()),
    }
}

/// What is only llama-server's, brought to the names that all routes know.
fn own(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    if let Some(Value::Array(pairs)) = f.take("logit_bias") {
        for p in &pairs {
            let wrong = || {
                Failure::field(
                    "logit_bias",
                    "it must be an array of pairs of a token id and a number or false",
                )
            };
            let id = p[0].as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong)?;
            let bias = if p[1] == json!(false) {
                f32::NEG_INFINITY
            } else {
                p[1].as_f64().ok_or_else(wrong)? as f32
            };
            ask.logit_bias.push((id, bias));
        }
    }
    ask.format = openai::grammar(f)?;
    ask.logprobs = f.within("n_probs", 0..=20)?.filter(|n| *n > 0);
    // Defaults of llama-server that say what is done here anyway.
    f.refuse("id_slot", |v| *v == json!(-1))?;
    f.refuse("t_max_predict_ms", |v| v.as_f64().is_some_and(|n| n <= 0.0))?;
    for off in ["mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range", "n_indent", "min_keep"] {
        f.refuse(off, |v| v.as_f64() == Some(0.0))?;
    }
    Ok(())
}

/// How an answer is written.
struct Form {
    model: String,
    /// Ids as well as text.
    tokens: bool,
    stream: bool,
}

impl Form {
    /// What an answer's end says, with all of the answer that was not said before.
    fn end(&self, said: &Whole, prompt: usize, options: &Options, end: &End) -> Value {
        let f = &end.finish;
        let (kind, word) = match &f.reason {
            Reason::Stop => ("eos", ""),
            Reason::StopString(s) => ("word", s.as_str()),
            Reason::Length => ("limit", ""),
        };
        let mut settings = settings(options);
        settings["stream"] = self.stream.into();
        let mut v = json!({"index": 0, "content": said.text, "stop": true, "model": self.model, "stop_type": kind,
            "stopping_word": word, "tokens_predicted": f.new_tokens, "tokens_evaluated": prompt,
            "tokens_cached": f.cached_tokens, "truncated": f.evicted > 0, "tokens_evicted": f.evicted,
            "timings": openai::timings(end), "generation_settings": settings,
            "has_new_line": said.text.contains('\n')});
        v["tokens"] = if self.tokens { json!(said.tokens) } else { json!([]) };
        if !said.logprobs.is_empty() {
            v["completion_probabilities"] = said.logprobs.iter().map(probability).collect();
        }
        v
    }
}

/// What a request asks of generation, by llama-server's names.
fn settings(o: &Options) -> Value {
    let s = &o.sampler;
    json!({"n_predict": o.num_predict, "max_tokens": o.num_predict, "n_keep": o.num_keep.unwrap_or(0),
        "seed": s.seed.map_or(json!(-1), |n| json!(n)), "temperature": s.temperature, "top_k": s.top_k,
        "top_p": s.top_p, "min_p": s.min_p, "typical_p": s.typical_p, "repeat_last_n": s.repeat_last_n as i64,
        "repeat_penalty": s.repeat_penalty, "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty, "stop": o.stop, "ignore_eos": o.ignore_eos,
        "logit_bias": s.logit_bias.iter().map(|(token, bias)| json!({"token": token, "bias": bias})).collect::<Vec<_>>()})
}

fn probability(p: &TokenLogprob) -> Value {
    let one = |id: u32, bytes: &[u8], logprob: f32| json!({"id": id, "token": String::from_utf8_lossy(bytes), "bytes": bytes, "logprob": logprob});
    let mut v = one(p.id, &p.bytes, p.logprob);
    v["top_logprobs"] = p.top.iter().map(|(id, b, l)| one(*id, b, *l)).collect();
    v
}

/// The chunks of an answer.
struct Chunks {
    form: Form,
    /// The prompt's length, and what was asked for.
    prompt: usize,
    options: Arc<Options>,
}

impl stream::Dialect for Chunks {
    fn begin(&mut self, answers: &[Answer], _: &mut Out) {
        for a in answers {
            (self.prompt, self.options) = (a.prompt.len(), a.options.clone());
        }
    }

    fn said(&mut self, _: usize, said: Said, out: &mut Out) {
        let mut all = Whole::default();
        all.take(said);
        if !self.form.tokens {
            all.tokens.clear();
        }
        if all.text.is_empty() && all.tokens.is_empty() && all.logprobs.is_empty() {
            return;
        }
        let mut v = json!({"index": 0, "content": all.text, "tokens": all.tokens, "stop": false});
        if !all.logprobs.is_empty() {
            v["completion_probabilities"] = all.logprobs.iter().map(probability).collect();
        }
        out.push_back(stream::data(&v));
    }

    fn done(&mut self, _: usize, end: End, out: &mut Out) {
        let end = self.form.end(&Whole::default(), self.prompt, &self.options, &end);
        out.push_back(stream::data(&end));
    }

    fn failed(&mut self, f: &Failure, out: &mut Out) {
        out.push_back(stream::data(&error::llama(f)));
    }
}

/// `POST /completion`.
pub async fn completion(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let m = model(&app, f.string("model")?.as_deref())?;
    let prompt = f.take("prompt");
    let mut ask = Ask::new(input(&app, &m, prompt).await?, Options::llama());
    own(&mut f, &mut ask)?;
    openai::common(&mut f, &mut ask)?;
    let tokens = f.boolean("return_tokens")?.unwrap_or(false);
    let stream = f.boolean("stream")?.unwrap_or(false);
    f.nothing_else()?;
    let form = Form { model: m.name.clone(), tokens, stream };
    if stream {
        let chunks = Chunks { form, prompt: 0, options: Arc::new(Options::llama()) };
        return stream::events(async move { app.ask(&m, ask, 1).await }, chunks).await;
    }
    let mut answer = app.ask(&m, ask, 1).await?.remove(0);
    let (all, end) = answer.whole().await?;
    Ok(Json(form.end(&all, answer.prompt.len(), &answer.options, &end)).into_response())
}
