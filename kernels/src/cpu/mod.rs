//! The CPU backend: glue between the `Backend` trait and the files beside this one.

pub(crate) mod attention;
mod cache;
pub mod isa;
mod lanes;
pub mod machine;
mod math;
pub mod matmul;
mod moe;
mod ops;
mod pool;
mod portable;
pub mod quantized;
mod reserve;
mod round;
mod router;
mod scalar;
mod scratch;
mod simd;
pub mod table;
#[cfg(test)]
mod tests;
pub mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use pool::Pool;

use crate::backend::*;
use crate::best::best_of;
use crate::{Buf, KernelError, KvBuf, Limits, Vector, View, ViewMut, Weight};
use quant::DType;
use scratch::Shared;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Working memory, kept between calls.
struct Memory {
    attention: attention::Memory,
    moe: moe::Memory,
    router: router::Memory,
}

/// Bytes of working memory of a backend with `threads` threads for calls within `limits`.
pub fn scratch_bytes(limits: &Limits, threads: usize) -> usize {
    reserve::Sizes::of(limits, threads, isa::Isa::current()).bytes
}

/// Runs everything on the host's cores; weights stay where they are (mapped), never repacked.
pub struct CpuBackend {
    pool: Pool,
    isa: isa::Isa,
    mem: Mutex<Memory>,
}

impl CpuBackend {
    /// A backend with `threads` threads (at least one).
    pub fn new(threads: usize) -> Self {
        let pool = Pool::new(threads);
        let attention = attention::Memory::new(pool.threads());
        let mem = Mutex::new(Memory { attention, moe: Default::default(), router: Default::default() });
        let isa = isa::Isa::current();
        Self { pool, isa, mem }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // What a panicked call left behind is overwritten by the next.
        self.mem.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The rows of a call in runs that take the same products, and whether these are tile products.
    fn runs(&self, prompts: &[u32], n: usize) -> Vec<(Range<usize>, bool)> {
        let tiled = |p: &u32| self.isa.has_tiles() && *p >= tiles::LEAST_PROMPT;
        if prompts.is_empty() {
            return vec![(0..n, false)];
        }
        let mut at = 0;
        let run = |run: &[u32]| {
            at += run.len();
            (at - run.len()..at, tiled(&run[0]))
        };
        prompts.chunk_by(|a, b| tiled(a) == tiled(b)).map(run).collect()
    }

    /// Calls `f(i, row i)` for every row of a window, in parallel where that pays.
    fn each(&self, out: &mut ViewMut<'_>, f: impl Fn(usize, &mut [f32]) + Sync) {
        let (rows, cols) = (out.rows(), out.cols());
        if rows == 0 {
            return;
        }
        let (ptr, stride) = out.raw();
        let ptr = Shared(ptr);
        self.pool.share(rows, rows * cols, |i| {
            // SAFETY: rows are disjoint, and each index is run once.
            f(i, unsafe { std::slice::from_raw_parts_mut(ptr.at(i * stride), cols) });
        });
    }
}

/// Row `id` of a table, times `scale`.
pub(crate) fn embed_row(table: &Weight, id: u32, scale: f32, out: &mut [f32]) {
    (table.dtype().format().dequantize)(table.row(0, id as usize), out);
    if scale != 1.0 {
        out.iter_mut().for_each(|v| *v *= scale);
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", isa::Isa::current().name(), self.pool.threads())
    }

    fn scratch_bytes(&self, limits: &Limits) -> usize {
        scratch_bytes(limits, self.pool.threads())
    }

    fn reserve(&self, limits: &Limits) -> Result<(), KernelError> {
        isa::Isa::active()?;
        let sizes = reserve::Sizes::of(limits, self.pool.threads(), self.isa);
        let mut mem = self.memory();
        mem.attention.areas.check(self.pool.threads())?;
        mem.attention.store.reserve(sizes.store)?;
        mem.moe.reserve(limits, self.isa)?;
        mem.router.reserve(limits)?;
        let failed = Mutex::new(None);
        self.pool.on_all(|| {
            let done = matmul::reserve_results(sizes.results);
            if let Err(e) = done.and_then(|()| table::reserve(self.isa, sizes.unpack)) {
                *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(e);
            }
        });
        failed.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Buf, KernelError> {
        Buf::host(rows, cols)
    }

    fn alloc_kv(&self, dtype: DType, slots: usize, width: usize) -> Result<KvBuf, KernelError> {
        KvBuf::host(dtype, slots, width)
    }

    fn upload(&self, host: Weight) -> Result<Weight, KernelError> {
        Ok(host)
    }

    fn write(&self, mut out: ViewMut<'_>, values: &[f32]) -> Result<(), KernelError> {
        let cols = out.cols();
        for i in 0..out.rows() {
            out.row_mut(i).copy_from_slice(&values[i * cols..][..cols]);
        }
        Ok(())
    }

    fn read(&self, x: View<'_>, values: &mut [f32]) -> Result<(), KernelError> {
        for (i, row) in values.chunks_exact_mut(x.cols()).enumerate() {
            row.copy_from_slice(x.row(i));
        }
        Ok(())
    }

    fn best(&self, x: View<'_>, k: usize, out: &mut Vec<(u32, f32)>) -> Result<(), KernelError> {
        (0..x.rows()).for_each(|i| best_of(x.row(i), k, out));
        Ok(())
    }

    fn gather(&self, x: View<'_>, rows: &[u32], mut out: ViewMut<'_>) -> Result<(), KernelError> {
        for (i, &r) in rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(r as usize));
        }
        Ok(())
    }

    fn copy(&self, x: View<'_>, mut out: ViewMut<'_>) -> Result<(), KernelError> {
        (0..x.rows()).for_each(|i| out.row_mut(i).copy_from_slice(x.row(i)));
        Ok(())
    }

    fn embed(
        &self,
        table: &Weight,
        ids: &[u32],
        scale: f32,
        mut out: ViewMut<'_>,
    ) -> Result<(), KernelError> {
        self.each(&mut out, |i, row| embed_row(table, ids[i], scale, row));
        Ok(())
    }

    fn rms_norm(&self, x: View<'_>, w: &Vector, eps: f32, mut out: ViewMut<'_>) -> Result<(), KernelError> {
        self.each(&mut out, |i, row| ops::rms_norm(self.isa, x.row(i), &w.data, eps, row));
        Ok(())
    }

    fn rms_norm_heads(&self, mut x: ViewMut<'_>, w: &Vector, eps: f32) -> Result<(), KernelError> {
        self.each(&mut x, |_, row| {
            let heads = row.chunks_exact_mut(w.len());
            heads.for_each(|head| ops::rms_norm_in_place(self.isa, head, &w.data, eps));
        });
        Ok(())
    }

    fn add(&self, x: View<'_>, mut acc: ViewMut<'_>) -> Result<(), KernelError> {
        self.each(&mut acc, |i, row| ops::axpy(self.isa, 1.0, x.row(i), row));
        Ok(())
    }

    fn rope(&self, mut x: ViewMut<'_>, heads: RopeHeads, cos_sin: View<'_>) -> Result<(), KernelError> {
        self.each(&mut x, |i, row| {
            let (cos, sin) = cos_sin.row(i).split_at(heads.dims / 2);
            ops::rope(self.isa, row, heads.head_dim, heads.offset, heads.style, cos, sin);
        });
        Ok(())
    }

    fn matmul(&self, prompts: &[u32], x: View<'_>, products: &mut [Product<'_>]) -> Result<(), KernelError> {
        let mem = &mut self.memory().moe;
        for (rows, tiled) in self.runs(prompts, x.rows()) {
            let x = x.part(rows.clone());
            let rounded = if !products.iter().any(|p| matmul::needs_quantized(p.weight)) {
                matmul::Rounded::No
            } else if tiled {
                mem.x_tiles.set_all(self.isa, &self.pool, x);
                matmul::Rounded::Bf16(&mem.x_tiles)
            } else {
                mem.x.set_with(self.isa, &self.pool, x);
                matmul::Rounded::Int8(&mem.x)
            };
            let mut products: Vec<_> = products.iter_mut().map(|p| p.part(rows.clone())).collect();
            matmul::multiply_all(self.isa, &self.pool, matmul::Input { float: x, rounded }, &mut products);
        }
        Ok(())
    }

    fn ffn(
        &self,
        prompts: &[u32],
        f: Ffn<'_>,
        x: View<'_>,
        mut out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError> {
        let mem = &mut self.memory().moe;
        for (rows, tiled) in self.runs(prompts, x.rows()) {
            let (x, out) = (x.part(rows.clone()), out.part(rows));
            let none = moe::Chosen::default();
            moe::layers(&self.pool, self.isa, mem, Some(f), None, none, tiled, x, out, write);
        }
        Ok(())
    }

    fn route(&self, r: Router<'_>, x: View<'_>, routes: &mut Routes) -> Result<(), KernelError> {
        router::route(&self.pool, self.isa, &mut self.memory().router, r, x, routes);
        Ok(())
    }

    fn moe(
        &self,
        prompts: &[u32],
        experts: Ffn<'_>,
        routes: &Routes,
        shared: Option<Ffn<'_>>,
        x: View<'_>,
        mut out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError> {
        let mem = &mut self.memory().moe;
        let used = routes.used;
        for (rows, tiled) in self.runs(prompts, x.rows()) {
            let pairs = rows.start * used..rows.end * used;
            let chosen =
                moe::Chosen { used, ids: &routes.ids[pairs.clone()], weights: &routes.weights[pairs] };
            let (x, out) = (x.part(rows.clone()), out.part(rows));
            moe::layers(&self.pool, self.isa, mem, shared, Some(experts), chosen, tiled, x, out, write);
        }
        Ok(())
    }

    fn kv_write(&self, x: View<'_>, cache: &mut KvBuf, slots: &[u32]) -> Result<(), KernelError> {
        if !slots.is_empty() {
            cache::write(&self.pool, self.isa, x, cache, slots);
        }
        Ok(())
    }

    fn kv_move(
        &self,
        cache: &mut KvBuf,
        moves: &[(u32, u32)],
        cols: Range<usize>,
    ) -> Result<(), KernelError> {
        cache::copy(cache, moves, &cols);
        Ok(())
    }

    fn kv_read(
        &self,
        cache: &KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        for (&slot, row) in slots.iter().zip(out.chunks_exact_mut(cols.len())) {
            cache::read_row(self.isa, cache, slot as usize, &cols, row);
        }
        Ok(())
    }

    fn kv_rotate(
        &self,
        cache: &mut KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        heads: RopeHeads,
        cos_sin: View<'_>,
    ) -> Result<(), KernelError> {
        let mut row = vec![0.0; cols.len()];
        for (i, &slot) in slots.iter().enumerate() {
            cache::read_row(self.isa, cache, slot as usize, &cols, &mut row);
            let (cos, sin) = cos_sin.row(i).split_at(heads.dims / 2);
            ops::rope(self.isa, &mut row, heads.head_dim, heads.offset, heads.style, cos, sin);
            cache::write_cols(&row, cache, slot as usize, &cols);
        }
        Ok(())
    }

    fn kv_save(&self, cache: &KvBuf, slots: &[u32], out: &mut [u8]) -> Result<(), KernelError> {
        let rows = out.chunks_exact_mut(cache.row_bytes());
        slots.iter().zip(rows).for_each(|(&s, row)| row.copy_from_slice(cache.row(s as usize)));
        Ok(())
    }

    fn kv_load(&self, cache: &mut KvBuf, slots: &[u32], bytes: &[u8]) -> Result<(), KernelError> {
        let rows = bytes.chunks_exact(cache.row_bytes());
        slots.iter().zip(rows).for_each(|(&s, row)| cache.row_mut(s as usize).copy_from_slice(row));
        Ok(())
    }

    fn attention(
        &self,
        a: Attention<'_>,
        out: ViewMut<'_>,
        mass: Option<Mass<'_>>,
    ) -> Result<(), KernelError> {
        attention::attention(&self.pool, self.isa, &mut self.memory().attention, a, out, mass)
    }

    fn mla(&self, m: Mla<'_>, out: ViewMut<'_>, mass: Option<Mass<'_>>) -> Result<(), KernelError> {
        attention::mla(&self.pool, self.isa, &mut self.memory().attention, m, out, mass)
    }
}
