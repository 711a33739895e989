//! Options of a request or a Modelfile, by Ollama's names (and llama.cpp's, where Ollama has none). Knows nothing of routes.

use super::failure::Failure;
use crate::model::MemoryConfig;
use engine::plan::Access;
use engine::{KvSpec, SamplerOptions};
use serde_json::{Map, Value};

/// Stop strings a request may have, and bytes of each.
const MOST_STOPS: usize = 256;
const LONGEST_STOP: usize = 4096;

/// What a request asks of sampling and of loading.
#[derive(Clone, Debug)]
pub struct Options {
    pub sampler: SamplerOptions,
    /// Negative: as long as the model likes.
    pub num_predict: i64,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub load: LoadWish,
}

/// What a request asks of loading; only `ctx` and `kv` can make a loaded model be loaded anew.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadWish {
    pub ctx: Option<usize>,
    pub kv: Option<KvSpec>,
    pub batch: Option<usize>,
    pub mmap: Option<bool>,
    pub mlock: Option<bool>,
    pub threads: Option<usize>,
}

impl LoadWish {
    /// How weights get into memory, where the server was told `m`.
    pub fn memory(&self, m: MemoryConfig) -> MemoryConfig {
        let access = match (self.mmap, self.mlock) {
            (Some(false), _) => Access::Read,
            (_, Some(true)) => Access::Locked,
            (Some(true), _) | (_, Some(false)) => Access::Mapped,
            _ => m.access,
        };
        MemoryConfig { access, ..m }
    }
}

impl Options {
    /// Ollama's defaults.
    pub fn ollama() -> Self {
        let sampler = SamplerOptions { top_p: 0.9, min_p: 0.0, ..SamplerOptions::default() };
        Self { sampler, num_predict: -1, stop: Vec::new(), ignore_eos: false, load: LoadWish::default() }
    }

    /// The same with OpenAI's temperature and nucleus.
    pub fn openai() -> Self {
        let o = Self::ollama();
        Self { sampler: SamplerOptions { temperature: 1.0, top_p: 1.0, ..o.sampler }, ..o }
    }

    /// llama-server's defaults.
    #[allow(dead_code, reason = "for llama-server's routes")]
    pub fn llama() -> Self {
        Self { sampler: SamplerOptions::default(), ..Self::ollama() }
    }

    /// Takes over what `map` says. Names that are not known are left out, and told.
    ///
    /// # Errors
    /// A value of the wrong type or out of range, by its name.
    pub fn apply(&mut self, map: &Map<String, Value>) -> Result<(), Failure> {
        for (name, value) in map.iter().filter(|(_, v)| !v.is_null()) {
            if !self.set(name, value)? {
                tracing::warn!(option = name, "unknown option, left out");
            }
        }
        self.sampler.check().map_err(|e| Failure::invalid(e.to_string()))
    }

    /// Sets one option; false: there is none of this name.
    ///
    /// # Errors
    /// As [`Options::apply`].
    pub fn set(&mut self, name: &str, value: &Value) -> Result<bool, Failure> {
        let s = &mut self.sampler;
        match name {
            "temperature" => s.temperature = float(name, value)?,
            "top_k" => s.top_k = int(name, value)?.try_into().unwrap_or(0),
            "top_p" => s.top_p = float(name, value)?,
            "min_p" => s.min_p = float(name, value)?,
            "typical_p" => s.typical_p = float(name, value)?,
            "repeat_last_n" => s.repeat_last_n = int(name, value)?.try_into().unwrap_or(usize::MAX),
            "repeat_penalty" => s.repeat_penalty = float(name, value)?,
            "presence_penalty" => s.presence_penalty = float(name, value)?,
            "frequency_penalty" => s.frequency_penalty = float(name, value)?,
            "seed" => s.seed = int(name, value)?.try_into().ok(),
            "num_predict" => self.num_predict = int(name, value)?,
            "stop" => self.stop = stops(name, value)?,
            "ignore_eos" => self.ignore_eos = boolean(name, value)?,
            "num_ctx" => self.load.ctx = Some(size(name, value)?),
            "num_batch" => self.load.batch = Some(size(name, value)?),
            "num_thread" => self.load.threads = Some(size(name, value)?).filter(|n| *n > 0),
            "use_mlock" => self.load.mlock = Some(boolean(name, value)?),
            "use_mmap" => self.load.mmap = Some(boolean(name, value)?),
            "kv" => {
                let text = value.as_str().ok_or_else(|| wrong(name, "string"))?;
                let spec = text.parse::<KvSpec>();
                self.load.kv = Some(spec.map_err(|e| Failure::field(name, e.message()))?);
            }
            // Taken note of where a GPU is; the first tokens that Ollama would keep are part of the KV policy here.
            "num_gpu" | "main_gpu" | "num_keep" | "draft_num_predict" => {
                int(name, value)?;
            }
            "penalize_newline" | "low_vram" | "f16_kv" | "logits_all" | "vocab_only" | "numa"
            | "mirostat" | "mirostat_tau" | "mirostat_eta" => {
                tracing::warn!(option = name, "this option is no longer of any effect");
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn wrong(name: &str, kind: &str) -> Failure {
    Failure::Invalid {
        message: format!("option \"{name}\" must be of type {kind}"),
        param: Some(name.into()),
    }
}

/// A finite number.
pub fn float(name: &str, v: &Value) -> Result<f32, Failure> {
    let n = v.as_f64().ok_or_else(|| wrong(name, "float32"))? as f32;
    if n.is_finite() { Ok(n) } else { Err(wrong(name, "float32")) }
}

/// A whole number, also if written as 1.0.
pub fn int(name: &str, v: &Value) -> Result<i64, Failure> {
    let whole = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
    let big = v.as_u64().map(|_| i64::MAX);
    v.as_i64().or_else(|| v.as_f64().and_then(whole)).or(big).ok_or_else(|| wrong(name, "integer"))
}

/// A whole number of 0 or more.
pub fn size(name: &str, v: &Value) -> Result<usize, Failure> {
    let n = int(name, v)?;
    n.try_into().map_err(|_| Failure::field(name, format!("{n} is not possible, it must be 0 or more")))
}

/// true or false.
pub fn boolean(name: &str, v: &Value) -> Result<bool, Failure> {
    v.as_bool().ok_or_else(|| wrong(name, "boolean"))
}

/// A string or a list of strings.
pub fn stops(name: &str, v: &Value) -> Result<Vec<String>, Failure> {
    let list = match v {
        Value::String(s) => vec![s.clone()],
        Value::Array(a) => {
            let all: Option<Vec<String>> = a.iter().map(|s| s.as_str().map(Into::into)).collect();
            all.ok_or_else(|| wrong(name, "array of strings"))?
        }
        _ => return Err(wrong(name, "string or array of strings")),
    };
    if list.len() > MOST_STOPS || list.iter().any(|s| s.len() > LONGEST_STOP) {
        let why = format!("at most {MOST_STOPS} stop strings of {LONGEST_STOP} bytes are possible");
        return Err(Failure::field(name, why));
    }
    Ok(list.into_iter().filter(|s| !s.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn apply(v: Value) -> Result<Options, Failure> {
        let mut o = Options::ollama();
        o.apply(v.as_object().unwrap())?;
        Ok(o)
    }

    #[test]
    fn names_types_and_ranges() {
        let o = apply(
            json!({"temperature": 0, "top_k": 5.0, "stop": "x", "num_ctx": 77, "seed": -1, "nonsense": 1,
            "repeat_last_n": -1, "kv": "sinks:4+window:60", "mirostat": 2, "num_predict": null}),
        );
        let o = o.unwrap();
        assert_eq!((o.sampler.temperature, o.sampler.top_k, o.sampler.seed), (0.0, 5, None));
        assert_eq!(
            (o.stop, o.load.ctx, o.sampler.repeat_last_n),
            (vec!["x".to_owned()], Some(77), usize::MAX)
        );
        for bad in [
            json!({"temperature": "hot"}),
            json!({"temperature": -1}),
            json!({"temperature": 1e300}),
            json!({"top_p": 2}),
            json!({"num_ctx": -5}),
            json!({"num_ctx": 1.5}),
            json!({"num_ctx": "big"}),
            json!({"stop": [1]}),
            json!({"stop": vec!["x"; 10_000]}),
            json!({"use_mmap": 1}),
            json!({"kv": "nonsense:3"}),
        ] {
            let e = apply(bad.clone()).expect_err(&bad.to_string());
            assert_eq!(e.status(), 400, "{bad}");
            assert!(!e.to_string().contains('\n'), "{e}");
        }
    }
}
