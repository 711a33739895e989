//! Many clients at once, of which some go away, ask too much or talk nonsense: everybody else gets an answer or an error, and
//! nothing is left behind. `RSINFER_LOAD=full` makes it 64 clients with 200 requests each (minutes).

mod common;

use common::rsinfer;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CTX: usize = 256;
/// How long any answer may take: it may wait for all others.
const PATIENCE: Duration = Duration::from_secs(120);

struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Its queue is shorter than the crowd: some are told to come back.
    fn start(queue: usize) -> Self {
        let ctx = CTX.to_string();
        let mut child = rsinfer()
            .args(["serve", "--host", "127.0.0.1:0", "--parallel", "4", "-t", "2", "-c", &ctx, "--max-queue"])
            .arg(queue.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = lines.find_map(|l| Some(l.split_once("serves on http://")?.1.trim().to_owned()));
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: address.expect("the server says where it is") }
    }

    fn open(&self, request: &[u8]) -> TcpStream {
        let mut s = TcpStream::connect(&self.address).expect("a connection");
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        // Who is refused early may find the connection closed while it still talks.
        let _ = s.write_all(request);
        s
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Vec<u8> {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .into_bytes()
    }

    /// Status and the rest of an answer, the framing of chunks included.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut s = self.open(&self.request(method, path, body));
        let mut all = Vec::new();
        s.read_to_end(&mut all).unwrap_or_else(|e| panic!("{method} {path}: no answer: {e}"));
        let text = String::from_utf8_lossy(&all).into_owned();
        let status = text.get(9..12).and_then(|s| s.parse().ok());
        (status.unwrap_or_else(|| panic!("{method} {path}: {text:?}")), text)
    }

    fn status(&self) -> Value {
        let (code, text) = self.ask("GET", "/api/status", "");
        assert_eq!(code, 200);
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// Waits until nobody is served any more; the memory that the process then holds.
    fn settled(&self) -> Option<u64> {
        let start = Instant::now();
        loop {
            let s = self.status();
            let models = s["models"].as_array().unwrap();
            let busy = |m: &Value| {
                m["waiting"] != 0 || m["sequences"].as_array().unwrap().iter().any(|s| s["state"] != "idle")
            };
            if !models.iter().any(busy) {
                return s["memory"]["anonymous_bytes"].as_u64();
            }
            assert!(start.elapsed() < PATIENCE, "sequences were leaked: {s}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The same numbers in every run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

fn chat(text: &str, stream: bool, more: Value) -> String {
    let mut v = json!({"model": "demo", "messages": [{"role": "user", "content": text}], "stream": stream});
    v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    v.to_string()
}

/// One request of a client; whether it was told that the server is busy.
fn one(s: &Server, r: &mut Random) -> bool {
    let short = json!({"options": {"num_predict": 1 + r.below(24)}});
    let story = format!("Tell me a story about {}.", ["a dog", "a king", "two birds"][r.below(3)]);
    let long = "Once there was a fox. ".repeat(CTX / 4 + r.below(CTX));
    // Status, a word that the answer must have.
    let (want, must, (status, text)) = match r.below(12) {
        0 | 1 => (200, "\"done\":true", s.ask("POST", "/api/chat", &chat(&story, true, short))),
        2 => {
            let limited = json!({"max_tokens": 1 + r.below(24)});
            (200, "[DONE]", s.ask("POST", "/v1/chat/completions", &chat(&story, true, limited)))
        }
        3 => {
            let limited = json!({"max_tokens": 4, "n": 2});
            (200, "finish_reason", s.ask("POST", "/v1/chat/completions", &chat(&story, false, limited)))
        }
        // Longer than the context, and going on anyway.
        4 => (200, "\"done\":true", s.ask("POST", "/api/chat", &chat(&long, false, short))),
        5 => {
            let body = chat(&long, r.below(2) == 0, json!({"truncate": false, "shift": false}));
            (400, "n_prompt_tokens", s.ask("POST", "/api/chat", &body))
        }
        6 => {
            let bad = ["", "{", "[]", "\u{0}", "{\"model\": 3}", "{\"model\": \"demo\", \"messages\": {}}"];
            (400, "error", s.ask("POST", "/api/chat", bad[r.below(bad.len())]))
        }
        7 => {
            let schema = json!({"format": {"type": "nothing that there is"}});
            (400, "error", s.ask("POST", "/api/chat", &chat(&story, true, schema)))
        }
        8 => (404, "not found", s.ask("POST", "/v1/completions", r#"{"model":"absent","prompt":"x"}"#)),
        // Goes away: at once, in the middle of the request, in the middle of the answer.
        9 => {
            s.open(&s.request("POST", "/api/chat", &chat(&long, true, json!({}))));
            return false;
        }
        10 => {
            let all = s.request("POST", "/api/chat", &chat(&story, true, json!({})));
            s.open(&all[..r.below(all.len())]);
            return false;
        }
        _ => {
            let endless = json!({"options": {"num_predict": -1, "ignore_eos": true}});
            let mut c = s.open(&s.request("POST", "/api/chat", &chat(&story, true, endless)));
            let _ = c.read(&mut vec![0; 1 + r.below(4000)]);
            return false;
        }
    };
    let busy = status == 503 && text.contains("maximum pending requests exceeded");
    assert!(busy || status == want && text.contains(must), "{want} {must:?}: {text}");
    busy
}

#[test]
fn a_crowd_leaves_nothing_behind() {
    let (clients, requests) = match std::env::var("RSINFER_LOAD").as_deref() {
        Ok("full") => (64, 200),
        _ => (12, 16),
    };
    let s = Server::start(clients / 2);
    let (over, busy, beats) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let mut memory = Vec::new();
    std::thread::scope(|scope| {
        // Ends the heartbeat even if an assertion fails.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let guard = Over(&over);
        let heart = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                let (status, text) = s.ask("GET", "/health", "");
                assert!(
                    status == 200 && start.elapsed() < Duration::from_secs(5),
                    "{:?}: {text}",
                    start.elapsed()
                );
                beats.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // In the first half everything grows to its size; in the second it stays.
        for half in 0..2 {
            let (s, busy) = (&s, &busy);
            let all: Vec<_> = (0..clients)
                .map(|c| {
                    scope.spawn(move || {
                        let mut r = Random(0x9E37_79B9_7F4A_7C15 ^ (1 + c as u64 + 1000 * half));
                        for _ in 0..requests / 2 {
                            busy.fetch_add(usize::from(one(s, &mut r)), Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            all.into_iter().for_each(|t| t.join().unwrap());
            memory.extend(s.settled());
        }
        drop(guard);
        heart.join().unwrap();
    });
    let busy = busy.load(Ordering::Relaxed);
    println!(
        "{} requests, {busy} told to come back, {beats:?} heartbeats, memory {memory:?}",
        clients * requests
    );
    assert!(busy < clients * requests / 2, "hardly anybody was served");
    if let [first, second] = memory[..] {
        assert!(second < first + (16 << 20), "memory grew from {first} to {second} bytes");
    }
    // And it still works.
    let (status, text) =
        s.ask("POST", "/api/chat", &chat("Hello!", false, json!({"options": {"num_predict": 4}})));
    assert!(status == 200 && text.contains("\"done\":true"), "{text}");
}
