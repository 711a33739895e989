//! What there is: models in the store and in memory, versions, health. Ollama's and OpenAI's forms.

use super::fields::Fields;
use crate::model::Source;
use crate::serve::failure::Failure;
use crate::serve::models::{Loaded, Loading};
use crate::serve::prompt::App;
use crate::store::{Details, Resolved};
use axum::Json;
use axum::extract::{Path, State};
use engine::gguf::{File, Metadata, Value as Meta};
use engine::text::DEFAULT_TEMPLATE;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Ollama's version whose interface this is: clients refuse what is older.
const OLLAMA: &str = "0.12.6";

/// Files whose details are remembered at most.
const MOST_KNOWN: usize = 4096;

/// As Ollama writes it.
pub fn time(t: SystemTime) -> String {
    jiff::Timestamp::try_from(t).unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}

/// What a model's file says of it.
fn facts(m: &Resolved) -> Result<(Details, File), Failure> {
    let file = m.source.open().map_err(|e| Failure::Internal(format!("{e:#}")))?;
    let details = m.describe(&file).map_err(|e| Failure::Internal(format!("{e:#}")))?;
    Ok((details, file))
}

/// What tells a file from what it was before, and the template that goes with it.
type Key = (String, u64, Option<SystemTime>, Option<String>);

/// Details of files that were opened before.
#[derive(Default)]
pub struct Known(Mutex<HashMap<Key, Details>>);

impl Known {
    /// Of a model whose file has not changed since, without opening it. `None`: it cannot be opened.
    fn details(&self, m: &Resolved) -> Option<Details> {
        let meta = match &m.source {
            Source::File(path) => std::fs::metadata(path).ok(),
            Source::Demo => None,
        };
        let (len, time) = meta.map_or((0, None), |m| (m.len(), m.modified().ok()));
        let key = (m.source.name(), len, time, m.template.clone());
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(d) = known().get(&key) {
            return Some(Details { parent_model: m.parent().to_owned(), ..d.clone() });
        }
        let details = facts(m).ok()?.0;
        let mut all = known();
        if all.len() >= MOST_KNOWN {
            all.clear();
        }
        all.insert(key, details.clone());
        Some(details)
    }
}

/// `GET /api/version`.
pub async fn version() -> Json<Value> {
    Json(json!({"version": OLLAMA, "rsinfer": env!("CARGO_PKG_VERSION")}))
}

/// `GET /health`. As llama-server's until the model of the command line is there; later loads are told beside it.
pub async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    if app.starting.load(Ordering::Relaxed) {
        return Err(Failure::Unavailable("Loading model".into()));
    }
    let mut v = json!({"status": "ok"});
    if let Some(l) = app.models.loading() {
        v["loading"] = loading(&l);
    }
    Ok(Json(v))
}

/// A load under way.
pub fn loading(l: &Loading) -> Value {
    json!({"model": l.name, "seconds": l.since.elapsed().as_secs_f64(), "bytes": l.progress.done(),
        "total_bytes": l.progress.total()})
}

/// `GET /metrics`.
pub async fn metrics(State(app): State<Arc<App>>) -> String {
    let loaded = app.models.list();
    let sum = |f: fn(&Loaded) -> u64| loaded.iter().map(|l| f(l)).sum::<u64>() as f64;
    metrics::gauge!("rsinfer_memory_planned_bytes", "kind" => "resident").set(sum(|l| l.resident));
    metrics::gauge!("rsinfer_memory_planned_bytes", "kind" => "mapped").set(sum(|l| l.mapped));
    app.metrics.render()
}

/// `GET /api/tags`.
pub async fn tags(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let all = blocking(app, |app| {
        let list = app.store.list().map_err(Failure::internal)?;
        let entry = |m: &Resolved| {
            let facts = app.known.details(m);
            json!({"name": m.name, "model": m.name, "modified_at": time(m.modified), "size": m.size,
                "digest": m.digest, "details": facts,
                "capabilities": facts.as_ref().map(|f| &f.capabilities)})
        };
        Ok(list.iter().map(entry).collect::<Vec<_>>())
    });
    Ok(Json(json!({"models": all.await?})))
}

/// Runs what reads files on a thread that may wait.
async fn blocking<T: Send + 'static>(
    app: Arc<App>,
    f: impl FnOnce(&App) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(move || f(&app)).await.map_err(Failure::internal)?
}

/// `GET /api/ps`.
pub async fn ps(State(app): State<Arc<App>>) -> Json<Value> {
    let mut all: Vec<_> = app.models.list().into_iter().map(|l| (l.expires(), l)).collect();
    // Longest remaining first; for ever is longest.
    all.sort_by_key(|(e, _)| std::cmp::Reverse(e.map_or((1, SystemTime::UNIX_EPOCH), |t| (0, t))));
    let ever = "2318-01-01T00:00:00Z";
    let entry = |(expires, l): &(Option<SystemTime>, Arc<Loaded>)| {
        let details = app.known.details(&l.resolved).unwrap_or_default();
        let vram = l.on_gpus.iter().map(|g| g.1).sum::<u64>();
        json!({"name": l.resolved.name, "model": l.resolved.name, "size": l.resident + l.mapped + vram,
            "digest": l.resolved.digest, "details": details, "size_vram": vram, "context_length": l.ctx,
            "expires_at": expires.map_or(ever.into(), time), "parallel": l.parallel, "kv": l.kv.to_string(),
            "resident": l.resident, "mapped": l.mapped})
    };
    Json(json!({"models": all.iter().map(entry).collect::<Vec<_>>()}))
}

fn value(v: &Meta, verbose: bool) -> Value {
    match v {
        Meta::Array(a) if a.len() > 5 && !verbose => json!([]),
        v => v.to_json(),
    }
}

/// `POST /api/show`.
pub async fn show(State(app): State<Arc<App>>, mut f: Fields) -> Result<Json<Value>, Failure> {
    let name = f.string("model")?.or(f.string("name")?).unwrap_or_default();
    let verbose = f.boolean("verbose")?.unwrap_or(false);
    let system = f.string("system")?;
    let v = blocking(app, move |app| {
        let m = app.resolve(&name)?;
        let (details, file) = facts(&m)?;
        let meta: &Metadata = file.metadata();
        let own = meta.str("tokenizer.chat_template").ok().flatten().unwrap_or(DEFAULT_TEMPLATE);
        let template = m.template.as_deref().unwrap_or(own);
        let mut info: Map<String, Value> =
            meta.iter().map(|(k, v)| (k.to_owned(), value(v, verbose))).collect();
        let params: u64 = file.tensors().iter().map(|t| t.dims.iter().product::<u64>()).sum();
        info.insert("general.parameter_count".into(), params.into());
        let tensor =
            |t: &engine::gguf::TensorInfo| json!({"name": t.name, "type": t.dtype.name(), "shape": t.dims});
        let parameters: Vec<String> = m
            .params
            .iter()
            .flat_map(|(k, v)| match v {
                Value::Array(a) => a.iter().map(|v| format!("{k:<30} {v}")).collect(),
                v => vec![format!("{k:<30} {v}")],
            })
            .collect();
        Ok(json!({"license": m.licenses.join("\n"), "modelfile": m.modelfile().to_string(),
            "parameters": parameters.join("\n"), "template": template,
            "system": system.or(m.system.clone()).unwrap_or_default(), "details": details,
            "messages": m.messages, "model_info": info, "capabilities": details.capabilities,
            "tensors": if verbose { file.tensors().iter().map(tensor).collect() } else { Value::Array(vec![]) },
            "modified_at": time(m.modified)}))
    });
    Ok(Json(v.await?))
}

/// `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let all = blocking(app, |app| app.store.list().map_err(Failure::internal)).await?;
    Ok(Json(json!({"object": "list", "data": all.iter().map(openai).collect::<Vec<_>>()})))
}

/// `GET /v1/models/{id}`.
pub async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    Ok(Json(openai(&app.resolve(&id)?)))
}

fn openai(m: &Resolved) -> Value {
    let created = m.modified.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    json!({"id": m.name, "object": "model", "created": created, "owned_by": "library"})
}
