//! Reading text that commands are given: files, standard input, escape sequences. Knows nothing of models.

use anyhow::{Context, Result, anyhow};
use std::io::Read;
use std::path::Path;

/// A whole file of UTF-8.
pub fn read_file(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).map_err(|e| {
        anyhow!(
            "{}: not UTF-8 text (byte {} is no part of a character)",
            path.display(),
            e.utf8_error().valid_up_to()
        )
    })
}

/// A prompt file: as llama.cpp's `-f`, without the line break that editors put at its end.
pub fn read_prompt_file(path: &Path) -> Result<String> {
    let mut text = read_file(path)?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// All of standard input, which must be UTF-8. Says what it waits for if nothing comes.
pub fn read_stdin() -> Result<String> {
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let hint = std::thread::spawn(move || {
        if waiting.recv_timeout(std::time::Duration::from_secs(3))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            eprintln!(
                "reading the prompt from standard input (redirect it from /dev/null if that is not meant) ..."
            );
        }
    });
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut bytes);
    drop(done);
    let _ = hint.join();
    read.context("cannot read standard input")?;
    String::from_utf8(bytes)
        .map_err(|e| anyhow!("standard input is not UTF-8 text (byte {})", e.utf8_error().valid_up_to()))
}

/// JSON from a file.
pub fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_str(&read_file(path)?).with_context(|| format!("{}: not JSON", path.display()))
}

/// `\n \t \r \\ \' \" \xHH` as llama.cpp's `--escape` reads them; other backslashes stay.
pub fn unescape(s: &str) -> String {
    let mut out = Vec::with_capacity(s.len());
    let mut rest = s.as_bytes();
    while let [first, tail @ ..] = rest {
        let (byte, used) = match (first, tail) {
            (b'\\', [b'n', ..]) => (b'\n', 2),
            (b'\\', [b't', ..]) => (b'\t', 2),
            (b'\\', [b'r', ..]) => (b'\r', 2),
            (b'\\', [c @ (b'\\' | b'\'' | b'"'), ..]) => (*c, 2),
            (b'\\', [b'x', a, b, ..]) if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => {
                let hex = |c: u8| (c as char).to_digit(16).unwrap_or(0) as u8;
                (hex(*a) * 16 + hex(*b), 4)
            }
            _ => (*first, 1),
        };
        out.push(byte);
        rest = &rest[used..];
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn escapes() {
        assert_eq!(super::unescape(r#"a\nb\\n\t\"\x41\q\"#), "a\nb\\n\t\"A\\q\\");
        assert_eq!(super::unescape(r"\xe2\x82\xac €"), "€ €");
    }
}
