//! Models by name: what a name stands for, and what is said of it. Knows nothing of HTTP and of loading.

use crate::model::Source;
use crate::serve::config::Config;
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::time::SystemTime;

/// What a name stands for.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The name in full: `llama3:latest`.
    pub name: String,
    pub source: Source,
    /// Options that the model comes with, by Ollama's names.
    pub params: Map<String, Value>,
    /// System prompt for conversations that bring none.
    pub system: Option<String>,
    /// A Jinja template in place of the file's.
    pub template: Option<String>,
    /// Messages before every conversation.
    pub messages: Vec<Value>,
    pub licenses: Vec<String>,
    /// SHA-256 in hex of what identifies the model.
    pub digest: String,
    /// Bytes on disk.
    pub size: u64,
    pub modified: SystemTime,
}

/// Where names are looked up.
pub struct Store {
    /// Served under the names of their stems.
    files: Vec<PathBuf>,
}

impl Store {
    pub fn new(config: &Config) -> Self {
        Self { files: config.models.clone() }
    }

    /// What a name stands for; `None`: nothing.
    ///
    /// # Errors
    /// A name that stands for something that cannot be read.
    pub fn resolve(&self, name: &str) -> anyhow::Result<Option<Resolved>> {
        let short = name.strip_suffix(":latest").unwrap_or(name);
        if short == crate::demo::NAME {
            let source = Source::Demo;
            return Ok(Some(plain(short, source, crate::demo::bytes().len() as u64, SystemTime::UNIX_EPOCH)));
        }
        let stem = |p: &&PathBuf| p.file_stem().is_some_and(|s| s == short) || p.as_os_str() == short;
        let named = self.files.iter().find(stem).cloned();
        let path =
            named.or_else(|| Some(PathBuf::from(name)).filter(|p| name.ends_with(".gguf") && p.is_file()));
        let Some(path) = path else { return Ok(None) };
        let meta = std::fs::metadata(&path)?;
        let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(Some(plain(short, Source::File(path), meta.len(), modified)))
    }

    /// All models with names.
    ///
    /// # Errors
    /// A store that cannot be read.
    pub fn list(&self) -> anyhow::Result<Vec<Resolved>> {
        let names = self.files.iter().filter_map(|p| p.file_stem()?.to_str());
        let names = names.chain([crate::demo::NAME]);
        names.filter_map(|n| self.resolve(n).transpose()).collect()
    }
}

fn plain(name: &str, source: Source, size: u64, modified: SystemTime) -> Resolved {
    use sha2::{Digest, Sha256};
    let name = if name.contains(':') || name.contains('/') { name.into() } else { format!("{name}:latest") };
    let digest = Sha256::digest(format!("{} {size}", source.name()));
    Resolved {
        name,
        source,
        params: Map::new(),
        system: None,
        template: None,
        messages: Vec::new(),
        licenses: Vec::new(),
        digest: digest.iter().map(|b| format!("{b:02x}")).collect(),
        size,
        modified,
    }
}
