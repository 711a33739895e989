//! Names of models, as Ollama writes them: `[HOST/][NAMESPACE/]MODEL[:TAG]`. Knows nothing of files but the folders that a
//! name stands for.

use std::fmt;
use std::path::{Component, Path, PathBuf};

const HOST: &str = "registry.ollama.ai";
const NAMESPACE: &str = "library";
const TAG: &str = "latest";

/// A name with all its parts. Two names are the same if they differ in case alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    host: String,
    namespace: String,
    model: String,
    tag: String,
}

/// What is wrong with a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no model name: letters, digits and . _ - in [HOST/][NAMESPACE/]MODEL[:TAG]")]
pub struct BadName(pub String);

impl Name {
    /// Reads a name; what is left out is Ollama's default.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let bad = || BadName(text.chars().take(100).collect());
        let (path, tag) = match text.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (text, TAG),
        };
        let parts: Vec<&str> = path.split('/').collect();
        let (host, namespace, model) = match parts[..] {
            [model] => (HOST, NAMESPACE, model),
            [namespace, model] => (HOST, namespace, model),
            [host, namespace, model] => (host, namespace, model),
            _ => return Err(bad()),
        };
        let host_only = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok());
        let all = [host_only.map_or(host, |(h, _)| h), namespace, model, tag];
        if !all.into_iter().all(is_part) {
            return Err(bad());
        }
        Ok(Self { host: host.into(), namespace: namespace.into(), model: model.into(), tag: tag.into() })
    }

    /// The file of this name below a folder of manifests, with this ending.
    pub fn below(&self, manifests: &Path, ending: &str) -> PathBuf {
        let folder = manifests.join(&self.host).join(&self.namespace).join(&self.model);
        folder.join(format!("{}{ending}", self.tag))
    }

    /// As [`Name::below`], in whatever case the file has its name.
    pub fn find(&self, manifests: &Path, ending: &str) -> Option<PathBuf> {
        let exact = self.below(manifests, ending);
        if exact.is_file() {
            return Some(exact);
        }
        let mut at = manifests.to_owned();
        for part in [&self.host, &self.namespace, &self.model, &format!("{}{ending}", self.tag)] {
            let same = |e: &std::fs::DirEntry| e.file_name().to_string_lossy().eq_ignore_ascii_case(part);
            at = std::fs::read_dir(&at).ok()?.flatten().find(same)?.path();
        }
        at.is_file().then_some(at)
    }

    /// The name whose file this is; `None` for files that are no manifests.
    pub fn of_file(manifests: &Path, file: &Path, ending: &str) -> Option<Self> {
        let inner = file.strip_prefix(manifests).ok()?;
        let parts: Option<Vec<&str>> = inner
            .components()
            .map(|c| match c {
                Component::Normal(s) => s.to_str(),
                _ => None,
            })
            .collect();
        let [host, namespace, model, tag] = parts?[..] else { return None };
        Self::parse(&format!("{host}/{namespace}/{model}:{}", tag.strip_suffix(ending)?)).ok()
    }
}

impl fmt::Display for Name {
    /// Without the parts that go without saying; the tag is always said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host != HOST {
            write!(f, "{}/{}/", self.host, self.namespace)?;
        } else if self.namespace != NAMESPACE {
            write!(f, "{}/", self.namespace)?;
        }
        write!(f, "{}:{}", self.model, self.tag)
    }
}

/// Parts become folders: none may leave its place.
fn is_part(part: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=80).contains(&part.len())
        && part.chars().all(inner)
        && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_shown() {
        for (text, shown, file) in [
            ("llama3", "llama3:latest", "registry.ollama.ai/library/llama3/latest"),
            ("me/Tiny:1.5b-q4_K", "me/Tiny:1.5b-q4_K", "registry.ollama.ai/me/Tiny/1.5b-q4_K"),
            ("hf.co/a/B-GGUF:Q4_K_M", "hf.co/a/B-GGUF:Q4_K_M", "hf.co/a/B-GGUF/Q4_K_M"),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b/latest"),
        ] {
            let name = Name::parse(text).unwrap();
            assert_eq!(name.to_string(), shown);
            assert_eq!(name.below(Path::new("m"), ""), Path::new("m").join(file));
            assert_eq!(
                Name::of_file(Path::new("m"), &name.below(Path::new("m"), ".json"), ".json"),
                Some(name)
            );
        }
    }

    #[test]
    fn no_name_leaves_the_store() {
        for text in [
            "",
            "..",
            "a/../b",
            "../a",
            "/etc/passwd",
            "a:..",
            "a:b/c",
            "a b",
            "a//b",
            "a\0",
            ":x",
            "a:",
            "~/x",
            "a/b/c/d",
        ] {
            assert!(Name::parse(text).is_err(), "{text:?}");
        }
        assert!(Name::parse(&"x".repeat(81)).is_err());
        assert_eq!(Name::of_file(Path::new("m"), Path::new("m/a/b"), ""), None);
    }
}
