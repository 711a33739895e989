//! `logits`: the logits after every token of a given sequence, as a NumPy array. Rows go to disk as they are computed, so
//! that n_tokens x n_vocab need not fit in memory.

use crate::model::{LoadConfig, SessionConfig};
use crate::output::OutFile;
use crate::{npy, text};
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::PathBuf;

/// What to compute and where to put it.
pub struct Config {
    pub load: LoadConfig,
    pub session: SessionConfig,
    pub tokens_file: PathBuf,
    pub out: PathBuf,
}

pub fn run(c: &Config) -> Result<()> {
    let ids: Vec<u32> = serde_json::from_value(text::read_json(&c.tokens_file)?)
        .with_context(|| format!("{}: not a JSON array of token ids", c.tokens_file.display()))?;
    if ids.is_empty() {
        bail!("{}: holds no token ids", c.tokens_file.display());
    }
    let mut out = OutFile::create(&c.out)?;
    let on = c.load.plan_all([(SessionConfig { ctx: Some(ids.len()), ..c.session.clone() }, 1)])?;
    let (model, _) = c.load.load(on)?;
    let n_vocab = model.info().n_vocab;
    out.write_all(&npy::header(&[ids.len(), n_vocab]))?;
    let mut session = c.session.open(&model, ids.len())?;
    let mut row_bytes = Vec::with_capacity(n_vocab * 4);
    session.eval_all(&ids, |_, row| {
        row_bytes.clear();
        row_bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        out.write_all(&row_bytes).with_context(|| format!("cannot write {}", c.out.display()))
    })?;
    out.finish()
}
