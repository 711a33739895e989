//! One test: sequences of random tokens in one cache, timed. Knows nothing of reports.

use super::{Config, Memory, Setup, Test};
use crate::memory::Resident;
use anyhow::{Context as _, Result};
use engine::{Context, Model, Rows, SeqId};
use std::sync::Arc;
use std::time::Instant;

/// Seconds of each repetition, and the memory it took. A warm-up comes first.
pub fn measure(c: &Config, setup: &Setup, model: &Arc<Model>, test: Test) -> Result<(Vec<f64>, Memory)> {
    let mut run = Run::open(setup, model, test)?;
    let mut ids = Ids::new(model);
    // Pages of the mapped file are read, threads are awake, clocks are up.
    if test.prompt > 0 {
        run.read(&mut ids, test.prompt.min(setup.batch))?;
    }
    if test.generated > 0 {
        run.truncate(0)?;
        run.decode(&mut ids)?;
    }
    let mut seconds = Vec::new();
    let (cache, scratch) =
        (run.context.cache().bytes(), run.context.scratch_bytes() + 4 * run.logits.capacity());
    let mut memory = Memory { cache, scratch, resident: None };
    for r in 0..c.repetitions {
        if c.verbose {
            eprintln!("{} {}: repetition {} of {}", setup.source.name(), test.name(), r + 1, c.repetitions);
        }
        // The tokens at depth are the same every time: they are computed once, unless the cache has let go of them.
        if r == 0 || !run.truncate(test.depth)? {
            run.truncate(0)?;
            run.read(&mut Ids::new(model), test.depth)?;
        }
        let start = Instant::now();
        run.read(&mut ids, test.prompt)?;
        for _ in 0..test.generated {
            run.decode(&mut ids)?;
        }
        seconds.push(start.elapsed().as_secs_f64());
        let now = Resident::now();
        memory.resident = memory.resident.map_or(now, |m| now.map(|n| n.max(m)));
    }
    Ok((seconds, memory))
}

/// The sequences of a test.
struct Run {
    context: Context,
    seqs: Vec<SeqId>,
    logits: Vec<f32>,
}

impl Run {
    fn open(setup: &Setup, model: &Arc<Model>, test: Test) -> Result<Self> {
        let (ctx, n) = (test.tokens(), test.sequences);
        let what = || format!("cannot open a cache for {n} sequences of {ctx} tokens");
        let mut context = Context::new(model, &setup.session(ctx).options(ctx), n).with_context(what)?;
        let seqs = (0..n).map(|_| context.cache_mut().admit(0)).collect::<Result<_, _>>()?;
        Ok(Self { context, seqs, logits: Vec::new() })
    }

    /// Forgets all but the first `len` tokens of every sequence; false if one had to forget more.
    fn truncate(&mut self, len: usize) -> Result<bool> {
        let mut whole = true;
        for s in &self.seqs {
            whole &= self.context.cache_mut().truncate(*s, len)? == len;
        }
        Ok(whole)
    }

    /// Appends a prompt of `n` tokens to every sequence, one after the other.
    fn read(&mut self, ids: &mut Ids, n: usize) -> Result<()> {
        for i in 0..self.seqs.len() {
            let tokens = ids.take(n);
            for chunk in tokens.chunks(self.context.batch()) {
                self.context.forward(&[Rows { seq: self.seqs[i], tokens: chunk, prompt: n }])?;
            }
            if let Some(last) = n.checked_sub(1) {
                self.logits.clear();
                self.context.logits(&[(last % self.context.batch()) as u32], &mut self.logits)?;
            }
        }
        Ok(())
    }

    /// Appends a token to every sequence, in one pass.
    fn decode(&mut self, ids: &mut Ids) -> Result<()> {
        let tokens = ids.take(self.seqs.len());
        let rows: Vec<Rows<'_>> = (self.seqs.iter().zip(tokens.chunks(1)))
            .map(|(&seq, tokens)| Rows { seq, tokens, prompt: 0 })
            .collect();
        self.context.forward(&rows)?;
        let all: Vec<u32> = (0..rows.len() as u32).collect();
        self.logits.clear();
        Ok(self.context.logits(&all, &mut self.logits)?)
    }
}

/// Pseudo-random token ids, the same in every run (a multiplicative generator; quality is no matter here).
struct Ids {
    state: u64,
    n_vocab: u64,
}

impl Ids {
    fn new(model: &Model) -> Self {
        Self { state: 1, n_vocab: model.info().n_vocab as u64 }
    }

    fn take(&mut self, n: usize) -> Vec<u32> {
        let mut next = || {
            self.state =
                self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.state >> 33) % self.n_vocab) as u32
        };
        (0..n).map(|_| next()).collect()
    }
}
