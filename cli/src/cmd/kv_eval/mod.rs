//! `kv-eval`: what KV cache policies make a model forget. Every policy with every budget does the same tasks; results go to
//! results.csv cell by cell, so that a kill costs one cell, and a report is made of them at the end.

mod corpus;
mod list;
mod measure;
pub mod plan;
mod plot;
mod report;
mod table;
mod tasks;

pub use corpus::Wording;
pub use measure::{Ask, Manner};
pub use tasks::{Judge, Sizes, TaskSpec};

use crate::model::{LoadConfig, SessionConfig};
use crate::output;
use crate::trace::{self, Trace};
use anyhow::{Context, Result};
use engine::{Model, Session};
use indicatif::{ProgressBar, ProgressStyle};
use measure::Found;
use plan::Cell;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use table::{ALL, Row, Table};
use tasks::{Task, Work};

/// What to do.
pub enum Config {
    /// Show the policies.
    List,
    /// Evaluate some.
    Eval(Box<Eval>),
}

/// An evaluation.
pub struct Eval {
    pub load: LoadConfig,
    pub session: SessionConfig,
    pub policies: Vec<plan::Policy>,
    pub budgets: Vec<(String, engine::kv::Budget)>,
    pub tasks: Vec<TaskSpec>,
    pub manner: Manner,
    pub sizes: Sizes,
    /// Tell what was evicted, cell by cell.
    pub trace: bool,
    pub out: PathBuf,
}

pub fn run(c: &Config) -> Result<()> {
    match c {
        Config::List => Ok(output::print(&list::text())?),
        Config::Eval(e) => evaluate(e),
    }
}

fn evaluate(e: &Eval) -> Result<()> {
    let words = tasks::Words::of(&e.load.source.open()?)?;
    let tasks: Vec<Task> =
        e.tasks.iter().map(|t| tasks::prepare(&words, t, &e.sizes)).collect::<Result<_>>()?;
    drop(words);
    let mut cells = Vec::new();
    for task in &tasks {
        for cell in plan::cells(&task.name, task.longest(), &e.policies, &e.budgets)? {
            cells.push((task, cell));
        }
    }
    let sessions = cells.iter().map(|(task, cell)| (session(e, task, cell), 1));
    let on = e.load.plan_all(sessions).context(
        "the longest text decides: --ppl-length, --fillers, --passkey-length and --answer-tokens shorten it",
    )?;
    let (model, _) = e.load.load(on)?;
    warn_of_length(&model, &tasks, &e.manner);
    // A policy that cannot serve the model must not be found out after an hour.
    for (task, cell) in &cells {
        open(e, &model, task, cell)?;
    }
    let about = about(e, &model, &tasks);
    let mut table = Table::open(&e.out, &about)?;
    let answers = e.out.join("answers");
    std::fs::create_dir_all(&answers)
        .with_context(|| format!("cannot make the folder {}", answers.display()))?;

    let todo: Vec<_> = cells.iter().filter(|(_, cell)| !table.has(&cell.id)).collect();
    let known = cells.len() - todo.len();
    if known > 0 {
        eprintln!("{known} of {} cells are in {} already", cells.len(), e.out.join("results.csv").display());
    }
    let bar = ProgressBar::new(todo.iter().map(|(task, _)| task.sequences() as u64).sum());
    let style = "{msg:<48!} {wide_bar} {pos}/{len} sequences, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).context("a template")?);
    for (task, cell) in todo {
        bar.set_message(format!("{} {} {}", task.name, cell.id.policy, cell.id.budget));
        let mut session = open(e, &model, task, cell)?;
        let start = Instant::now();
        let trace = trace(e, &model, cell)?;
        trace.iter().for_each(|t| t.follow(&mut session));
        let mut done = 0;
        let step = || {
            done += 1;
            bar.inc(1);
            trace.iter().filter(|_| done < task.sequences()).for_each(|t| t.sequence(done));
        };
        let found = measure::measure(&mut session, task, &e.manner, step)
            .with_context(|| format!("{}, {}", task.name, cell.spec))?;
        let seconds = start.elapsed().as_secs_f64();
        trace.map_or(Ok(()), Trace::finish)?;
        write_answers(&answers, cell, &found)?;
        table.append(rows(task, cell, &found, seconds))?;
    }
    bar.finish_and_clear();
    let order: Vec<String> = e.policies.iter().map(|p| p.text.clone()).collect();
    let report = report::write(&e.out, &table.rows, &order, &about)?;
    Ok(output::print(&format!("{report}\nreport: {}\n", e.out.join("report.html").display()))?)
}

/// The session of a cell.
fn session(e: &Eval, task: &Task, cell: &Cell) -> SessionConfig {
    let ctx = match task.work {
        Work::Read(_) => task.longest(),
        Work::Ask(_) => task.longest() + e.manner.answer_tokens,
    };
    let mut kv = cell.spec.clone();
    if e.trace {
        kv = kv.recording(trace::needs());
    }
    SessionConfig { ctx: Some(ctx), kv, ..e.session.clone() }
}

fn open(e: &Eval, model: &Arc<Model>, task: &Task, cell: &Cell) -> Result<Session> {
    let config = session(e, task, cell);
    let options = config.options(config.ctx(model.info().ctx_train)?);
    Session::new(model, &options).with_context(|| format!("{}, {}", task.name, cell.spec))
}

fn warn_of_length(model: &Model, tasks: &[Task], m: &Manner) {
    let trained = model.info().ctx_train;
    for t in tasks {
        let answer = if matches!(t.work, Work::Ask(_)) { m.answer_tokens } else { 0 };
        if trained > 0 && t.longest() + answer > trained {
            eprintln!(
                "note: {} takes up to {} tokens, the model was trained for {trained}: policies that keep original \
                 positions go beyond",
                t.name,
                t.longest() + answer
            );
        }
    }
}

/// All that decides the results, and what a reader must know to repeat them.
fn about(e: &Eval, model: &Model, tasks: &[Task]) -> Map<String, Value> {
    let i = model.info();
    let (s, m) = (&e.session, &e.manner);
    let all = json!({
        "format": 1,
        "model": output::one_line(&i.name),
        "architecture": i.arch,
        "fingerprint": fingerprint(model),
        "threads": e.load.threads,
        "cache_k": s.cache_k.name(),
        "cache_v": s.cache_v.name(),
        "batch": s.batch,
        "ask": if m.ask == Ask::After { "after" } else { "before" },
        "judge": if m.judge == Judge::Exact { "exact" } else { "contains" },
        "answer_tokens": m.answer_tokens,
        "seed": e.sizes.seed,
        "trace": e.trace,
    });
    let Value::Object(mut all) = all else { unreachable!("an object") };
    for t in tasks {
        let what = json!({"sequences": t.sequences(), "longest": t.longest(), "hash": t.hash});
        all.insert(format!("task {}", t.name), what);
    }
    all
}

/// Hash of the tensors' names, shapes and types and of a page of each: weights that were trained on differ in it.
fn fingerprint(model: &Model) -> String {
    let (file, mut h) = (model.file(), Sha256::new());
    for t in file.tensors() {
        h.update(format!("{} {} {:?}\n", t.name, t.dtype.name(), t.dims));
        let bytes = file.bytes(t);
        h.update(&bytes[..bytes.len().min(4096)]);
    }
    h.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
}

fn rows(task: &Task, cell: &Cell, found: &Found, seconds: f64) -> Vec<Row> {
    let is_text = matches!(task.work, Work::Read(_));
    let rate =
        |n: usize, t: std::time::Duration| if n > 0 { n as f64 / t.as_secs_f64().max(1e-9) } else { 0.0 };
    let row = |bucket: &str, from, to, score: &measure::Score| {
        let [value, low, high] = if is_text { score.perplexity() } else { score.share() };
        Row {
            id: cell.id.clone(),
            budget_tokens: cell.budget_tokens,
            kv: cell.spec.to_string(),
            bucket: bucket.into(),
            from,
            to,
            metric: if is_text { "ppl" } else { "accuracy" }.into(),
            n: score.n,
            value,
            low,
            high,
            prompt_tokens: found.prompt_tokens,
            new_tokens: found.new_tokens,
            evicted: found.evicted as f64 / task.sequences() as f64,
            bytes: found.bytes,
            prompt_rate: rate(found.prompt_tokens, found.prompt_time),
            new_rate: rate(found.new_tokens, found.new_time),
            seconds,
        }
    };
    let each = task.buckets.iter().zip(&found.scores).map(|(b, s)| row(&b.label, b.from, b.to, s));
    let last = task.buckets.last().map_or(0, |b| b.to);
    let first = task.buckets.first().map_or(0, |b| b.from);
    let mut rows: Vec<Row> = each.collect();
    rows.push(row(ALL, first, last, &found.all()));
    rows
}

/// The cell's trace, if one is wanted and there is something to trace.
fn trace(e: &Eval, model: &Arc<Model>, cell: &Cell) -> Result<Option<Trace>> {
    if !e.trace || !cell.spec.chooses() {
        return Ok(None);
    }
    let dir = e.out.join("trace");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
    let about = json!({"task": cell.id.task, "policy": cell.id.policy, "budget": cell.id.budget});
    let Value::Object(about) = about else { unreachable!("an object") };
    Trace::create(&dir.join(file_name(cell)), model, about).map(Some)
}

/// A file for a cell.
fn file_name(cell: &Cell) -> String {
    let name = format!("{} {} {}", cell.id.task, cell.id.policy, cell.id.budget);
    let plain = |c: char| if c.is_alphanumeric() || "-+=.,% ".contains(c) { c } else { '_' };
    let mut name: String = name.chars().map(plain).collect();
    if name.len() > 120 {
        // Long configurations may begin alike.
        let hash = Sha256::digest(name.as_bytes());
        name = name.chars().take(80).collect();
        name.extend(hash.iter().take(4).map(|b| format!("{b:02x}")));
    }
    name + ".jsonl"
}

/// What was asked and answered, for reading: one JSON object a line.
fn write_answers(dir: &Path, cell: &Cell, found: &Found) -> Result<()> {
    if found.answers.is_empty() {
        return Ok(());
    }
    let mut out = output::OutFile::create(&dir.join(file_name(cell)))?;
    for a in &found.answers {
        writeln!(out, "{a}")?;
    }
    out.finish()
}
