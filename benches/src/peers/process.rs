//! The programs measured: ours, llama.cpp's through its Python package, and this one for the machine's limits. Each
//! measurement is a process of its own, so that neither finds what another left in memory.

use anyhow::{Context, Result, bail};
use kernels::cpu::isa::Isa;
use kernels::cpu::machine;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::cell::Cell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What the machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes read per second by all threads.
    pub read: f64,
    /// Multiply-adds of int8 per second.
    pub int8: f64,
    /// Multiply-adds of f32 per second.
    pub float: f64,
    /// Multiply-adds of bf16 tile products per second, where there are any.
    #[serde(default)]
    pub tiles: Option<f64>,
}

impl Limits {
    /// Measures here and now.
    ///
    /// # Errors
    /// An instruction set whose peak nothing measures.
    pub fn measure(threads: usize) -> Result<Self> {
        let isa = Isa::current();
        let none = || format!("the peak of {} cannot be measured", isa.name());
        Ok(Self {
            read: machine::read_bandwidth(threads),
            int8: machine::int8_peak(isa, threads).with_context(none)?,
            float: machine::float_peak(isa, threads).with_context(none)?,
            tiles: machine::tile_peak(isa, threads),
        })
    }
}

/// What to run.
pub struct Programs {
    /// This program.
    pub this: PathBuf,
    /// `rsinfer`.
    pub rsinfer: PathBuf,
    /// The peer; `None`: rsinfer alone.
    pub peer: Option<Peer>,
    /// Command put in front of every measurement (`taskset -c 0-7`).
    pub prefix: Vec<String>,
    /// Threads.
    pub threads: usize,
    /// Where the peer's states at depth are kept.
    pub scratch: PathBuf,
    /// Largest share of the processor that others took during a measurement that counts.
    pub disturbance: Cell<f64>,
}

/// llama.cpp as a Python that has llama-cpp-python, and the script that times it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The interpreter.
    pub python: PathBuf,
    /// `ref-tests/llama_cpp/bench_peer.py`.
    pub script: PathBuf,
    /// Whether it may repack weights.
    pub repack: bool,
}

/// One measurement of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// Tokens of the prompt; 0: none.
    pub prompt: usize,
    /// Tokens decoded; 0: none.
    pub generate: usize,
    /// Tokens of context before.
    pub depth: usize,
}

/// Tokens per second of a run, and the bytes a decoded token reads (ours).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Of the prompt.
    pub prompt: Option<f64>,
    /// Of decoding.
    pub decode: Option<f64>,
    /// Bytes that a decoded token reads.
    pub token_bytes: Option<f64>,
}

/// What a process printed, and how much of the machine others took meanwhile.
struct Output {
    text: String,
    /// Processor time of all other processes, as a share of all cores' time. 0 where the system does not say.
    others: f64,
}

/// Processor time spent so far, in ticks: by everything on the machine, and by the children that this process waited for
/// (and theirs).
fn ticks() -> Option<(f64, f64)> {
    let all = std::fs::read_to_string("/proc/stat").ok()?;
    let fields: Vec<f64> =
        all.lines().next()?.split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal: all but waiting.
    let busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|&i| fields.get(i)).sum();
    let own = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name, which may hold anything: cutime and cstime are fields 16 and 17 of the line.
    let own: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
    Some((busy, own.get(13)?.parse::<f64>().ok()? + own.get(14)?.parse::<f64>().ok()?))
}

/// The first argument of a call that watches another program: `--watch REPORT PROGRAM ARGUMENT...`.
pub const WATCH: &str = "--watch";

/// Runs a program and writes to `report` what share of all cores' time other processes took meanwhile (0 where the system does
/// not say). Returns the program's exit code.
///
/// # Errors
/// It cannot be run, or the report not be written.
pub fn watch(report: &Path, words: &[OsString]) -> Result<i32> {
    let (program, args) = words.split_first().context("nothing to watch")?;
    let before = ticks();
    let start = Instant::now();
    let status = Command::new(program).args(args).status();
    let status = status.with_context(|| format!("cannot run {}", program.display()))?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    // A tick is a hundredth of a second on every Linux (USER_HZ).
    let time = start.elapsed().as_secs_f64() * cores as f64 * 100.0;
    let others = before.zip(ticks()).map_or(0.0, |(a, b)| ((b.0 - a.0) - (b.1 - a.1)) / time);
    std::fs::write(report, others.max(0.0).to_string()).with_context(|| report.display().to_string())?;
    // A signal has no code: 128 and more, as shells say it.
    Ok(status.code().unwrap_or(134))
}

/// Share of all cores that others may take before a measurement is taken again.
const CALM: f64 = 0.03;
/// How often it is tried.
const TRIES: usize = 3;

impl Programs {
    /// The text of a measurement during which others left the machine alone; the least disturbed of several if they never do.
    fn measured(&self, program: &Path, args: &[String]) -> Result<String> {
        let mut best: Option<Output> = None;
        for _ in 0..TRIES {
            let out = self.run(program, args, true)?;
            let share = out.others;
            if best.as_ref().is_none_or(|b| share < b.others) {
                best = Some(out);
            }
            if share <= CALM {
                break;
            }
            eprintln!("others took {:.0}% of the processor: again", 100.0 * share);
        }
        let best = best.expect("tried at least once");
        self.disturbance.set(self.disturbance.get().max(best.others));
        Ok(best.text)
    }

    fn output(&self, program: &Path, args: &[String]) -> Result<String> {
        self.run(program, args, false).map(|o| o.text)
    }

    fn run(&self, program: &Path, args: &[String], measured: bool) -> Result<Output> {
        let mut words = Vec::new();
        let report = self.scratch.join("others");
        if measured {
            // The watch begins behind the prefix: what that waits for does not count.
            words.extend_from_slice(&self.prefix);
            words.extend([self.this.display().to_string(), WATCH.into(), report.display().to_string()]);
        }
        words.push(program.display().to_string());
        words.extend_from_slice(args);
        let out = Command::new(&words[0]).args(&words[1..]).stderr(Stdio::piped()).output();
        let out = out.with_context(|| format!("cannot run {}", words[0]))?;
        if !out.status.success() {
            // What llama.cpp asserts stands above the stack it prints.
            let text = String::from_utf8_lossy(&out.stderr);
            let mut lines = text.lines().filter(|l| !l.trim().is_empty());
            let said = lines.clone().find(|l| l.contains("GGML_ASSERT")).or_else(|| lines.next_back());
            bail!("{} ended with {}: {}", words.join(" "), out.status, said.unwrap_or("it says nothing"));
        }
        let mut others = 0.0;
        if measured {
            others = std::fs::read_to_string(&report)?.trim().parse().context("the watch wrote no number")?;
        }
        Ok(Output { text: String::from_utf8_lossy(&out.stdout).into_owned(), others })
    }

    /// The machine's limits, measured by a process of their own.
    ///
    /// # Errors
    /// The process failed.
    pub fn limits(&self) -> Result<Limits> {
        let args = ["--limits".to_owned(), "-t".into(), self.threads.to_string()];
        Ok(serde_json::from_str(&self.measured(&self.this, &args)?)?)
    }

    /// One run of `rsinfer bench`.
    ///
    /// # Errors
    /// It failed, or printed something else than expected.
    pub fn ours(&self, model: &Path, run: Run) -> Result<Rates> {
        let args = [
            "bench".to_owned(),
            model.display().to_string(),
            format!("-p{}", run.prompt),
            format!("-n{}", run.generate),
            format!("-d{}", run.depth),
            format!("-t{}", self.threads),
            "-b512".into(),
            "-r1".into(),
            "-ojson".into(),
        ];
        let tests: Vec<Value> = serde_json::from_str(&self.measured(&self.rsinfer, &args)?)?;
        let mut rates = Rates::default();
        for t in &tests {
            let rate = t["avg_ts"].as_f64().context("rsinfer bench printed no avg_ts")?;
            if t["n_gen"].as_u64() == Some(0) {
                rates.prompt = Some(rate);
            } else {
                rates.decode = Some(rate);
                rates.token_bytes = t["read_bytes_per_second"].as_f64().map(|b| b / rate);
            }
        }
        Ok(rates)
    }

    fn peer_args(&self, peer: &Peer, model: &Path, run: Run) -> Vec<String> {
        let mut args = vec![
            peer.script.display().to_string(),
            model.display().to_string(),
            format!("-p{}", run.prompt),
            format!("-n{}", run.generate),
            format!("-d{}", run.depth),
            format!("-t{}", self.threads),
            "-r1".into(),
        ];
        if !peer.repack {
            args.push("--no-repack".into());
        }
        if run.depth > 0 {
            args.extend(["--state".into(), self.scratch.join("peer.state").display().to_string()]);
        }
        args
    }

    /// Tries whether the peer can run a model at all.
    ///
    /// # Errors
    /// What it said when it failed.
    pub fn probe(&self, peer: &Peer, model: &Path) -> Result<()> {
        let run = Run { prompt: 40, generate: 1, depth: 0 };
        self.output(&peer.python, &self.peer_args(peer, model, run)).map(|_| ())
    }

    /// Lets the peer compute its context at depth once, outside of any measurement: at a depth of thousands of tokens this
    /// takes minutes.
    ///
    /// # Errors
    /// It failed.
    pub fn prepare(&self, peer: &Peer, model: &Path, depth: usize) -> Result<()> {
        self.forget_peer_state();
        let run = Run { prompt: 0, generate: 1, depth };
        self.output(&peer.python, &self.peer_args(peer, model, run)).map(|_| ())
    }

    /// Removes the peer's state at depth.
    pub fn forget_peer_state(&self) {
        // Absent is as good as removed.
        let _ = std::fs::remove_file(self.scratch.join("peer.state"));
    }

    /// One run of the peer.
    ///
    /// # Errors
    /// It failed, or printed something else than expected.
    pub fn theirs(&self, peer: &Peer, model: &Path, run: Run) -> Result<Rates> {
        let text = self.measured(&peer.python, &self.peer_args(peer, model, run))?;
        let line = text.lines().next_back().context("the peer printed nothing")?;
        let found: Value =
            serde_json::from_str(line).with_context(|| format!("the peer printed {line:?}"))?;
        let rate = |name: String| found[name]["best"].as_f64();
        Ok(Rates {
            prompt: rate(format!("pp{}", run.prompt)),
            decode: rate(format!("tg{}", run.generate)),
            token_bytes: None,
        })
    }

    /// The peer's name and version.
    ///
    /// # Errors
    /// The package is not there.
    pub fn peer_name(&self) -> Result<String> {
        let Some(peer) = &self.peer else { return Ok("no peer".into()) };
        let code = "import llama_cpp; print(llama_cpp.__version__)";
        let version = self.output(&peer.python, &["-c".into(), code.into()])?;
        Ok(format!("llama.cpp (llama-cpp-python {})", version.trim()))
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_watched_program_keeps_its_exit_code_and_does_not_count_as_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let report = folder.path().join("others");
        let words =
            ["sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; exit 3"].map(OsString::from);
        assert_eq!(watch(&report, &words).expect("it runs"), 3);
        let others: f64 = std::fs::read_to_string(&report).expect("written").parse().expect("a number");
        // Rounded to ticks on both sides; what others really did is not ours to say.
        assert!((0.0..1.2).contains(&others), "{others}");
        assert!(watch(&report, &["/no/such/program".into()]).is_err());
        assert!(watch(&report, &[]).is_err());
    }
}
