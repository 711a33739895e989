//! Who may ask: foreign hosts and origins are kept out (DNS rebinding), an API key is checked. Requests get an id, a line in
//! the log and a place in the metrics.

use crate::serve::failure::Failure;
use crate::serve::prompt::App;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tower_http::cors::{AllowOrigin, CorsLayer};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Whether a request to a server on loopback may name this host: local names, and addresses that are nobody else's.
fn is_local(host: &str) -> bool {
    let host = host
        .strip_prefix('[')
        .and_then(|h| h.split_once(']'))
        .map_or_else(|| host.rsplit_once(':').map_or(host, |(h, _)| h), |(inside, _)| inside);
    if let Ok(ip) = host.parse::<IpAddr>() {
        return match ip {
            IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_unspecified(),
            IpAddr::V6(v6) => v6.is_loopback() || v6.is_unspecified(),
        };
    }
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    host.is_empty()
        || host == "localhost"
        || [".localhost", ".local", ".internal"].iter().any(|t| host.ends_with(t))
}

/// Whether an origin matches `http://host`, `http://host:*`, `app://*` or `*`.
fn matches(pattern: &str, origin: &str) -> bool {
    match pattern.strip_suffix('*') {
        None => origin == pattern,
        Some("") => true,
        Some(start) => origin.strip_prefix(start).is_some_and(|rest| {
            !start.ends_with(':') || (!rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
        }),
    }
}

/// Ollama's local origins, and those of the configuration.
fn origins(extra: &[String]) -> Vec<String> {
    let mut all: Vec<String> = extra.to_vec();
    for host in ["localhost", "127.0.0.1", "0.0.0.0", "[::1]"] {
        for scheme in ["http", "https"] {
            all.push(format!("{scheme}://{host}"));
            all.push(format!("{scheme}://{host}:*"));
        }
    }
    all.extend(["app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*"].map(Into::into));
    all
}

/// Answers preflights, and says which origins may read answers.
pub fn cors(app: &App) -> CorsLayer {
    let allowed = origins(&app.config.origins);
    let allow = move |origin: &HeaderValue, _: &axum::http::request::Parts| {
        origin.to_str().is_ok_and(|o| allowed.iter().any(|p| matches(p, o)))
    };
    let methods = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(allow))
        .allow_methods(methods)
        .allow_headers(tower_http::cors::AllowHeaders::mirror_request())
        .max_age(Duration::from_secs(12 * 3600))
}

fn text(headers: &HeaderMap, name: impl header::AsHeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Time depends on the length alone.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

fn admit(app: &App, loopback: bool, request: &Request) -> Result<(), Failure> {
    let h = request.headers();
    let host = request.uri().authority().map(|a| a.as_str()).or_else(|| text(h, header::HOST)).unwrap_or("");
    if loopback && !is_local(host) {
        return Err(Failure::Forbidden(format!("host {:?} is not allowed", crate::output::one_line(host))));
    }
    if let Some(o) = h.get(header::ORIGIN) {
        let allowed = origins(&app.config.origins);
        // A page that this server itself sent.
        let own = o.to_str().is_ok_and(|o| o.split_once("://").is_some_and(|(_, h)| h == host));
        if !own && !o.to_str().is_ok_and(|o| allowed.iter().any(|p| matches(p, o))) {
            return Err(Failure::Forbidden("this origin is not allowed (OLLAMA_ORIGINS)".into()));
        }
    }
    let open =
        matches!(request.uri().path(), "/" | "/health" | "/v1/health") || request.method() == Method::OPTIONS;
    if let Some(key) = app.config.api_key.as_deref().filter(|_| !open) {
        let bearer = text(h, header::AUTHORIZATION).and_then(|v| v.strip_prefix("Bearer "));
        let given = bearer.or_else(|| text(h, "x-api-key")).unwrap_or("");
        if !same(given.trim(), key) {
            return Err(Failure::Unauthorized);
        }
    }
    Ok(())
}

/// Middleware: see the module.
pub async fn gate(
    State((app, loopback)): State<(Arc<App>, bool)>,
    mut request: Request,
    next: Next,
) -> Response {
    let given = request.headers().get(REQUEST_ID).filter(|v| v.len() <= 128).cloned();
    let id = given.unwrap_or_else(|| {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        HeaderValue::from_str(&format!("req-{n}")).unwrap_or(HeaderValue::from_static("req"))
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let start = Instant::now();
    let mut response = match admit(&app, loopback, &request) {
        Ok(()) => next.run(request).await,
        Err(f) => f.into_response(),
    };
    let status = response.status().as_u16();
    metrics::counter!("rsinfer_http_requests_total", "status" => status.to_string()).increment(1);
    metrics::histogram!("rsinfer_http_request_seconds").record(start.elapsed());
    tracing::info!(id = id.to_str().unwrap_or(""), %method, path = crate::output::one_line(&path), status,
        head_ms = start.elapsed().as_millis() as u64);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_origins() {
        for h in [
            "localhost",
            "localhost:11434",
            "127.0.0.1:1",
            "[::1]:11434",
            "a.localhost",
            "box.local:80",
            "192.168.1.5",
            "",
        ] {
            assert!(is_local(h), "{h}");
        }
        for h in ["evil.com", "evil.com:11434", "localhost.evil.com", "8.8.8.8", "notlocal"] {
            assert!(!is_local(h), "{h}");
        }
        let all = origins(&["https://my.page".into()]);
        let allowed = |o: &str| all.iter().any(|p| matches(p, o));
        for o in [
            "http://localhost",
            "http://localhost:3000",
            "https://127.0.0.1:8443",
            "https://my.page",
            "app://x",
        ] {
            assert!(allowed(o), "{o}");
        }
        for o in [
            "http://localhost.evil.com",
            "http://localhost:80@evil.com",
            "https://evil.com",
            "null",
            "https://my.page.evil.com",
        ] {
            assert!(!allowed(o), "{o}");
        }
        assert!(matches("*", "https://any.where"));
        assert!(same("abc", "abc") && !same("abc", "abd") && !same("abc", "ab"));
    }
}
