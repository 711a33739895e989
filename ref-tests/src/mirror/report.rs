//! What became of launches on a GPU: lines of JSON in the file that `RSINFER_TEST_GPU_REPORT` names (`gpu check` reads them), or else a
//! panic at the first that is wrong.

use super::compare::{Difference, Word};
use kernels::cuda::{GpuError, Launch};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, OnceLock};

/// The exit status of a process that lost its GPU; whoever reports starts another.
const LOST: i32 = 86;

/// The report, and the launch that was last begun, for people.
struct Report {
    file: Option<File>,
    launch: String,
}

fn report() -> &'static Mutex<Report> {
    static REPORT: OnceLock<Mutex<Report>> = OnceLock::new();
    REPORT.get_or_init(|| {
        let open = |path| {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            file.unwrap_or_else(|e| panic!("RSINFER_TEST_GPU_REPORT={path:?}: {e}"))
        };
        let file = std::env::var_os("RSINFER_TEST_GPU_REPORT").map(open);
        Mutex::new(Report { file, launch: String::new() })
    })
}

/// Writes a line; without a report a failure is a panic.
fn event(line: &Value, failure: Option<String>) {
    let mut r = report().lock().unwrap_or_else(|e| e.into_inner());
    match (&mut r.file, failure) {
        (Some(file), _) => writeln!(file, "{line}").expect("the report can be written"),
        (None, Some(what)) => {
            let launch = r.launch.clone();
            drop(r);
            panic!("on the GPU: {launch}: {what}");
        }
        (None, None) => {}
    }
}

/// A launch begins: should nothing follow, it did not end.
pub fn launch(n: usize, kernel: &str, launch: Launch, args: &[String]) {
    let Launch { grid, threads, shared, .. } = launch;
    report().lock().unwrap_or_else(|e| e.into_inner()).launch =
        format!("{kernel}, grid {grid:?} of {threads} threads, shared {shared}, ({})", args.join(", "));
    event(
        &json!({"launch": n, "kernel": kernel, "grid": grid, "threads": threads, "shared": shared, "args": args}),
        None,
    );
}

/// It ended.
pub fn ended(n: usize) {
    event(&json!({"ended": n}), None);
}

/// A launch that the GPU was spared.
pub fn skipped(n: usize, kernel: &str, why: &str) {
    event(&json!({"skipped": n, "kernel": kernel, "why": why}), None);
}

/// The GPU refused, or was lost.
pub fn failed(n: usize, e: &GpuError) {
    let lost = matches!(e, GpuError::Lost { .. });
    event(&json!({"failed": n, "why": e.to_string(), "lost": lost}), Some(e.to_string()));
    if lost {
        // Nothing more can be compared in this process.
        std::process::exit(LOST);
    }
}

fn show(w: &Word) -> String {
    let float = |x: u32| format!("{:?} ({x:#010x})", f32::from_bits(x));
    format!("[{}] {}, not {}", w.index, float(w.found), float(w.expected))
}

/// An allocation (by number) is not as the interpreter's.
pub fn compared(n: usize, allocation: u64, d: Difference) {
    if d.passes {
        return event(&json!({"close": n, "allocation": allocation, "worst": d.worst}), None);
    }
    let first: Vec<String> = d.first.iter().map(show).collect();
    let text = format!(
        "{} of {} words of allocation #{allocation} differ (as floats by up to {:.2e} of the largest; {} were never written): {}",
        d.count,
        d.words,
        d.worst,
        d.untouched,
        first.join("; ")
    );
    event(&json!({"differs": n, "allocation": allocation, "text": text}), Some(text.clone()));
}

/// A kernel wrote beside an allocation.
pub fn outside(n: usize, allocation: u64, bytes: usize, hurt: usize) {
    let text = format!("{hurt} bytes beside allocation #{allocation} of {bytes} bytes were written");
    event(&json!({"differs": n, "allocation": allocation, "text": text}), Some(text.clone()));
}
