//! `quantize`: a smaller file of a model, over engine::quantize. Progress and figures on stderr.

use crate::model::Source;
use crate::output;
use anyhow::Result;
use engine::quantize::{self, Options};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

/// What to make of what.
pub struct Config {
    pub source: Source,
    pub output: PathBuf,
    pub options: Options,
}

pub fn run(c: &Config) -> Result<()> {
    let file = c.source.open()?;
    let mut err = std::io::stderr().lock();
    let live = err.is_terminal();
    let start = std::time::Instant::now();
    let mut last = usize::MAX;
    let report = quantize::run(&file, &c.output, &c.options, |p| {
        if p.index == last {
            return;
        }
        last = p.index;
        let t = p.tensor;
        let line = format!(
            "[{:4}/{:4}] {:40} {:>6} -> {}",
            p.index + 1,
            p.count,
            t.name,
            t.from.name(),
            t.to.name()
        );
        let line = output::one_line(&line);
        // Progress is a courtesy: a closed stderr must not stop the work.
        let _ = if live { write!(err, "\r\x1b[K{line}") } else { Ok(()) };
    })?;
    if live {
        let _ = write!(err, "\r\x1b[K");
    }
    for t in &report.tensors {
        let note = if t.fallback { "  (fallback: the rows do not fit the type wanted)" } else { "" };
        let name = output::one_line(&t.name);
        let line = format!("{name:40} {:>6} -> {:6} rmse {:.6}{note}", t.from.name(), t.to.name(), t.rmse);
        let _ = writeln!(err, "{line}");
    }
    let bpw = |bytes: u64| bytes as f64 * 8.0 / report.elements().max(1) as f64;
    let (i, o) = (report.bytes_in(), report.bytes_out());
    let _ = writeln!(err, "tensors before: {:>11} ({:.2} bits per weight)", output::bytes(i), bpw(i));
    let _ = writeln!(err, "tensors after:  {:>11} ({:.2} bits per weight)", output::bytes(o), bpw(o));
    if report.fallbacks() > 0 {
        let _ =
            writeln!(err, "{} of {} tensors got a fallback type", report.fallbacks(), report.tensors.len());
    }
    let _ = writeln!(
        err,
        "wrote {} ({}) in {}",
        c.output.display(),
        output::bytes(report.file_bytes),
        output::duration(start.elapsed())
    );
    Ok(())
}
