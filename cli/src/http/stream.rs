//! Answers as streams of HTTP: JSON lines, server-sent events. What is written when, a dialect says; the order of answers that
//! come side by side, what waits to be sent, and the end are kept here.

use crate::serve::answer::{Answer, End, Said, Step};
use crate::serve::failure::Failure;
use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll, Stream};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Silence after which a stream of events says that it lives.
const PING: Duration = Duration::from_secs(10);

/// Pieces, framed, that wait to be sent.
pub type Out = VecDeque<String>;

/// How answers are written.
pub trait Dialect: Send + 'static {
    /// They have begun.
    fn begin(&mut self, _answers: &[Answer], _out: &mut Out) {}
    /// The answer of this number goes on.
    fn said(&mut self, i: usize, said: Said, out: &mut Out);
    /// The answer of this number has ended.
    fn done(&mut self, i: usize, end: End, out: &mut Out);
    /// All have ended.
    fn over(&mut self, _out: &mut Out) {}
    /// Instead of all that: what broke them off.
    fn failed(&mut self, f: &Failure, out: &mut Out);
}

/// Answers that are being written.
struct Writing<D> {
    dialect: D,
    out: Out,
    steps: SelectAll<BoxStream<'static, (usize, Result<Step, Failure>)>>,
    over: bool,
}

impl<D: Dialect> Writing<D> {
    fn new(answers: Result<Vec<Answer>, Failure>, dialect: D) -> Self {
        let mut w = Self { dialect, out: Out::new(), steps: SelectAll::new(), over: false };
        match answers {
            Ok(answers) => {
                w.dialect.begin(&answers, &mut w.out);
                w.steps.extend(answers.into_iter().enumerate().map(|(i, a)| steps(i, a)));
            }
            Err(f) => w.fail(&f),
        }
        w
    }

    fn fail(&mut self, f: &Failure) {
        // The client has its status already.
        tracing::warn!(status = f.status(), "a stream ended with an error: {f}");
        self.dialect.failed(f, &mut self.out);
        self.steps.clear();
        self.over = true;
    }

    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(piece) = self.out.pop_front() {
                return Some(piece);
            }
            if self.over {
                return None;
            }
            match self.steps.next().await {
                Some((i, Ok(Step::Said(said)))) => self.dialect.said(i, said, &mut self.out),
                Some((i, Ok(Step::Done(end)))) => self.dialect.done(i, end, &mut self.out),
                Some((_, Err(f))) => self.fail(&f),
                None => {
                    self.dialect.over(&mut self.out);
                    self.over = true;
                }
            }
        }
    }
}

/// The steps of the answer of number `i`; there is none after its end or an error.
fn steps(i: usize, answer: Answer) -> BoxStream<'static, (usize, Result<Step, Failure>)> {
    let next = move |answer: Option<Answer>| async move {
        let mut answer = answer?;
        let step = answer.next().await;
        let rest = matches!(step, Ok(Step::Said(_))).then_some(answer);
        Some(((i, step), rest))
    };
    stream::unfold(Some(answer), next).boxed()
}

fn response(kind: &'static str, body: impl Stream<Item = String> + Send + 'static) -> Response {
    let body = body.map(|piece| Ok::<_, Infallible>(Bytes::from(piece)));
    let mut r = Response::new(Body::from_stream(body));
    r.headers_mut().insert(CONTENT_TYPE, axum::http::HeaderValue::from_static(kind));
    r.headers_mut().insert(CACHE_CONTROL, axum::http::HeaderValue::from_static("no-cache"));
    r
}

/// One JSON object a line.
pub fn ndjson(answers: Vec<Answer>, dialect: impl Dialect) -> Response {
    let writing = Writing::new(Ok(answers), dialect);
    let body = stream::unfold(writing, |mut w| async move { Some((w.next().await?, w)) });
    response("application/x-ndjson", body)
}

/// Server-sent events, with comments while nothing else is to be said: a model that is loaded takes its time, and so does a
/// long prompt. What fails soon has a status; later it is an event.
///
/// # Errors
/// Why the answers cannot begin.
pub async fn events(
    answers: impl Future<Output = Result<Vec<Answer>, Failure>> + Send + 'static,
    dialect: impl Dialect,
) -> Result<Response, Failure> {
    let mut answers = Box::pin(answers);
    let begun = match timeout(PING, &mut answers).await {
        Ok(begun) => Some(begun?),
        Err(_) => None,
    };
    let writing = async move {
        let answers = match begun {
            Some(a) => Ok(a),
            None => answers.await,
        };
        Writing::new(answers, dialect)
    };
    let pieces = stream::once(writing)
        .flat_map(|writing| stream::unfold(writing, |mut w| async move { Some((w.next().await?, w)) }));
    let body = stream::unfold(Box::pin(pieces), |mut pieces| async move {
        let piece = tokio::select! {
            piece = pieces.next() => piece?,
            () = sleep(PING) => ": still here\n\n".into(),
        };
        Some((piece, pieces))
    });
    Ok(response("text/event-stream", body))
}

/// `data: ...` of a JSON value.
pub fn data(v: &serde_json::Value) -> String {
    format!("data: {v}\n\n")
}

/// The same with the event's name, its `type`.
pub fn event(v: &serde_json::Value) -> String {
    format!("event: {}\n{}", v["type"].as_str().unwrap_or("message"), data(v))
}
