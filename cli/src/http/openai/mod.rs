//! OpenAI's `/v1/chat/completions` and `/v1/completions`. Every field is honoured, or refused by name.

mod fields;
mod form;

pub use fields::{common, effort, grammar, tools};
pub use form::timings;

use super::fields::Fields;
use super::{messages, stream};
use crate::serve::answer::Answer;
use crate::serve::failure::Failure;
use crate::serve::options::Options;
use crate::serve::prompt::{App, Ask, Input};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use form::{Chunks, Form};
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers to one request at most.
const MOST_ANSWERS: usize = 16;
/// Prompts of one request at most.
const MOST_PROMPTS: usize = 64;

/// Gives the answers that `asked` begins.
async fn respond(
    asked: impl Future<Output = Result<Vec<Answer>, Failure>> + Send + 'static,
    form: Form,
    streamed: bool,
) -> Result<Response, Failure> {
    if streamed {
        return stream::events(asked, Chunks::new(form)).await;
    }
    let mut answers = asked.await?;
    let all = join_all(answers.iter_mut().map(Answer::whole)).await;
    let all = all.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(Json(form.whole(&answers, &all)).into_response())
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
    ask.format = fields::response_format(&mut f)?;
    ask.kwargs = f.object("chat_template_kwargs")?.unwrap_or_default();
    let top = f.within("top_logprobs", 0..=20)?;
    ask.logprobs = f.boolean("logprobs")?.unwrap_or(false).then(|| top.unwrap_or(0));
    let n = f.within("n", 1..=MOST_ANSWERS)?.unwrap_or(1);
    f.refuse("modalities", |v| *v == json!(["text"]))?;
    let mut form = Form::new(&app, name, true);
    form.n = n;
    let streamed = streaming(&mut f, &mut form)?;
    f.nothing_else()?;
    respond(async move { app.ask(&model, ask, n).await }, form, streamed).await
}

/// A prompt: its text, or tokens.
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// `prompt`: a string, token ids, or an array of either.
fn prompts(v: Option<Value>) -> Result<Vec<Prompt>, Failure> {
    let wrong = || {
        let why = format!(
            "it must be a string, an array of token ids, or up to {MOST_PROMPTS} of them in an array"
        );
        Failure::field("prompt", why)
    };
    let tokens = |a: &[Value]| -> Option<Prompt> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        a.iter().map(id).collect::<Option<_>>().filter(|ids: &Vec<u32>| !ids.is_empty()).map(Prompt::Tokens)
    };
    let one = |v: Value| match v {
        Value::String(s) => Some(Prompt::Text(s)),
        Value::Array(a) => tokens(&a),
        _ => None,
    };
    let all = match v {
        Some(Value::Array(a)) if !a.first().is_some_and(Value::is_number) => a.into_iter().map(one).collect(),
        Some(v) => one(v).map(|p| vec![p]),
        None => None,
    };
    all.filter(|a: &Vec<_>| (1..=MOST_PROMPTS).contains(&a.len())).ok_or_else(wrong)
}

/// `POST /v1/completions`.
pub async fn completions(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = f.string("model")?.unwrap_or_default();
    let model = app.resolve(&name)?;
    let suffix = f.string("suffix")?.filter(|s| !s.is_empty());
    let prompts = prompts(f.take("prompt"))?;
    let mut base = Ask::new(Input::Tokens(Vec::new()), Options::openai());
    common(&mut f, &mut base)?;
    // OpenAI's default, which is not the model's own end.
    base.options.entry("num_predict").or_insert(json!(16));
    base.logprobs = f.within("logprobs", 0..=20)?;
    base.format = fields::response_format(&mut f)?;
    let n = f.within("n", 1..=MOST_ANSWERS)?.unwrap_or(1);
    f.refuse("best_of", |v| v.as_u64() == Some(n as u64))?;
    let echo = f.boolean("echo")?.unwrap_or(false);
    base.echo = echo && base.logprobs.is_some();
    if base.echo && suffix.is_some() {
        return Err(Failure::field("echo", "log-probabilities of a prompt with a suffix are not supported"));
    }
    let mut form = Form::new(&app, name, false);
    form.n = n;
    let (mut texts, mut asks) = (Vec::new(), Vec::new());
    for p in prompts {
        let (input, text) = match (p, &suffix) {
            (Prompt::Tokens(_), Some(_)) => {
                return Err(Failure::field("suffix", "it needs a prompt that is a string"));
            }
            (Prompt::Tokens(ids), None) => (Input::Tokens(ids), None),
            (Prompt::Text(prefix), Some(s)) => {
                (Input::Fill { prefix: prefix.clone(), suffix: s.clone() }, Some(prefix))
            }
            (Prompt::Text(text), None) => (Input::Text { text: text.clone(), special: false }, Some(text)),
        };
        asks.push(Ask { input, ..base.clone() });
        texts.push(text);
    }
    form.echo = echo.then_some(texts);
    let streamed = streaming(&mut f, &mut form)?;
    f.nothing_else()?;
    let asked = async move {
        let mut all = Vec::with_capacity(asks.len() * n);
        for ask in asks {
            all.extend(app.ask(&model, ask, n).await?);
        }
        Ok(all)
    };
    respond(asked, form, streamed).await
}
