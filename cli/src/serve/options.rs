//! What a request or a model asks of sampling and of loading, from parameters that `store::parameters` has checked. Knows
//! nothing of routes.

use super::failure::Failure;
use crate::model::MemoryConfig;
use crate::store::parameters::{Kind, Parameters, kind};
use engine::device::DeviceChoice;
use engine::plan::Access;
use engine::{DType, KvSpec, SamplerOptions};
use serde_json::{Map, Value};

/// See the module.
#[derive(Clone, Debug)]
pub struct Options {
    pub sampler: SamplerOptions,
    /// Negative: as long as the model likes.
    pub num_predict: i64,
    /// Tokens of the prompt that should stay when the context overflows, beside the system prompt; negative: all.
    pub num_keep: Option<i64>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub load: LoadWish,
}

/// What a request asks of loading; only `ctx`, `kv` and the cache's types can make a loaded model be loaded anew.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadWish {
    pub ctx: Option<usize>,
    pub kv: Option<KvSpec>,
    pub cache_k: Option<DType>,
    pub cache_v: Option<DType>,
    pub cache_k_pe: Option<DType>,
    pub batch: Option<usize>,
    pub mmap: Option<bool>,
    pub mlock: Option<bool>,
    pub threads: Option<usize>,
    /// Layers on GPUs, as Ollama counts them.
    pub gpu_layers: Option<usize>,
    /// The one GPU to use.
    pub main_gpu: Option<usize>,
}

impl LoadWish {
    /// What computes and how weights get into memory, where the server was told `m`.
    pub fn memory(&self, mut m: MemoryConfig) -> MemoryConfig {
        let access = match (self.mmap, self.mlock) {
            (Some(false), _) => Access::Read,
            (_, Some(true)) => Access::Locked,
            (Some(true), _) | (_, Some(false)) => Access::Mapped,
            _ => m.access,
        };
        if m.device == DeviceChoice::Cpu {
            if self.gpu_layers.is_some_and(|n| n > 0) || self.main_gpu.is_some() {
                tracing::warn!(
                    "num_gpu and main_gpu are of no effect: the server runs models on the CPU (--device)"
                );
            }
        } else {
            m.place.gpu_layers = self.gpu_layers.or(m.place.gpu_layers);
            m.place.main_gpu = self.main_gpu.or(m.place.main_gpu);
        }
        MemoryConfig { access, ..m }
    }
}

impl Options {
    /// Ollama's defaults.
    pub fn ollama() -> Self {
        let sampler = SamplerOptions { top_p: 0.9, min_p: 0.0, ..SamplerOptions::default() };
        let load = LoadWish::default();
        Self { sampler, num_predict: -1, num_keep: None, stop: Vec::new(), ignore_eos: false, load }
    }

    /// The same with OpenAI's temperature and nucleus.
    pub fn openai() -> Self {
        let o = Self::ollama();
        Self { sampler: SamplerOptions { temperature: 1.0, top_p: 1.0, ..o.sampler }, ..o }
    }

    /// llama-server's defaults.
    pub fn llama() -> Self {
        Self { sampler: SamplerOptions::default(), ..Self::ollama() }
    }

    /// Takes over what `map` says. Names that are not known, or of no effect, are left out, and told.
    ///
    /// # Errors
    /// A value of the wrong type or out of range, by its name.
    pub fn apply(&mut self, map: &Map<String, Value>) -> Result<(), Failure> {
        let mut p = Parameters::default();
        for (name, value) in map.iter().filter(|(_, v)| !v.is_null()) {
            match kind(name) {
                None => tracing::warn!(option = name, "unknown option, left out"),
                Some(Kind::Unused) => tracing::warn!(option = name, "this option is no longer of any effect"),
                Some(_) => {
                    p.set(name, value).map_err(|e| Failure::Invalid {
                        message: crate::output::one_line(&format!("{e:#}")),
                        param: Some(name.clone()),
                    })?;
                }
            }
        }
        if p.int("draft_num_predict").is_some_and(|n| n != 0) {
            tracing::warn!(option = "draft_num_predict", "this option is of no effect: there are no drafts");
        }
        self.sampler = p.sampler(self.sampler.clone());
        self.num_predict = p.int("num_predict").unwrap_or(self.num_predict);
        self.num_keep = p.int("num_keep").or(self.num_keep);
        if p.contains_key("stop") {
            self.stop = p.stop();
            self.stop.retain(|s| !s.is_empty());
        }
        self.ignore_eos = p.boolean("ignore_eos").unwrap_or(self.ignore_eos);
        let l = &mut self.load;
        l.ctx = p.size("num_ctx").or(l.ctx);
        l.batch = p.size("num_batch").or(l.batch);
        l.threads = p.size("num_thread").filter(|n| *n > 0).or(l.threads);
        // Negative: the server's choice. The first GPU is what clients say that do not mean any.
        l.gpu_layers = p.size("num_gpu").or(l.gpu_layers);
        l.main_gpu = p.size("main_gpu").filter(|n| *n > 0).or(l.main_gpu);
        l.mmap = p.boolean("use_mmap").or(l.mmap);
        l.mlock = p.boolean("use_mlock").or(l.mlock);
        l.kv = p.kv().or(l.kv.take());
        l.cache_k = p.dtype("cache_type_k").or(l.cache_k);
        l.cache_v = p.dtype("cache_type_v").or(l.cache_v);
        l.cache_k_pe = p.dtype("cache_type_k_pe").or(l.cache_k_pe);
        self.sampler.check().map_err(|e| Failure::invalid(e.to_string()))
    }
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
            "repeat_last_n": -1, "kv": "sinks:4+window:60", "mirostat": 2, "num_predict": null, "num_gpu": 99,
            "num_keep": -1, "main_gpu": 0, "cache_type_k": "q8_0"}),
        );
        let o = o.unwrap();
        assert_eq!((o.sampler.temperature, o.sampler.top_k, o.sampler.seed), (0.0, 5, None));
        assert_eq!(
            (o.stop, o.load.ctx, o.sampler.repeat_last_n),
            (vec!["x".to_owned()], Some(77), usize::MAX)
        );
        assert_eq!((o.load.gpu_layers, o.load.main_gpu), (Some(99), None));
        let on = |device, wish: &LoadWish| {
            wish.memory(MemoryConfig { device, ..Default::default() }).place.gpu_layers
        };
        assert_eq!((on(DeviceChoice::Auto, &o.load), on(DeviceChoice::Cpu, &o.load)), (Some(99), None));
        assert_eq!((o.num_predict, o.num_keep, o.load.cache_k), (-1, Some(-1), Some(DType::Q8_0)));
        for bad in [
            json!({"temperature": "hot"}),
            json!({"temperature": -1}),
            json!({"temperature": 1e300}),
            json!({"top_p": 2}),
            json!({"num_ctx": -5}),
            json!({"num_ctx": 1.5}),
            json!({"num_ctx": "big"}),
            json!({"num_gpu": "all"}),
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
