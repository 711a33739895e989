//! Tool calls in the text of an answer. Knows the formats of model families; nothing of dialects.

use serde_json::Value;

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// `call_` and eight characters.
    pub id: String,
    pub name: String,
    /// An object, in the order in which the model wrote it.
    pub arguments: Value,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
#[allow(dead_code, reason = "calls are not parsed yet")]
pub enum Piece {
    Thinking(String),
    Text(String),
    Call(ToolCall),
}

/// Finds calls in streamed text. What turns out to be no call is given back as text.
#[derive(Debug, Default)]
pub struct Parser {}

impl Parser {
    /// For answers that a template with this source asks for; `tools` as in OpenAI's API.
    pub fn new(_template: &str, _tools: &[Value]) -> Self {
        Self::default()
    }

    /// Takes text; gives what is certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        if text.is_empty() { Vec::new() } else { vec![Piece::Text(text.into())] }
    }

    /// Ends the text.
    pub fn finish(&mut self) -> Vec<Piece> {
        Vec::new()
    }
}
