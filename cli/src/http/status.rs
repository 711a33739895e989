//! `GET /api/status`: of every loaded model the memory plan, the queue, and what the cache holds of each sequence. For people
//! (the page at `/`) and their scripts; Ollama has no such route.

use super::catalog::{loading, time};
use crate::cmd::plan::device_json;
use crate::memory::Resident;
use crate::serve::models::Loaded;
use crate::serve::prompt::App;
use crate::serve::status::SlotStatus;
use axum::Json;
use axum::extract::State;
use engine::SeqId;
use engine::plan::available_memory;
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Stretches that a sequence is cut into to show what is left of it.
const PARTS: usize = 64;
/// The engine answers between two passes; a long pass is not waited for.
const PATIENCE: Duration = Duration::from_millis(250);

/// What the cache still holds of sequences; empty where it is not known.
async fn held(l: &Loaded, seqs: Vec<Option<SeqId>>) -> Vec<Vec<f32>> {
    let (tx, rx) = tokio::sync::oneshot::channel();
    let n = seqs.len();
    l.worker.call(Box::new(move |context| {
        let cache = context.cache();
        let one = |s: Option<SeqId>| s.and_then(|s| cache.held(s, PARTS).ok()).unwrap_or_default();
        let _ = tx.send(seqs.into_iter().map(one).collect());
    }));
    match tokio::time::timeout(PATIENCE, rx).await {
        Ok(Ok(all)) => all,
        _ => vec![Vec::new(); n],
    }
}

fn sequence(s: &SlotStatus, held: &[f32]) -> Value {
    let state = match (s.job, s.prompt_left) {
        (None, _) => "idle",
        (Some(_), 0) => "decoding",
        (Some(_), _) => "prompt",
    };
    // Two digits are enough to draw.
    let held: Vec<f64> = held.iter().map(|h| (f64::from(*h) * 100.0).round() / 100.0).collect();
    json!({"state": state, "request": s.job, "tokens": s.cached, "prompt_left": s.prompt_left, "evicted": s.evicted,
        "generated": s.made, "held": held})
}

async fn model(l: Arc<Loaded>) -> Value {
    let status = l.worker.status();
    let held = held(&l, status.slots.iter().map(|s| s.seq).collect()).await;
    let sequences: Vec<Value> = status.slots.iter().zip(&held).map(|(s, h)| sequence(s, h)).collect();
    json!({"name": l.resolved.name, "context_length": l.ctx, "parallel": l.parallel, "kv": l.kv.to_string(),
        "keeps_system_prompt": l.own_kv,
        "expires_at": l.expires().map(time), "plan": device_json(&l.plan), "waiting": status.waiting,
        "kv_entries_used": status.kv.0, "kv_entries": status.kv.1, "sequences": sequences})
}

/// See the module.
pub async fn status(State(app): State<Arc<App>>) -> Json<Value> {
    let own = Resident::now();
    let models = join_all(app.models.list().into_iter().map(model)).await;
    let loading = app.models.loading().map(|l| loading(&l));
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "models": models, "loading": loading,
        "memory": {"available_bytes": available_memory(), "anonymous_bytes": own.map(|m| m.anon),
            "file_bytes": own.map(|m| m.file)}}))
}
