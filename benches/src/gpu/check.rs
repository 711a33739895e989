//! The tests that run on a GPU, each in a process of its own, and what they say of it. A kernel that loses the GPU or never ends costs its
//! test's process alone: the test runs again without that launch, so that every other kernel is seen in one go. Knows test programs and
//! the lines that they report (`ref-tests/src/mirror/report.rs`); nothing of kernels.

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The programs, by the names of their tests in ref-tests, and whether their models and operations run on the GPU alone unless each launch is
/// asked to be compared: they do both.
const PROGRAMS: [(&str, bool); 4] =
    [("cuda_kernels", false), ("cuda_backend", true), ("cuda_backend", false), ("cuda_instructions", false)];
/// Tests of tests, and of what the interpreter alone can do.
const NOT_ON_A_GPU: [&str; 3] = ["mutants_are_caught", "faults::", "decoding_waits_for_the_logits_alone"];
/// Times that a kernel may lose the GPU in one test before it is left out there.
const LOSSES: usize = 3;
/// Wrong launches that are told of a kernel.
const TOLD: usize = 4;

/// What to run, and where.
pub struct Check {
    /// As in `cuda:0`.
    pub device: String,
    /// Where the test programs lie; names may end in a hash, as cargo's do.
    pub programs: PathBuf,
    /// The models of the tests.
    pub fixtures: PathBuf,
    /// Processes at a time.
    pub threads: usize,
    /// No test begins later.
    pub deadline: Instant,
    /// A launch that has not ended after this long never will.
    pub patience: Duration,
    /// Only tests whose name contains this.
    pub only: Option<String>,
}

/// What became of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Kernel {
    /// Launches on the GPU.
    pub launches: usize,
    /// Launches that were wrong.
    pub wrong: usize,
    /// Launches that were left out, and why.
    pub skipped: BTreeMap<String, usize>,
    /// The largest distance from the interpreter within a bar, as a share of the largest value.
    pub worst: f64,
    /// What was wrong, and with which launch.
    pub failures: Vec<String>,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Checked {
    /// Tests that passed.
    pub passed: usize,
    /// By `module.entry`.
    pub kernels: BTreeMap<String, Kernel>,
    /// Tests that failed, with the end of what they printed.
    pub failed: Vec<(String, String)>,
    /// Tests that there was no time for.
    pub left: Vec<String>,
}

impl Checked {
    /// Nothing was found wrong.
    pub fn right(&self) -> bool {
        self.failed.is_empty() && self.kernels.values().all(|k| k.wrong == 0)
    }

    /// Every kernel that was wrong, and every test that failed.
    pub fn complaints(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (name, k) in self.kernels.iter().filter(|k| k.1.wrong > 0) {
            out.push(format!("WRONG {name}: {} of {} launches", k.wrong, k.launches));
            out.extend(k.failures.iter().take(TOLD).map(|f| format!("  {f}")));
        }
        for (test, said) in &self.failed {
            out.push(format!("FAILED {test}"));
            out.extend(said.lines().map(|l| format!("  {l}")));
        }
        out
    }

    fn kernel(&mut self, name: &str) -> &mut Kernel {
        self.kernels.entry(name.to_owned()).or_default()
    }
}

/// A test, in a process of its own.
struct Test {
    name: String,
    program: PathBuf,
    test: String,
    mirror: bool,
}

/// How one process ended.
enum End {
    Passed,
    Failed(String),
    /// The GPU was lost, or a launch did not end: its number, kernel, and what to say.
    Lost(u64, String, String),
}

impl Check {
    /// Runs every test, calling `said` with a line for each that is done.
    ///
    /// # Errors
    /// No test programs, or programs that cannot be run.
    pub fn run(&self, said: &(dyn Fn(&str) + Sync)) -> Result<Checked> {
        let mut tests = Vec::new();
        for (name, mirror) in PROGRAMS {
            let program = self.program(name)?;
            let list = Command::new(&program).args(["--list", "--format", "terse"]).output();
            let list = list.with_context(|| program.display().to_string())?;
            let names = String::from_utf8_lossy(&list.stdout);
            let names = names.lines().filter_map(|l| l.strip_suffix(": test"));
            let wanted = |n: &&str| {
                !NOT_ON_A_GPU.iter().any(|x| n.contains(x))
                    && self.only.as_ref().is_none_or(|o| n.contains(o.as_str()))
            };
            tests.extend(names.filter(wanted).map(|t| Test {
                name: format!("{name} {t}{}", if mirror { ", launch by launch" } else { "" }),
                program: program.clone(),
                test: t.to_owned(),
                mirror,
            }));
        }
        if tests.is_empty() {
            bail!("no tests in {}", self.programs.display());
        }
        let (next, found) = (AtomicUsize::new(0), Mutex::new(Checked::default()));
        std::thread::scope(|s| {
            for _ in 0..self.threads.clamp(1, tests.len()) {
                s.spawn(|| {
                    while let Some(test) = tests.get(next.fetch_add(1, Relaxed)) {
                        let name = &test.name;
                        if Instant::now() > self.deadline {
                            lock(&found).left.push(name.clone());
                            continue;
                        }
                        let (start, before) = (Instant::now(), lock(&found).failed.len());
                        self.test(test, &found);
                        let ok = lock(&found).failed.len() == before;
                        said(&format!(
                            "{name}: {} {:.1?}",
                            if ok { "done" } else { "FAILED" },
                            start.elapsed()
                        ));
                    }
                });
            }
        });
        Ok(found.into_inner().unwrap_or_else(|e| e.into_inner()))
    }

    /// The newest of the programs of this name.
    fn program(&self, name: &str) -> Result<PathBuf> {
        let ours = |p: &PathBuf| {
            let stem = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let rest = stem.strip_prefix(name);
            rest.is_some_and(|r| r.is_empty() || r.starts_with('-') && !r.contains('.'))
        };
        let entries =
            std::fs::read_dir(&self.programs).with_context(|| self.programs.display().to_string())?;
        let found = entries.filter_map(|e| Some(e.ok()?.path())).filter(ours);
        let newest = found.max_by_key(|p| p.metadata().and_then(|m| m.modified()).ok());
        newest.with_context(|| {
            format!("{} has no {name}: benches/gpu-run puts it there", self.programs.display())
        })
    }

    /// A test until it has said all it can: again without what lost the GPU.
    fn test(&self, test: &Test, found: &Mutex<Checked>) {
        let mut left_out: Vec<String> = Vec::new();
        let mut lost: BTreeMap<String, usize> = BTreeMap::new();
        loop {
            let end = self.process(test, &left_out, found);
            let mut all = lock(found);
            match end.unwrap_or_else(|e| End::Failed(format!("{e:#}"))) {
                End::Passed => all.passed += 1,
                End::Failed(said) => all.failed.push((test.name.clone(), said)),
                End::Lost(n, kernel, what) => {
                    let k = all.kernel(&kernel);
                    k.wrong += 1;
                    k.failures.push(format!("{what} [{}]", test.name));
                    let times = lost.entry(kernel.clone()).or_default();
                    *times += 1;
                    left_out.push(if *times < LOSSES && n > 0 { n.to_string() } else { kernel });
                    continue;
                }
            }
            return;
        }
    }

    fn process(&self, test: &Test, left_out: &[String], found: &Mutex<Checked>) -> Result<End> {
        let (report, mut printed) = (tempfile::NamedTempFile::new()?, tempfile::tempfile()?);
        let mut c = Command::new(&test.program);
        c.args(["--exact", &test.test, "--test-threads=1", "--nocapture"])
            .env("RSINFER_TEST_GPU", &self.device)
            .env("RSINFER_TEST_GPU_REPORT", report.path())
            .env("RSINFER_TEST_GPU_SKIP", left_out.join(","))
            .env("RSINFER_FIXTURES", &self.fixtures)
            .stdin(std::process::Stdio::null())
            .stdout(printed.try_clone()?)
            .stderr(printed.try_clone()?);
        if test.mirror {
            c.env("RSINFER_TEST_GPU_MIRROR", "1");
        }
        let mut child = c.spawn()?;
        let status = self.wait(&mut child, report.path())?;
        let mut text = String::new();
        File::open(report.path())?.read_to_string(&mut text)?;
        let mut under_way = take(&text, &test.name, &mut lock(found));
        let mut said = String::new();
        printed.seek(SeekFrom::Start(0))?;
        // What a test prints may be cut within a character where it was killed.
        let mut bytes = Vec::new();
        printed.read_to_end(&mut bytes)?;
        said.push_str(&String::from_utf8_lossy(&bytes));
        match status {
            Some(s) if s.success() => Ok(End::Passed),
            status => {
                let how = status.map_or("did not end, and was stopped".to_owned(), |s| s.to_string());
                if let Some((n, kernel, launch, why)) = under_way.take() {
                    let why = why.unwrap_or(how);
                    return Ok(End::Lost(n, kernel, format!("{launch}: {why}")));
                }
                let end: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
                let end = end[end.len().saturating_sub(12)..].join("\n");
                Ok(End::Failed(if status.is_some_and(|s| s.code() == Some(101)) {
                    end
                } else {
                    format!("{how}\n{end}")
                }))
            }
        }
    }

    /// Waits; `None` where the process had to be stopped: a launch of its did not end, or all of it takes too long.
    fn wait(&self, child: &mut Child, report: &Path) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        let (mut size, mut grew) = (0, Instant::now());
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Some(status));
            }
            let now = report.metadata().map_or(0, |m| m.len());
            if now != size {
                (size, grew) = (now, Instant::now());
            }
            let stuck = grew.elapsed() > self.patience && launching(report);
            if stuck || start.elapsed() > 10 * self.patience {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn lock(found: &Mutex<Checked>) -> std::sync::MutexGuard<'_, Checked> {
    found.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether the last line says that a launch began.
fn launching(report: &Path) -> bool {
    let text = std::fs::read_to_string(report).unwrap_or_default();
    text.lines().last().is_some_and(|l| l.starts_with("{\"launch\""))
}

type UnderWay = (u64, String, String, Option<String>);

/// Adds a report to what is known; returns the launch that was under way when it ended, if its GPU was lost or it did not end: number, kernel,
/// what it was and why.
fn take(text: &str, test: &str, all: &mut Checked) -> Option<UnderWay> {
    let mut last: Option<UnderWay> = None;
    for line in text.lines() {
        let Ok(v) = serde_json::from_str::<Value>(line) else { continue };
        let word = |key: &str| v[key].as_str().unwrap_or_default().to_owned();
        if let Some(n) = v["launch"].as_u64() {
            let args: Vec<&str> =
                v["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let (kernel, threads) = (word("kernel"), &v["threads"]);
            let launch =
                format!("{} x {threads} threads, shared {}, ({})", v["grid"], v["shared"], args.join(", "));
            all.kernel(&kernel).launches += 1;
            last = Some((n, kernel, launch, None));
            continue;
        }
        if v["skipped"].is_u64() {
            *all.kernel(&word("kernel")).skipped.entry(word("why")).or_default() += 1;
            continue;
        }
        let Some((_, kernel, launch, why)) = &mut last else {
            // Before any launch: no memory, say.
            if v["failed"].is_u64() {
                all.failed.push((test.to_owned(), word("why")));
            }
            continue;
        };
        let k = all.kernels.entry(kernel.clone()).or_default();
        if v["lost"] == true {
            *why = Some(word("why"));
        } else if v["differs"].is_u64() || v["failed"].is_u64() {
            let what = if v["failed"].is_u64() { word("why") } else { word("text") };
            k.wrong += 1;
            k.failures.push(format!("{launch}: {what} [{test}]"));
        } else if let Some(worst) = v["worst"].as_f64() {
            k.worst = k.worst.max(worst);
        }
    }
    let ended = text.lines().last().is_none_or(|l| !l.starts_with("{\"launch\""));
    last.filter(|l| l.3.is_some() || !ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_understood() {
        let launch = |n: u64| {
            format!(
                "{{\"launch\":{n},\"kernel\":\"m.k\",\"grid\":[1,1,1],\"threads\":32,\"shared\":0,\"args\":[\"#1+0\"]}}\n"
            )
        };
        let mut all = Checked::default();
        let text = format!(
            "{}{{\"ended\":1}}\n{{\"differs\":1,\"allocation\":1,\"text\":\"word 3\"}}\n{}{{\"ended\":2}}\n\
             {{\"skipped\":3,\"kernel\":\"m.j\",\"why\":\"old\"}}\n",
            launch(1),
            launch(2)
        );
        assert_eq!(take(&text, "t", &mut all), None);
        assert_eq!((all.kernels["m.k"].launches, all.kernels["m.k"].wrong), (2, 1));
        assert_eq!(all.kernels["m.j"].skipped["old"], 1);
        assert!(all.complaints()[1].contains("word 3") && !all.right());
        // A launch that never ended, and one that lost the GPU.
        assert_eq!(take(&launch(7), "t", &mut all).map(|u| (u.0, u.3)), Some((7, None)));
        let lost = format!("{}{{\"failed\":8,\"why\":\"gone\",\"lost\":true}}\n", launch(8));
        assert_eq!(take(&lost, "t", &mut all).and_then(|u| u.3), Some("gone".into()));
    }
}
