//! `create`, `list`, `show`, `rm`, `cp`: models that have a name. Columns and sections are Ollama's.

use crate::output::{self, one_line};
use crate::store::modelfile::Modelfile;
use crate::store::{Resolved, Store};
use anyhow::{Context, Result};
use engine::text::{ChatTemplate, Vocab};
use std::fmt::Write;
use std::path::PathBuf;
use std::time::SystemTime;

/// What to do.
pub enum Config {
    Create { name: String, file: String, text: String, folder: PathBuf },
    List,
    Show { model: String, part: Option<Part>, verbose: bool },
    Remove { models: Vec<String> },
    Copy { source: String, destination: String },
}

/// One thing to show, as it is.
pub enum Part {
    Modelfile,
    Parameters,
    Template,
    System,
    License,
}

pub fn run(c: &Config) -> Result<()> {
    let store = Store::from_env();
    match c {
        Config::Create { name, file, text, folder } => {
            let modelfile = Modelfile::parse(text).with_context(|| file.clone())?;
            let made = store.create(name, &modelfile, folder)?;
            eprintln!("created {}: {}", made.name, made.source.name());
        }
        Config::List => {
            let (entries, failed) = store.all();
            failed.iter().for_each(|f| eprintln!("note: {}", one_line(f)));
            output::print(&list(&entries, SystemTime::now()))?;
        }
        Config::Show { model, part, verbose } => {
            let entry = store.named(model)?;
            let text = match part {
                Some(part) => show_part(&entry, part)?,
                None => show(&entry, *verbose)?,
            };
            output::print(&text)?;
        }
        Config::Remove { models } => {
            for m in models {
                store.remove(m)?;
                eprintln!("removed {m}");
            }
        }
        Config::Copy { source, destination } => {
            let made = store.copy(&store.named(source)?, destination)?;
            eprintln!("copied {source} to {}", made.name);
        }
    }
    Ok(())
}

fn list(entries: &[Resolved], now: SystemTime) -> String {
    let row = |e: &Resolved| {
        let age = now.duration_since(e.modified).unwrap_or_default();
        vec![one_line(&e.name), e.digest[..12].to_owned(), output::decimal_bytes(e.size), output::ago(age)]
    };
    output::columns(&["NAME", "ID", "SIZE", "MODIFIED"], entries.iter().map(row))
}

fn show_part(e: &Resolved, part: &Part) -> Result<String> {
    let lines = |text: &str| if text.is_empty() { String::new() } else { format!("{}\n", text.trim_end()) };
    Ok(match part {
        Part::Modelfile => e.modelfile().to_string(),
        Part::Parameters => parameters(e).iter().map(|(k, v)| format!("{k:<30} {v}\n")).collect(),
        Part::System => lines(e.system.as_deref().unwrap_or_default()),
        Part::License => lines(&e.licenses.join("\n")),
        Part::Template => match &e.template {
            Some(t) => lines(t),
            None => {
                let file = e.source.open()?;
                let vocab = Vocab::from_metadata(file.metadata())?;
                lines(ChatTemplate::from_metadata(file.metadata(), &vocab)?.source())
            }
        },
    })
}

fn parameters(e: &Resolved) -> Vec<(&str, String)> {
    e.params.lines()
}

fn show(e: &Resolved, verbose: bool) -> Result<String> {
    let d = e.inspect().with_context(|| e.name.clone())?;
    let file = e.source.open()?;
    let number = |n: Option<u64>| n.map_or("-".into(), |n| n.to_string());
    let mut model = vec![
        ("architecture", one_line(&d.family)),
        ("parameters", one_line(&d.parameter_size)),
        ("context length", number(d.context_length)),
        ("embedding length", number(d.embedding_length)),
        ("quantization", d.quantization_level),
        ("file", e.source.name()),
    ];
    if !d.parent_model.is_empty() {
        model.push(("made from", one_line(&d.parent_model)));
    }
    if e.go_template {
        model.push(("template", "the file's own (Ollama's Go template is not used)".into()));
    }
    if e.projector {
        model.push(("images", "not supported: the projector is not used".into()));
    }
    let mut o = String::new();
    section(&mut o, "Model", &model)?;
    let can: Vec<(&str, String)> = d.capabilities.iter().map(|c| (c.as_str(), String::new())).collect();
    section(&mut o, "Capabilities", &can)?;
    section(&mut o, "Parameters", &parameters(e))?;
    let head = |text: &str| -> Vec<(&'static str, String)> {
        let all: Vec<&str> = text.trim().lines().collect();
        let mut some: Vec<_> = all.iter().take(2).map(|l| ("", one_line(l))).collect();
        if all.len() > 2 {
            some.push(("", "...".into()));
        }
        some
    };
    section(&mut o, "System", &head(e.system.as_deref().unwrap_or_default()))?;
    section(&mut o, "License", &head(&e.licenses.join("\n")))?;
    if verbose {
        let all: Vec<(&str, String)> = file.metadata().iter().map(|(k, v)| (k, v.brief(5, 60))).collect();
        section(&mut o, "Metadata", &all)?;
    }
    Ok(o)
}

/// A heading and its rows; nothing without rows.
fn section(o: &mut String, name: &str, rows: &[(&str, String)]) -> std::fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(o, "  {name}")?;
    let width = rows.iter().map(|(k, _)| k.chars().count()).max().unwrap_or(0);
    for (key, value) in rows {
        let line =
            if key.is_empty() { format!("    {value}") } else { format!("    {key:width$}    {value}") };
        writeln!(o, "{}", line.trim_end())?;
    }
    writeln!(o)
}
