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
        l.choices = l.choices.max(self.n_vocab());
    }
}

/// The head behind a pass, to be asked for rows of it.
pub struct Output<'a> {
    /// Its weights.
    pub head: &'a Head,
    /// The residual stream.
    pub x: Last<'a>,
    /// Its buffers.
    pub bufs: &'a mut HeadBufs,
}

impl Output<'_> {
    /// Appends the logits `[rows.len(), vocab]` of the given rows.
    pub fn logits(mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        for rows in rows.chunks(self.bufs.rows.rows()) {
            self.multiply(rows)?;
            read(self.x.head, self.bufs.logits.view(rows.len()), rows.len() * self.head.n_vocab(), out)?;
        }
        Ok(())
    }

    /// Appends the `k` best logits of the given rows, ids and values, best first; NaN is above all. False, and nothing is appended, where
    /// they lie on the host anyway.
    pub fn best(mut self, rows: &[u32], k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool, EngineError> {
        if self.x.head.is_host() {
            return Ok(false);
        }
        for rows in rows.chunks(self.bufs.rows.rows()) {
            self.multiply(rows)?;
            self.x.head.best(self.bufs.logits.view(rows.len()), k, out)?;
        }
        Ok(true)
    }

    /// Appends the normed rows `[rows.len(), d]`.
    pub fn states(mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), EngineError> {
        for rows in rows.chunks(self.bufs.rows.rows()) {
            self.norm(rows)?;
            read(self.x.head, self.bufs.rows.view(rows.len()), rows.len() * self.head.weight.cols(), out)?;
        }
        Ok(())
    }

    fn norm(&mut self, rows: &[u32]) -> Result<(), EngineError> {
        let Self { head, x, bufs } = self;
        x.gather(rows, bufs.rows.view_mut(rows.len()))?;
        Ok(x.head.rms_norm_heads(bufs.rows.view_mut(rows.len()), &head.norm, head.eps)?)
    }

    fn multiply(&mut self, rows: &[u32]) -> Result<(), EngineError> {
        self.norm(rows)?;
        let (dev, n) = (self.x.device(rows)?, rows.len());
        let HeadBufs { rows: h, logits } = &mut *self.bufs;
        Ok(dev.linear(&self.head.weight, h.view(n), logits.view_mut(n), Write::Set)?)
    }
}

/// Appends `n` values to `out`.
fn read(dev: &Device, from: View<'_>, n: usize, out: &mut Vec<f32>) -> Result<(), EngineError> {
    let at = out.len();
    out.try_reserve(n).map_err(|_| KernelError::Memory { what: "logits", bytes: n.saturating_mul(4) })?;
    out.resize(at + n, 0.0);
    Ok(dev.read(from, &mut out[at..])?)
}
