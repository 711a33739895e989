//! `template`: a conversation as the model's chat template renders it. Needs no tensors.

use crate::chat;
use crate::model::Source;
use crate::output;
use anyhow::{Context, Result};
use engine::text::Vocab;
use serde_json::{Map, Value};

/// What to render.
pub struct Config {
    pub source: Source,
    pub messages: Value,
    pub tools: Option<Value>,
    /// Jinja source in place of the model's own template.
    pub template: Option<String>,
    pub add_generation_prompt: bool,
    pub kwargs: Map<String, Value>,
}

pub fn run(c: &Config) -> Result<()> {
    let file = c.source.open()?;
    let vocab = Vocab::from_metadata(file.metadata()).with_context(|| c.source.name())?;
    let template = chat::template(file.metadata(), &vocab, c.template.as_deref())?;
    let prompt = chat::render(&template, &c.messages, c.tools.as_ref(), c.add_generation_prompt, &c.kwargs)?;
    Ok(output::print(&prompt)?)
}
