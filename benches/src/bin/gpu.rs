//! `gpu`: checks and times everything on a GPU in one go, and ends in a table.

use anyhow::{Context, Result};
use benches::gpu::check::{Check, Checked};
use benches::gpu::models::{CASES, Case};
use benches::gpu::parts;
use benches::gpu::row::{Row, table};
use benches::gpu::yardstick::Peaks;
use benches::synth;
use clap::{Parser, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Every kernel against the interpreter, models against their references
    Check,
    /// How fast
    Time,
    /// Both
    All,
    /// One part, for the program itself
    #[value(hide = true)]
    Part,
}

/// Check and time everything on a GPU in one go
#[derive(Parser)]
#[command(after_help = "Examples:\n  \
    gpu                            all of it, in under nine minutes\n  \
    gpu check --only rms_norm      the tests with that in their names\n  \
    gpu time --parts mla,matvec --json figures.json\n\n\
    It ends in a table in Markdown. The exit status is 0 where all is right, 1 where a result is wrong or something failed, 2 without\n\
    a GPU. Bars that are missed, and what there was no time for, are said and change no status. docs/cuda.md has the rest.")]
struct Args {
    /// What to do
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// The GPU
    #[arg(long, default_value = "cuda:0", value_name = "cuda:N")]
    device: String,
    /// Nothing begins that could not end by then
    #[arg(long, default_value_t = 8.5, value_name = "M")]
    minutes: f64,
    /// Everything that was found, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Tests at a time [default: cores, at most 16 and one for each GiB that the GPU has free]
    #[arg(short, long, value_name = "N")]
    threads: Option<usize>,
    /// Where the test programs lie [default: tests beside this program, or where cargo puts them]
    #[arg(long, value_name = "DIR")]
    tests: Option<PathBuf>,
    /// The tests' models [default: fixtures beside this program, or ref-tests/fixtures]
    #[arg(long, value_name = "DIR")]
    fixtures: Option<PathBuf>,
    /// Where models are made, 40 GB [default: /dev/shm where it has room, else the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Only tests with this in their names
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only these timings: mla, matvec, matmul, attention, or the beginning of a model's name
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    parts: Vec<String>,
    /// Seconds after which a launch of a test counts as endless
    #[arg(long, default_value_t = 30.0, value_name = "S")]
    patience: f64,
    /// Sizes at which an interpreter of PTX ends
    #[arg(long, hide = true)]
    toy: bool,
    #[arg(long, hide = true)]
    part: Option<String>,
    #[arg(long, hide = true)]
    peaks: Option<String>,
    #[arg(long, hide = true)]
    model: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let index = args.device.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    let index: usize = index.with_context(|| format!("{} is no cuda:N", args.device))?;
    if args.what == What::Part {
        let peaks = args.peaks.as_deref().map(serde_json::from_str::<Peaks>).transpose()?;
        let part = args.part.as_deref().unwrap_or_default();
        parts::run(part, index, peaks, args.model.as_deref(), args.toy)?;
        return Ok(ExitCode::SUCCESS);
    }
    let start = Instant::now();
    let deadline = start + Duration::from_secs_f64(60.0 * args.minutes);
    let gpu = kernels::cuda::open(index)?;
    let (info, (free, _)) = (gpu.info(), gpu.memory()?);
    drop(gpu);
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let driver = driver.lines().next().unwrap_or("unknown driver").trim().to_owned();
    let head = format!("{}: {info}; {driver}; {}", args.device, jiff::Zoned::now().strftime("%F %H:%M"));
    println!("{head}\n");
    // Made while the tests run.
    let made = (args.what != What::Check).then(|| Made::begin(args)).transpose()?;
    let mut found = Found { head, json: args.json.clone(), ..Found::default() };
    if args.what != What::Time {
        found.checked = Some(check(args, deadline, free)?);
        found.save()?;
    }
    if let Some(made) = made {
        time(args, made, deadline, &mut found)?;
    }
    println!("\n## {}\n", found.head);
    if let Some(c) = &found.checked {
        println!("{}", summary(c));
    }
    if !found.rows.is_empty() {
        println!("{}", table(&found.rows));
    }
    found.left.iter().for_each(|l| println!("not measured, the time was over: {l}"));
    let verdict = if found.wrong() { "WRONG" } else { "nothing was wrong" };
    println!("{:.1} minutes; {verdict}", start.elapsed().as_secs_f64() / 60.0);
    found.save()?;
    Ok(ExitCode::from(u8::from(found.wrong())))
}

/// All that is known so far; kept as it grows, should the program be stopped.
#[derive(Default)]
struct Found {
    head: String,
    json: Option<PathBuf>,
    checked: Option<Checked>,
    rows: Vec<Row>,
    left: Vec<String>,
}

impl Found {
    fn wrong(&self) -> bool {
        self.checked.as_ref().is_some_and(|c| !c.right()) || self.rows.iter().any(|r| r.value.is_none())
    }

    fn row(&mut self, row: Row) {
        println!("{row}");
        self.rows.push(row);
    }

    fn save(&self) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let Self { head, checked, rows, left, .. } = self;
        let all = serde_json::json!({
            "head": head, "wrong": self.wrong(), "checked": checked, "rows": rows, "left": left
        });
        std::fs::write(path, serde_json::to_string_pretty(&all)?).with_context(|| path.display().to_string())
    }
}

/// `name` beside this program, or the second choice.
fn beside(name: &str, or: impl FnOnce(&Path) -> PathBuf) -> Result<PathBuf> {
    let program = std::env::current_exe().context("this program")?;
    let folder = program.parent().context("its folder")?;
    let here = folder.join(name);
    Ok(if here.is_dir() { here } else { or(folder) })
}

/// Processes that share a GPU well enough, and what each takes of its memory: a context, kernels, a tiny model.
const SHARING: usize = 16;
const CONTEXT: u64 = 1 << 30;

/// `free`: bytes of the GPU's memory.
fn check(args: &Args, deadline: Instant, free: u64) -> Result<Checked> {
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    let threads = cores.min(SHARING).min((free / CONTEXT) as usize).max(1);
    let fixtures = || {
        let here = std::path::absolute("ref-tests/fixtures").unwrap_or_default();
        if here.is_dir() { here } else { Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/fixtures") }
    };
    let check = Check {
        device: args.device.clone(),
        programs: args.tests.clone().map_or_else(|| beside("tests", |f| f.join("deps")), Ok)?,
        fixtures: args.fixtures.clone().map_or_else(|| beside("fixtures", |_| fixtures()), Ok)?,
        threads: args.threads.unwrap_or(threads),
        deadline,
        patience: Duration::from_secs_f64(args.patience),
        only: args.only.clone(),
    };
    let checked = check.run(&|line| println!("{line}"))?;
    println!();
    checked.complaints().iter().for_each(|l| println!("{l}"));
    Ok(checked)
}

fn summary(c: &Checked) -> String {
    let launches: usize = c.kernels.values().map(|k| k.launches).sum();
    let wrong = c.kernels.values().filter(|k| k.wrong > 0).count();
    let mut out = format!(
        "{} tests passed, {} failed; {} kernels in {launches} launches beside the interpreter, {wrong} of them wrong.\n",
        c.passed,
        c.failed.len(),
        c.kernels.len()
    );
    for (name, k) in &c.kernels {
        if k.wrong > 0 {
            out += &format!("- WRONG: {name}, {} of {} launches\n", k.wrong, k.launches);
        }
        if k.worst > 0.0 {
            out += &format!("- {name}: within {:.1e} of the interpreter\n", k.worst);
        }
        for (why, n) in &k.skipped {
            out += &format!("- {name}: {n} launches left out, {why}\n");
        }
    }
    c.failed.iter().for_each(|(test, _)| out += &format!("- FAILED: {test}\n"));
    c.left.iter().for_each(|test| out += &format!("- not run, the time was over: {test}\n"));
    out
}

type Writing = JoinHandle<Result<u64, synth::SynthError>>;

/// A part that takes longer hangs.
const PART: Duration = Duration::from_secs(150);

/// Models that are being written.
struct Made {
    folder: tempfile::TempDir,
    models: Vec<(Case, PathBuf, Writing)>,
}

impl Made {
    fn begin(args: &Args) -> Result<Self> {
        let shared = Path::new("/dev/shm");
        let room = |p: &Path| rustix::fs::statvfs(p).map_or(0, |s| s.f_bavail * s.f_frsize);
        let fits = !args.toy && room(shared) > 45_000_000_000;
        let default = || if fits { shared.to_owned() } else { std::env::temp_dir() };
        let scratch = args.scratch.clone().unwrap_or_else(default);
        let folder = tempfile::tempdir_in(&scratch).with_context(|| scratch.display().to_string())?;
        let make = |case: &Case| {
            let path = folder.path().join(format!("{}-{}.gguf", case.geometry, case.types));
            let (to, (geometry, types)) = (path.clone(), case.model(args.toy));
            (*case, path, std::thread::spawn(move || synth::write(&geometry, types, 1, &to)))
        };
        let models = CASES.iter().filter(|c| wanted(args, c.name)).map(make).collect();
        Ok(Self { folder, models })
    }
}

fn wanted(args: &Args, part: &str) -> bool {
    args.parts.is_empty() || args.parts.iter().any(|p| part.to_lowercase().starts_with(&p.to_lowercase()))
}

fn time(args: &Args, made: Made, deadline: Instant, found: &mut Found) -> Result<()> {
    let base = |part: &str| -> Vec<String> {
        let mut all: Vec<String> = ["part", "--part", part, "--device", &args.device].map(Into::into).into();
        all.extend(args.toy.then(|| "--toy".to_owned()));
        all
    };
    let mut peaks = None;
    let until = deadline.min(Instant::now() + PART);
    let measured = parts::child(&base(parts::PEAKS), until, &mut |l| peaks = serde_json::from_str(l).ok());
    if let Err(e) = measured {
        found.row(Row::failed("this machine", "bandwidth and peaks", format!("{e:#}")));
    }
    // The rest is worth having even so.
    let p = peaks.unwrap_or(Peaks::ASSUMED);
    let note = if p == Peaks::ASSUMED { "an H200's, not measured" } else { "" };
    let text = serde_json::to_string(&p)?;
    for (name, value, unit) in [
        ("bytes copied (read and written)", p.copied / 1e9, "GB/s"),
        ("bytes read", p.read / 1e9, "GB/s"),
        ("mma.sync on f16, sums in f32", p.f16 / 1e12, "TFLOP/s"),
        ("mma.sync on int8", p.s8 / 1e12, "TOP/s"),
        ("multiply-adds in f32", p.fma / 1e12, "TFLOP/s"),
    ] {
        found.row(Row::new("this machine", name, value, unit, note));
    }
    let one = |found: &mut Found, name: &str, model: Option<&Path>| -> Result<()> {
        if Instant::now() > deadline {
            found.left.push(name.to_owned());
            return Ok(());
        }
        let mut all = base(name);
        all.extend(["--peaks".to_owned(), text.clone()]);
        if let Some(path) = model {
            all.extend(["--model".to_owned(), path.display().to_string()]);
        }
        let start = Instant::now();
        let done = parts::child(&all, deadline.min(start + PART), &mut |l| match serde_json::from_str(l) {
            Ok(row) => found.row(row),
            Err(_) => println!("{l}"),
        });
        match done {
            Err(e) if Instant::now() > deadline => found.left.push(format!("the rest of {name} ({e:#})")),
            Err(e) => found.row(Row::failed(name, "all that is missing", format!("{e:#}"))),
            Ok(()) => {}
        }
        println!("{name}: {:.1?}", start.elapsed());
        found.save()
    };
    let mut models = made.models.into_iter();
    let mut model = |found: &mut Found| -> Result<()> {
        let Some((case, path, writing)) = models.next() else { return Ok(()) };
        match writing.join() {
            Ok(Ok(_)) => one(found, case.name, Some(&path))?,
            Ok(Err(e)) => found.row(Row::failed(case.name, "making the file", e.to_string())),
            Err(_) => found.row(Row::failed(case.name, "making the file", "it panicked")),
        }
        // Room for what follows; the folder goes in the end.
        let _ = std::fs::remove_file(&path);
        Ok(())
    };
    // The models that most bars are for, then kernels while the larger files are made.
    model(found)?;
    model(found)?;
    for part in parts::ALONE.iter().filter(|p| wanted(args, p)) {
        one(found, part, None)?;
    }
    model(found)?;
    model(found)?;
    made.folder.close()?;
    Ok(())
}
