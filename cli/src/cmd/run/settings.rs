//! `/set parameter NAME VALUE`: Ollama's parameter names onto the configuration.

use super::RunConfig;
use anyhow::{Result, bail};
use std::str::FromStr;

/// Name, what it is.
pub const PARAMETERS: &[(&str, &str)] = &[
    ("seed", "same seed, same text (-1: random)"),
    ("num_predict", "most new tokens in an answer (-1: until the model ends)"),
    ("num_ctx", "context size in tokens (what is cached is computed again)"),
    ("temperature", "0 takes the most probable token"),
    ("top_k", "keep the k most probable tokens (0: all)"),
    ("top_p", "keep the most probable tokens that add up to p (1: all)"),
    ("min_p", "keep tokens at least p times as probable as the best (0: all)"),
    ("typical_p", "locally typical sampling (1: off)"),
    ("repeat_last_n", "tokens the penalties look back on (0: none, -1: all)"),
    ("repeat_penalty", "penalty on tokens seen (1: off)"),
    ("presence_penalty", "taken from the logit of tokens seen"),
    ("frequency_penalty", "taken from the logit for every time a token was seen"),
    ("stop", "texts that end the answer, one or more"),
];

fn number<T: FromStr>(name: &str, values: &[&str]) -> Result<T> {
    match values {
        [v] => v.parse().or_else(|_| bail!("{name} takes a number, not {v:?}")),
        _ => bail!("{name} takes one value"),
    }
}

/// Sets a parameter; the engine checks ranges.
pub fn set(c: &mut RunConfig, name: &str, values: &[&str]) -> Result<()> {
    let s = &mut c.sampler;
    match name {
        "seed" => s.seed = number::<i64>(name, values)?.try_into().ok(),
        "num_predict" => c.generate.max_tokens = number::<i64>(name, values)?.try_into().ok(),
        "num_ctx" => c.session.ctx = Some(number(name, values)?),
        "temperature" => s.temperature = number(name, values)?,
        "top_k" => s.top_k = number::<i64>(name, values)?.try_into().unwrap_or(0),
        "top_p" => s.top_p = number(name, values)?,
        "min_p" => s.min_p = number(name, values)?,
        "typical_p" => s.typical_p = number(name, values)?,
        "repeat_last_n" => s.repeat_last_n = number::<i64>(name, values)?.try_into().unwrap_or(usize::MAX),
        "repeat_penalty" => s.repeat_penalty = number(name, values)?,
        "presence_penalty" => s.presence_penalty = number(name, values)?,
        "frequency_penalty" => s.frequency_penalty = number(name, values)?,
        "stop" => c.generate.stop = values.iter().map(|v| v.trim_matches('"').to_owned()).collect(),
        _ => bail!("unknown parameter {name:?}; /set parameter lists them"),
    }
    Ok(())
}

/// All parameters with their values, a line each.
pub fn show(c: &RunConfig, ctx: usize) -> String {
    let s = &c.sampler;
    let signed = |n: Option<usize>| n.map_or("-1".to_owned(), |n| n.to_string());
    let value = |name: &str| match name {
        "seed" => s.seed.map_or("-1".into(), |n| n.to_string()),
        "num_predict" => signed(c.generate.max_tokens),
        "num_ctx" => ctx.to_string(),
        "temperature" => s.temperature.to_string(),
        "top_k" => s.top_k.to_string(),
        "top_p" => s.top_p.to_string(),
        "min_p" => s.min_p.to_string(),
        "typical_p" => s.typical_p.to_string(),
        "repeat_last_n" => signed((s.repeat_last_n != usize::MAX).then_some(s.repeat_last_n)),
        "repeat_penalty" => s.repeat_penalty.to_string(),
        "presence_penalty" => s.presence_penalty.to_string(),
        "frequency_penalty" => s.frequency_penalty.to_string(),
        _ => format!("{:?}", c.generate.stop),
    };
    PARAMETERS.iter().map(|(name, what)| format!("  {name:<18} {:<8} {what}\n", value(name))).collect()
}
