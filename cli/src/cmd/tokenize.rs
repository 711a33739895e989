//! `tokenize`: text to token ids. Needs a vocabulary, no tensors.

use crate::model::Source;
use crate::output;
use anyhow::{Context, Result};
use engine::text::{EncodeOptions, Vocab};
use std::fmt::Write;

/// What to tokenise and how to print it.
pub struct Config {
    pub source: Source,
    pub text: String,
    /// The ids alone, as one JSON array.
    pub ids: bool,
    pub add_special: bool,
    pub parse_special: bool,
    pub show_count: bool,
}

pub fn run(c: &Config) -> Result<()> {
    let file = c.source.open()?;
    let vocab = Vocab::from_metadata(file.metadata()).with_context(|| c.source.name())?;
    let options = EncodeOptions { add_special: c.add_special, parse_special: c.parse_special };
    let ids = vocab.encode(&c.text, options);
    let mut out = String::new();
    if c.ids {
        let list: Vec<String> = ids.iter().map(u32::to_string).collect();
        writeln!(out, "[{}]", list.join(", "))?;
    } else {
        for &id in &ids {
            let bytes = vocab.bytes(id).unwrap_or_default();
            writeln!(out, "{id:6} -> '{}'", String::from_utf8_lossy(&bytes))?;
        }
    }
    if c.show_count {
        writeln!(out, "Total number of tokens: {}", ids.len())?;
    }
    Ok(output::print(&out)?)
}
