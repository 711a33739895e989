//! Writing results and messages: broken pipes, single lines, durations, files that appear only when whole.
//! Knows nothing of models or commands.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Whether the error is that nobody reads our output any more.
pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|c| c.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// The text without line breaks and other control characters.
pub fn one_line(s: &str) -> String {
    s.split(|c: char| c.is_control()).filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Writes to stdout at once.
pub fn print(s: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(s.as_bytes())?;
    out.flush()
}

/// Whether stdout is a terminal that understands colours and wants them.
pub fn is_styled() -> bool {
    let dumb = std::env::var_os("TERM").is_none_or(|t| t == "dumb");
    io::stdout().is_terminal() && !dumb && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A duration in the unit that fits it, as Go and Ollama print it: `1.234567s`, `45.1ms`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs_f64();
    let trim = |x: f64| format!("{x:.6}").trim_end_matches('0').trim_end_matches('.').to_owned();
    match s {
        _ if s >= 60.0 => format!("{}m{}s", (s / 60.0) as u64, trim(s % 60.0)),
        _ if s >= 1.0 => format!("{}s", trim(s)),
        _ if s >= 1e-3 => format!("{}ms", trim(s * 1e3)),
        _ => format!("{}µs", trim(s * 1e6)),
    }
}

/// Bytes in binary units, as llama-bench prints sizes: `4.58 GiB`.
pub fn bytes(n: u64) -> String {
    let n = n as f64;
    for (unit, name) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let unit = (1u64 << unit) as f64;
        if n >= unit {
            return format!("{:.2} {name}", n / unit);
        }
    }
    format!("{n} B")
}

/// Bytes in decimal units, as Ollama prints sizes: `4.7 GB`, `274 MB`.
pub fn decimal_bytes(n: u64) -> String {
    for (unit, name) in [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")] {
        let n = n as f64 / unit;
        if n >= 1.0 {
            let digits = usize::from(n < 10.0 && n.fract() >= 0.05);
            return format!("{n:.digits$} {name}");
        }
    }
    format!("{n} B")
}

/// A duration in words, as Ollama's: `2 weeks`, `About an hour`.
pub fn rough(d: Duration) -> String {
    let (seconds, minutes, hours) = (d.as_secs(), d.as_secs() / 60, d.as_secs() / 3600);
    match seconds {
        0 => "Less than a second".into(),
        1 => "1 second".into(),
        2..60 => format!("{seconds} seconds"),
        _ if minutes == 1 => "About a minute".into(),
        _ if minutes < 60 => format!("{minutes} minutes"),
        _ if hours == 1 => "About an hour".into(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 14 => format!("{} days", hours / 24),
        _ if hours < 24 * 60 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    }
}

/// The same, in the past.
pub fn ago(d: Duration) -> String {
    format!("{} ago", rough(d))
}

/// A table as Ollama prints one: columns as wide as they must be, four spaces between them.
pub fn columns(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = vec![header.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()];
    table.extend(rows);
    let width =
        |i: usize| table.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}    "));
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    table.iter().map(line).collect()
}

/// A file that gets its name only when [`OutFile::finish`] is called; before that it lies beside it under a temporary
/// name, and a drop removes it. What exists and is no regular file (a device, a pipe) is written directly.
pub struct OutFile {
    path: PathBuf,
    partial: Option<PathBuf>,
    out: BufWriter<File>,
}

impl OutFile {
    /// Starts the file; fails now, not after an hour of computing, if it cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let open = || -> io::Result<(Option<PathBuf>, File)> {
            match fs::metadata(path) {
                Ok(m) if m.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
                Ok(m) if !m.is_file() => return Ok((None, File::options().write(true).open(path)?)),
                Ok(m) if m.permissions().readonly() => return Err(io::ErrorKind::PermissionDenied.into()),
                _ => {}
            }
            let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
            let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
            let file = File::create_new(&partial)?;
            Ok((Some(partial), file))
        };
        let (partial, file) = open().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path: path.into(), partial, out: BufWriter::with_capacity(1 << 18, file) })
    }

    /// Flushes and gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        let done = self.out.flush().and_then(|()| match self.partial.take() {
            Some(p) => fs::rename(&p, &self.path).inspect_err(|_| drop(fs::remove_file(&p))),
            None => Ok(()),
        });
        done.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Write for OutFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.out.write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Drop for OutFile {
    fn drop(&mut self) {
        if let Some(p) = self.partial.take() {
            let _ = fs::remove_file(p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes() {
        for (ns, s) in
            [(1_500_000_000, "1.5s"), (45_100_000, "45.1ms"), (1_200, "1.2µs"), (61_000_000_000, "1m1s")]
        {
            assert_eq!(duration(Duration::from_nanos(ns)), s);
        }
        assert_eq!(bytes(4_917_830_000), "4.58 GiB");
        assert_eq!(bytes(12), "12 B");
        for (n, s) in
            [(4_661_000_000, "4.7 GB"), (274_302_450, "274 MB"), (2_000_000, "2 MB"), (999, "999 B")]
        {
            assert_eq!(decimal_bytes(n), s);
        }
        for (s, words) in
            [(0, "Less than a second"), (90, "About a minute"), (7200, "2 hours"), (15 * 86400, "2 weeks")]
        {
            assert_eq!(rough(Duration::from_secs(s)), words);
        }
        assert_eq!(
            columns(&["A", "BB"], [vec!["xyz".into(), "1".into()]].into_iter()),
            "A      BB\nxyz    1\n"
        );
        assert_eq!(one_line("a\nb\u{1b}[2Jc\r\n"), "a b [2Jc");
    }

    #[test]
    fn a_file_appears_only_when_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mut f = OutFile::create(&path).unwrap();
        f.write_all(b"abc").unwrap();
        assert!(!path.exists());
        drop(f);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut f = OutFile::create(&path).unwrap();
        f.write_all(b"abc").unwrap();
        f.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
