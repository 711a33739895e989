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
    with_bos(vocab, vocab.encode(rendered, EncodeOptions { add_special: false, parse_special: true }))
}

/// Marks around what must not be read as a control token. They are no characters: nobody's text has them.
const GUARD: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// Messages in which names of control tokens are marked as text, whoever wrote them: [`guarded_tokens`] reads the marks in what
/// the chat template makes of the messages.
pub fn guard(vocab: &Vocab, messages: &[Value]) -> Vec<Value> {
    fn walk(vocab: &Vocab, v: &mut Value) {
        match v {
            Value::String(s) => {
                s.retain(|c| !GUARD.contains(&c));
                let spans: Vec<_> = vocab.control_spans(s).collect();
                for r in spans.into_iter().rev() {
                    s.insert(r.end, GUARD[1]);
                    s.insert(r.start, GUARD[0]);
                }
            }
            Value::Array(a) => a.iter_mut().for_each(|v| walk(vocab, v)),
            Value::Object(o) => o.values_mut().for_each(|v| walk(vocab, v)),
            _ => {}
        }
    }
    let mut messages = messages.to_vec();
    messages.iter_mut().for_each(|m| walk(vocab, m));
    messages
}

/// The tokens of a prompt rendered from guarded messages.
pub fn guarded_tokens(vocab: &Vocab, rendered: &str) -> Vec<u32> {
    let clean = |s: &str| s.replace(GUARD, "");
    let mut ids = Vec::new();
    let mut rest = rendered;
    while let Some((before, after)) = rest.split_once(GUARD[0]) {
        let (inside, after) = after.split_once(GUARD[1]).unwrap_or((after, ""));
        for (text, parse_special) in [(before, true), (inside, false)] {
            ids.extend(vocab.encode(&clean(text), EncodeOptions { add_special: false, parse_special }));
        }
        rest = after;
    }
    ids.extend(vocab.encode(&clean(rest), EncodeOptions { add_special: false, parse_special: true }));
    with_bos(vocab, ids)
}

fn with_bos(vocab: &Vocab, mut ids: Vec<u32>) -> Vec<u32> {
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
