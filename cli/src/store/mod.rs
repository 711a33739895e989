//! What MODEL may be: `demo`, a GGUF file, a name in rsinfer's own store, or a name in Ollama's store. Names are looked up in
//! this order. Knows nothing of sessions and HTTP.

mod details;
pub mod modelfile;
mod name;
mod ollama;
mod own;
pub mod parameters;

pub use details::Details;
pub use name::Name;

use crate::model::Source;
use anyhow::{Context, Result, bail};
use engine::gguf::File;
use modelfile::Modelfile;
use parameters::Parameters;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// Where a model was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is embedded in the program.
    Demo,
    /// A file, named as such.
    Path,
    /// rsinfer's store.
    Own,
    /// Ollama's store.
    Ollama,
}

/// A model, and what goes with it.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// In full: `llama3:latest`, a path, `demo`.
    pub name: String,
    pub place: Place,
    pub source: Source,
    pub params: Parameters,
    pub system: Option<String>,
    /// `{"role", "content"}` each: what conversations begin with.
    pub messages: Vec<Value>,
    /// Jinja in place of the file's own chat template.
    pub template: Option<String>,
    pub licenses: Vec<String>,
    /// SHA-256 in hex, of the manifest; it changes when the model does.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    pub modified: SystemTime,
    /// Ollama has a Go template for it, which is not used.
    pub go_template: bool,
    /// There is a part for images, which is not used.
    pub projector: bool,
    details: Option<Details>,
}

/// There is no model of this name.
#[derive(Clone, Debug, thiserror::Error)]
#[error("model '{name}' not found{places}")]
pub struct NotFound {
    pub name: String,
    /// Where it was looked for, as the end of the sentence.
    pub places: String,
}

/// The folders in which models are looked up.
#[derive(Clone, Debug, Default)]
pub struct Store {
    /// rsinfer's own.
    own: Option<PathBuf>,
    /// Ollama's.
    ollama: Vec<PathBuf>,
    /// Served under the names of their stems.
    files: Vec<PathBuf>,
}

const ENDING: &str = ".json";

impl Store {
    /// `RSINFER_MODELS`, or `rsinfer/models` in the user's data folder; `OLLAMA_MODELS`, or the folders in which Ollama keeps
    /// models of the user and of the system's service.
    pub fn from_env() -> Self {
        let env = |name: &str| {
            let value = std::env::var(name).ok()?;
            let value = value.trim().trim_matches(['"', '\'']).to_owned();
            (!value.is_empty()).then(|| PathBuf::from(value))
        };
        let home = env("HOME").or_else(|| env("USERPROFILE"));
        let data = env("XDG_DATA_HOME").or_else(|| Some(home.as_ref()?.join(".local/share")));
        let own = env("RSINFER_MODELS").or_else(|| Some(data?.join("rsinfer/models")));
        let ollama = match env("OLLAMA_MODELS") {
            Some(folder) => vec![folder],
            None => {
                let user = home.map(|h| h.join(".ollama/models"));
                user.into_iter().chain(["/usr/share/ollama/.ollama/models".into()]).collect()
            }
        };
        Self { own, ollama, files: Vec::new() }
    }

    /// With these folders.
    #[cfg(test)]
    pub fn at(own: &Path, ollama: &Path) -> Self {
        Self { own: Some(own.into()), ollama: vec![ollama.into()], files: Vec::new() }
    }

    /// These files get the names of their stems, too.
    pub fn with_files(self, files: Vec<PathBuf>) -> Self {
        Self { files, ..self }
    }

    /// What MODEL names on a command line: `demo`, a file, or a name.
    ///
    /// # Errors
    /// [`NotFound`] with the places where it was looked for; a manifest or a file that cannot be used.
    pub fn named(&self, text: &str) -> Result<Resolved> {
        let path = Path::new(text);
        if text != crate::demo::NAME && path.is_file() {
            return Resolved::of_path(path);
        }
        let is_path = path.is_absolute() || text.starts_with('.') || text.ends_with(".gguf");
        match self.find(text) {
            Err(e) if e.is::<NotFound>() && !is_path && !path.exists() => {
                let places = self.own.iter().chain(&self.ollama).map(|p| p.display().to_string());
                let places: Vec<String> = places.collect();
                let places = format!(": no file of that name, and no such model in {}", places.join(", "));
                Err(NotFound { name: text.into(), places }.into())
            }
            Err(e) if !e.is::<NotFound>() && !e.is::<name::BadName>() => Err(e),
            Err(_) => Resolved::of_path(path),
            found => found,
        }
    }

    /// The model of a name; never a path.
    ///
    /// # Errors
    /// [`NotFound`]; a manifest that cannot be used.
    pub fn find(&self, text: &str) -> Result<Resolved> {
        let name = Name::parse(text)?;
        if name.to_string() == format!("{}:latest", crate::demo::NAME) {
            return Ok(Resolved::demo());
        }
        for (root, place) in self.roots() {
            let ending = if place == Place::Own { ENDING } else { "" };
            if let Some(file) = name.find(&root.join("manifests"), ending) {
                return read(root, place, &file, name.to_string());
            }
        }
        Err(NotFound { name: text.into(), places: String::new() }.into())
    }

    /// What a client's name stands for: a file that is served by its stem, a file with its ending, a name; `None`: nothing.
    ///
    /// # Errors
    /// A name that stands for something that cannot be read.
    pub fn resolve(&self, name: &str) -> Result<Option<Resolved>> {
        let short = name.strip_suffix(":latest").unwrap_or(name);
        let stem = |p: &&PathBuf| p.file_stem().is_some_and(|s| s == short) || p.as_os_str() == name;
        if let Some(path) = self.files.iter().find(stem) {
            return Resolved::served(path).map(Some);
        }
        if name.ends_with(".gguf") && Path::new(name).is_file() {
            return Resolved::of_path(Path::new(name)).map(Some);
        }
        match self.find(name) {
            Err(e) if e.is::<NotFound>() || e.is::<name::BadName>() => Ok(None),
            found => found.map(Some),
        }
    }

    /// Every model that can be read, files that are served first.
    ///
    /// # Errors
    /// A served file that is gone.
    pub fn list(&self) -> Result<Vec<Resolved>> {
        let (entries, failed) = self.all();
        failed.iter().for_each(|f| tracing::warn!("{}", crate::output::one_line(f)));
        let files: Result<Vec<_>> = self.files.iter().map(|p| Resolved::served(p)).collect();
        Ok(files?.into_iter().chain(entries).collect())
    }

    /// Every stored model, the latest first, `demo` last; and what could not be read, in words.
    pub fn all(&self) -> (Vec<Resolved>, Vec<String>) {
        let (mut entries, mut failed): (Vec<Resolved>, Vec<String>) = Default::default();
        for (root, place) in self.roots() {
            let manifests = root.join("manifests");
            let ending = if place == Place::Own { ENDING } else { "" };
            let mut files = Vec::new();
            walk(&manifests, 4, &mut files);
            for file in files {
                let Some(name) = Name::of_file(&manifests, &file, ending) else { continue };
                let name = name.to_string();
                if entries.iter().any(|e| e.name.eq_ignore_ascii_case(&name)) {
                    continue;
                }
                match read(root, place, &file, name) {
                    Ok(e) => entries.push(e),
                    Err(e) => failed.push(format!("{e:#}")),
                }
            }
        }
        entries.sort_by_key(|e| std::cmp::Reverse(e.modified));
        entries.push(Resolved::demo());
        (entries, failed)
    }

    /// Makes a model of a Modelfile; paths in it are relative to `folder`.
    ///
    /// # Errors
    /// What the Modelfile refers to cannot be used, or the store cannot be written.
    pub fn create(&self, text: &str, m: &Modelfile, folder: &Path) -> Result<Resolved> {
        let beside = folder.join(&m.from);
        if beside.is_dir() && Name::parse(&m.from).is_err() {
            bail!("{}: a folder; FROM takes a GGUF file or the name of a model", beside.display());
        }
        let base = match beside.is_file() {
            true => Resolved::of_path(&beside)?,
            false => self.named(&m.from)?,
        };
        self.make(text, base, m)
    }

    /// Makes a model of another and what a Modelfile says apart from FROM.
    ///
    /// # Errors
    /// A name that is none, a file that is no sound model, or the store cannot be written.
    pub fn make(&self, text: &str, base: Resolved, m: &Modelfile) -> Result<Resolved> {
        let name = self.new_name(text)?;
        let mut entry = base;
        if entry.place != Place::Path {
            let mut details = entry.details()?;
            details.parent_model = entry.name.clone();
            entry.details = Some(details);
        }
        // Headers are read now: what is no model gets no name.
        let file = entry.source.open()?;
        if file.missing_parts() > 0 {
            bail!("{}: parts of it are missing", entry.source.name());
        }
        entry.params.extend(&m.parameters);
        entry.system = m.system.clone().or(entry.system);
        entry.template = m.template.clone().or(entry.template);
        if !m.messages.is_empty() {
            entry.messages = m.messages.clone();
        }
        if !m.license.is_empty() {
            entry.licenses = m.license.clone();
        }
        self.write(&name, &entry)
    }

    /// Gives a model a second name.
    pub fn copy(&self, entry: &Resolved, to: &str) -> Result<Resolved> {
        self.write(&self.new_name(to)?, entry)
    }

    /// Takes a name out of the store; with it the blob that no other model uses. Files that were referred to stay.
    ///
    /// # Errors
    /// [`NotFound`]; a model that is not rsinfer's to remove.
    pub fn remove(&self, text: &str) -> Result<()> {
        let name = Name::parse(text)?;
        let root = self.own.as_ref().context("there is no store: set RSINFER_MODELS")?;
        let Some(file) = name.find(&root.join("manifests"), ENDING) else {
            match self.find(text)?.place {
                Place::Ollama => {
                    bail!("'{name}' is in Ollama's store, which is only read: `ollama rm {text}`")
                }
                _ => bail!("'{text}' cannot be removed: it comes with the program"),
            }
        };
        let source = own::read(root, &file, name.to_string()).ok().map(|e| e.source);
        std::fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
        if let Some(Source::File(blob)) = source
            && blob.parent() == Some(&root.join("blobs"))
            && !self.all().0.iter().any(|e| e.source == Source::File(blob.clone()))
        {
            std::fs::remove_file(&blob).with_context(|| format!("cannot remove {}", blob.display()))?;
        }
        Ok(())
    }

    /// The file of a blob of rsinfer's own store, there or not; `None` for what is no digest.
    pub fn blob(&self, digest: &str) -> Option<PathBuf> {
        Some(self.own.as_ref()?.join("blobs").join(digest_file(digest)?))
    }

    fn new_name(&self, text: &str) -> Result<Name> {
        let name = Name::parse(text)?;
        if name.to_string() == format!("{}:latest", crate::demo::NAME) {
            bail!("the name '{text}' is taken: it is the embedded model's");
        }
        Ok(name)
    }

    fn write(&self, name: &Name, entry: &Resolved) -> Result<Resolved> {
        let root = self.own.as_ref().context("there is no store: set RSINFER_MODELS")?;
        let manifests = root.join("manifests");
        let file = name.find(&manifests, ENDING).unwrap_or_else(|| name.below(&manifests, ENDING));
        own::write(root, &file, entry)?;
        own::read(root, &file, name.to_string())
    }

    fn roots(&self) -> impl Iterator<Item = (&Path, Place)> {
        let own = self.own.iter().map(|p| (p.as_path(), Place::Own));
        own.chain(self.ollama.iter().map(|p| (p.as_path(), Place::Ollama)))
    }
}

impl Resolved {
    fn new(name: String, place: Place, source: Source, digest: String) -> Self {
        Self {
            name,
            place,
            source,
            params: Parameters::default(),
            system: None,
            messages: Vec::new(),
            template: None,
            licenses: Vec::new(),
            digest,
            size: 0,
            modified: SystemTime::UNIX_EPOCH,
            go_template: false,
            projector: false,
            details: None,
        }
    }

    /// The embedded model.
    pub fn demo() -> Self {
        static DIGEST: OnceLock<String> = OnceLock::new();
        let digest = DIGEST.get_or_init(|| sha256(crate::demo::bytes()));
        let name = format!("{}:latest", crate::demo::NAME);
        let mut e = Self::new(name, Place::Demo, Source::Demo, digest.clone());
        e.size = crate::demo::bytes().len() as u64;
        e.modified = std::env::current_exe().map_or(SystemTime::UNIX_EPOCH, |p| modified(&p));
        e
    }

    fn served(path: &Path) -> Result<Self> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self { name: format!("{stem}:latest"), ..Self::of_path(path)? })
    }

    /// A file.
    pub fn of_path(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
        let identity = format!("{} {} {:?}", path.display(), meta.len(), meta.modified().ok());
        let name = path.display().to_string();
        let mut e = Self::new(name, Place::Path, Source::File(path.into()), sha256(identity.as_bytes()));
        (e.size, e.modified) = (meta.len(), modified(path));
        Ok(e)
    }

    /// What is known of the model; files whose details nobody wrote down are opened.
    ///
    /// # Errors
    /// A file that is no sound GGUF.
    pub fn details(&self) -> Result<Details> {
        self.details.clone().map_or_else(|| self.inspect(), Ok)
    }

    /// The model that it was made of, if it was.
    pub fn parent(&self) -> &str {
        self.details.as_ref().map_or("", |d| &d.parent_model)
    }

    /// The same from the model's file itself, with what it can do.
    pub fn inspect(&self) -> Result<Details> {
        self.describe(&self.source.open()?)
    }

    /// As [`Resolved::inspect`], of the file that is open already.
    pub fn describe(&self, file: &File) -> Result<Details> {
        Ok(Details { parent_model: self.parent().into(), ..Details::of(file, self.template.as_deref())? })
    }

    /// A Modelfile that makes this model.
    pub fn modelfile(&self) -> Modelfile {
        Modelfile {
            from: self.source.name(),
            parameters: self.params.clone(),
            system: self.system.clone(),
            template: self.template.clone(),
            license: self.licenses.clone(),
            messages: self.messages.clone(),
        }
    }
}

fn read(root: &Path, place: Place, file: &Path, name: String) -> Result<Resolved> {
    match place {
        Place::Own => own::read(root, file, name),
        _ => ollama::read(root, file, name),
    }
}

/// Files exactly `depth` folders down. Folders that cannot be read hold nothing.
fn walk(folder: &Path, depth: usize, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match depth {
            1 if path.is_file() => out.push(path),
            1 => {}
            _ if path.is_dir() => walk(&path, depth - 1, out),
            _ => {}
        }
    }
}

/// `sha256:HEX` as a file's name.
fn digest_file(digest: &str) -> Option<String> {
    let hex = digest.strip_prefix("sha256:").or_else(|| digest.strip_prefix("sha256-"))?;
    let sound = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    sound.then(|| format!("sha256-{hex}"))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A file of text, not of a model: there is a limit to it.
fn read_small(path: &Path) -> Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    let file = std::fs::File::open(path).with_context(cannot)?;
    let mut bytes = Vec::new();
    file.take(modelfile::MOST_BYTES as u64 + 1).read_to_end(&mut bytes).with_context(cannot)?;
    if bytes.len() > modelfile::MOST_BYTES {
        bail!("{}: larger than {} bytes", path.display(), modelfile::MOST_BYTES);
    }
    Ok(bytes)
}

fn modified(path: &Path) -> SystemTime {
    std::fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests;
