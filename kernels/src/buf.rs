//! Device memory as the engine sees it: activations, weights, vectors and caches. Storage is opaque outside this crate: bytes of the
//! host, or a handle to memory of a GPU, in which case there is nothing on the host to look at.

use crate::cuda::Memory;
use crate::{HostBytes, KernelError};
use quant::DType;
use std::ops::Range;
use std::sync::Arc;

/// Where memory lies. Every GPU that is opened is a place of its own; operands of one operation share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub(crate) u32);

impl Place {
    /// The memory of the process.
    pub const HOST: Self = Self(0);
}

fn place(memory: Option<&Memory>) -> Place {
    memory.map_or(Place::HOST, Memory::place)
}

/// Activations: a row-major f32 matrix `[rows, cols]`, allocated once and used for any number of leading rows.
pub struct Buf {
    rows: usize,
    cols: usize,
    /// Empty where there is `memory`.
    data: Vec<f32>,
    memory: Option<Memory>,
}

impl Buf {
    pub(crate) fn host(rows: usize, cols: usize) -> Result<Self, KernelError> {
        let n = rows
            .checked_mul(cols)
            .ok_or_else(|| KernelError::Shape(format!("[{rows}, {cols}] overflows")))?;
        let mut data = Vec::new();
        let fail = |_| KernelError::Memory { what: "activations", bytes: n.saturating_mul(4) };
        data.try_reserve_exact(n).map_err(fail)?;
        data.resize(n, 0.0);
        Ok(Self { rows, cols, data, memory: None })
    }

    /// In `memory`, which holds it.
    pub(crate) fn device(rows: usize, cols: usize, memory: Memory) -> Self {
        assert!(memory.bytes() >= rows * cols * 4);
        Self { rows, cols, data: Vec::new(), memory: Some(memory) }
    }

    /// One that has a size and no memory: no operation takes it.
    pub(crate) fn unbacked(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: Vec::new(), memory: None }
    }

    /// Rows allocated.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * 4
    }

    /// The first `n` rows.
    pub fn view(&self, n: usize) -> View<'_> {
        self.part(n, 0..self.cols)
    }

    /// Columns `cols` of the first `n` rows. Panics if they are not there: a bug in the caller, not bad input.
    pub fn part(&self, n: usize, cols: Range<usize>) -> View<'_> {
        assert!(n <= self.rows && cols.end <= self.cols && cols.start <= cols.end, "view outside the buffer");
        let (data, memory) = (&self.data[..], self.memory.as_ref());
        View { data, memory, stride: self.cols, off: cols.start, rows: n, cols: cols.len() }
    }

    /// The first `n` rows, to write.
    pub fn view_mut(&mut self, n: usize) -> ViewMut<'_> {
        self.part_mut(n, 0..self.cols)
    }

    /// Columns `cols` of the first `n` rows, to write. Panics if they are not there.
    pub fn part_mut(&mut self, n: usize, cols: Range<usize>) -> ViewMut<'_> {
        assert!(n <= self.rows && cols.end <= self.cols && cols.start <= cols.end, "view outside the buffer");
        let (data, memory) = (&mut self.data[..], self.memory.as_ref());
        ViewMut { data, memory, stride: self.cols, off: cols.start, rows: n, cols: cols.len() }
    }
}

/// A read-only window `[rows, cols]` of a [`Buf`].
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    memory: Option<&'a Memory>,
    stride: usize,
    off: usize,
    rows: usize,
    cols: usize,
}

/// A writable window `[rows, cols]` of a [`Buf`].
pub struct ViewMut<'a> {
    data: &'a mut [f32],
    memory: Option<&'a Memory>,
    stride: usize,
    off: usize,
    rows: usize,
    cols: usize,
}

impl<'a> View<'a> {
    /// A window over host memory, for tests and benches.
    pub fn from_host(data: &'a [f32], cols: usize) -> Self {
        assert!(cols > 0 && data.len().is_multiple_of(cols), "length must be a multiple of the columns");
        Self { data, memory: None, stride: cols, off: 0, rows: data.len() / cols, cols }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        place(self.memory)
    }

    /// On a GPU: the address of element (0, 0), and the distance in elements between rows.
    pub(crate) fn address(&self) -> Option<(u64, usize)> {
        Some((self.memory?.at() + 4 * self.off as u64, self.stride))
    }

    /// The rows `rows` of the window.
    pub(crate) fn part(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        Self { off: self.off + rows.start * self.stride, rows: rows.len(), ..*self }
    }

    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows);
        let at = i * self.stride + self.off;
        &self.data[at..at + self.cols]
    }
}

impl<'a> ViewMut<'a> {
    /// A window over host memory, for tests and benches.
    pub fn from_host(data: &'a mut [f32], cols: usize) -> Self {
        assert!(cols > 0 && data.len().is_multiple_of(cols), "length must be a multiple of the columns");
        Self { memory: None, stride: cols, off: 0, rows: data.len() / cols, cols, data }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// A shorter borrow of the same window.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        let Self { memory, stride, off, rows, cols, .. } = *self;
        ViewMut { data: self.data, memory, stride, off, rows, cols }
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        place(self.memory)
    }

    /// On a GPU: the address of element (0, 0), and the distance in elements between rows.
    pub(crate) fn address(&self) -> Option<(u64, usize)> {
        Some((self.memory?.at() + 4 * self.off as u64, self.stride))
    }

    /// The rows `rows` of the window.
    pub(crate) fn part(&mut self, rows: Range<usize>) -> ViewMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let off = self.off + rows.start * self.stride;
        ViewMut { off, rows: rows.len(), ..self.reborrow() }
    }

    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows);
        let at = i * self.stride + self.off;
        &mut self.data[at..at + self.cols]
    }

    /// Pointer to element (0, 0) and the distance in elements between rows, for kernels whose threads write disjoint parts.
    #[allow(dead_code)]
    pub(crate) fn raw(&mut self) -> (*mut f32, usize) {
        (self.data[self.off..].as_mut_ptr(), self.stride)
    }
}

/// A stack of `count` weight matrices `[rows, cols]` (`count` > 1: experts, or heads), each row a run of blocks of `dtype`.
#[derive(Clone, Debug)]
pub struct Weight {
    dtype: DType,
    count: usize,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    pub(crate) bytes: HostBytes,
    /// There are no bytes: it has a size only.
    unbacked: bool,
    /// On a GPU, from this byte of that memory on, rows as `cuda::layout` packs them; then `bytes` is empty.
    memory: Option<(Arc<Memory>, u64)>,
}

impl Weight {
    /// Wraps host bytes, without copying them.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a dimension is zero, the row is not whole blocks or the length does not fit the shape.
    pub fn host(
        dtype: DType,
        count: usize,
        rows: usize,
        cols: usize,
        bytes: HostBytes,
    ) -> Result<Self, KernelError> {
        Self::new(dtype, count, rows, cols, bytes, false)
    }

    /// One that has a size and no bytes, for planning: no operation takes it.
    ///
    /// # Errors
    /// As [`Weight::host`].
    pub fn unbacked(dtype: DType, count: usize, rows: usize, cols: usize) -> Result<Self, KernelError> {
        Self::new(dtype, count, rows, cols, HostBytes::from_vec(Vec::new()), true)
    }

    fn new(
        dtype: DType,
        count: usize,
        rows: usize,
        cols: usize,
        bytes: HostBytes,
        unbacked: bool,
    ) -> Result<Self, KernelError> {
        let row_bytes = dtype.row_bytes(cols).map_err(|e| KernelError::Shape(e.to_string()))?;
        let want = count.checked_mul(rows).and_then(|n| n.checked_mul(row_bytes));
        if unbacked && count > 0 && rows > 0 && cols > 0 && want.is_some() {
            return Ok(Self { dtype, count, rows, cols, row_bytes, bytes, unbacked, memory: None });
        }
        if count == 0 || rows == 0 || cols == 0 || want != Some(bytes.len()) {
            let shape = format!("[{count}, {rows}, {cols}] {dtype}");
            return Err(KernelError::Shape(format!("{} bytes do not hold a weight {shape}", bytes.len())));
        }
        Ok(Self { dtype, count, rows, cols, row_bytes, bytes, unbacked, memory: None })
    }

    /// The same weight in `memory`, with rows of `row_bytes`.
    pub(crate) fn device(&self, memory: Memory, row_bytes: usize) -> Self {
        assert!(memory.bytes() >= self.count * self.rows * row_bytes);
        let (bytes, memory) = (HostBytes::from_vec(Vec::new()), Some((Arc::new(memory), 0)));
        Self { row_bytes, bytes, memory, ..self.clone() }
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        place(self.memory.as_ref().map(|m| &*m.0))
    }

    /// On a GPU: the address of its first row.
    pub(crate) fn address(&self) -> Option<u64> {
        self.memory.as_ref().map(|(m, at)| m.at() + at)
    }

    /// On a GPU, of formats that have them: the address of its rows' powers of two, a float each, behind all rows of that memory.
    pub(crate) fn powers(&self) -> Option<u64> {
        let (memory, at) = self.memory.as_ref()?;
        let rows = memory.bytes() / (self.row_bytes + crate::cuda::layout::POWER);
        let here = *at as usize / self.row_bytes;
        Some(memory.at() + (rows * self.row_bytes + here * crate::cuda::layout::POWER) as u64)
    }

    /// Whether there are bytes to compute with or to copy.
    pub(crate) fn is_backed(&self) -> bool {
        !self.unbacked
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Matrices in the stack.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Output features of one matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the whole stack.
    pub fn n_bytes(&self) -> usize {
        self.count * self.rows * self.row_bytes
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The bytes of matrix `m`: rows in order.
    pub(crate) fn matrix(&self, m: usize) -> &[u8] {
        let len = self.rows * self.row_bytes;
        &self.bytes[m * len..][..len]
    }

    /// The bytes of row `r` of matrix `m`.
    pub(crate) fn row(&self, m: usize, r: usize) -> &[u8] {
        assert!(m < self.count && r < self.rows);
        &self.bytes[(m * self.rows + r) * self.row_bytes..][..self.row_bytes]
    }

    /// The rows `rows` of matrix 0 as a weight of its own, sharing the bytes. Panics if they are not there.
    pub fn slice_rows(&self, rows: Range<usize>) -> Self {
        assert!(self.count == 1 && rows.start < rows.end && rows.end <= self.rows);
        if self.unbacked {
            return Self { rows: rows.len(), ..self.clone() };
        }
        if let Some((memory, at)) = &self.memory {
            let memory = Some((memory.clone(), at + (rows.start * self.row_bytes) as u64));
            return Self { rows: rows.len(), memory, ..self.clone() };
        }
        let bytes = self.bytes.slice(rows.start * self.row_bytes..rows.end * self.row_bytes).expect("inside");
        Self { rows: rows.len(), bytes, ..self.clone() }
    }

    /// The stack as one matrix `[count * rows, cols]`, sharing the bytes.
    pub fn flat(&self) -> Self {
        Self { count: 1, rows: self.count * self.rows, ..self.clone() }
    }
}

/// A small f32 vector (norm weights, biases), held in full precision.
#[derive(Clone, Debug)]
pub struct Vector {
    pub(crate) data: Arc<[f32]>,
    /// A copy on a GPU.
    memory: Option<Arc<Memory>>,
}

impl Vector {
    /// Takes the values.
    pub fn new(values: Vec<f32>) -> Self {
        Self { data: values.into(), memory: None }
    }

    /// The same with a copy in `memory`.
    pub(crate) fn device(self, memory: Memory) -> Self {
        assert!(memory.bytes() >= 4 * self.len());
        Self { memory: Some(Arc::new(memory)), ..self }
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        place(self.memory.as_deref())
    }

    /// On a GPU: its address.
    pub(crate) fn address(&self) -> Option<u64> {
        self.memory.as_ref().map(|m| m.at())
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }
}

/// One layer's cache of one kind (keys, values, latents or shared rotary keys): `[slots, width]`.
pub struct KvBuf {
    dtype: DType,
    slots: usize,
    width: usize,
    row_bytes: usize,
    /// Empty where there is `memory`.
    pub(crate) data: Vec<u8>,
    /// On a GPU, rows as `cuda::layout` packs them.
    memory: Option<Memory>,
}

impl KvBuf {
    /// The cache types: those a row of keys or values can be stored as.
    pub const TYPES: [DType; 5] = [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0];

    /// Bytes that a cache `[slots, width]` takes, without making it.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a type not in [`KvBuf::TYPES`] or a width that is not whole blocks.
    pub fn size(dtype: DType, slots: usize, width: usize) -> Result<usize, KernelError> {
        if !Self::TYPES.contains(&dtype) {
            return Err(KernelError::Shape(format!(
                "{dtype} is not a cache type (f32, f16, bf16, q8_0, q4_0)"
            )));
        }
        let row = dtype.row_bytes(width).map_err(|e| KernelError::Shape(format!("KV cache: {e}")))?;
        row.checked_mul(slots)
            .ok_or_else(|| KernelError::Shape(format!("KV cache of {slots} slots overflows")))
    }

    pub(crate) fn host(dtype: DType, slots: usize, width: usize) -> Result<Self, KernelError> {
        let bytes = Self::size(dtype, slots, width)?;
        let mut data = Vec::new();
        data.try_reserve_exact(bytes).map_err(|_| KernelError::Memory { what: "KV cache", bytes })?;
        data.resize(bytes, 0);
        Ok(Self { dtype, slots, width, row_bytes: bytes / slots.max(1), data, memory: None })
    }

    /// In `memory`, which holds it.
    pub(crate) fn device(
        dtype: DType,
        slots: usize,
        width: usize,
        memory: Memory,
    ) -> Result<Self, KernelError> {
        Ok(Self { memory: Some(memory), ..Self::unbacked(dtype, slots, width)? })
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        place(self.memory.as_ref())
    }

    /// On a GPU: the address of slot 0.
    pub(crate) fn address(&self) -> Option<u64> {
        self.memory.as_ref().map(Memory::at)
    }

    /// One that has a size and no memory: no operation takes it.
    pub(crate) fn unbacked(dtype: DType, slots: usize, width: usize) -> Result<Self, KernelError> {
        let bytes = Self::size(dtype, slots, width)?;
        Ok(Self { dtype, slots, width, row_bytes: bytes / slots.max(1), data: Vec::new(), memory: None })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Entries it can hold.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Values per entry.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes of all rows as files hold them; a GPU pads them to whole planes.
    pub fn bytes(&self) -> usize {
        self.slots * self.row_bytes
    }

    pub(crate) fn row(&self, slot: usize) -> &[u8] {
        &self.data[slot * self.row_bytes..][..self.row_bytes]
    }

    pub(crate) fn row_mut(&mut self, slot: usize) -> &mut [u8] {
        &mut self.data[slot * self.row_bytes..][..self.row_bytes]
    }
}
