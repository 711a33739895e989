//! What a GGUF's header says of a model, as Ollama's `details` and `capabilities` give it.

use anyhow::Result;
use engine::gguf::{File, Metadata, Summary};
use engine::text::thinking::ThinkTags;
use serde::{Deserialize, Serialize};

/// See the module. Strings that nothing is known of are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    pub parent_model: String,
    pub format: String,
    pub family: String,
    pub families: Vec<String>,
    pub parameter_size: String,
    pub quantization_level: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_length: Option<u64>,
    #[serde(skip)]
    pub capabilities: Vec<String>,
}

impl Details {
    /// Of an open file; `template` is the chat template in force, if it is not the file's.
    ///
    /// # Errors
    /// Metadata of the wrong type.
    pub fn of(file: &File, template: Option<&str>) -> Result<Self> {
        let m = file.metadata();
        let s = Summary::of(file)?;
        let family = s.architecture.unwrap_or_default();
        let number = |key: &str| m.u64(&format!("{family}.{key}")).ok().flatten();
        let mut largest = s.by_type.iter().filter(|t| t.dtype.name() != "f32");
        let quantization = s.file_type.and_then(|t| t.1).map(Into::into);
        let by_share = || largest.next().map_or("F32".into(), |t| t.dtype.name().to_uppercase());
        Ok(Self {
            format: "gguf".into(),
            families: vec![family.clone()],
            parameter_size: count(s.parameters),
            quantization_level: quantization.unwrap_or_else(by_share),
            context_length: number("context_length"),
            embedding_length: number("embedding_length"),
            capabilities: capabilities(m, &family, template),
            family,
            parent_model: String::new(),
        })
    }
}

/// `8.0B`, as Ollama counts parameters.
fn count(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e12 => format!("{:.1}T", n / 1e12),
        _ if n >= 1e9 => format!("{:.1}B", n / 1e9),
        _ if n >= 1e6 => format!("{:.2}M", n / 1e6),
        _ => format!("{:.2}K", n / 1e3),
    }
}

/// What a model can do, in Ollama's words.
fn capabilities(m: &Metadata, family: &str, template: Option<&str>) -> Vec<String> {
    if m.get(&format!("{family}.pooling_type")).is_some() {
        return vec!["embedding".into()];
    }
    let own = m.str("tokenizer.chat_template").ok().flatten();
    let tool_use = m.get("tokenizer.chat_template.tool_use").is_some() && template.is_none();
    let template = template.or(own).unwrap_or_default();
    let fills = ["<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>"];
    let tokens = m.strings("tokenizer.ggml.tokens").ok().flatten().unwrap_or_default();
    let mut can = vec!["completion"];
    if template.contains("tools") || tool_use {
        can.push("tools");
    }
    if tokens.iter().any(|t| fills.contains(&t.as_str())) {
        can.push("insert");
    }
    if ThinkTags::in_template(template).is_some() {
        can.push("thinking");
    }
    can.into_iter().map(Into::into).collect()
}
