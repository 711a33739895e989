//! From a conversation to the prompt's tokens: chat template, variables, BOS. Knows nothing of sessions and terminals.

use anyhow::{Context, Result, bail};
use engine::gguf::Metadata;
use engine::text::{ChatTemplate, EncodeOptions, RenderOptions, Vocab};
use serde_json::{Map, Value};

/// The template in `source` if there is one, else the file's.
pub fn template(metadata: &Metadata, vocab: &Vocab, source: Option<&str>) -> Result<ChatTemplate> {
    let text = |id: Option<u32>| id.and_then(|id| vocab.token_text(id)).unwrap_or_default();
    Ok(match source {
        Some(s) => ChatTemplate::new(s, text(vocab.bos()), text(vocab.eos()))?,
        None => ChatTemplate::from_metadata(metadata, vocab)?,
    })
}

/// Renders messages (an array of objects with `role` and `content`).
pub fn render(
    template: &ChatTemplate,
    messages: &Value,
    tools: Option<&Value>,
    add_generation_prompt: bool,
    kwargs: &Map<String, Value>,
) -> Result<String> {
    if !messages.is_array() {
        bail!("messages must be a JSON array of objects with role and content");
    }
    Ok(template.render(&RenderOptions { messages, tools, add_generation_prompt, kwargs: kwargs.clone() })?)
}

/// The tokens of a rendered prompt. Templates write BOS themselves or leave it to the vocabulary: it is there once.
pub fn tokens(vocab: &Vocab, rendered: &str) -> Vec<u32> {
    let mut ids = vocab.encode(rendered, EncodeOptions { add_special: false, parse_special: true });
    if let (true, Some(bos)) = (vocab.adds_bos(), vocab.bos())
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    ids
}

/// The variables that templates read for thinking: Qwen 3's and DeepSeek-V3.1's names.
pub fn set_thinking(kwargs: &mut Map<String, Value>, think: bool) {
    for name in ["enable_thinking", "thinking"] {
        kwargs.insert(name.into(), think.into());
    }
}

/// Messages as a conversation's file holds them.
pub fn check_messages(value: Value) -> Result<Vec<Value>> {
    let Value::Array(messages) = value else { bail!("messages must be a JSON array") };
    for m in &messages {
        m.get("role").and_then(Value::as_str).context("a message has no role")?;
    }
    Ok(messages)
}
