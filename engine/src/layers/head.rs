//! The output head: final norm and the product with the output matrix, for the rows whose logits are wanted.

use crate::EngineError;
use crate::stages::Last;
use crate::weights::Loader;
use kernels::{Buf, Device, KernelError, Limits, Vector, View, Weight, Write};

/// Rows whose logits are computed at once: bounds the memory that logits take.
pub const HEAD_ROWS: usize = 16;

/// Final norm and output matrix (tied to the embedding where the file has no `output.weight`).
pub struct Head {
    norm: Vector,
    weight: Weight,
    eps: f32,
}

/// Buffers of the head.
pub struct HeadBufs {
    /// `[HEAD_ROWS, d]`.
    rows: Buf,
    /// `[HEAD_ROWS, vocab]`.
    logits: Buf,
}

impl Head {
    /// Takes `output_norm.weight` and `output.weight` or the embedding `[vocab, d]`.
    pub fn load(w: &Loader<'_>, embed: &Weight, eps: f32) -> Result<Self, EngineError> {
        let (vocab, d) = (embed.rows(), embed.cols());
        let tied = !w.has("output.weight");
        let weight = if tied {
            w.upload("output.weight", embed.clone())?
        } else {
            w.matrix("output.weight", vocab, d)?
        };
        Ok(Self { norm: w.vector("output_norm.weight", d)?, weight, eps })
    }

    /// Entries of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.weight.rows()
    }

    /// The buffers for batches of up to `tokens` rows.
    pub fn bufs(&self, dev: &Device, tokens: usize) -> Result<HeadBufs, EngineError> {
        let n = HEAD_ROWS.min(tokens);
        Ok(HeadBufs { rows: dev.alloc(n, self.weight.cols())?, logits: dev.alloc(n, self.n_vocab())? })
    }

    /// Adds what it will ask of a device.
    pub fn limits(&self, l: &mut Limits) {
        l.product(&self.weight);
    }

    /// Logits `[rows.len(), vocab]` of the given rows of the residual stream, appended to `out`.
    pub fn logits(
        &self,
        mut x: Last<'_>,
        rows: &[u32],
        b: &mut HeadBufs,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        for rows in rows.chunks(b.rows.rows()) {
            let n = rows.len();
            self.norm(&mut x, rows, b)?;
            x.head.linear(&self.weight, b.rows.view(n), b.logits.view_mut(n), Write::Set)?;
            read(x.head, b.logits.view(n), n * self.n_vocab(), out)?;
        }
        Ok(())
    }

    /// The normed rows `[rows.len(), d]` of the residual stream, appended to `out`.
    pub fn states(
        &self,
        mut x: Last<'_>,
        rows: &[u32],
        b: &mut HeadBufs,
        out: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        for rows in rows.chunks(b.rows.rows()) {
            self.norm(&mut x, rows, b)?;
            read(x.head, b.rows.view(rows.len()), rows.len() * self.weight.cols(), out)?;
        }
        Ok(())
    }

    fn norm(&self, x: &mut Last<'_>, rows: &[u32], b: &mut HeadBufs) -> Result<(), EngineError> {
        x.gather(rows, b.rows.view_mut(rows.len()))?;
        Ok(x.head.rms_norm_heads(b.rows.view_mut(rows.len()), &self.norm, self.eps)?)
    }
}

/// Appends `n` values to `out`.
fn read(dev: &Device, from: View<'_>, n: usize, out: &mut Vec<f32>) -> Result<(), EngineError> {
    let at = out.len();
    out.try_reserve(n).map_err(|_| KernelError::Memory { what: "logits", bytes: n.saturating_mul(4) })?;
    out.resize(at + n, 0.0);
    Ok(dev.read(from, &mut out[at..])?)
}
