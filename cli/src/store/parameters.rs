//! Parameters of models and options of requests: Ollama's names and ours, their kinds, and what they set. One table for
//! Modelfiles, stored models and HTTP.

use anyhow::{Result, anyhow, bail};
use engine::{DType, KvSpec, SamplerOptions};
use serde_json::{Map, Number, Value};

/// What values a parameter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Int,
    /// A whole number of 0 or more.
    Size,
    Float,
    Bool,
    Text,
    /// One text or several.
    Texts,
    /// Known to Ollama, of no effect (there, too).
    Unused,
}

use Kind::{Bool, Float, Int, Size, Text, Texts, Unused};

/// Every parameter.
pub const PARAMETERS: &[(&str, Kind)] = &[
    ("num_ctx", Size),
    ("num_batch", Size),
    ("num_gpu", Int),
    ("main_gpu", Int),
    ("num_thread", Size),
    ("use_mmap", Bool),
    ("use_mlock", Bool),
    ("draft_num_predict", Int),
    ("num_keep", Int),
    ("num_predict", Int),
    ("seed", Int),
    ("temperature", Float),
    ("top_k", Int),
    ("top_p", Float),
    ("min_p", Float),
    ("typical_p", Float),
    ("repeat_last_n", Int),
    ("repeat_penalty", Float),
    ("presence_penalty", Float),
    ("frequency_penalty", Float),
    ("stop", Texts),
    ("ignore_eos", Bool),
    ("kv", Text),
    ("cache_type_k", Text),
    ("cache_type_v", Text),
    ("cache_type_k_pe", Text),
    ("penalize_newline", Unused),
    ("low_vram", Unused),
    ("f16_kv", Unused),
    ("logits_all", Unused),
    ("vocab_only", Unused),
    ("mirostat", Unused),
    ("mirostat_tau", Unused),
    ("mirostat_eta", Unused),
    ("numa", Unused),
    ("tfs_z", Unused),
];

/// The kind of the parameter of this name.
pub fn kind(name: &str) -> Option<Kind> {
    PARAMETERS.iter().find(|(n, _)| *n == name).map(|(_, k)| *k)
}

/// Stop strings there may be, and bytes of each.
const MOST_STOPS: usize = 256;
const LONGEST_STOP: usize = 4096;

/// A whole number, also if written as 1.0: JSON of other languages does.
pub fn whole(v: &Value) -> Option<i64> {
    let exact = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
    let big = v.as_u64().map(|_| i64::MAX);
    v.as_i64().or_else(|| v.as_f64().and_then(exact)).or(big)
}

/// The value of a parameter in its one form; `None`: it changes nothing.
///
/// # Errors
/// Why it cannot be.
pub fn check(name: &str, value: &Value) -> Result<Option<Value>, String> {
    let text = value.as_str().unwrap_or_default();
    let value = match (kind(name), value) {
        (None, _) => return Err("there is no parameter of this name".into()),
        (Some(Unused), _) | (_, Value::Null) => return Ok(None),
        (Some(Int), v) => whole(v).ok_or("it must be a whole number")?.into(),
        (Some(Size), v) => {
            whole(v).filter(|n| *n >= 0).ok_or("it must be a whole number of 0 or more")?.into()
        }
        // Samplers compute with f32.
        (Some(Float), v) if v.as_f64().is_some_and(|f| (f as f32).is_finite()) => v.clone(),
        (Some(Bool), Value::Bool(_)) | (Some(Text), Value::String(_)) => value.clone(),
        (Some(Texts), Value::String(s)) => vec![s.clone()].into(),
        (Some(Texts), Value::Array(a)) if a.iter().all(Value::is_string) => value.clone(),
        (Some(Float), _) => return Err("it must be a number".into()),
        (Some(Bool), _) => return Err("it must be true or false".into()),
        (Some(Text), _) => return Err("it must be a string".into()),
        (Some(Texts), _) => return Err("it must be a string or an array of strings".into()),
    };
    match (name, &value) {
        ("kv", _) => drop(text.parse::<KvSpec>().map_err(|e| e.to_string())?),
        ("cache_type_k" | "cache_type_v" | "cache_type_k_pe", _) if DType::from_name(text).is_none() => {
            return Err("it must be a tensor type (f32, f16, bf16, q8_0 ...)".into());
        }
        (_, Value::Array(a)) => {
            let long = |v: &Value| v.as_str().is_some_and(|s| s.len() > LONGEST_STOP);
            if a.len() > MOST_STOPS || a.iter().any(long) {
                return Err(format!("at most {MOST_STOPS} strings of {LONGEST_STOP} bytes are possible"));
            }
        }
        _ => {}
    }
    Ok(Some(value))
}

/// Parameters that are set, by name, each of its kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters(Map<String, Value>);

impl std::ops::Deref for Parameters {
    type Target = Map<String, Value>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<'a> IntoIterator for &'a Parameters {
    type Item = (&'a String, &'a Value);
    type IntoIter = serde_json::map::Iter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl Parameters {
    /// Sets a parameter from text, as in a Modelfile; several `stop`s add up.
    ///
    /// # Errors
    /// An unknown name, or a value of the wrong kind.
    pub fn set_text(&mut self, name: &str, text: &str) -> Result<()> {
        let name = name.to_ascii_lowercase();
        let wrong = |what: &str| anyhow!("parameter {name} takes {what}, not {text:?}");
        let value = match kind(&name) {
            None => bail!("unknown parameter {name:?}"),
            Some(Unused) => return Ok(()),
            Some(Int | Size) => Value::from(text.parse::<i64>().map_err(|_| wrong("a whole number"))?),
            Some(Float) => {
                let n: f64 = text.parse().map_err(|_| wrong("a number"))?;
                Value::Number(Number::from_f64(n).ok_or_else(|| wrong("a finite number"))?)
            }
            Some(Bool) => Value::from(text.parse::<bool>().map_err(|_| wrong("true or false"))?),
            Some(Text) => text.into(),
            Some(Texts) => {
                let mut all = self.stop();
                all.push(text.to_owned());
                all.into()
            }
        };
        self.set(&name, &value)
    }

    /// Sets a parameter from JSON, as in a request's `options`. Null leaves it as it is.
    ///
    /// # Errors
    /// An unknown name, or a value of the wrong kind.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        if let Some(value) = check(name, value).map_err(|why| anyhow!("{name}: {why}"))? {
            self.0.insert(name.into(), value);
        }
        Ok(())
    }

    /// Those of `other` over these.
    pub fn extend(&mut self, other: &Self) {
        self.0.extend(other.0.iter().map(|(k, v)| (k.clone(), v.clone())));
    }

    /// All that are set, as JSON.
    pub fn as_json(&self) -> &Map<String, Value> {
        &self.0
    }

    /// From JSON that somebody else wrote; what is unknown or of the wrong kind is left out.
    pub fn from_json_lenient(map: &Map<String, Value>) -> Self {
        let mut out = Self::default();
        for (name, value) in map {
            let _ = out.set(name, value);
        }
        out
    }

    /// From JSON that must be right.
    ///
    /// # Errors
    /// As [`Parameters::set`].
    pub fn from_json(map: &Map<String, Value>) -> Result<Self> {
        let mut out = Self::default();
        map.iter().try_for_each(|(name, value)| out.set(name, value))?;
        Ok(out)
    }

    /// Every parameter with its value as text, in lines of their own, as Ollama shows them.
    pub fn lines(&self) -> Vec<(&str, String)> {
        let each = |(name, value): (&str, &Value)| match value {
            Value::Array(a) => a.iter().map(|v| v.to_string()).collect(),
            Value::String(s) if name != "stop" => vec![s.clone()],
            v => vec![v.to_string()],
        };
        let all = self.0.iter().flat_map(|(k, v)| each((k, v)).into_iter().map(move |v| (k.as_str(), v)));
        all.collect()
    }

    /// A whole number, if it is set.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.0.get(name)?.as_i64()
    }

    /// The same of 0 or more.
    pub fn size(&self, name: &str) -> Option<usize> {
        self.int(name)?.try_into().ok()
    }

    /// A number, if it is set.
    pub fn float(&self, name: &str) -> Option<f32> {
        self.0.get(name)?.as_f64().map(|f| f as f32)
    }

    /// A truth value, if it is set.
    pub fn boolean(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool()
    }

    /// The stop strings.
    pub fn stop(&self) -> Vec<String> {
        let list = self.0.get("stop").and_then(Value::as_array).into_iter().flatten();
        list.filter_map(|s| s.as_str().map(Into::into)).collect()
    }

    /// The cache's policy, if it is set.
    pub fn kv(&self) -> Option<KvSpec> {
        self.0.get("kv")?.as_str()?.parse().ok()
    }

    /// An element type of the cache (`cache_type_k`, ...), if it is set.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        DType::from_name(self.0.get(name)?.as_str()?)
    }

    /// A sampler's options where these parameters are silent `base`'s. Negative numbers mean what they mean to Ollama: no
    /// limit, or a random seed.
    pub fn sampler(&self, base: SamplerOptions) -> SamplerOptions {
        let unlimited = |n: i64| usize::try_from(n).unwrap_or(usize::MAX);
        SamplerOptions {
            temperature: self.float("temperature").unwrap_or(base.temperature),
            top_k: self.int("top_k").map_or(base.top_k, |k| k.try_into().unwrap_or(0)),
            top_p: self.float("top_p").unwrap_or(base.top_p),
            min_p: self.float("min_p").unwrap_or(base.min_p),
            typical_p: self.float("typical_p").unwrap_or(base.typical_p),
            repeat_last_n: self.int("repeat_last_n").map_or(base.repeat_last_n, unlimited),
            repeat_penalty: self.float("repeat_penalty").unwrap_or(base.repeat_penalty),
            presence_penalty: self.float("presence_penalty").unwrap_or(base.presence_penalty),
            frequency_penalty: self.float("frequency_penalty").unwrap_or(base.frequency_penalty),
            logit_bias: base.logit_bias,
            seed: self.int("seed").map_or(base.seed, |s| s.try_into().ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn text_and_json_mean_the_same() {
        let mut text = Parameters::default();
        for (name, value) in [
            ("temperature", "0.5"),
            ("TOP_K", "7"),
            ("use_mmap", "false"),
            ("stop", "a"),
            ("stop", "b"),
            ("kv", "sinks:4+window:64"),
            ("mirostat", "1"),
        ] {
            text.set_text(name, value).unwrap();
        }
        let json = json!({"temperature": 0.5, "top_k": 7.0, "use_mmap": false, "stop": ["a", "b"], "kv": "sinks:4+window:64", "low_vram": true});
        assert_eq!(Parameters::from_json(json.as_object().unwrap()).unwrap(), text);
        assert_eq!(text.stop(), ["a", "b"]);
        let s = text.sampler(SamplerOptions::default());
        assert_eq!((s.temperature, s.top_k, s.top_p), (0.5, 7, 0.95));
    }

    #[test]
    fn wrong_values_are_errors() {
        for (name, value, words) in [
            ("top_k", json!("7"), "whole number"),
            ("top_k", json!(1.5), "whole number"),
            ("temperature", json!([1]), "number"),
            ("use_mmap", json!(1), "true or false"),
            ("num_ctx", json!(-1), "0 or more"),
            ("stop", json!(vec!["x"; 10_000]), "at most"),
            ("stop", json!([1]), "strings"),
            ("kv", json!("nonsense:1"), "kv"),
            ("cache_type_k", json!("f17"), "tensor type"),
            ("nonsense", json!(1), "nonsense"),
        ] {
            let e = Parameters::default().set(name, &value).unwrap_err().to_string();
            assert!(e.contains(words), "{name}: {e}");
        }
        for (name, value) in [("top_k", "x"), ("temperature", "inf"), ("use_mmap", "yes"), ("nonsense", "1")]
        {
            assert!(Parameters::default().set_text(name, value).is_err(), "{name}");
        }
    }
}
