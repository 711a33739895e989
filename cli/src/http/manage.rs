//! Ollama's routes that change the store: create, copy, delete, blobs. Names only: no client reaches a file by its path.

use super::fields::Fields;
use crate::serve::failure::Failure;
use crate::serve::prompt::App;
use crate::store::modelfile::{self, Modelfile};
use crate::store::parameters::Parameters;
use crate::store::{NotFound, Resolved};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long an upload may pause.
const PAUSE: Duration = Duration::from_secs(60);

fn failure(e: anyhow::Error) -> Failure {
    match e.downcast_ref::<NotFound>() {
        Some(e) => Failure::NoModel(crate::output::one_line(&e.name)),
        None => Failure::invalid(format!("{e:#}")),
    }
}

/// Runs what touches files on a thread that may wait.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(f).await.map_err(Failure::internal)?.map_err(failure)
}

fn model(f: &mut Fields) -> Result<String, Failure> {
    let name = f.string("model")?.or(f.string("name")?).filter(|n| !n.is_empty());
    name.ok_or_else(|| Failure::field("model", "a model's name is required"))
}

/// What the new model is made of: a model, or an uploaded file.
enum From {
    Model(String),
    Blob(String),
}

fn read(f: &mut Fields) -> Result<(From, Modelfile), Failure> {
    let mut m = Modelfile::default();
    let files = f.object("files")?.unwrap_or_default();
    let from = match (f.string("from")?.filter(|s| !s.is_empty()), files.len()) {
        (Some(name), 0) => From::Model(name),
        (None, 1) => {
            let digest = files.values().next().and_then(Value::as_str).unwrap_or_default();
            From::Blob(digest.to_owned())
        }
        (None, 0) => return Err(Failure::field("from", "neither from nor files was given")),
        _ => return Err(Failure::field("files", "one GGUF file is possible, and no from beside it")),
    };
    f.refuse("adapters", |v| v.as_object().is_some_and(|o| o.is_empty()))?;
    f.refuse("quantize", |v| v.as_str() == Some(""))?;
    f.refuse("quantization", |v| v.as_str() == Some(""))?;
    f.refuse("modelfile", |v| v.as_str() == Some(""))?;
    m.system = f.string("system")?;
    m.template = f.string("template")?.filter(|t| !t.is_empty());
    if let Some(t) = &m.template {
        modelfile::check_template(t).map_err(|e| Failure::field("template", e))?;
    }
    m.license = match f.take("license") {
        None => Vec::new(),
        Some(Value::String(s)) => vec![s],
        Some(Value::Array(a)) if a.iter().all(Value::is_string) => {
            a.into_iter().filter_map(|v| v.as_str().map(Into::into)).collect()
        }
        Some(_) => return Err(Failure::field("license", "it must be a string or an array of strings")),
    };
    let parameters = f.object("parameters")?.unwrap_or_default();
    m.parameters = Parameters::from_json(&parameters).map_err(|e| Failure::field("parameters", e))?;
    m.messages = super::messages::normalise(f.array("messages")?.unwrap_or_default())?;
    Ok((from, m))
}

/// `POST /api/create`.
pub async fn create(State(app): State<Arc<App>>, mut f: Fields) -> Result<Response, Failure> {
    let name = model(&mut f)?;
    let (from, m) = read(&mut f)?;
    let streamed = f.boolean("stream")?.unwrap_or(true);
    let made = blocking(move || {
        let base = match from {
            From::Model(name) => app.store.find(&name)?,
            From::Blob(digest) => {
                let blob = app.store.blob(&digest).filter(|b| b.is_file());
                Resolved::of_path(
                    &blob.ok_or_else(|| anyhow::anyhow!("files: blob {digest:?} was not uploaded"))?,
                )?
            }
        };
        app.store.make(&name, base, &m)
    });
    let made = made.await?;
    if !streamed {
        return Ok(Json(json!({"status": "success"})).into_response());
    }
    let layer = format!("using existing layer sha256:{}", made.digest);
    let all = ["parsing GGUF", &layer, "writing manifest", "success"];
    let lines: String = all.iter().map(|s| format!("{}\n", json!({"status": s}))).collect();
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], lines).into_response())
}

/// `POST /api/pull` and `/api/push`: refused, with the way out.
pub async fn registry() -> Failure {
    Failure::invalid(
        "rsinfer fetches and sends no models: give a GGUF file a name with /api/create or `rsinfer create`, or pull it with \
         Ollama, whose store is read",
    )
}

/// `POST /api/copy`.
pub async fn copy(State(app): State<Arc<App>>, mut f: Fields) -> Result<StatusCode, Failure> {
    let mut need =
        |name: &str| f.string(name)?.ok_or_else(|| Failure::field(name, "a model's name is required"));
    let (source, destination) = (need("source")?, need("destination")?);
    blocking(move || {
        let from = app.store.find(&source)?;
        app.store.copy(&from, &destination)
    })
    .await?;
    Ok(StatusCode::OK)
}

/// `DELETE /api/delete`.
pub async fn delete(State(app): State<Arc<App>>, mut f: Fields) -> Result<StatusCode, Failure> {
    let name = model(&mut f)?;
    blocking(move || app.store.remove(&name)).await?;
    Ok(StatusCode::OK)
}

fn blob(app: &App, digest: &str) -> Result<PathBuf, Failure> {
    app.store.blob(digest).ok_or_else(|| Failure::invalid("a digest is sha256: and 64 hexadecimal digits"))
}

/// `HEAD /api/blobs/:digest`.
pub async fn has_blob(
    State(app): State<Arc<App>>,
    Path(digest): Path<String>,
) -> Result<StatusCode, Failure> {
    match blob(&app, &digest)?.is_file() {
        true => Ok(StatusCode::OK),
        false => Err(Failure::NotFound(format!("blob {digest:?} not found"))),
    }
}

/// `POST /api/blobs/:digest`.
pub async fn put_blob(
    State(app): State<Arc<App>>,
    Path(digest): Path<String>,
    body: Body,
) -> Result<StatusCode, Failure> {
    let path = blob(&app, &digest)?;
    if path.is_file() {
        return Ok(StatusCode::OK);
    }
    let (pieces, mut arrived) = tokio::sync::mpsc::channel::<Bytes>(8);
    let want = digest.replacen('-', ":", 1);
    let written = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let mut hash = Sha256::new();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // It gets its name only when it is whole.
        let mut out = crate::output::OutFile::create(&path)?;
        while let Some(piece) = arrived.blocking_recv() {
            hash.update(&piece);
            out.write_all(&piece)?;
        }
        let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        anyhow::ensure!(want == format!("sha256:{hex}"), "digest mismatch: the body's is sha256:{hex}");
        out.finish()
    });
    let mut body = body.into_data_stream();
    loop {
        match tokio::time::timeout(PAUSE, body.next()).await {
            Err(_) => return Err(Failure::invalid("the upload paused for too long")),
            Ok(None) => break,
            Ok(Some(Err(e))) => return Err(Failure::invalid(format!("the upload broke off: {e}"))),
            Ok(Some(Ok(piece))) => {
                // Nobody receives after an error, which is reported below.
                if pieces.send(piece).await.is_err() {
                    break;
                }
            }
        }
    }
    drop(pieces);
    written.await.map_err(Failure::internal)?.map_err(failure)?;
    Ok(StatusCode::CREATED)
}
