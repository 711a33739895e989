//! Showing an answer as it comes: thinking dimmed (or on stderr, or not at all), the answer as it is.
//! Knows nothing of models.

use crate::output;
use engine::text::thinking::Part;
use std::io::{self, IsTerminal, Write};

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Where parts go.
pub struct Display {
    hide_thinking: bool,
    styled: bool,
    /// With stdout redirected, thinking goes to stderr: stdout is for the answer alone.
    thinking_on_stderr: bool,
    thinking: bool,
    ends_line: bool,
    /// The first failure to write; the answer is not worth computing further then.
    pub failed: Option<io::Error>,
}

impl Display {
    pub fn new(hide_thinking: bool) -> Self {
        Self {
            hide_thinking,
            styled: output::is_styled(),
            thinking_on_stderr: !io::stdout().is_terminal(),
            thinking: false,
            ends_line: true,
            failed: None,
        }
    }

    /// Shows a part; `false` if it cannot be shown.
    pub fn show(&mut self, part: &Part) -> bool {
        match part {
            Part::Thinking(_) if self.hide_thinking => {}
            Part::Thinking(text) => {
                if !self.thinking {
                    self.thinking = true;
                    self.put_thinking(if self.styled { DIM } else { "Thinking...\n" });
                }
                self.put_thinking(text);
            }
            Part::Answer(text) => {
                self.end_thinking();
                self.put(text);
            }
        }
        self.failed.is_none()
    }

    /// Ends the answer: styles off, line ended.
    pub fn finish(&mut self) {
        self.end_thinking();
        if !self.ends_line {
            self.put("\n");
        }
    }

    fn end_thinking(&mut self) {
        if std::mem::take(&mut self.thinking) {
            let end = if self.styled { format!("{PLAIN}\n\n") } else { "\n...done thinking.\n\n".into() };
            self.put_thinking(&end);
        }
    }

    fn put_thinking(&mut self, text: &str) {
        if self.thinking_on_stderr {
            // stderr is a courtesy: its loss must not end the answer.
            let _ = io::stderr().write_all(text.as_bytes());
        } else {
            self.put(text);
        }
    }

    fn put(&mut self, text: &str) {
        if self.failed.is_none() && !text.is_empty() {
            self.failed = output::print(text).err();
            self.ends_line = text.ends_with('\n');
        }
    }
}
