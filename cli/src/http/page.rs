//! `GET /`: a page for browsers, and the line that everybody else expects there.

use axum::http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, VARY,
};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

/// The whole page: its style and its script are in it, each once.
const PAGE: &str = include_str!("page.html");

/// Nothing but this style, this script, and requests to this server.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let inside =
            PAGE.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
        STANDARD.encode(Sha256::digest(inside.map_or("", |(text, _)| text)))
    };
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script")
    );
    HeaderValue::from_str(&policy).expect("base64 is ASCII")
});

fn wants_html(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).any(|v| v.contains("text/html"))
}

/// See the module.
pub async fn root(headers: HeaderMap) -> Response {
    if !wants_html(&headers) {
        return ([(VARY, "accept")], "Ollama is running").into_response();
    }
    let fixed = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CACHE_CONTROL, "no-cache"),
        (REFERRER_POLICY, "no-referrer"),
        (VARY, "accept"),
    ];
    let mut response = (fixed, [("x-content-type-options", "nosniff")], PAGE).into_response();
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, POLICY.clone());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_self_contained() {
        for tag in ["style", "script"] {
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1, "{tag}");
            assert_eq!(PAGE.matches(&format!("</{tag}>")).count(), 1, "{tag}");
        }
        // The policy would forbid them: inline styles and handlers, and whatever lies elsewhere.
        for forbidden in [
            " style=\"",
            " onclick=",
            "http://",
            "https://",
            "innerHTML",
            "<link rel=\"stylesheet",
            "@import",
        ] {
            assert!(!PAGE.contains(forbidden), "{forbidden}");
        }
        let policy = POLICY.to_str().expect("ASCII");
        assert!(!policy.contains("unsafe") && !policy.contains("sha256-'"), "{policy}");
        // SHA-256 of nothing: a tag was not found.
        assert!(!policy.contains("47DEQpj8HBSa"), "{policy}");
    }

    #[test]
    fn browsers_are_told_apart() {
        let wants = |accept: &str| {
            let mut h = HeaderMap::new();
            h.insert(ACCEPT, accept.parse().expect("a header"));
            wants_html(&h)
        };
        assert!(wants("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"));
        assert!(!wants("*/*") && !wants("application/json") && !wants_html(&HeaderMap::new()));
    }
}
