//! Go's durations, which Ollama's clients and variables use: `5m`, `1h30m`, `-1s`, or seconds as a number.

use serde_json::Value;
use std::time::Duration;

/// How long an idle model stays loaded; `None`: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive(pub Option<Duration>);

/// Longer is for ever: clocks cannot be asked for what lies centuries ahead.
const EVER: f64 = 3e9;

impl KeepAlive {
    /// Seconds; negative: for ever.
    fn seconds(s: f64) -> Self {
        Self((0.0..EVER).contains(&s).then(|| Duration::from_secs_f64(s)))
    }

    /// A Go duration, or a number of seconds.
    pub fn parse(s: &str) -> Option<Self> {
        let s = s.trim();
        let seconds = s.parse::<f64>().ok().filter(|n| n.is_finite()).or_else(|| go_seconds(s))?;
        Some(Self::seconds(seconds))
    }

    /// The same of a request's field.
    pub fn from_json(v: &Value) -> Option<Self> {
        match v {
            Value::String(s) => Self::parse(s),
            v => v.as_f64().map(Self::seconds),
        }
    }
}

/// Seconds of a Go duration (time.ParseDuration).
pub fn go_seconds(s: &str) -> Option<f64> {
    let (sign, mut rest) = match s.strip_prefix('-') {
        Some(r) => (-1.0, r),
        None => (1.0, s.strip_prefix('+').unwrap_or(s)),
    };
    if rest == "0" {
        return Some(0.0);
    }
    let mut total = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        total += number
            * match &rest[..end] {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[end..];
    }
    Some(sign * total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn as_go_and_ollama_read_them() {
        let s = |s: f64| Some(KeepAlive(Some(Duration::from_secs_f64(s))));
        for (v, want) in [
            (json!("5m"), s(300.0)),
            (json!("1h30m"), s(5400.0)),
            (json!("1.5s"), s(1.5)),
            (json!("250ms"), s(0.25)),
            (json!("0"), s(0.0)),
            (json!(0), s(0.0)),
            (json!(60), s(60.0)),
            (json!("60"), s(60.0)),
            (json!(-1), Some(KeepAlive(None))),
            (json!("-1m"), Some(KeepAlive(None))),
            (json!(1e300), Some(KeepAlive(None))),
            (json!("99999999h"), Some(KeepAlive(None))),
            (json!("soon"), None),
            (json!("5"), s(5.0)),
            (json!("m"), None),
            (json!("5 m"), None),
            (json!(""), None),
            (json!("NaN"), None),
            (json!(null), None),
            (json!([1]), None),
        ] {
            assert_eq!(KeepAlive::from_json(&v), want, "{v}");
        }
    }
}
