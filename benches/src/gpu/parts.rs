//! The parts of the timing, each in a process of its own: what loses the GPU, or never ends, takes nothing else with it. Rows are lines of JSON.

use super::kernels::Bench;
use super::models::{self, CASES};
use super::row::Row;
use super::timed::Timed;
use super::yardstick::Peaks;
use anyhow::{Context as _, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The parts without a model, in the order of what they tell.
pub const ALONE: [&str; 4] = ["mla", "matvec", "matmul", "attention"];
/// The part that all others take their bars from.
pub const PEAKS: &str = "peaks";

/// Writes a row where the parent reads it.
fn print(row: &Row) {
    let mut out = std::io::stdout().lock();
    // A parent that is gone has no use for it.
    let _ = serde_json::to_string(row).map(|line| writeln!(out, "{line}"));
}

/// Measures a part here.
///
/// # Errors
/// No GPU, an unknown part, or what keeps all of it from being measured.
pub fn run(part: &str, index: usize, peaks: Option<Peaks>, file: Option<&Path>, toy: bool) -> Result<()> {
    let gpu = Timed::new(kernels::cuda::open(index)?);
    let mut row = |r: Row| print(&r);
    let Some(peaks) = peaks else {
        let p = Peaks::measure(&gpu, toy)?;
        println!("{}", serde_json::to_string(&p)?);
        return Ok(());
    };
    if let (Some(case), Some(file)) = (CASES.iter().find(|c| c.name == part), file) {
        return models::measure(case, file, gpu, peaks, toy, &mut row);
    }
    let bench = Bench::new(gpu, peaks, toy)?;
    match part {
        "mla" => bench.mla(&mut row),
        "matvec" => bench.matvec(&mut row),
        "matmul" => bench.matmul(&mut row),
        "attention" => bench.attention(&mut row),
        other => bail!("there is no part {other}"),
    }
}

/// Runs a part in a process; each line that it prints goes to `line`.
///
/// # Errors
/// A process that failed, or had to be stopped at the deadline: with the end of what it said.
pub fn child(args: &[String], deadline: Instant, line: &mut dyn FnMut(&str)) -> Result<()> {
    let program = std::env::current_exe().context("this program")?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (out, err) = (child.stdout.take().context("a pipe")?, child.stderr.take().context("a pipe")?);
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for l in BufReader::new(out).lines().map_while(Result::ok) {
            if send.send(l).is_err() {
                return;
            }
        }
    });
    let said = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = BufReader::new(err).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let stopped = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(Duration::from_secs(1))) {
            Ok(l) => line(&l),
            Err(mpsc::RecvTimeoutError::Disconnected) => break false,
            Err(mpsc::RecvTimeoutError::Timeout) if left.is_zero() => break true,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
    };
    if stopped {
        child.kill()?;
    }
    let status = child.wait()?;
    let said = said.join().unwrap_or_default();
    let end: Vec<&str> = said.lines().rev().take(4).collect();
    let end = end.into_iter().rev().collect::<Vec<_>>().join(" / ");
    if stopped {
        bail!("stopped: the time was over. {end}");
    }
    if !status.success() {
        bail!("{status}: {end}");
    }
    Ok(())
}
