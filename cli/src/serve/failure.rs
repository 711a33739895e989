//! Why a request failed, once for all dialects: each renders it in its own form. Knows nothing of HTTP but status numbers.

use std::fmt;

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// The request makes no sense, or asks for what cannot be done; `param` names the field.
    Invalid {
        message: String,
        param: Option<String>,
    },
    /// No or a wrong API key.
    Unauthorized,
    /// A foreign host or origin.
    Forbidden(String),
    /// No such model (its name), or no such thing.
    NoModel(String),
    NotFound(String),
    /// The route is there, but not for this method.
    Method,
    /// The prompt does not fit, and may not be cut.
    TooLong {
        prompt: usize,
        ctx: usize,
    },
    /// The body is too large.
    TooLarge(usize),
    /// As many requests wait as may.
    Busy,
    /// Something in the server; the request may be tried again.
    Internal(String),
    /// The server is going down, or took too long.
    Unavailable(String),
}

impl Failure {
    /// A request that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { message: crate::output::one_line(&message.into()), param: None }
    }

    /// The same, for a field.
    pub fn field(param: &str, message: impl fmt::Display) -> Self {
        let message = crate::output::one_line(&format!("{param}: {message}"));
        Self::Invalid { message, param: Some(param.into()) }
    }

    /// Something in the server.
    pub fn internal(e: impl fmt::Display) -> Self {
        Self::Internal(crate::output::one_line(&format!("{e:#}")))
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::Invalid { .. } | Self::TooLong { .. } => 400,
            Self::Unauthorized => 401,
            Self::Forbidden(_) => 403,
            Self::NoModel(_) | Self::NotFound(_) => 404,
            Self::Method => 405,
            Self::TooLarge(_) => 413,
            Self::Busy | Self::Unavailable(_) => 503,
            Self::Internal(_) => 500,
        }
    }

    /// OpenAI's and llama-server's name for the kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Invalid { .. } | Self::TooLarge(_) | Self::Method => "invalid_request_error",
            Self::TooLong { .. } => "exceed_context_size_error",
            Self::Unauthorized => "authentication_error",
            Self::Forbidden(_) => "permission_error",
            Self::NoModel(_) | Self::NotFound(_) => "not_found_error",
            Self::Busy | Self::Unavailable(_) => "unavailable_error",
            Self::Internal(_) => "api_error",
        }
    }

    /// The field that is wrong.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::NoModel(_) => Some("model"),
            _ => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { message, .. } => f.write_str(message),
            Self::Unauthorized => f.write_str("invalid API key"),
            Self::Method => f.write_str("405 method not allowed"),
            Self::Forbidden(m) | Self::NotFound(m) | Self::Internal(m) | Self::Unavailable(m) => {
                f.write_str(m)
            }
            Self::NoModel(name) => write!(f, "model '{name}' not found"),
            Self::TooLong { prompt, ctx } => write!(
                f,
                "the prompt of {prompt} tokens exceeds the context of {ctx}: shorten it, raise num_ctx, or allow truncate and shift"
            ),
            Self::TooLarge(most) => write!(f, "the request body is larger than {most} bytes"),
            // Ollama's text, its two spaces included: clients look for it.
            Self::Busy => f.write_str("server busy, please try again.  maximum pending requests exceeded"),
        }
    }
}

impl std::error::Error for Failure {}
