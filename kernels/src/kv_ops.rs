//! What a cache does with its own rows: storing, moving, reading, rotating, saving. The shape checks of the operations; attention
//! over a cache is in `backend`.

use crate::backend::{Device, RopeHeads, shape};
use crate::{KernelError, KvBuf, View, ViewMut};
use std::ops::Range;

impl KvBuf {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.bytes() / self.slots().max(1)
    }

    /// The bytes of columns `cols` of a row; `None` if they are not there or do not begin and end with whole blocks.
    pub fn byte_range(&self, cols: &Range<usize>) -> Option<Range<usize>> {
        let f = self.dtype().format();
        let whole = cols.start.is_multiple_of(f.block_len) && cols.end.is_multiple_of(f.block_len);
        (whole && cols.start <= cols.end && cols.end <= self.width())
            .then(|| cols.start / f.block_len * f.block_bytes..cols.end / f.block_len * f.block_bytes)
    }
}

fn inside(cache: &KvBuf, slots: impl IntoIterator<Item = u32>, op: &str) -> Result<(), KernelError> {
    let outside = slots.into_iter().find(|&s| s as usize >= cache.slots());
    shape(outside.is_none(), op, || format!("slot {} of {}", outside.unwrap_or(0), cache.slots()))
}

fn blocks(cache: &KvBuf, cols: &Range<usize>, op: &str) -> Result<(), KernelError> {
    shape(cache.byte_range(cols).is_some(), op, || {
        format!("columns {cols:?} of [{}] {} are not whole blocks", cache.width(), cache.dtype())
    })
}

impl Device {
    fn check_store(&self, x: &View<'_>, cache: &KvBuf, slots: &[u32]) -> Result<(), KernelError> {
        inside(cache, slots.iter().copied(), "kv_write")?;
        shape(slots.len() == x.rows() && x.cols() == cache.width(), "kv_write", || {
            format!("x [{}, {}], cache [{}, {}]", x.rows(), x.cols(), cache.slots(), cache.width())
        })?;
        self.near("kv_write", [x.place(), cache.place()])
    }

    /// Stores row i of x `[n, width]` in slot `slots[i]`.
    pub fn kv_write(&self, x: View<'_>, cache: &mut KvBuf, slots: &[u32]) -> Result<(), KernelError> {
        self.check_store(&x, cache, slots)?;
        self.0.kv_write(x, cache, slots)
    }

    /// The same of a layer's two caches at once.
    pub fn kv_write_both(
        &self,
        first: (View<'_>, &mut KvBuf),
        second: (View<'_>, &mut KvBuf),
        slots: &[u32],
    ) -> Result<(), KernelError> {
        self.check_store(&first.0, first.1, slots)?;
        self.check_store(&second.0, second.1, slots)?;
        self.0.kv_write_both(first, second, slots)
    }

    /// `out = x`.
    pub fn copy(&self, x: View<'_>, out: ViewMut<'_>) -> Result<(), KernelError> {
        shape(x.rows() == out.rows() && x.cols() == out.cols(), "copy", || {
            format!("x [{}, {}], out [{}, {}]", x.rows(), x.cols(), out.rows(), out.cols())
        })?;
        self.near("copy", [x.place(), out.place()])?;
        self.0.copy(x, out)
    }

    /// Copies columns `cols` of slots, `(from, to)` each, in order: a later one sees what an earlier one wrote.
    pub fn kv_move(
        &self,
        cache: &mut KvBuf,
        moves: &[(u32, u32)],
        cols: Range<usize>,
    ) -> Result<(), KernelError> {
        inside(cache, moves.iter().flat_map(|m| [m.0, m.1]), "kv_move")?;
        blocks(cache, &cols, "kv_move")?;
        self.near("kv_move", [cache.place()])?;
        self.0.kv_move(cache, moves, cols)
    }

    /// Columns `cols` of `slots` as f32 `[slots, cols]`.
    pub fn kv_read(
        &self,
        cache: &KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        inside(cache, slots.iter().copied(), "kv_read")?;
        let fits = cols.start < cols.end && cols.end <= cache.width();
        shape(fits && out.len() == slots.len() * cols.len(), "kv_read", || {
            format!("columns {cols:?} of {}, {} slots into {} values", cache.width(), slots.len(), out.len())
        })?;
        self.near("kv_read", [cache.place()])?;
        self.0.kv_read(cache, slots, cols, out)
    }

    /// Rotates columns `cols` of `slots` in place as [`Device::rope`] does, through f32; row i of `cos_sin` is of `slots[i]`.
    pub fn kv_rotate(
        &self,
        cache: &mut KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        heads: RopeHeads,
        cos_sin: View<'_>,
    ) -> Result<(), KernelError> {
        inside(cache, slots.iter().copied(), "kv_rotate")?;
        blocks(cache, &cols, "kv_rotate")?;
        let h = heads;
        let fits = h.head_dim > 0
            && h.dims.is_multiple_of(2)
            && h.offset + h.dims <= h.head_dim
            && cols.len().is_multiple_of(h.head_dim)
            && cos_sin.cols() == h.dims
            && cos_sin.rows() == slots.len();
        shape(fits, "kv_rotate", || {
            format!("{h:?}, columns {cols:?}, angles [{}, {}]", cos_sin.rows(), cos_sin.cols())
        })?;
        self.near("kv_rotate", [cache.place(), cos_sin.place()])?;
        self.0.kv_rotate(cache, slots, cols, heads, cos_sin)
    }

    /// The bytes of `slots` as they are stored, one row after the other.
    pub fn kv_save(&self, cache: &KvBuf, slots: &[u32], out: &mut [u8]) -> Result<(), KernelError> {
        inside(cache, slots.iter().copied(), "kv_save")?;
        shape(out.len() == slots.len() * cache.row_bytes(), "kv_save", || format!("{} bytes", out.len()))?;
        self.near("kv_save", [cache.place()])?;
        self.0.kv_save(cache, slots, out)
    }

    /// Puts back what [`Device::kv_save`] gave.
    pub fn kv_load(&self, cache: &mut KvBuf, slots: &[u32], bytes: &[u8]) -> Result<(), KernelError> {
        inside(cache, slots.iter().copied(), "kv_load")?;
        shape(bytes.len() == slots.len() * cache.row_bytes(), "kv_load", || {
            format!("{} bytes", bytes.len())
        })?;
        self.near("kv_load", [cache.place()])?;
        self.0.kv_load(cache, slots, bytes)
    }
}
