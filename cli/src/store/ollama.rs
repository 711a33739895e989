//! Ollama's own store, which is only read: a manifest a model, and blobs named by their digests. What a user has pulled with
//! Ollama runs from where it lies.

use super::parameters::Parameters;
use super::{Details, Place, Resolved, digest_file, read_small};
use crate::model::Source;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;

/// Layers of a manifest, by the last word of their media types.
const MEDIA: &str = "application/vnd.ollama.image.";

/// The model of a manifest of the store at `root`.
///
/// # Errors
/// A manifest that is not sound, whose blobs are missing, or that needs what rsinfer has not.
pub fn read(root: &Path, manifest: &Path, name: String) -> Result<Resolved> {
    let bytes = read_small(manifest)?;
    let wrong = || format!("{}: not a manifest of Ollama", manifest.display());
    let json: Value = serde_json::from_slice(&bytes).with_context(wrong)?;
    let layers = json["layers"].as_array().with_context(wrong)?;
    let mut entry = Resolved::new(name, Place::Ollama, Source::Demo, super::sha256(&bytes));
    entry.modified = super::modified(manifest);
    let mut model = None;
    let sized = layers.iter().chain([&json["config"]]);
    entry.size = sized.filter_map(|l| l["size"].as_u64()).fold(0, u64::saturating_add);
    for layer in layers {
        let kind = layer["mediaType"].as_str().and_then(|t| t.strip_prefix(MEDIA)).unwrap_or_default();
        let digest = layer["digest"].as_str().with_context(wrong)?;
        let blob = || blob(root, digest).with_context(|| format!("{}: layer {kind}", manifest.display()));
        let text = || -> Result<String> {
            String::from_utf8(read_small(&blob()?)?).with_context(|| format!("layer {kind}: not UTF-8 text"))
        };
        let parsed = || -> Result<Value> {
            serde_json::from_str(&text()?).with_context(|| format!("layer {kind}: not JSON"))
        };
        match kind {
            "model" if model.is_some() => bail!("{}: a model of several files", entry.name),
            "model" => model = Some(Source::File(blob()?)),
            "params" => match parsed()? {
                Value::Object(map) => entry.params = Parameters::from_json_lenient(&map),
                _ => bail!("layer params: not a JSON object"),
            },
            "system" => entry.system = Some(text()?),
            "license" => entry.licenses.push(text()?),
            "messages" => {
                let Value::Array(list) = parsed()? else { bail!("layer messages: not a JSON array") };
                entry.messages = crate::chat::check_messages(Value::Array(list))?;
            }
            "template" | "prompt" => {
                let text = text()?;
                // Ollama's are Go templates, most often: the file's own Jinja template is what the model was trained with.
                if !super::modelfile::is_go(&text) && text.contains("{%") {
                    entry.template = Some(text);
                } else {
                    entry.go_template = true;
                }
            }
            "adapter" => bail!("{}: has an adapter, which rsinfer does not apply", entry.name),
            "tensor" => {
                bail!("{}: its tensors are safetensors; rsinfer runs GGUF files only", entry.name)
            }
            "projector" => entry.projector = true,
            _ => {}
        }
    }
    entry.source = model.with_context(|| format!("{}: the manifest has no model layer", entry.name))?;
    entry.details = json["config"]["digest"].as_str().and_then(|d| details(&blob(root, d).ok()?));
    Ok(entry)
}

/// A blob's file.
fn blob(root: &Path, digest: &str) -> Result<std::path::PathBuf> {
    let file = digest_file(digest).with_context(|| format!("{digest:?} is no digest"))?;
    let path = root.join("blobs").join(&file);
    // Early versions of Ollama wrote a colon.
    let old = root.join("blobs").join(digest);
    [path.clone(), old]
        .into_iter()
        .find(|p| p.is_file())
        .with_context(|| format!("{} is missing: pull the model again with Ollama", path.display()))
}

fn details(config: &Path) -> Option<Details> {
    let json: Value = serde_json::from_slice(&read_small(config).ok()?).ok()?;
    let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
    let families = json["model_families"].as_array().into_iter().flatten();
    Some(Details {
        format: text("model_format"),
        family: text("model_family"),
        families: families.filter_map(|f| f.as_str().map(Into::into)).collect(),
        parameter_size: text("model_type"),
        quantization_level: text("file_type"),
        ..Details::default()
    })
}
