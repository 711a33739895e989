//! The conversation on a terminal, under a real pseudo-terminal: util-linux's `script` makes one without further crates.
#![cfg(target_os = "linux")]

mod common;

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

struct Terminal {
    child: Child,
    keys: ChildStdin,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// `None` (said, and a failure in CI) where there is no `script`.
    fn open(home: &std::path::Path, args: &str) -> Option<Self> {
        // `exec`: a shell that stayed between would hear Ctrl-C too and end with 130 for it.
        let command = format!("exec {} {args}", env!("CARGO_BIN_EXE_rsinfer"));
        let child = Command::new("script")
            .args(["-qfec", &command, "/dev/null"])
            .env("TERM", "xterm")
            .env("HOME", home)
            .env_remove("XDG_STATE_HOME")
            .env_remove("NO_COLOR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "the command `script` is not here");
            println!("skipped: the command `script` is not here");
            return None;
        };
        let (send, screen) = channel();
        let mut out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n) = out.read(&mut buf) {
                if n == 0 || send.send(buf[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let keys = child.stdin.take().unwrap();
        Some(Self { child, keys, screen, seen: String::new() })
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Waits until `text` appears behind what was waited for before; returns what came before it.
    fn expect(&mut self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return before;
            }
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => panic!("no {text:?} in time: {:?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("it ended without {text:?}: {:?}", self.seen),
            }
        }
    }

    /// A line at the prompt.
    fn line(&mut self, line: &str) {
        self.expect(">>> ");
        self.press(&format!("{line}\r"));
    }

    fn leave(mut self) {
        self.expect(">>> ");
        self.press("\x04");
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.json");
    let Some(mut t) = Terminal::open(dir.path(), "run demo --temp 0 -n 30") else { return };
    t.line("Tell me a story.");
    t.expect("\x1b[2m"); // thinking is dimmed
    t.expect("\x1b[0m");
    t.expect("Once upon a time");
    t.line("/set parameter temperature -2");
    t.expect("error: temperature");
    t.line("/set verbose");
    t.line("\"\"\"Tell me");
    t.expect("... ");
    t.press("a story.\"\"\"\r");
    t.expect(" cached"); // the first turn is not computed again
    t.expect("eval rate:");
    t.line(&format!("/save {}", file.display()));
    t.expect("saved 4 messages");
    t.line("/clear");
    t.line(&format!("/load {}", file.display()));
    t.expect("4 messages");
    t.line("/show messages");
    t.expect("Tell me\\na story.");
    t.line("/nope");
    t.expect("error: unknown command /nope");
    t.line("/load /no/such/file");
    t.expect("error: cannot read /no/such/file");
    t.line("/?");
    t.expect("/bye");
    t.leave();
    let saved: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(saved["messages"][2]["content"], "Tell me\na story.");
    let history = std::fs::read_to_string(dir.path().join(".local/state/rsinfer/history")).unwrap();
    assert!(history.contains("Tell me a story."), "{history}");
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut t) = Terminal::open(dir.path(), "run demo --temp 0 --ignore-eos -c 500") else { return };
    t.line("Tell me a story.");
    t.expect("Once upon");
    t.press("\x03");
    let cut = t.expect(">>> ");
    assert!(!cut.contains("is full"), "Ctrl-C came too late or was not heard: {cut}");
    t.press("\x03"); // at the prompt it only says how to leave
    t.expect("/bye to leave");
    t.line("Tell me a story.");
    t.expect("Once upon");
    t.expect("note: the context of 500 tokens is full");
    t.leave();
}
