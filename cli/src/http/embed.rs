//! Embeddings: Ollama's `/api/embed` and `/api/embeddings`, OpenAI's `/v1/embeddings`.

use super::fields::Fields;
use super::ollama::keep_alive;
use crate::serve::embed::Text;
use crate::serve::failure::Failure;
use crate::serve::options::Options;
use crate::serve::prompt::{App, Ask, Input};
use axum::Json;
use axum::extract::State;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

fn ask(f: &mut Fields) -> Result<Ask, Failure> {
    let mut ask = Ask::new(Input::Tokens(Vec::new()), Options::ollama());
    ask.keep_alive = keep_alive(f)?;
    ask.options = f.object("options")?.unwrap_or_default();
    ask.truncate = f.boolean("truncate")?.unwrap_or(true);
    Ok(ask)
}

/// A text or several; with `tokens` also ids.
fn texts(v: Option<Value>, tokens: bool) -> Result<Vec<Text>, Failure> {
    let wrong = || {
        let or = if tokens { ", or token ids" } else { "" };
        Failure::field("input", format!("it must be a string or an array of strings{or}"))
    };
    let ids = |v: &Value| -> Option<Text> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        Some(Text::Tokens(v.as_array()?.iter().map(id).collect::<Option<_>>()?)).filter(|_| tokens)
    };
    match v {
        None => Ok(Vec::new()),
        Some(Value::String(s)) => Ok(vec![Text::Text(s)]),
        Some(Value::Array(a)) if a.is_empty() => Ok(Vec::new()),
        Some(v @ Value::Array(_)) => {
            if let Some(one) = ids(&v) {
                return Ok(vec![one]);
            }
            let each = |v: &Value| v.as_str().map(|s| Text::Text(s.into())).or_else(|| ids(v));
            let all: Option<Vec<Text>> = v.as_array().into_iter().flatten().map(each).collect();
            all.ok_or_else(wrong)
        }
        Some(_) => Err(wrong()),
    }
}

/// `POST /api/embed`.
pub async fn embed(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let start = Instant::now();
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let input = texts(f.take("input"), false)?;
    let ask = ask(&mut f)?;
    let dimensions = f.within("dimensions", 0..=usize::MAX)?.filter(|n| *n > 0);
    let e = app.embed(&model, &ask, input, dimensions).await?;
    Ok(Json(json!({"model": name, "embeddings": e.vectors,
        "total_duration": start.elapsed().as_nanos() as u64,
        "load_duration": (e.lease.load_time.as_nanos() as u64).max(1), "prompt_eval_count": e.tokens})))
}

/// `POST /api/embeddings`.
pub async fn embeddings(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let prompt = f.string("prompt")?.unwrap_or_default();
    let ask = ask(&mut f)?;
    let input = if prompt.is_empty() { Vec::new() } else { vec![Text::Text(prompt)] };
    let mut e = app.embed(&model, &ask, input, None).await?;
    Ok(Json(json!({"embedding": e.vectors.pop().unwrap_or_default()})))
}

/// `POST /v1/embeddings`.
pub async fn openai(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let input = texts(f.take("input"), true)?;
    if input.is_empty() {
        return Err(Failure::field("input", "it is missing or empty"));
    }
    let ask = ask(&mut f)?;
    let dimensions = f.within("dimensions", 1..=usize::MAX)?;
    let base64 = match f.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(Failure::field("encoding_format", "it must be float or base64")),
    };
    f.string("user")?;
    f.nothing_else()?;
    let e = app.embed(&model, &ask, input, dimensions).await?;
    let form = |v: &Vec<f32>| match base64 {
        true => json!(BASE64_STANDARD.encode(v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())),
        false => json!(v),
    };
    let data = e.vectors.iter().enumerate();
    let data = data.map(|(i, v)| json!({"object": "embedding", "index": i, "embedding": form(v)}));
    Ok(Json(json!({"object": "list", "data": data.collect::<Vec<_>>(), "model": name,
        "usage": {"prompt_tokens": e.tokens, "total_tokens": e.tokens}})))
}
