//! Failures in each dialect's form. A handler's failure travels in the response; [`dress`] gives it the form of its route.

use crate::serve::failure::Failure;
use axum::Json;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut r =
            StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR).into_response();
        r.extensions_mut().insert(self);
        r
    }
}

/// Ollama's error object.
pub fn ollama(f: &Failure) -> Value {
    let mut e = json!({"error": f.to_string()});
    if let Failure::TooLong { prompt, ctx } = f {
        e["type"] = f.kind().into();
        e["n_prompt_tokens"] = (*prompt).into();
        e["n_ctx"] = (*ctx).into();
    }
    e
}

/// OpenAI's, with llama-server's fields for prompts that are too long.
pub fn openai(f: &Failure) -> Value {
    let code = match f {
        Failure::NoModel(_) => json!("model_not_found"),
        Failure::TooLong { .. } => json!("context_length_exceeded"),
        Failure::Unauthorized => json!("invalid_api_key"),
        _ => Value::Null,
    };
    let mut e = json!({"message": f.to_string(), "type": f.kind(), "param": f.param(), "code": code});
    if let Failure::TooLong { prompt, ctx } = f {
        e["n_prompt_tokens"] = (*prompt).into();
        e["n_ctx"] = (*ctx).into();
    }
    json!({"error": e})
}

/// Anthropic's.
pub fn anthropic(f: &Failure) -> Value {
    let kind = match f.status() {
        400 => "invalid_request_error",
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        503 => "overloaded_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": f.to_string()}})
}

/// llama-server's.
pub fn llama(f: &Failure) -> Value {
    let mut e = openai(f);
    e["error"]["code"] = f.status().into();
    e
}

/// The form for a route.
fn form(path: &str, f: &Failure) -> Value {
    match path {
        p if p.starts_with("/v1/messages") => anthropic(f),
        p if p.starts_with("/v1/") => openai(f),
        p if p.starts_with("/api/") || p == "/" => ollama(f),
        _ => llama(f),
    }
}

/// Middleware: gives failures their form.
pub async fn dress(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    match response.extensions_mut().remove::<Failure>() {
        Some(f) => {
            if f.status() >= 500 {
                tracing::warn!(path, "{f}");
            }
            (response.status(), Json(form(&path, &f))).into_response()
        }
        None => response,
    }
}
