//! Decoding with less memory than the model has bytes: control groups, runs in them, what an ideal memory would have read.

mod group;

pub use group::Group;

use anyhow::{Context, Result};
use engine::gguf::{File, OpenMode};
use engine::pager::{PagerOptions, ideal};
use engine::{LoadOptions, Model, Session, SessionOptions, Usage};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::io::{Seek, SeekFrom, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

/// What a run came to. All but `killed` and `failed` are of the measured tokens alone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// Tokens decoded.
    pub tokens: usize,
    /// Seconds they took.
    pub seconds: f64,
    /// Bytes that the process had read from disk.
    pub read: u64,
    /// Page faults that had to read.
    pub faults: u64,
    /// Bytes that an LRU memory of whole experts would have read, given the group's limit less anonymous memory and all weights
    /// that are no experts.
    pub ideal: Option<u64>,
    /// Bytes of the experts that were chosen.
    pub chosen: Option<u64>,
    /// The share of the uses that the tenth of the experts used most had.
    pub hot: Option<f64>,
    /// The system ended it for want of memory.
    pub killed: bool,
    /// It ended with an error.
    pub failed: bool,
}

impl Outcome {
    /// Tokens per second.
    pub fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn per_token(&self, bytes: u64) -> f64 {
        bytes as f64 / self.tokens as f64
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.killed || self.failed {
            return f.write_str(if self.killed { "killed" } else { "failed" });
        }
        let mb = |b: u64| self.per_token(b) / 1e6;
        write!(f, "{:.2} t/s, {:.1} MB a token read, {} faults", self.rate(), mb(self.read), self.faults)?;
        if let (Some(i), Some(c)) = (self.ideal, self.chosen) {
            write!(f, ", ideal {:.1} MB of {:.1} MB chosen", mb(i), mb(c))?;
        }
        if let Some(hot) = self.hot {
            write!(f, ", {:.0}% of the uses by a tenth of the experts", hot * 100.0)?;
        }
        Ok(())
    }
}

/// A limit with its outcomes.
pub struct Row {
    /// Percent of the file.
    pub share: u64,
    /// Bytes.
    pub limit: u64,
    /// rsinfer's.
    pub ours: Option<Outcome>,
    /// That of the other, llama.cpp or rsinfer otherwise.
    pub theirs: Option<Outcome>,
}

/// The outcome in the middle by speed; one that was killed or failed, if there is any.
pub fn median(mut all: Vec<Outcome>) -> Option<Outcome> {
    if let Some(bad) = all.iter().find(|o| o.killed || o.failed) {
        return Some(bad.clone());
    }
    all.sort_by(|a, b| a.rate().total_cmp(&b.rate()));
    all.get(all.len() / 2).cloned()
}

/// Pseudo-random token ids, the same for both programs (ref-tests/llama_cpp/larger_peer.py).
fn token(i: usize, n_vocab: usize) -> u32 {
    ((i as u64 * 7919 + 13) % n_vocab as u64) as u32
}

/// Decodes `warm` tokens, then measures `tokens` more.
pub fn decode(
    path: &Path,
    threads: usize,
    warm: usize,
    tokens: usize,
    seconds: f64,
    limit: u64,
    pager: PagerOptions,
) -> Result<Outcome> {
    let model = Model::load(path, &LoadOptions { threads, pager, ..Default::default() })?;
    let options = SessionOptions { ctx: warm + tokens, batch: 64, ..Default::default() };
    let mut session = Session::new(&model, &options)?;
    let usage = || Usage::now().context("this system does not count page faults");
    let n_vocab = model.info().n_vocab;
    model.pager().record(true);
    for i in 0..warm {
        session.eval(&[token(i, n_vocab)])?;
    }
    let before = model.pager().record(true);
    let (start, from, most) = (Instant::now(), usage()?, Duration::from_secs_f64(seconds));
    let mut done = 0;
    while done < tokens && start.elapsed() < most {
        session.eval(&[token(warm + done, n_vocab)])?;
        done += 1;
    }
    let (seconds, used) = (start.elapsed().as_secs_f64(), usage()?.since(from));
    let trace = model.pager().record(false);

    let layers = model.info().n_layers;
    let counts: Vec<usize> = (0..layers).map(|l| model.pager().uses(l).len()).collect();
    let first: Vec<usize> = counts.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
    let sizes: Vec<usize> = (0..layers)
        .flat_map(|l| std::iter::repeat_n(model.pager().expert_bytes(l) as usize, counts[l]))
        .collect();
    let dense: u64 = model
        .file()
        .tensors()
        .iter()
        .filter(|t| !t.name.contains("_exps.") && t.name != "token_embd.weight")
        .map(|t| t.n_bytes)
        .sum();
    let capacity = limit.saturating_sub(dense + used.resident_anon) as usize;
    let number = |c: &engine::pager::Choice| first[c.layer as usize] + c.expert as usize;
    let all = ideal(&sizes, before.iter().chain(&trace).map(number), capacity);
    let warmed = ideal(&sizes, before.iter().map(number), capacity);
    let mut uses = vec![0u64; sizes.len()];
    trace.iter().for_each(|c| uses[number(c)] += 1);
    uses.sort_unstable_by(|a, b| b.cmp(a));
    let (hottest, total) = (uses[..uses.len() / 10].iter().sum::<u64>(), uses.iter().sum::<u64>());
    Ok(Outcome {
        tokens: done,
        seconds,
        read: used.disk_read,
        faults: used.major_faults,
        ideal: Some(all - warmed),
        chosen: Some(trace.iter().map(|c| sizes[number(c)] as u64).sum()),
        hot: (total > 0).then(|| hottest as f64 / total as f64),
        ..Default::default()
    })
}

/// Seconds per token of a model that is wholly in memory, with the pager and without, round by round: both loaded, decoding the
/// same tokens in turns.
pub fn cost(path: &Path, threads: usize, tokens: usize, rounds: usize) -> Result<Vec<(f64, f64)>> {
    let open = |off: bool| -> Result<Session> {
        let pager = PagerOptions { off, ..Default::default() };
        let model = Model::load(path, &LoadOptions { threads, pager, ..Default::default() })?;
        Ok(Session::new(&model, &SessionOptions { ctx: tokens, batch: 64, ..Default::default() })?)
    };
    let (mut with, mut without) = (open(false)?, open(true)?);
    let run = |s: &mut Session| -> Result<f64> {
        s.truncate(0);
        let (start, n_vocab) = (Instant::now(), s.model().info().n_vocab);
        for i in 0..tokens {
            s.eval(&[token(i, n_vocab)])?;
        }
        Ok(start.elapsed().as_secs_f64() / tokens as f64)
    };
    let mut all = Vec::new();
    // The first round reads the file.
    for round in 0..=rounds {
        let pair = match round % 2 {
            0 => (run(&mut with)?, run(&mut without)?),
            _ => {
                let second = run(&mut without)?;
                (run(&mut with)?, second)
            }
        };
        all.extend((round > 0).then_some(pair));
    }
    Ok(all)
}

/// Makes routers prefer some experts: the rows of the one at rank r, in an order of each layer's own, are scaled by
/// (1 + r)^-exponent, so that the largest logits are more often those of the first ranks.
pub fn skew(path: &Path, exponent: f32) -> Result<()> {
    let file = File::open(path, OpenMode::Read)?;
    let mut out = std::fs::OpenOptions::new().write(true).open(path)?;
    for (layer, t) in file.tensors().iter().filter(|t| t.name.contains("ffn_gate_inp.weight")).enumerate() {
        let experts = t.dims.get(1).copied().unwrap_or(1) as usize;
        let bytes = file.bytes(t);
        let mut rows: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let width = rows.len() / experts.max(1);
        for (e, row) in rows.chunks_exact_mut(width.max(1)).enumerate() {
            let rank = (e * 37 + layer * 11) % experts;
            row.iter_mut().for_each(|x| *x *= (1.0 + rank as f32).powf(-exponent));
        }
        out.seek(SeekFrom::Start(t.offset))?;
        out.write_all(&rows.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    Ok(out.sync_all()?)
}

/// Drops the file from the page cache.
pub fn forget(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    // Pages not yet written stay.
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// The table.
pub fn markdown(rows: &[Row], other: &str) -> String {
    let mut t = format!(
        "| limit | rsinfer t/s | {other} t/s | ratio | rsinfer MB/token | ideal LRU MB/token | ratio | {other} MB/token |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let ok = |o: &Option<Outcome>| o.clone().filter(|o| !o.killed && !o.failed);
    let cell = |o: &Option<Outcome>, f: &dyn Fn(&Outcome) -> String| match o {
        None => "-".into(),
        Some(o) if o.killed => "killed".into(),
        Some(o) if o.failed => "failed".into(),
        Some(o) => f(o),
    };
    for r in rows {
        let mb = |o: &Outcome, b: u64| format!("{:.1}", o.per_token(b) / 1e6);
        let ratio = match (ok(&r.ours), ok(&r.theirs)) {
            (Some(a), Some(b)) => format!("{:.2}", a.rate() / b.rate()),
            _ => "-".into(),
        };
        let _ = writeln!(
            t,
            "| {}% ({:.2} GB) | {} | {} | {ratio} | {} | {} | {} | {} |",
            r.share,
            r.limit as f64 / 1e9,
            cell(&r.ours, &|o| format!("{:.1}", o.rate())),
            cell(&r.theirs, &|o| format!("{:.1}", o.rate())),
            cell(&r.ours, &|o| mb(o, o.read)),
            cell(&r.ours, &|o| o.ideal.map_or("-".into(), |i| mb(o, i))),
            cell(&r.ours, &|o| match o.ideal {
                Some(i) if i > 0 => format!("{:.2}", o.read as f64 / i as f64),
                _ => "-".into(),
            }),
            cell(&r.theirs, &|o| mb(o, o.read)),
        );
    }
    t
}
