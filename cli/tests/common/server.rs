//! A server under test on a free port, and requests written by hand: what goes over the wire is what counts.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Stdio};
use std::time::{Duration, Instant};

/// Ends with the test.
pub struct Server {
    pub child: Child,
    pub address: String,
    log: Option<std::thread::JoinHandle<String>>,
}

/// An answer.
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    /// The body's object.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {} {:?}", self.status, self.body))
    }

    /// The lines' objects.
    pub fn lines(&self) -> Vec<Value> {
        self.body.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
    }

    /// The events' data, `[DONE]` left out; whether it was there.
    pub fn events(&self) -> (Vec<Value>, bool) {
        let data = self.body.split("\n\n").filter_map(|e| e.strip_prefix("data: "));
        let all: Vec<&str> = data.collect();
        let done = all.last() == Some(&"[DONE]");
        let objects = all.iter().filter(|d| **d != "[DONE]");
        (objects.map(|d| serde_json::from_str(d).unwrap_or_else(|e| panic!("{e}: {d}"))).collect(), done)
    }
}

fn drain(from: ChildStderr, said: std::sync::mpsc::Sender<String>) -> String {
    let mut all = String::new();
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        if let Some((_, address)) = line.split_once("serves on http://") {
            let _ = said.send(address.to_owned());
        }
        all += &(line + "\n");
    }
    all
}

impl Server {
    pub fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut c = super::rsinfer();
        c.args(["serve", "--host", "127.0.0.1:0", "-t", "2"]).args(args).envs(env.iter().copied());
        let mut child = c.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let (said, address) = std::sync::mpsc::channel();
        let from = child.stderr.take().expect("piped");
        let log = std::thread::spawn(move || drain(from, said));
        let address = address.recv_timeout(Duration::from_secs(60));
        let Ok(address) = address else {
            let _ = child.kill();
            panic!("no server: {}", log.join().unwrap());
        };
        Self { child, address, log: Some(log) }
    }

    /// Sends a request as it is, and returns the connection.
    pub fn open(&self, text: &[u8]) -> TcpStream {
        let mut s = TcpStream::connect(&self.address).expect("a connection");
        s.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        s.write_all(text).expect("a request");
        s
    }

    /// A request with a body and more header lines.
    pub fn request(&self, method: &str, path: &str, more: &str, body: &[u8]) -> Vec<u8> {
        let host = if more.to_lowercase().contains("host:") {
            String::new()
        } else {
            format!("Host: {}\r\n", self.address)
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\n{host}Connection: close\r\nContent-Length: {}\r\n{more}\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    }

    pub fn send(&self, method: &str, path: &str, more: &str, body: &[u8]) -> Reply {
        let mut s = self.open(&self.request(method, path, more, body));
        let mut all = Vec::new();
        s.read_to_end(&mut all).expect("an answer");
        read(&all)
    }

    pub fn post(&self, path: &str, body: Value) -> Reply {
        self.send("POST", path, "Content-Type: application/json\r\n", body.to_string().as_bytes())
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", b"")
    }

    /// A metric's value.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |v| v.parse().expect("a number"))
    }

    /// Waits for something.
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let done = std::process::Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(done.expect("kill").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log.take().map(|l| l.join().unwrap_or_default()).unwrap_or_default();
        if std::thread::panicking() {
            let from = log.len().saturating_sub(4000);
            eprintln!("the server said: {}", log.get(from..).unwrap_or(&log));
        }
    }
}

/// Takes an answer apart.
pub fn read(all: &[u8]) -> Reply {
    let at = all.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8_lossy(&all[..at]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    let mut body = all[at + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = dechunk(&body);
    }
    Reply { status, head, body: String::from_utf8(body).expect("UTF-8") }
}

fn dechunk(mut from: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(at) = from.windows(2).position(|w| w == b"\r\n") {
        let n = usize::from_str_radix(std::str::from_utf8(&from[..at]).expect("a size").trim(), 16)
            .expect("a size");
        if n == 0 {
            return out;
        }
        out.extend_from_slice(&from[at + 2..at + 2 + n]);
        from = &from[at + 2 + n + 2..];
    }
    panic!("the body broke off: {}", String::from_utf8_lossy(&out));
}
