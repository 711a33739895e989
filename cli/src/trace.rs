//! What a cache forgot, and how much attention it had got: evictions as lines of JSON, attention masses as a NumPy array.
//!
//! One object per evicted entry: `at` (tokens of the sequence when it happened), `layer`, `head` (null if one choice serves
//! all heads), `position` (the original one), `token`, `text`, `score` (null if the policy gives none). The masses are
//! float32 `[sequences, layers, kv_heads, tokens]`: all attention that the entry of a token got up to the last eviction that
//! saw it, summed over queries and the query heads of the kv head; NaN where no eviction saw any.

use crate::output::OutFile;
use anyhow::{Context, Result};
use engine::kv::Eviction;
use engine::kv::policy::Needs;
use engine::{Model, Session};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What must be recorded for a trace, whatever the policy needs.
pub fn needs() -> Needs {
    Needs { mass_total: true, ..Needs::default() }
}

/// See the module.
pub struct Trace {
    state: Arc<Mutex<State>>,
}

struct State {
    /// `None` when finished.
    lines: Option<OutFile>,
    npy: PathBuf,
    model: Arc<Model>,
    /// Fields of every line: what is being done.
    about: Map<String, Value>,
    /// Of each sequence: per layer the masses `[kv_heads][tokens]`.
    masses: Vec<Vec<Vec<Vec<f32>>>>,
    failed: Option<std::io::Error>,
}

impl Trace {
    /// Starts the files `path` and `path` with `.npy` behind it.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn create(path: &Path, model: &Arc<Model>, about: Map<String, Value>) -> Result<Self> {
        let mut npy = path.as_os_str().to_owned();
        npy.push(".npy");
        let npy = PathBuf::from(npy);
        // Both now, and not after an hour.
        drop(OutFile::create(&npy)?);
        let lines = Some(OutFile::create(path)?);
        let masses = vec![Vec::new()];
        let state = State { lines, npy, model: model.clone(), about, masses, failed: None };
        Ok(Self { state: Arc::new(Mutex::new(state)) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the session tell of its evictions.
    pub fn follow(&self, session: &mut Session) {
        let state = self.state.clone();
        session.watch(Some(Box::new(move |e| {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.failed.is_none() {
                state.failed = state.add(e).err();
            }
        })));
    }

    /// What follows is of sequence `n`; the first is 0.
    pub fn sequence(&self, n: usize) {
        self.state().masses.resize(n + 1, Vec::new());
    }

    /// Gives the files their names; evictions that follow are not told.
    ///
    /// # Errors
    /// Something could not be written, now or before.
    pub fn finish(self) -> Result<()> {
        let mut state = self.state();
        if let Some(e) = state.failed.take() {
            return Err(e).context("cannot write the trace");
        }
        let mut npy = OutFile::create(&state.npy)?;
        write_masses(&mut npy, &state.masses)?;
        npy.finish()?;
        state.lines.take().map_or(Ok(()), OutFile::finish)
    }
}

impl State {
    fn add(&mut self, e: &Eviction<'_>) -> std::io::Result<()> {
        let Some(lines) = &mut self.lines else { return Ok(()) };
        let (v, kept) = (e.view, e.kept);
        let layer = v.geometry.layer;
        for head in 0..kept.heads {
            let mut stays = kept.head(head).iter().peekable();
            let scores = kept.scores.get(head * v.entries..(head + 1) * v.entries);
            for (i, position) in v.positions(head).iter().enumerate() {
                if stays.next_if(|s| **s as usize == i).is_some() {
                    continue;
                }
                let token = e.tokens.get(*position as usize);
                let mut line = self.about.clone();
                line.insert("sequence".into(), (self.masses.len() - 1).into());
                line.insert("at".into(), e.tokens.len().into());
                line.insert("layer".into(), layer.into());
                line.insert("head".into(), if kept.heads == 1 { Value::Null } else { head.into() });
                line.insert("position".into(), (*position).into());
                line.insert("token".into(), json!(token));
                line.insert("text".into(), json!(token.map(|t| self.model.vocab().decode(&[*t], true))));
                line.insert("score".into(), json!(scores.map(|s| s[i])));
                writeln!(lines, "{}", Value::Object(line))?;
            }
        }
        if v.mass_total.is_empty() {
            return Ok(());
        }
        let layers = self.masses.last_mut().expect("a sequence is being run");
        let missing = (layers.len()..=layer).map(|_| Vec::new());
        layers.extend(missing);
        let heads = &mut layers[layer];
        heads.resize(v.geometry.kv_heads, Vec::new());
        for (head, masses) in heads.iter_mut().enumerate() {
            for (position, mass) in v.positions(head).iter().zip(v.mass_total(head)) {
                let at = *position as usize;
                // A position without a token would be a bug; it must not cost all memory.
                if at < e.tokens.len() {
                    masses.resize(masses.len().max(at + 1), f32::NAN);
                    masses[at] = *mass;
                }
            }
        }
        Ok(())
    }
}

fn write_masses(out: &mut impl Write, masses: &[Vec<Vec<Vec<f32>>>]) -> std::io::Result<()> {
    let layers = masses.iter().map(Vec::len).max().unwrap_or(0);
    let heads = masses.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let tokens = masses.iter().flatten().flatten().map(Vec::len).max().unwrap_or(0);
    out.write_all(&crate::npy::header(&[masses.len(), layers, heads, tokens]))?;
    for s in masses {
        for l in 0..layers {
            for h in 0..heads {
                let row = s.get(l).and_then(|l| l.get(h)).map_or(&[][..], Vec::as_slice);
                let padded = row.iter().copied().chain(std::iter::repeat(f32::NAN)).take(tokens);
                out.write_all(&padded.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn masses_are_padded_to_one_array() {
        let mut out = Vec::new();
        // Two sequences; the second's first layer keeps all it sees.
        let masses =
            vec![vec![vec![vec![1.0, 2.0]], vec![vec![3.0]]], vec![vec![], vec![vec![4.0, 5.0, 6.0]]]];
        super::write_masses(&mut out, &masses).unwrap();
        let body = out.len() - 2 * 2 * 3 * 4;
        assert!(String::from_utf8_lossy(&out[..body]).contains("'shape': (2, 2, 1, 3), }"));
        let numbers: Vec<f32> =
            out[body..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let n = f32::NAN;
        let want = [1.0, 2.0, n, 3.0, n, n, n, n, n, 4.0, 5.0, 6.0];
        assert!(numbers.iter().zip(want).all(|(a, b)| *a == b || (a.is_nan() && b.is_nan())), "{numbers:?}");
    }
}
