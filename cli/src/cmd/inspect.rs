//! `inspect`: what a GGUF file holds: metadata, tensors, sizes by type. Needs no vocabulary and no known architecture.

use crate::model::Source;
use crate::output;
use anyhow::Result;
use engine::gguf::{File, Summary};
use serde_json::{Value, json};
use std::fmt::Write;

/// What to show.
pub struct Config {
    pub source: Source,
    pub json: bool,
    pub tensors: bool,
}

pub fn run(c: &Config) -> Result<()> {
    let file = c.source.open()?;
    let summary = Summary::of(&file)?;
    let text = if c.json { as_json(c, &file, &summary)? } else { as_text(c, &file, &summary)? };
    Ok(output::print(&text)?)
}

fn as_json(c: &Config, file: &File, s: &Summary) -> Result<String> {
    let metadata: serde_json::Map<String, Value> =
        file.metadata().iter().map(|(k, v)| (k.to_owned(), v.to_json())).collect();
    let by_type: Vec<Value> = s
        .by_type
        .iter()
        .map(|t| json!({"type": t.dtype.name(), "tensors": t.tensors, "elements": t.elements, "bytes": t.bytes}))
        .collect();
    let tensors: Vec<Value> = file
        .tensors()
        .iter()
        .map(|t| json!({"name": t.name, "type": t.dtype.name(), "shape": t.dims, "bytes": t.n_bytes, "part": t.part, "offset": t.offset}))
        .collect();
    let all = json!({
        "file": c.source.name(), "version": s.version, "alignment": s.alignment, "parts": s.parts,
        "file_bytes": s.file_bytes, "architecture": s.architecture, "name": s.name,
        "file_type": s.file_type.map(|t| t.0), "file_type_name": s.file_type.and_then(|t| t.1),
        "parameters": s.parameters, "size_label": s.size_label, "tensor_bytes": s.tensor_bytes,
        "bits_per_weight": s.bits_per_weight(), "by_type": by_type, "metadata": metadata, "tensors": tensors,
    });
    Ok(serde_json::to_string_pretty(&all)? + "\n")
}

fn as_text(c: &Config, file: &File, s: &Summary) -> Result<String> {
    let mut o = String::new();
    let show = |v: &Option<String>| output::one_line(v.as_deref().unwrap_or("-"));
    let parts = if s.parts > 1 { format!(", {} parts", s.parts) } else { String::new() };
    writeln!(o, "file          {}", c.source.name())?;
    writeln!(o, "format        GGUF version {}, alignment {}{parts}", s.version, s.alignment)?;
    writeln!(o, "name          {}", show(&s.name))?;
    writeln!(o, "architecture  {}", show(&s.architecture))?;
    if let Some((id, name)) = s.file_type {
        writeln!(o, "file type     {}", name.map_or_else(|| format!("unknown ({id})"), Into::into))?;
    }
    writeln!(o, "parameters    {} ({})", s.parameters, output::one_line(&s.size_label))?;
    writeln!(
        o,
        "size          {} of tensors, file {}",
        output::bytes(s.tensor_bytes),
        output::bytes(s.file_bytes)
    )?;
    writeln!(o, "per weight    {:.2} bits", s.bits_per_weight())?;
    writeln!(o, "\n{} metadata keys:", file.metadata().len())?;
    let width = file.metadata().iter().map(|(k, _)| k.chars().count()).max().unwrap_or(0).min(48);
    for (k, v) in file.metadata().iter() {
        writeln!(o, "  {:width$}  {:<14} {}", output::one_line(k), v.type_name(), v.brief(5, 60))?;
    }
    writeln!(o, "\n{} tensors:", file.tensors().len())?;
    for t in &s.by_type {
        let share = 100.0 * t.bytes as f64 / s.tensor_bytes.max(1) as f64;
        let bytes = output::bytes(t.bytes);
        writeln!(
            o,
            "  {:<8} {:>5} tensors  {:>14} weights  {bytes:>11}  {share:5.1}%",
            t.dtype.name(),
            t.tensors,
            t.elements
        )?;
    }
    if c.tensors {
        writeln!(o)?;
        let width = file.tensors().iter().map(|t| t.name.chars().count()).max().unwrap_or(0).min(64);
        for t in file.tensors() {
            let dims: Vec<String> = t.dims.iter().map(u64::to_string).collect();
            let name = output::one_line(&t.name);
            writeln!(
                o,
                "  {name:width$}  {:<7} {:>24}  {:>11}",
                t.dtype.name(),
                format!("[{}]", dims.join(", ")),
                output::bytes(t.n_bytes)
            )?;
        }
    } else if !file.tensors().is_empty() {
        writeln!(o, "\n--tensors lists them, --json shows everything in full.")?;
    }
    Ok(o)
}
