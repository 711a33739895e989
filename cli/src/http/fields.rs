//! A request's JSON object, field by field: each is taken out once, with its type checked; what is left over is unknown.

use crate::serve::failure::Failure;
use crate::store::parameters;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use serde_json::{Map, Value};
use std::time::Duration;

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Debug, Default)]
pub struct Fields(pub Map<String, Value>);

fn wrong(name: &str, kind: &str) -> Failure {
    Failure::field(name, format!("it must be {kind}"))
}

impl Fields {
    /// A field, if it is there and not null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|v| !v.is_null())
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(wrong(name, "a string")),
        }
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(_) => Err(wrong(name, "true or false")),
        }
    }

    pub fn int(&mut self, name: &str) -> Result<Option<i64>, Failure> {
        let whole = |v| parameters::whole(&v).ok_or_else(|| wrong(name, "a whole number"));
        self.take(name).map(whole).transpose()
    }

    /// A whole number in a range.
    pub fn within(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<Option<usize>, Failure> {
        let Some(n) = self.int(name)? else { return Ok(None) };
        let n = usize::try_from(n).ok().filter(|n| range.contains(n));
        n.map(Some).ok_or_else(|| wrong(name, &format!("between {} and {}", range.start(), range.end())))
    }

    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(a)) => Ok(Some(a)),
            Some(_) => Err(wrong(name, "an array")),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Failure> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(o)) => Ok(Some(o)),
            Some(_) => Err(wrong(name, "an object")),
        }
    }

    /// Descriptions of functions, in OpenAI's form, which is Ollama's too.
    pub fn tools(&mut self, name: &str) -> Result<Vec<Value>, Failure> {
        let all = self.array(name)?.unwrap_or_default();
        let sound = |t: &Value| {
            let (f, kind) = (&t["function"], &t["type"]);
            let optional = |v: &Value, is: fn(&Value) -> bool| v.is_null() || is(v);
            f["name"].is_string()
                && optional(kind, |k| k == "function")
                && optional(&f["description"], Value::is_string)
                && optional(&f["parameters"], Value::is_object)
        };
        match all.iter().all(sound) {
            true => Ok(all),
            false => {
                Err(wrong(name, "an array of functions, each with a name and parameters that are a schema"))
            }
        }
    }

    /// Token ids.
    pub fn tokens(&mut self, name: &str) -> Result<Vec<u32>, Failure> {
        let all = self.array(name)?.unwrap_or_default();
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        all.iter().map(id).collect::<Option<_>>().ok_or_else(|| wrong(name, "an array of token ids"))
    }

    /// Refuses a field that is there, unless it says what is done anyway.
    pub fn refuse(&mut self, name: &str, harmless: impl Fn(&Value) -> bool) -> Result<(), Failure> {
        match self.take(name) {
            Some(v) if !harmless(&v) => Err(Failure::field(name, "this is not supported")),
            _ => Ok(()),
        }
    }

    /// Refuses what is left over.
    pub fn nothing_else(self) -> Result<(), Failure> {
        match self.0.into_iter().find(|(_, v)| !v.is_null()) {
            Some((name, _)) => Err(Failure::field(&name, "this field is not supported")),
            None => Ok(()),
        }
    }

    /// Reads a body.
    ///
    /// # Errors
    /// It is no JSON object.
    pub fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        if bytes.trim_ascii().is_empty() {
            return Err(Failure::invalid("missing request body"));
        }
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(o)) => Ok(Self(o)),
            Ok(_) => Err(Failure::invalid("the request body is not a JSON object")),
            Err(e) => Err(Failure::invalid(format!("the request body is not JSON: {e}"))),
        }
    }
}

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        // Said before it is sent, it need not be waited for.
        let length = request.headers().get(axum::http::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok());
        if length.and_then(|l| l.parse::<u64>().ok()).is_some_and(|n| n > super::BODY_LIMIT as u64) {
            return Err(Failure::TooLarge(super::BODY_LIMIT));
        }
        let body = tokio::time::timeout(BODY_TIME, Bytes::from_request(request, state)).await;
        let body = body.map_err(|_| Failure::invalid("the request body did not arrive in time"))?;
        Self::parse(&body.map_err(|e| match e.status().as_u16() {
            413 => Failure::TooLarge(super::BODY_LIMIT),
            _ => Failure::invalid(e.to_string()),
        })?)
    }
}
