//! Launches on rows of activations: their rounding, alone or behind a norm or a gate, and their best values.

use super::{Arg, Launcher, flag, n, p};
use crate::cuda::operands::{BLOCK_BYTES, Floats, Halves, Rounded};
use crate::{Activation, KernelError};
use std::ops::Range;

/// Columns that a block looks for the best in.
const CHOICES: usize = 2048;

/// Parts that a row of so many columns is cut into for [`Launcher::top_k`].
pub fn choices(cols: usize) -> usize {
    cols.div_ceil(CHOICES)
}

impl Launcher {
    /// The `k` best of each row, best first: values `[rows, k]`, behind them columns. Where a row has several parts, `parts` has room for as
    /// much of each.
    pub fn top_k(&self, x: Floats, k: usize, parts: u64, best: u64) -> Result<(), KernelError> {
        let m = self.base("rows")?;
        let (count, pairs) = (choices(x.cols), |of: usize| (4 * x.rows * of * k) as u64);
        let run = |(at, ids, stride, cols): (u64, u64, usize, usize), count: usize, to: u64| {
            let per = cols.div_ceil(count).max(CHOICES);
            let args = [p(at), n(stride)?, p(ids), n(cols)?, n(per)?, n(k)?, p(to), p(to + pairs(count))];
            self.run(m, "top_k", [count, x.rows, 1], 256, 0, &args)
        };
        let all = (x.at, 0, x.stride, x.cols);
        if count == 1 {
            return run(all, 1, best);
        }
        run(all, count, parts)?;
        run((parts, parts + pairs(count), count * k, count * k), 1, best)
    }

    /// Rounds rows to `out`, which has room for `x.rows * ceil(x.cols / 256)` blocks.
    pub fn round(&self, x: Floats, out: u64) -> Result<Rounded, KernelError> {
        self.rounding("round_rows", x, out, |x, _| Ok(vec![p(x.at), n(x.stride)?, n(x.cols)?]))
    }

    /// The same of act(gate) * up, which goes nowhere else.
    pub fn round_glu(
        &self,
        gate: Floats,
        up: Floats,
        act: Activation,
        out: u64,
    ) -> Result<Rounded, KernelError> {
        let act = flag(act == Activation::GeluTanh);
        self.rounding("round_glu", gate, out, |x, r| {
            let up = up.part(r);
            Ok(vec![p(x.at), n(x.stride)?, p(up.at), n(up.stride)?, n(x.cols)?, act])
        })
    }

    /// The same of the norms of whole rows, which also go to y; y is not x.
    pub fn round_norm(
        &self,
        x: Floats,
        w: u64,
        eps: f32,
        y: Floats,
        out: u64,
    ) -> Result<Rounded, KernelError> {
        self.rounding("round_norm", x, out, |x, r| {
            let y = y.part(r);
            Ok(vec![p(x.at), n(x.stride)?, p(w), n(x.cols)?, Arg::F32(eps), p(y.at), n(y.stride)?])
        })
    }

    /// Rounds rows to f16 at `out`, which has room for `x.rows` times [`crate::cuda::operands::input_bytes`].
    pub fn half(&self, x: Floats, out: u64) -> Result<Halves, KernelError> {
        let to = Halves::of(out, &x);
        let args = [p(x.at), n(x.stride)?, n(x.cols)?, p(to.at), n(to.stride)?, p(to.scales)];
        // Heads are short, and many.
        let threads = x.cols.div_ceil(4).next_multiple_of(32).min(256) as u32;
        self.run(self.base("round")?, "half_rows", [x.rows, 1, 1], threads, 0, &args)?;
        Ok(to)
    }

    /// Runs an entry of `round`; `args`: of some rows, those before where the blocks go.
    fn rounding(
        &self,
        entry: &'static str,
        x: Floats,
        out: u64,
        args: impl Fn(Floats, Range<usize>) -> Result<Vec<Arg>, KernelError>,
    ) -> Result<Rounded, KernelError> {
        let (m, to) = (self.base("round")?, Rounded::of(out, x.cols));
        Self::rows(x.rows, |r| {
            let (x, at) = (x.part(r.clone()), out + (r.start * to.stride * BLOCK_BYTES) as u64);
            let args = [args(x, r)?, vec![p(at), n(to.stride)?]].concat();
            self.run(m, entry, [to.stride, x.rows, 1], 256, 0, &args)
        })?;
        Ok(to)
    }
}
