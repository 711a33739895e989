//! Answers as streams of HTTP: JSON lines, server-sent events. Knows nothing of what they say.

use crate::serve::failure::Failure;
use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use futures_util::stream::{self, Stream};
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Silence after which a stream of events says that it lives.
const PING: Duration = Duration::from_secs(10);

/// What makes the pieces of a stream.
pub trait Source: Send + 'static {
    /// The next piece, framed; `None`: the end. An error has been framed by the source.
    fn next(&mut self) -> impl Future<Output = Option<String>> + Send;
}

fn response(
    kind: &'static str,
    body: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Response {
    let mut r = Response::new(Body::from_stream(body));
    r.headers_mut().insert(CONTENT_TYPE, axum::http::HeaderValue::from_static(kind));
    r.headers_mut().insert(CACHE_CONTROL, axum::http::HeaderValue::from_static("no-cache"));
    r
}

/// One JSON object a line.
pub fn ndjson(source: impl Source) -> Response {
    let body = stream::unfold(source, |mut s| async move { Some((Ok(Bytes::from(s.next().await?)), s)) });
    response("application/x-ndjson", body)
}

/// Server-sent events, with comments while nothing else is to be said.
pub fn events(source: impl Source) -> Response {
    // A piece that is being made must survive the ping: the source lives in a task.
    let (tx, rx) = tokio::sync::mpsc::channel::<String>(1);
    tokio::spawn(async move {
        let mut source = source;
        loop {
            tokio::select! {
                piece = source.next() => match piece {
                    Some(p) => if tx.send(p).await.is_err() { return },
                    None => return,
                },
                () = tx.closed() => return,
            }
        }
    });
    let body = stream::unfold(rx, |mut rx| async move {
        let piece = tokio::select! {
            p = rx.recv() => p?,
            () = sleep_until(Instant::now() + PING) => ": still here\n\n".into(),
        };
        Some((Ok(Bytes::from(piece)), rx))
    });
    response("text/event-stream", body)
}

/// `data: ...` of a JSON value.
pub fn data(v: &serde_json::Value) -> String {
    format!("data: {v}\n\n")
}

/// A failure in the log, where the client has its status already.
pub fn log(f: &Failure) {
    tracing::warn!(status = f.status(), "a stream ended with an error: {f}");
}
