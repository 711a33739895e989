//! `ps` and `stop`: questions to a running server, rsinfer's or Ollama's, over Ollama's API.

use crate::output::{self, one_line};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::time::Duration;

/// What to ask of whom.
pub struct Config {
    pub server: Server,
    pub action: Action,
}

/// What to ask.
pub enum Action {
    List,
    Stop(String),
}

/// A server's base address.
pub struct Server(String);

impl Server {
    /// `HOST`, `HOST:PORT` or `http://HOST:PORT`; the port is Ollama's unless a scheme goes without one.
    pub fn at(host: &str) -> Self {
        let host = host.trim().trim_matches(['"', '\'']).trim_end_matches('/');
        if host.contains("://") {
            return Self(host.into());
        }
        // 0.0.0.0 is where servers listen, not where they are.
        let host = host.replace("0.0.0.0", "127.0.0.1");
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(h, p)| p.parse::<u16>().is_ok() && (!h.contains(':') || h.ends_with(']')));
        Self(if has_port { format!("http://{host}") } else { format!("http://{host}:11434") })
    }

    fn ask(&self, path: &str, body: Option<Value>) -> Result<Value> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(5)))
            .http_status_as_error(false)
            .build()
            .into();
        let url = format!("{}{path}", self.0);
        let sent = match body {
            Some(body) => agent.post(&url).send_json(body),
            None => agent.get(&url).call(),
        };
        let mut response = sent.with_context(|| {
            format!(
                "no server answers at {} (start one with `rsinfer serve`, or name it with --host)",
                self.0
            )
        })?;
        let answer: Value =
            response.body_mut().read_json().with_context(|| format!("{url}: the answer is no JSON"))?;
        match answer["error"].as_str() {
            Some(e) => bail!("{}", one_line(e)),
            None if !response.status().is_success() => bail!("{url}: {}", response.status()),
            None => Ok(answer),
        }
    }
}

pub fn run(c: &Config) -> Result<()> {
    match &c.action {
        Action::List => {
            let answer = c.server.ask("/api/ps", None)?;
            let models = answer["models"].as_array().cloned().unwrap_or_default();
            let rows = models.iter().map(row);
            let header = ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"];
            Ok(output::print(&output::columns(&header, rows))?)
        }
        Action::Stop(model) => {
            let body = json!({"model": model, "keep_alive": 0, "stream": false});
            c.server.ask("/api/generate", Some(body)).map(drop)
        }
    }
}

fn row(m: &Value) -> Vec<String> {
    let text = |key: &str| one_line(m[key].as_str().unwrap_or_default());
    let (size, gpu) = (m["size"].as_u64().unwrap_or(0), m["size_vram"].as_u64().unwrap_or(0));
    let processor = match (size, gpu) {
        (_, 0) => "100% CPU".to_owned(),
        (size, gpu) if gpu >= size => "100% GPU".to_owned(),
        (size, gpu) => {
            let cpu = ((size - gpu) as f64 * 100.0 / size as f64).round() as u64;
            format!("{cpu}%/{}% CPU/GPU", 100 - cpu)
        }
    };
    let context = m["context_length"].as_u64().map_or(String::new(), |n| n.to_string());
    let until = match text("expires_at").parse::<jiff::Timestamp>() {
        Err(_) => String::new(),
        Ok(t) => {
            let left = t.duration_since(jiff::Timestamp::now());
            match Duration::try_from(left) {
                Err(_) => "Stopping...".into(),
                // Servers say a date far away for "never".
                Ok(left) if left > Duration::from_secs(100 * 365 * 86400) => "Forever".into(),
                Ok(left) => format!("{} from now", output::rough(left)),
            }
        }
    };
    let id: String = text("digest").trim_start_matches("sha256:").chars().take(12).collect();
    vec![text("name"), id, output::decimal_bytes(size), processor, context, until]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (host, url) in [
            ("127.0.0.1:11434", "http://127.0.0.1:11434"),
            ("0.0.0.0", "http://127.0.0.1:11434"),
            ("box:8080", "http://box:8080"),
            ("[::1]:99", "http://[::1]:99"),
            ("https://x.example/", "https://x.example"),
            (" \"box\" ", "http://box:11434"),
        ] {
            assert_eq!(Server::at(host).0, url);
        }
    }

    #[test]
    fn rows_are_those_of_ollama() {
        let never = "2400-01-01T00:00:00Z";
        let m = json!({"name": "a:latest", "digest": "0123456789abcdef", "size": 10_000_000_000u64,
            "size_vram": 5_200_000_000u64, "context_length": 4096, "expires_at": never});
        assert_eq!(row(&m), ["a:latest", "0123456789ab", "10 GB", "48%/52% CPU/GPU", "4096", "Forever"]);
        let gone = json!({"name": "a", "size": 1, "size_vram": 1, "expires_at": "2001-01-01T00:00:00Z"});
        assert_eq!(row(&gone)[3..], ["100% GPU", "", "Stopping..."]);
        assert_eq!(row(&json!({})).len(), 6);
    }
}
