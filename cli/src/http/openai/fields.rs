//! The fields of OpenAI's requests that several routes have. Each is honoured, or refused by name.

use crate::http::fields::Fields;
use crate::http::ollama::keep_alive;
use crate::serve::constrain::Format;
use crate::serve::failure::Failure;
use crate::serve::prompt::{Ask, Thinking};
use crate::serve::tools::Choice;
use crate::store::parameters;
use serde_json::{Value, json};

/// Sampling fields by OpenAI's and llama.cpp's names, and Ollama's.
const SAMPLING: [(&str, &str); 19] = [
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
    ("n_keep", "num_keep"),
    ("num_keep", "num_keep"),
    ("kv", "kv"),
];

/// Fields of both routes, taken into `ask`.
pub fn common(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    ask.keep_alive = keep_alive(f)?;
    ask.options = f.object("options")?.unwrap_or_default();
    for (name, ours) in SAMPLING {
        if let Some(v) = f.take(name) {
            if ours == "num_predict" && name != "n_predict" && parameters::whole(&v).is_some_and(|n| n < 0) {
                return Err(Failure::field(name, "it must be 0 or more"));
            }
            // Checked here, where the client's own name for it is known.
            parameters::check(ours, &v).map_err(|why| Failure::field(name, why))?;
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
    for name in ["user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"] {
        f.string(name)?;
    }
    f.object("metadata")?;
    f.boolean("cache_prompt")?;
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

pub fn response_format(f: &mut Fields) -> Result<Option<Format>, Failure> {
    let grammar = grammar(f)?;
    let Some(v) = f.take("response_format") else { return Ok(grammar) };
    if grammar.is_some() {
        return Err(Failure::field(
            "response_format",
            "it is not possible beside a grammar or a json_schema",
        ));
    }
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

/// llama-server's `json_schema` and `grammar`: GBNF, or Lark where it begins with `%llguidance`, as there.
pub fn grammar(f: &mut Fields) -> Result<Option<Format>, Failure> {
    let schema = f.take("json_schema").map(Format::Schema);
    let read = |g: String| match g.trim_start().starts_with("%llguidance") {
        true => Format::Lark(g),
        false => Format::Gbnf(g),
    };
    let grammar = f.string("grammar")?.filter(|g| !g.is_empty()).map(read);
    if schema.is_some() && grammar.is_some() {
        return Err(Failure::field("grammar", "either a grammar or a json_schema is possible"));
    }
    Ok(schema.or(grammar))
}

/// Takes `tools` and `tool_choice`.
pub fn tools(f: &mut Fields, ask: &mut Ask) -> Result<(), Failure> {
    ask.tools = f.tools("tools")?;
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
