//! `peers`: rsinfer and llama.cpp on the same models, in turns, beside the machine's own limits: a Markdown table and a plot.

use anyhow::{Context, Result, bail};
use benches::peers::{
    Case, Kind, Limits, Measured, Peer, PeerForm, Programs, Results, Round, Run, Test, Work,
};
use benches::peers::{WATCH, draw, markdown, median, replace_between, watch};
use benches::synth;
use clap::Parser;
use engine::gguf::{File, OpenMode};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Measure rsinfer beside llama.cpp: prompts and decoding, every model made on the spot and removed
#[derive(Parser)]
#[command(after_help = "Examples:\n  \
    peers                                   the whole table (half an hour on two quiet cores)\n  \
    peers --only llama-3.2-1b-Q4            the rows whose name contains it\n  \
    peers --case gemma-3-4b:Q4_0 --rounds 1\n  \
    peers --tiny                            a test of the command itself, in a minute\n\n\
    llama.cpp comes from llama-cpp-python, built from source with its defaults into a virtual environment under the target\n\
    folder on the first call (needs python3, a C++ compiler and cmake); --python names one that has it already.")]
struct Args {
    /// Folder of the models: MODEL-TYPE.gguf is used if it is there, and made and removed otherwise
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Keep the models made
    #[arg(long)]
    keep: bool,
    /// Rows whose MODEL-TYPE contains one of these
    #[arg(long, value_name = "TEXT,...", value_delimiter = ',')]
    only: Vec<String>,
    /// These instead of the table's rows, as MODEL:TYPE
    #[arg(long, value_name = "MODEL:TYPE,...", value_delimiter = ',', value_parser = Case::parse)]
    case: Vec<Case>,
    /// Rounds; medians are taken over them
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Threads of both [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    prompt: u16,
    /// Tokens decoded
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    generate: u16,
    /// Context of the test of decoding at depth
    #[arg(long, default_value_t = 4096, value_name = "N")]
    depth: u16,
    /// Python that has llama-cpp-python
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// The same, built without AMX, for models that it cannot run with it [default: built where --python is not given, and
    /// otherwise its weights are not repacked]
    #[arg(long, value_name = "FILE")]
    python_without_amx: Option<PathBuf>,
    /// Measure rsinfer alone
    #[arg(long, conflicts_with = "python")]
    no_peer: bool,
    /// The rsinfer to measure [default: built anew]
    #[arg(long, value_name = "FILE")]
    rsinfer: Option<PathBuf>,
    /// A command in front of every measurement (`taskset -c 0-7`)
    #[arg(long, value_name = "COMMAND")]
    prefix: Option<String>,
    /// Folder of the results: peers.json, peers.md, peers.svg [default: target/peers]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Put table and plot into docs/
    #[arg(long)]
    write_docs: bool,
    /// Only print and draw results measured before (peers.json)
    #[arg(long, value_name = "FILE")]
    show: Option<PathBuf>,
    /// Models of a few megabytes: a test of this command
    #[arg(long)]
    tiny: bool,
    /// Print the machine's limits as JSON, and nothing else
    #[arg(long, hide = true)]
    limits: bool,
}

fn main() -> Result<()> {
    // Not an option of clap's: what follows is another program's command line.
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|w| w == WATCH) {
        let report = words.next().context("--watch needs a file")?;
        std::process::exit(watch(report.as_ref(), &words.collect::<Vec<_>>())?);
    }
    let a = Args::parse();
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    let threads = a.threads.map_or(cores, usize::from);
    if a.limits {
        println!("{}", serde_json::to_string(&Limits::measure(threads)?)?);
        return Ok(());
    }
    let out = a.out.clone().unwrap_or_else(|| target().join("peers"));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let results = match &a.show {
        Some(path) => serde_json::from_str(&read(path)?).with_context(|| path.display().to_string())?,
        None => {
            let programs = programs(&a, threads, &out)?;
            measure(&a, &programs, &out)?
        }
    };
    report(&a, &results, &out)
}

/// The repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("benches lies in the repository")
}

/// The target folder: that of this program, `target/release/peers`.
fn target() -> PathBuf {
    let this = std::env::current_exe().ok();
    this.as_deref().and_then(|p| p.ancestors().nth(2)).map_or_else(|| root().join("target"), Into::into)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn programs(a: &Args, threads: usize, out: &Path) -> Result<Programs> {
    let this = std::env::current_exe()?;
    let rsinfer = match &a.rsinfer {
        Some(path) => path.clone(),
        None => {
            run(Command::new(cargo()).args(["build", "--release", "-p", "rsinfer"]).current_dir(root()))?;
            target().join("release/rsinfer")
        }
    };
    let python = match (&a.python, a.no_peer) {
        (_, true) => None,
        (Some(python), _) => Some(python.clone()),
        (None, _) => Some(environment(&target().join("peers-venv"), Build::Default)?),
    };
    let peer = python.map(|python| Peer { python, script: script(), repack: true });
    let prefix = a.prefix.iter().flat_map(|p| p.split_whitespace()).map(Into::into).collect();
    Ok(Programs {
        this,
        rsinfer,
        peer,
        prefix,
        threads,
        scratch: out.into(),
        disturbance: Default::default(),
    })
}

fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn run(command: &mut Command) -> Result<()> {
    let what = format!("{command:?}");
    let status = command.status().with_context(|| what.clone())?;
    if !status.success() {
        bail!("{what} ended with {status}");
    }
    Ok(())
}

/// What times the peer.
fn script() -> PathBuf {
    root().join("ref-tests/llama_cpp/bench_peer.py")
}

/// How llama.cpp is built.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Build {
    /// Its defaults: for the CPU at hand.
    Default,
    /// The same with the stores that GCC 12 drops. It takes `_tile_loadconfig` to read 8 of its 64 bytes, and the first prompt
    /// on a CPU with AMX ends in an illegal instruction.
    AllStores,
    /// The same without AMX: with it, llama.cpp's scheduler finds no place for the products of latent attention.
    WithoutAmx,
}

impl Build {
    fn flags(self) -> Option<&'static str> {
        match self {
            Self::Default => None,
            Self::AllStores => Some("-fno-tree-dse -fno-dse"),
            Self::WithoutAmx => Some("-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"),
        }
    }
}

/// A virtual environment with llama-cpp-python built from source, of the version the reference tests use; made if need be.
fn environment(folder: &Path, build: Build) -> Result<PathBuf> {
    let python = folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    let found = Command::new(&python).args(["-c", "import llama_cpp, numpy"]).output();
    if !found.is_ok_and(|o| o.status.success()) {
        run(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
        install(&python, build)?;
    }
    if build == Build::Default && !reads_a_prompt(&python)? {
        install(&python, Build::AllStores)?;
        if !reads_a_prompt(&python)? {
            bail!("llama.cpp in {} cannot read a prompt; name another with --python", folder.display());
        }
    }
    Ok(python)
}

fn install(python: &Path, build: Build) -> Result<()> {
    eprintln!(
        "building llama.cpp for {} (minutes, once): {}",
        python.display(),
        build.flags().unwrap_or("defaults")
    );
    let pinned = read(&root().join("ref-tests/requirements.txt"))?;
    let wanted = pinned.lines().filter(|l| l.starts_with("llama-cpp-python") || l.starts_with("numpy"));
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python"]).args(wanted);
    if let Some(flags) = build.flags() {
        // A wheel in pip's cache has other flags.
        pip.args(["--force-reinstall", "--no-cache-dir"]).env("CXXFLAGS", flags).env("CFLAGS", flags);
    }
    run(&mut pip)
}

/// Whether the peer runs on a small model, in the type whose kernels depend most on the CPU.
fn reads_a_prompt(python: &Path) -> Result<bool> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    let geometry = synth::Geometry::named("llama-3.2-1b").context("in the table")?.tiny();
    let types = synth::Types::from_name("Q4_0").context("a type")?;
    synth::write(&geometry, types, 1, &path)?;
    let out = Command::new(python).arg(script()).arg(&path).args(["-p40", "-n1", "-r1"]).output()?;
    Ok(out.status.success())
}

/// The peer that can run a model.
fn peer_for(a: &Args, programs: &Programs, path: &Path) -> Result<Option<(Peer, PeerForm)>> {
    let Some(peer) = &programs.peer else { return Ok(None) };
    let Err(e) = programs.probe(peer, path) else { return Ok(Some((peer.clone(), PeerForm::Default))) };
    let amx = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|t| t.contains("amx_tile"));
    if !amx {
        return Err(e);
    }
    let without_amx = match (&a.python_without_amx, &a.python) {
        (Some(python), _) => Some(python.clone()),
        (None, None) => Some(environment(&target().join("peers-venv-without-amx"), Build::WithoutAmx)?),
        (None, Some(_)) => None,
    };
    let (peer, form) = match without_amx {
        Some(python) => (Peer { python, ..peer.clone() }, PeerForm::WithoutAmx),
        None => (Peer { repack: false, ..peer.clone() }, PeerForm::NotRepacked),
    };
    eprintln!("{e:#}: trying {}", form.note());
    programs.probe(&peer, path)?;
    Ok(Some((peer, form)))
}

fn measure(a: &Args, programs: &Programs, out: &Path) -> Result<Results> {
    let mut cases = if a.case.is_empty() { Case::table() } else { a.case.clone() };
    cases.retain(|c| a.only.is_empty() || a.only.iter().any(|o| c.name().contains(o.as_str())));
    if cases.is_empty() {
        bail!(
            "--only leaves no row: there are {}",
            Case::table().iter().map(Case::name).collect::<Vec<_>>().join(", ")
        );
    }
    let folder = a.models.clone().unwrap_or_else(|| out.join("models"));
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut results = Results {
        date: today()?,
        machine: machine(),
        peer: programs.peer_name()?,
        threads: programs.threads,
        others: 0.0,
        limits: programs.limits()?,
        models: Vec::new(),
    };
    let mut limits = Vec::new();
    for mut case in cases {
        if a.tiny {
            case.geometry = case.geometry.tiny();
        }
        let tiny = if a.tiny { "tiny-" } else { "" };
        let path = folder.join(format!("{tiny}{}.gguf", case.name()));
        let made = !path.exists();
        if made {
            eprintln!("{}: writing", path.display());
            synth::write(&case.geometry, case.types, 1, &path)?;
        }
        let done = measure_case(a, programs, &case, &path, &mut limits);
        programs.forget_peer_state();
        if made && !a.keep {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        results.models.push(done?);
        results.others = programs.disturbance.get();
        // After every model: an hour's work is not lost to a failure at its end.
        let of = |f: fn(&Limits) -> f64| median(limits.iter().map(f)).unwrap_or(f64::NAN);
        let tiles = median(limits.iter().filter_map(|l| l.tiles));
        results.limits = Limits { read: of(|l| l.read), int8: of(|l| l.int8), float: of(|l| l.float), tiles };
        std::fs::write(out.join("peers.json"), serde_json::to_string_pretty(&results)? + "\n")?;
    }
    Ok(results)
}

fn measure_case(
    a: &Args,
    programs: &Programs,
    case: &Case,
    path: &Path,
    all_limits: &mut Vec<Limits>,
) -> Result<Measured> {
    let (prompt, generate, depth) = (a.prompt.into(), a.generate.into(), usize::from(a.depth));
    let file = File::open(path, OpenMode::Mmap)?;
    let macs = Work::of(&file, prompt).multiply_adds;
    let decode = |depth| Kind::Decode { depth, tokens: generate };
    let peer = peer_for(a, programs, path)?;
    let mut runs = vec![
        (
            Run { prompt, generate: 0, depth: 0 },
            Test { kind: Kind::Prompt(prompt), work: macs, rounds: Vec::new() },
        ),
        (Run { prompt: 0, generate, depth: 0 }, Test { kind: decode(0), work: 0.0, rounds: Vec::new() }),
    ];
    if case.deep && depth > 0 {
        runs.push((
            Run { prompt: 0, generate, depth },
            Test { kind: decode(depth), work: 0.0, rounds: Vec::new() },
        ));
        if let Some((peer, _)) = &peer {
            eprintln!("{}: the peer computes {depth} tokens of context", case.name());
            programs.prepare(peer, path, depth)?;
        }
    }
    for round in 1..=a.rounds {
        let limits = programs.limits()?;
        all_limits.push(limits);
        for (run, test) in &mut runs {
            let ours = programs.ours(path, *run)?;
            let theirs = match &peer {
                Some((peer, _)) => Some(programs.theirs(peer, path, *run)?),
                None => None,
            };
            let peak = if case.float() { limits.float } else { limits.int8 };
            let (rate, limit) = if run.prompt > 0 {
                (ours.prompt, peak / test.work)
            } else {
                test.work = ours.token_bytes.context("rsinfer bench printed no read_bytes_per_second")?;
                (ours.decode, limits.read / test.work)
            };
            let rate = rate.context("rsinfer bench printed no rate")?;
            let beside = theirs.and_then(|p| if run.prompt > 0 { p.prompt } else { p.decode });
            eprintln!(
                "{}, round {round}, {:?}: {rate:.1} tokens/s, the peer {}, {:.0}% of the limit",
                case.name(),
                test.kind,
                beside.map_or("-".into(), |p| format!("{p:.1}")),
                100.0 * rate / limit
            );
            test.rounds.push(Round { ours: rate, peer: beside, limit });
        }
    }
    Ok(Measured {
        model: format!("{}{}", if a.tiny { "tiny " } else { "" }, case.geometry.name),
        types: case.types.to_string(),
        file_bytes: file.total_bytes(),
        float: case.float(),
        peer_form: peer.map_or(PeerForm::Default, |p| p.1),
        tests: runs.into_iter().map(|r| r.1).collect(),
    })
}

/// The lines in docs/performance.md between which the tables stand.
const BEGIN: &str = "<!-- peers: begin -->";
const END: &str = "<!-- peers: end -->";

fn report(a: &Args, results: &Results, out: &Path) -> Result<()> {
    let text = markdown(results);
    let picture = |path: &Path| draw(results, path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()));
    std::fs::write(out.join("peers.md"), &text)?;
    picture(&out.join("peers.svg"))?;
    if a.write_docs {
        let page = root().join("docs/performance.md");
        let new = replace_between(&read(&page)?, BEGIN, END, &text)
            .with_context(|| format!("{} has no lines {BEGIN} and {END}", page.display()))?;
        std::fs::write(&page, new)?;
        picture(&root().join("docs/peers.svg"))?;
    }
    print!("{text}");
    eprintln!("also in {}: peers.json, peers.md, peers.svg", out.display());
    Ok(())
}

/// The processor's name and what our backend makes of it.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let name = model.map_or("unknown processor", |m| m.1.trim());
    format!("{name}, {}", kernels::cpu::isa::Isa::current().name())
}

/// Today, from the system: `2026-01-31`.
fn today() -> Result<String> {
    let now = jiff::Timestamp::now().to_string();
    now.get(..10).map(Into::into).context("the clock has no date")
}
