//! rsinfer's own store: one JSON file a model, which refers to the GGUF where it lies; nothing is copied. Blobs are there for
//! files that came over HTTP.

use super::parameters::Parameters;
use super::{Details, Place, Resolved, digest_file, read_small};
use crate::model::Source;
use crate::output::OutFile;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Of the files this program writes; others are refused.
const VERSION: u32 = 1;

/// A model's file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    model: Where,
    parent: String,
    parameters: Map<String, Value>,
    system: Option<String>,
    template: Option<String>,
    license: Vec<String>,
    messages: Vec<Value>,
    details: Details,
    size: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Where {
    Path(PathBuf),
    Blob(String),
    Demo,
}

/// The model of a manifest of the store at `root`.
///
/// # Errors
/// A manifest that is not sound, or whose model is gone.
pub fn read(root: &Path, manifest: &Path, name: String) -> Result<Resolved> {
    let bytes = read_small(manifest)?;
    let wrong = || format!("{}: not a model of rsinfer's store", manifest.display());
    let m: Manifest = serde_json::from_slice(&bytes).with_context(wrong)?;
    if m.version != VERSION {
        bail!("{}: of version {}, this program knows {VERSION}", manifest.display(), m.version);
    }
    let source = match m.model {
        Where::Demo => Source::Demo,
        Where::Path(p) => Source::File(p),
        Where::Blob(d) => Source::File(
            root.join("blobs").join(digest_file(&d).with_context(|| format!("{d:?} is no digest"))?),
        ),
    };
    if let Source::File(p) = &source
        && !p.is_file()
    {
        bail!(
            "model '{name}': its file {} is gone (create refers to files, it does not copy them)",
            p.display()
        );
    }
    let mut entry = Resolved::new(name, Place::Own, source, super::sha256(&bytes));
    entry.params = Parameters::from_json(&m.parameters).with_context(wrong)?;
    entry.messages = crate::chat::check_messages(Value::Array(m.messages)).with_context(wrong)?;
    (entry.system, entry.template, entry.licenses) = (m.system, m.template, m.license);
    (entry.details, entry.size, entry.modified) = (Some(m.details), m.size, super::modified(manifest));
    Ok(entry)
}

/// Writes a model's file, whole or not at all.
pub fn write(root: &Path, manifest: &Path, entry: &Resolved) -> Result<()> {
    let blobs = root.join("blobs");
    let model = match &entry.source {
        Source::Demo => Where::Demo,
        Source::File(p) if p.parent() == Some(&blobs) => {
            Where::Blob(p.file_name().unwrap_or_default().to_string_lossy().replacen('-', ":", 1))
        }
        Source::File(p) => {
            Where::Path(std::path::absolute(p).with_context(|| format!("cannot resolve {}", p.display()))?)
        }
    };
    let m = Manifest {
        version: VERSION,
        model,
        parent: entry.details.as_ref().map(|d| d.parent_model.clone()).unwrap_or_default(),
        parameters: entry.params.as_json().clone(),
        system: entry.system.clone(),
        template: entry.template.clone(),
        license: entry.licenses.clone(),
        messages: entry.messages.clone(),
        details: entry.details()?,
        size: entry.size,
    };
    let folder = manifest.parent().context("a manifest lies in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut out = OutFile::create(manifest)?;
    out.write_all(serde_json::to_string_pretty(&m)?.as_bytes())?;
    out.finish()
}
