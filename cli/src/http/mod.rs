//! HTTP: the routes, and a server that keeps its word until it has said the last one. Knows nothing of engines.

mod anthropic;
mod catalog;
mod embed;
mod error;
mod fields;
mod gate;
mod llama;
mod manage;
mod messages;
mod ollama;
mod openai;
mod openapi;
mod page;
mod responses;
mod status;
mod stream;

pub use catalog::Known;

use crate::serve::config::Config;
use crate::serve::failure::Failure;
use crate::serve::metrics::Metrics;
use crate::serve::models::Models;
use crate::serve::prompt::App;
use crate::store::Store;
use anyhow::{Context, Result};
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::{delete, get, head, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::TcpListener;
use tower_http::catch_panic::CatchPanicLayer;

/// Bytes of a request's body.
pub const BODY_LIMIT: usize = 64 << 20;
/// How long the header of a request may take, and an idle connection be kept.
const HEADER_TIME: Duration = Duration::from_secs(30);

/// All routes.
fn router(app: Arc<App>, loopback: bool) -> Router {
    Router::new()
        .route("/", get(page::root))
        .route("/openapi.json", get(openapi::document))
        .route("/api/version", get(catalog::version))
        .route("/api/tags", get(catalog::tags))
        .route("/api/ps", get(catalog::ps))
        .route("/api/status", get(status::status))
        .route("/api/show", post(catalog::show))
        .route("/api/generate", post(ollama::generate))
        .route("/api/chat", post(ollama::chat))
        .route("/api/embed", post(embed::embed))
        .route("/api/embeddings", post(embed::embeddings))
        .route("/api/create", post(manage::create))
        .route("/api/copy", post(manage::copy))
        .route("/api/pull", post(manage::registry))
        .route("/api/push", post(manage::registry))
        .route("/api/delete", delete(manage::delete))
        .route("/api/blobs/{digest}", head(manage::has_blob).post(manage::put_blob))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(anthropic::create))
        .route("/v1/messages/count_tokens", post(anthropic::count))
        .route("/props", get(llama::props))
        .route("/slots", get(llama::slots))
        .route("/tokenize", post(llama::tokenize))
        .route("/detokenize", post(llama::detokenize))
        .route("/apply-template", post(llama::apply_template))
        .route("/completion", post(llama::completion))
        .route("/v1/embeddings", post(embed::openai))
        .route("/v1/models", get(catalog::models))
        .route("/v1/models/{*id}", get(catalog::model))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/health", get(catalog::health))
        .route("/v1/health", get(catalog::health))
        .route("/metrics", get(catalog::metrics))
        .method_not_allowed_fallback(async || Failure::Method)
        .fallback(async || Failure::NotFound("404 page not found".into()))
        .layer(CatchPanicLayer::custom(|_| Failure::internal("the request failed").into_response()))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(gate::cors(&app))
        .layer(from_fn_with_state((app.clone(), loopback), gate::gate))
        .layer(from_fn(error::dress))
        .with_state(app)
}

/// Serves until SIGINT or SIGTERM; then takes no more, and ends when the last answer is given. A second signal ends it at once.
///
/// # Errors
/// An address that cannot be listened on.
pub async fn serve(config: Config) -> Result<()> {
    let metrics = Metrics::install()?;
    let listener =
        TcpListener::bind(&config.host).await.with_context(|| format!("cannot listen on {}", config.host))?;
    let at = listener.local_addr()?;
    let preload = config.models.first().and_then(|p| Some(p.file_stem()?.to_str()?.to_owned()));
    let app = Arc::new(App {
        store: Store::from_env().with_files(config.models.clone()),
        models: Models::new(Arc::new(config.clone())),
        config,
        metrics,
        counter: Default::default(),
        starting: preload.is_some().into(),
        known: Known::default(),
    });
    let routes = router(app.clone(), at.ip().is_loopback());
    // For people and for those who wait for it.
    eprintln!("rsinfer serves on http://{at}");
    let starting = app.clone();
    let mut preloading = tokio::spawn(async move {
        if let Some(name) = preload {
            let model = starting.resolve(&name)?;
            drop(starting.models.acquire(&model, &Default::default(), None).await?);
            starting.starting.store(false, Ordering::Relaxed);
        }
        Ok::<(), Failure>(())
    });
    let mut preloaded = false;
    let graceful = GracefulShutdown::new();
    let mut signals = Signals::new()?;
    loop {
        let (socket, _) = tokio::select! {
            s = listener.accept() => match s {
                Ok(s) => s,
                Err(e) => {
                    // Too many open files, mostly: give others time to end.
                    tracing::warn!("a connection cannot be accepted: {e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            loaded = &mut preloading, if !preloaded => {
                loaded??;
                preloaded = true;
                continue;
            }
            () = signals.next() => break,
        };
        let _ = socket.set_nodelay(true);
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_headers(128);
        let connection =
            http.serve_connection(TokioIo::new(socket), TowerToHyperService::new(routes.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!("a connection ended: {e}");
            }
        });
    }
    drop(listener);
    eprintln!("finishing {} connections; a second signal ends at once", graceful.count());
    tokio::select! {
        () = graceful.shutdown() => {}
        () = signals.next() => eprintln!("ended with answers under way"),
    }
    Ok(())
}

/// SIGINT and SIGTERM.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            #[cfg(unix)]
            terminate: tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
    }
}
