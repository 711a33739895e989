//! `logits`: the logits after every token of a given sequence, as a NumPy array. Rows go to disk as they are computed, so
//! that n_tokens x n_vocab need not fit in memory. File format: numpy.lib.format version 1.0.

use crate::model::{LoadConfig, SessionConfig};
use crate::output::OutFile;
use crate::text;
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
    let (model, _) = c.load.load()?;
    let n_vocab = model.info().n_vocab;
    out.write_all(&npy_header(ids.len(), n_vocab))?;
    let mut session = c.session.open(&model, ids.len())?;
    let mut row_bytes = Vec::with_capacity(n_vocab * 4);
    session.eval_all(&ids, |_, row| {
        row_bytes.clear();
        row_bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        out.write_all(&row_bytes).with_context(|| format!("cannot write {}", c.out.display()))
    })?;
    out.finish()
}

/// The header of a C-ordered little-endian float32 array `[rows, cols]`, padded to a multiple of 64 bytes.
fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let unpadded = 10 + dict.len() + 1;
    dict.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    dict.push('\n');
    let mut h = b"\x93NUMPY\x01\x00".to_vec();
    h.extend((dict.len() as u16).to_le_bytes());
    h.extend(dict.as_bytes());
    h
}

#[cfg(test)]
mod tests {
    #[test]
    fn header() {
        let h = super::npy_header(3, 2048);
        assert_eq!(h.len() % 64, 0);
        assert_eq!(&h[..8], b"\x93NUMPY\x01\x00");
        assert_eq!(usize::from(u16::from_le_bytes([h[8], h[9]])) + 10, h.len());
        assert!(h.ends_with(b"\n"));
        assert!(String::from_utf8_lossy(&h).contains("'shape': (3, 2048), }"));
    }
}
