//! The CUDA backend: the operations of `Backend` as sequences of kernels on whatever is behind [`Gpu`]. Everything on the way of a decoded
//! token stays on the device; what is rare (saving, rotating and reading a cache) goes through the host. Knows shapes and formats;
//! which kernel an entry point is, is `launch`'s.

use super::gpu::{Counted, Gpu, Memory};
use super::half;
use super::launch::{COLUMNS, Launcher, TILE_COLUMNS};
use super::layout;
use super::operands::{
    BLOCK_BYTES, Cache, Floats, Input, Jobs, Matrix, Product, Rounded, Sorted, inputs_bytes,
};
use super::scratch::{Area, Scratch, Sizes, best_bytes, tile_bytes};
use crate::backend::*;
use crate::cpu::{self, CpuBackend};
use crate::{Buf, KernelError, KvBuf, Limits, Place, Vector, View, ViewMut, Weight};
use quant::DType;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes of scratch memory for calls within `limits`.
pub fn scratch_bytes(limits: &Limits) -> usize {
    Sizes::of(limits).bytes()
}

/// Bytes of weights on a device.
pub fn weight_bytes(w: &Weight) -> usize {
    w.count() * w.rows() * layout::weight_bytes(w.dtype(), w.cols())
}

/// Bytes of a cache on a device.
///
/// # Errors
/// As [`KvBuf::size`].
pub fn kv_bytes(dtype: DType, slots: usize, width: usize) -> Result<usize, KernelError> {
    KvBuf::size(dtype, slots, width)?;
    let row = layout::row_bytes(dtype, width);
    row.checked_mul(slots).ok_or_else(|| KernelError::Shape(format!("KV cache of {slots} slots overflows")))
}

/// Runs everything on one GPU.
pub struct CudaBackend {
    name: String,
    gpu: Arc<Counted>,
    pub(super) kernels: Launcher,
    scratch: Mutex<Scratch>,
    /// For what goes through the host.
    host: CpuBackend,
}

/// Rows of a decoding pass that goes out as one: beyond, kernels take long enough to hide their launches.
const HELD_ROWS: usize = 32;
/// Threads that make what is sent at most, and bytes that are worth one.
const PACKERS: usize = 8;
const PACKED: usize = 256 << 10;

/// Calls `pack` for each of `rows` of `row` values with its number, on several threads; `bytes`: what a row's work goes by.
fn packed<T: Send>(rows: &mut [T], row: usize, bytes: usize, pack: impl Fn(usize, &mut [T]) + Sync) {
    let n = rows.len() / row;
    let packers = std::thread::available_parallelism().map_or(1, Into::into).min(PACKERS);
    let share = n.div_ceil((n * bytes / PACKED).clamp(1, packers)).max(1);
    let pack = |first: usize, part: &mut [T]| {
        part.chunks_exact_mut(row).enumerate().for_each(|(i, to)| pack(first + i, to));
    };
    let mut parts = rows.chunks_mut(share * row).enumerate();
    let here = parts.next();
    std::thread::scope(|s| {
        for (t, part) in parts {
            s.spawn(move || pack(t * share, part));
        }
        if let Some((_, part)) = here {
            pack(0, part);
        }
    });
}

impl CudaBackend {
    /// A backend on `gpu`, called `name` (`cuda:0`).
    ///
    /// # Errors
    /// A driver that does not take the kernels.
    pub fn new(gpu: Box<dyn Gpu>, name: &str) -> Result<Self, KernelError> {
        let name = format!("{name} ({})", gpu.info());
        let gpu = Arc::new(Counted::new(gpu));
        let kernels = Launcher::new(gpu.clone());
        for m in ["rows", "round", "router", "cache"] {
            kernels.text(m).map_or(Ok(()), |m| kernels.load(m))?;
        }
        let scratch = Mutex::new(Scratch::new(gpu.clone()));
        Ok(Self { name, gpu, kernels, scratch, host: CpuBackend::new(1) })
    }

    /// Rows of a table on the host, made where they are sent from while others are on their way.
    fn embed_prompt(
        &self,
        table: &Weight,
        ids: &[u32],
        scale: f32,
        out: ViewMut<'_>,
    ) -> Result<(), KernelError> {
        let to = self.scratch().output(&out)?;
        let cols = table.cols();
        // Rows that do not lie behind one another go out one by one.
        let step = if to.stride == cols { to.rows } else { 1 };
        for (i, ids) in ids.chunks(step).enumerate() {
            let mut next = 0;
            self.gpu.gpu.stream(to.part(i * step..i * step + ids.len()).at, 4 * cols, &mut |piece| {
                let n = (piece.len() / (4 * cols)).min(ids.len() - next);
                let rows: &mut [f32] = bytemuck::cast_slice_mut(&mut piece[..4 * n * cols]);
                packed(rows, cols, 4 * cols, |i, to| cpu::embed_row(table, ids[next + i], scale, to));
                next += n;
                4 * n * cols
            })?;
        }
        Ok(())
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // What a panicked call left behind is overwritten by the next.
        self.scratch.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn memory(&self, bytes: usize, what: &'static str) -> Result<Memory, KernelError> {
        Ok(Memory::new(&self.gpu, bytes, what)?)
    }

    /// x as the weights read it, in `area`: rounded to int8, unless it lies there already, or where rows are tiled to f16. The area must hold
    /// it ([`inputs_bytes`]).
    pub(super) fn input(
        &self,
        s: &mut Scratch,
        area: Area,
        x: Floats,
        weights: &[&Weight],
        tiled: bool,
    ) -> Result<Input, KernelError> {
        let (at, any) = (s.at(area), |of: fn(DType) -> bool| weights.iter().any(|w| of(w.dtype())));
        let (mut rounded, mut halves) = (None, None);
        let known = area == Area::Input && s.rounded == Some(x);
        if tiled && any(|d| d != DType::F32) {
            halves = Some(self.kernels.half(x, at)?);
        } else if !tiled && any(layout::rounds) {
            rounded = Some(if known { Rounded::of(at, x.cols) } else { self.kernels.round(x, at)? });
        }
        if area == Area::Input && (rounded.is_some() || halves.is_some()) {
            s.rounded = rounded.map(|_| x);
        }
        Ok(Input { float: x, rounded, halves })
    }

    /// The rows of a call in runs that take the same products, and whether these are the ones of prompts on tensor cores, which all weights
    /// but F32 have. A property of a row's request, never of the call.
    fn runs(&self, prompts: &[u32], n: usize, weights: &[&Weight]) -> Vec<(Range<usize>, bool)> {
        let halves = weights.iter().any(|w| w.dtype() != DType::F32);
        if prompts.is_empty() || !halves || !self.kernels.takes_halves() {
            return vec![(0..n, false)];
        }
        let tiled = |p: &u32| *p as usize > COLUMNS;
        let mut at = 0;
        let run = |run: &[u32]| {
            at += run.len();
            (at - run.len()..at, tiled(&run[0]))
        };
        prompts.chunk_by(|a, b| tiled(a) == tiled(b)).map(run).collect()
    }

    /// `act(gate x) * up x` in [`Area::Gate`], as `down` reads it.
    fn hidden(
        &self,
        s: &mut Scratch,
        f: &Ffn<'_>,
        x: Input,
        jobs: Jobs,
        tiled: bool,
    ) -> Result<Input, KernelError> {
        let width = f.gate.rows();
        let rows = x.float.rows * jobs.share();
        s.room(Area::Gate, 4 * rows * width, 4 * rows * width)?;
        let gate = Floats::dense(s.at(Area::Gate), rows, width);
        let (g, u) = (Matrix::of(f.gate)?, Matrix::of(f.up)?);
        let bytes = rows * inputs_bytes(&[f.down], width, tiled);
        s.room(Area::Hidden, bytes, bytes)?;
        if g.dtype == u.dtype {
            self.kernels.product(Product::set(g, gate), x, jobs, Some((u, f.act)))?;
            return self.input(s, Area::Hidden, gate, &[f.down], tiled);
        }
        s.room(Area::Up, 4 * rows * width, 4 * rows * width)?;
        let up = Floats::dense(s.at(Area::Up), rows, width);
        for (w, to) in [(g, gate), (u, up)] {
            self.kernels.product(Product::set(w, to), x, jobs, None)?;
        }
        if layout::rounds(f.down.dtype()) && !tiled {
            let rounded = Some(self.kernels.round_glu(gate, up, f.act, s.at(Area::Hidden))?);
            return Ok(Input { float: gate, rounded, halves: None });
        }
        self.kernels.glu(gate, up, f.act)?;
        self.input(s, Area::Hidden, gate, &[f.down], tiled)
    }

    /// How many of `rows` rows of a feed-forward layer, `used` times over, fit the areas.
    fn ffn_rows(
        &self,
        s: &mut Scratch,
        f: &Ffn<'_>,
        used: usize,
        rows: usize,
        tiled: bool,
    ) -> Result<usize, KernelError> {
        let width = f.gate.rows() * used;
        let mut n = s.rows(Area::Gate, 4 * width, rows)?;
        n = n.min(s.rows(Area::Up, 4 * width, rows)?);
        n = n.min(s.rows(Area::Input, inputs_bytes(&[f.gate, f.up], f.gate.cols(), tiled), rows)?);
        n = n.min(s.rows(Area::Hidden, used * inputs_bytes(&[f.down], f.gate.rows(), tiled), rows)?);
        Ok(whole_tiles(n, rows))
    }

    /// The jobs of `rows` rows, `used` matrices of `ids` each: by expert (or head) where there are so many rows that experts are worth a
    /// tile, or rows are tiled (of so many `columns`).
    pub(super) fn jobs(
        &self,
        s: &mut Scratch,
        ids: u64,
        rows: usize,
        used: usize,
        experts: usize,
        columns: Option<usize>,
    ) -> Result<Jobs, KernelError> {
        if rows <= COLUMNS && columns.is_none() {
            return Ok(Jobs::Each { ids, share: used });
        }
        let columns = columns.unwrap_or(TILE_COLUMNS);
        let jobs = rows * used;
        s.room(Area::JobOrder, 4 * jobs, 4 * jobs)?;
        s.room(Area::JobTiles, tile_bytes(jobs, experts), tile_bytes(jobs, experts))?;
        let (order, tiles) = (s.at(Area::JobOrder), s.at(Area::JobTiles));
        self.kernels.sort_experts(ids, jobs, columns, experts, order, tiles)?;
        Ok(Jobs::Sorted(Sorted { order, tiles, columns, count: jobs / columns + experts, share: used }))
    }

    /// Runs of neighbouring slots: first slot, place in `slots`, length.
    fn neighbours(slots: &[u32]) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = *slots.get(at)?;
            let n = slots[at..].iter().zip(first..).take_while(|(s, i)| **s == *i).count();
            at += n;
            Some((u64::from(first), at - n, n))
        })
    }

    fn store(&self, stores: &[(Floats, Cache)], slots: &[u32]) -> Result<(), KernelError> {
        let ids = self.scratch().send(&[Area::Slots, Area::OtherSlots], slots)?;
        let mut sorted = slots.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).all(|w| w[0] != w[1]) {
            return self.kernels.cache_write(stores, ids);
        }
        // Rows for one slot: the last stays.
        (0..slots.len()).try_for_each(|i| {
            let row: Vec<_> = stores.iter().map(|(x, c)| (x.part(i..i + 1), *c)).collect();
            self.kernels.cache_write(&row, ids + 4 * i as u64)
        })
    }

    /// The rows of `slots`, through the host's form of the cache: `change` may alter them before they go back.
    fn on_host(
        &self,
        cache: &mut KvBuf,
        slots: &[u32],
        change: impl FnOnce(&mut KvBuf, &[u32]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let mut rows = vec![0; slots.len() * cache.row_bytes()];
        self.kv_save(cache, slots, &mut rows)?;
        let mut here = KvBuf::host(cache.dtype(), slots.len(), cache.width())?;
        let ids: Vec<u32> = (0..slots.len() as u32).collect();
        self.host.kv_load(&mut here, &ids, &rows)?;
        change(&mut here, &ids)?;
        self.host.kv_save(&here, &ids, &mut rows)?;
        self.kv_load(cache, slots, &rows)
    }
}

/// `n` of `rows` rows at a time, in whole tiles of the largest products where that is more than one.
fn whole_tiles(n: usize, rows: usize) -> usize {
    if n < rows && n > half::COLUMNS { n / half::COLUMNS * half::COLUMNS } else { n }
}

fn address(x: Option<u64>) -> Result<u64, KernelError> {
    x.ok_or(KernelError::Place { op: "cuda" })
}

pub(super) fn cache_of(c: &KvBuf) -> Result<Cache, KernelError> {
    Ok(Cache { at: address(c.address())?, dtype: c.dtype(), width: c.width() })
}

fn vector(v: Option<&Vector>) -> Result<u64, KernelError> {
    v.map_or(Ok(0), |v| address(v.address()))
}

impl Backend for CudaBackend {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn place(&self) -> Place {
        self.gpu.place
    }

    fn held(&self) -> usize {
        self.gpu.bytes()
    }

    fn scratch_bytes(&self, limits: &Limits) -> usize {
        scratch_bytes(limits)
    }

    fn reserve(&self, limits: &Limits) -> Result<(), KernelError> {
        self.scratch().reserve(limits)
    }

    fn begin(&self, prompts: &[u32]) {
        self.scratch().begin();
        self.gpu.gpu.begin(prompts.len() <= HELD_ROWS && prompts.iter().all(|p| *p == 0));
    }

    fn start(&self) -> Result<(), KernelError> {
        Ok(self.gpu.gpu.start()?)
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Buf, KernelError> {
        let overflow = || KernelError::Shape(format!("[{rows}, {cols}] overflows"));
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(4)).ok_or_else(overflow)?;
        let memory = self.memory(bytes, "activations")?;
        // It may lie where other activations did.
        self.scratch().rounded = None;
        self.gpu.gpu.zero(memory.at(), bytes)?;
        Ok(Buf::device(rows, cols, memory))
    }

    fn alloc_kv(&self, dtype: DType, slots: usize, width: usize) -> Result<KvBuf, KernelError> {
        let bytes = kv_bytes(dtype, slots, width)?;
        self.kernels.of("store", dtype).map_or(Ok(()), |m| self.kernels.load(m))?;
        let memory = self.memory(bytes, "KV cache")?;
        self.gpu.gpu.zero(memory.at(), bytes)?;
        KvBuf::device(dtype, slots, width, memory)
    }

    fn upload(&self, host: Weight) -> Result<Weight, KernelError> {
        if !host.is_backed() || host.place() != Place::HOST {
            return Err(KernelError::Place { op: "upload" });
        }
        self.kernels.load(self.kernels.of("matvec", host.dtype())?)?;
        let row = layout::row_bytes(host.dtype(), host.cols());
        let memory = self.memory(weight_bytes(&host), "weights")?;
        let (each, bytes, total) = (host.rows(), host.row_bytes(), host.count() * host.rows());
        let mut powers = vec![0.0; if layout::has_power(host.dtype()) { total } else { 0 }];
        let source = |i: usize| &host.matrix(i / each)[i % each * bytes..][..bytes];
        let mut next = 0;
        self.gpu.gpu.stream(memory.at(), row, &mut |piece| {
            let n = (piece.len() / row).min(total - next);
            let pack = |i: usize, to: &mut [u8]| layout::pack_row(host.dtype(), source(next + i), to);
            packed(&mut piece[..n * row], row, row, pack);
            if let Some(powers) = powers.get_mut(next..next + n) {
                packed(powers, 1, row, |i, p| p[0] = layout::power(host.dtype(), source(next + i)));
            }
            next += n;
            n * row
        })?;
        self.gpu.gpu.write(memory.at() + (total * row) as u64, bytemuck::cast_slice(&powers))?;
        Ok(host.device(memory, row))
    }

    fn upload_vector(&self, host: Vector) -> Result<Vector, KernelError> {
        let memory = self.memory(4 * host.len(), "weights")?;
        self.gpu.gpu.write(memory.at(), bytemuck::cast_slice(&host.data))?;
        Ok(host.device(memory))
    }

    fn write(&self, out: ViewMut<'_>, values: &[f32]) -> Result<(), KernelError> {
        let to = self.scratch().output(&out)?;
        let step = if to.stride == to.cols { to.rows } else { 1 };
        for (i, rows) in values.chunks((to.cols * step).max(1)).enumerate() {
            self.gpu.gpu.write(to.part(i * step..i * step).at, bytemuck::cast_slice(rows))?;
        }
        Ok(())
    }

    fn read(&self, x: View<'_>, values: &mut [f32]) -> Result<(), KernelError> {
        let from = Floats::of(&x)?;
        let step = if from.stride == from.cols { from.rows } else { 1 };
        for (i, rows) in values.chunks_mut((from.cols * step).max(1)).enumerate() {
            self.gpu.gpu.read(from.part(i * step..i * step).at, bytemuck::cast_slice_mut(rows))?;
        }
        Ok(())
    }

    fn best(&self, x: View<'_>, k: usize, out: &mut Vec<(u32, f32)>) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let x = Floats::of(&x)?;
        let n = s.rows(Area::Best, best_bytes(k, x.cols), x.rows)?.max(1);
        for first in (0..x.rows).step_by(n) {
            let x = x.part(first..x.rows.min(first + n));
            let (at, pairs) = (s.at(Area::Best), x.rows * k);
            self.kernels.top_k(x, k, at + 8 * pairs as u64, at)?;
            let mut words = vec![0; 2 * pairs];
            self.gpu.gpu.read(at, bytemuck::cast_slice_mut(&mut words))?;
            let (values, ids) = words.split_at(pairs);
            out.extend(ids.iter().zip(values).map(|(id, v)| (*id, f32::from_bits(*v))));
        }
        Ok(())
    }

    fn gather(&self, x: View<'_>, rows: &[u32], out: ViewMut<'_>) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let ids = s.send(&[Area::Ids], rows)?;
        self.kernels.gather(Floats::of(&x)?, ids, s.output(&out)?, false)
    }

    fn copy(&self, x: View<'_>, out: ViewMut<'_>) -> Result<(), KernelError> {
        self.kernels.gather(Floats::of(&x)?, 0, self.scratch().output(&out)?, false)
    }

    /// The table may lie on the host: a pass reads a few of its rows.
    fn embed(&self, table: &Weight, ids: &[u32], scale: f32, out: ViewMut<'_>) -> Result<(), KernelError> {
        if table.place() == Place::HOST && ids.len() > HELD_ROWS {
            return self.embed_prompt(table, ids, scale, out);
        }
        if table.place() == Place::HOST {
            let mut rows = vec![0.0; ids.len() * table.cols()];
            self.host.embed(table, ids, scale, ViewMut::from_host(&mut rows, table.cols()))?;
            return self.write(out, &rows);
        }
        if table.place() != self.gpu.place {
            return Err(KernelError::Place { op: "embed" });
        }
        let s = &mut *self.scratch();
        let at = s.send(&[Area::Ids], ids)?;
        self.kernels.embed(Matrix::of(table)?, at, scale, s.output(&out)?)
    }

    fn rms_norm(&self, x: View<'_>, w: &Vector, eps: f32, out: ViewMut<'_>) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let (x, w, out) = (Floats::of(&x)?, address(w.address())?, s.output(&out)?);
        // Few rows, which most likely are multiplied next: the norm and its rounding in one, where there is room for it.
        let bytes = x.rows * x.cols.div_ceil(256) * BLOCK_BYTES;
        if x.rows > COLUMNS || x.meets(&out) || s.bytes(Area::Input) < bytes {
            return self.kernels.rms_norm(x, w, x.cols, eps, out);
        }
        self.kernels.round_norm(x, w, eps, out, s.at(Area::Input))?;
        s.rounded = Some(out);
        Ok(())
    }

    fn rms_norm_heads(&self, x: ViewMut<'_>, w: &Vector, eps: f32) -> Result<(), KernelError> {
        let x = self.scratch().output(&x)?;
        self.kernels.rms_norm(x, address(w.address())?, w.len(), eps, x)
    }

    fn add(&self, x: View<'_>, acc: ViewMut<'_>) -> Result<(), KernelError> {
        self.kernels.gather(Floats::of(&x)?, 0, self.scratch().output(&acc)?, true)
    }

    fn rope(&self, x: ViewMut<'_>, heads: RopeHeads, cos_sin: View<'_>) -> Result<(), KernelError> {
        self.kernels.rope(&[(self.scratch().output(&x)?, heads)], Floats::of(&cos_sin)?)
    }

    fn rope_both(
        &self,
        (x, x_heads): (ViewMut<'_>, RopeHeads),
        (y, y_heads): (ViewMut<'_>, RopeHeads),
        cos_sin: View<'_>,
    ) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let both = [(s.output(&x)?, x_heads), (s.output(&y)?, y_heads)];
        self.kernels.rope(&both, Floats::of(&cos_sin)?)
    }

    fn matmul(
        &self,
        prompts: &[u32],
        x: View<'_>,
        products: &mut [crate::backend::Product<'_>],
    ) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let x = Floats::of(&x)?;
        let weights: Vec<&Weight> = products.iter().map(|p| p.weight).collect();
        for (run, tiled) in self.runs(prompts, x.rows, &weights) {
            let n = s.rows(Area::Input, inputs_bytes(&weights, x.cols, tiled), run.len())?;
            let n = whole_tiles(n, run.len()).max(1);
            for first in run.clone().step_by(n) {
                let rows = first..run.end.min(first + n);
                let input = self.input(s, Area::Input, x.part(rows.clone()), &weights, tiled)?;
                let each = products.iter().map(|p| {
                    let (w, out) = (Matrix::of(p.weight)?, s.output(&p.out)?.part(rows.clone()));
                    Ok(Product { w, bias: vector(p.bias)?, out, add: p.write == Write::Add })
                });
                self.kernels.products(&each.collect::<Result<Vec<_>, KernelError>>()?, input)?;
            }
        }
        Ok(())
    }

    fn ffn(
        &self,
        prompts: &[u32],
        f: Ffn<'_>,
        x: View<'_>,
        out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let (x, out) = (Floats::of(&x)?, s.output(&out)?);
        for (run, tiled) in self.runs(prompts, x.rows, &[f.gate, f.up, f.down]) {
            let n = self.ffn_rows(s, &f, 1, run.len(), tiled)?.max(1);
            for first in run.clone().step_by(n) {
                let rows = first..run.end.min(first + n);
                let input = self.input(s, Area::Input, x.part(rows.clone()), &[f.gate, f.up], tiled)?;
                let hidden = self.hidden(s, &f, input, Jobs::One, tiled)?;
                let (w, out) = (Matrix::of(f.down)?, out.part(rows));
                self.kernels.products(&[Product { w, bias: 0, out, add: write == Write::Add }], hidden)?;
            }
        }
        Ok(())
    }

    fn route(&self, r: Router<'_>, x: View<'_>, routes: &mut Routes) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let (x, experts) = (Floats::of(&x)?, r.weight.rows());
        let bytes = 4 * x.rows * r.used;
        s.forget(&[Area::RouteIds, Area::RouteWeights]);
        s.room(Area::RouteIds, bytes, bytes)?;
        s.room(Area::RouteWeights, bytes, bytes)?;
        let mut n = s.rows(Area::Logits, 4 * experts, x.rows)?;
        if layout::rounds(r.weight.dtype()) {
            n = n.min(s.rows(Area::Input, x.cols.div_ceil(256) * BLOCK_BYTES, x.rows)?);
        }
        for first in (0..x.rows).step_by(n.max(1)) {
            let x = x.part(first..x.rows.min(first + n));
            let logits = Floats::dense(s.at(Area::Logits), x.rows, experts);
            let w = Matrix::of(r.weight)?;
            if w.dtype == DType::F32 && w.cols.is_multiple_of(4) {
                self.kernels.router_logits(w, x, logits.at)?;
            } else {
                let input = self.input(s, Area::Input, x, &[r.weight], false)?;
                self.kernels.products(&[Product::set(w, logits)], input)?;
            }
            let skip = 4 * (first * r.used) as u64;
            let (ids, weights) = (s.at(Area::RouteIds) + skip, s.at(Area::RouteWeights) + skip);
            let rule = (r.used, r.normalize, r.scale);
            let correction = vector(r.correction)?;
            self.kernels.route(logits, r.gating, correction, r.groups, rule, ids, weights)?;
        }
        s.routed += 1;
        routes.used = r.used;
        routes.ids.clear();
        routes.weights.clear();
        routes.kept = Some(Kept { place: self.gpu.place, rows: x.rows, call: s.routed });
        Ok(())
    }

    fn moe(
        &self,
        prompts: &[u32],
        experts: Ffn<'_>,
        routes: &Routes,
        shared: Option<Ffn<'_>>,
        x: View<'_>,
        out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError> {
        let s = &mut *self.scratch();
        let (x, out, used) = (Floats::of(&x)?, s.output(&out)?, routes.used);
        match &routes.kept {
            Some(k) if k.call == s.routed => {}
            Some(_) => {
                return Err(KernelError::Shape("moe: these routes were overwritten by later ones".into()));
            }
            None => {
                let weights: Vec<u32> = routes.weights.iter().map(|w| w.to_bits()).collect();
                s.send(&[Area::RouteIds], &routes.ids)?;
                s.send(&[Area::RouteWeights], &weights)?;
                s.routed += 1;
            }
        }
        let inner: Vec<&Weight> =
            [Some(&experts), shared.as_ref()].into_iter().flatten().flat_map(|f| [f.gate, f.up]).collect();
        let downs = [Some(&experts), shared.as_ref()].into_iter().flatten().map(|f| f.down);
        let weights: Vec<&Weight> = inner.iter().copied().chain(downs).collect();
        for (run, tiled) in self.runs(prompts, x.rows, &weights) {
            let mut n = self.ffn_rows(s, &experts, used, run.len(), tiled)?;
            n = n.min(s.rows(Area::Experts, 4 * used * out.cols, run.len())?);
            n = n.min(s.rows(Area::JobOrder, 4 * used, run.len())?);
            n = n.min(s.rows(Area::Input, inputs_bytes(&inner, x.cols, tiled), run.len())?);
            if let Some(f) = &shared {
                n = n.min(self.ffn_rows(s, f, 1, run.len(), tiled)?);
                n = n.min(s.rows(Area::Shared, 4 * out.cols, run.len())?);
            }
            for first in run.clone().step_by(n.max(1)) {
                let rows = first..run.end.min(first + n);
                let input = self.input(s, Area::Input, x.part(rows.clone()), &inner, tiled)?;
                let mut beside = 0;
                if let Some(f) = &shared {
                    let hidden = self.hidden(s, f, input, Jobs::One, tiled)?;
                    beside = s.at(Area::Shared);
                    let to = Floats::dense(beside, rows.len(), out.cols);
                    self.kernels.products(&[Product::set(Matrix::of(f.down)?, to)], hidden)?;
                }
                let skip = 4 * (first * used) as u64;
                let (ids, weights) = (s.at(Area::RouteIds) + skip, s.at(Area::RouteWeights) + skip);
                let count = experts.gate.count();
                let of = [experts.gate, experts.up, experts.down];
                let columns = tiled.then(|| half::grouped_columns(&of, rows.len() * used / count));
                let jobs = self.jobs(s, ids, rows.len(), used, count, columns)?;
                let hidden = self.hidden(s, &experts, input, jobs, tiled)?;
                let each = Floats::dense(s.at(Area::Experts), rows.len() * used, out.cols);
                let down = Product::set(Matrix::of(experts.down)?, each);
                self.kernels.product(down, hidden, jobs.alone(), None)?;
                let add = write == Write::Add;
                self.kernels.mix_experts(each, weights, used, beside, out.part(rows), add)?;
            }
        }
        Ok(())
    }

    fn kv_write(&self, x: View<'_>, cache: &mut KvBuf, slots: &[u32]) -> Result<(), KernelError> {
        self.store(&[(Floats::of(&x)?, cache_of(cache)?)], slots)
    }

    fn kv_write_both(
        &self,
        (x, first): (View<'_>, &mut KvBuf),
        (y, second): (View<'_>, &mut KvBuf),
        slots: &[u32],
    ) -> Result<(), KernelError> {
        let both = [(Floats::of(&x)?, cache_of(first)?), (Floats::of(&y)?, cache_of(second)?)];
        self.store(&both, slots)
    }

    fn kv_move(
        &self,
        cache: &mut KvBuf,
        moves: &[(u32, u32)],
        cols: Range<usize>,
    ) -> Result<(), KernelError> {
        let c = cache_of(cache)?;
        let ranges = layout::column_bytes(c.dtype, c.width, cols.start, cols.end);
        let s = &mut *self.scratch();
        // As many as the area holds at a time: between two of them nothing changes the order.
        let words: Vec<u32> = moves.iter().flat_map(|m| [m.0, m.1]).collect();
        let room = s.room(Area::Ids, 8, 4 * words.len())? / 8 * 2;
        for some in words.chunks(room) {
            let at = s.send(&[Area::Ids], some)?;
            self.kernels.kv_move(c, at, some.len() / 2, ranges.clone())?;
        }
        Ok(())
    }

    fn kv_read(
        &self,
        cache: &KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let mut rows = vec![0; slots.len() * cache.row_bytes()];
        self.kv_save(cache, slots, &mut rows)?;
        let mut here = KvBuf::host(cache.dtype(), slots.len(), cache.width())?;
        here.data.copy_from_slice(&rows);
        let ids: Vec<u32> = (0..slots.len() as u32).collect();
        self.host.kv_read(&here, &ids, cols, out)
    }

    fn kv_rotate(
        &self,
        cache: &mut KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        heads: RopeHeads,
        cos_sin: View<'_>,
    ) -> Result<(), KernelError> {
        let mut angles = vec![0.0; cos_sin.rows() * cos_sin.cols()];
        self.read(cos_sin, &mut angles)?;
        let angles = View::from_host(&angles, heads.dims.max(1));
        self.on_host(cache, slots, |here, ids| self.host.kv_rotate(here, ids, cols, heads, angles))
    }

    fn kv_save(&self, cache: &KvBuf, slots: &[u32], out: &mut [u8]) -> Result<(), KernelError> {
        let (c, host_row) = (cache_of(cache)?, cache.row_bytes());
        let row = c.row_bytes();
        for (slot, at, n) in Self::neighbours(slots) {
            let mut packed = vec![0; n * row];
            self.gpu.gpu.read(c.at + slot * row as u64, &mut packed)?;
            let to = out[at * host_row..(at + n) * host_row].chunks_exact_mut(host_row);
            for (src, dst) in packed.chunks_exact(row).zip(to) {
                layout::unpack_row(c.dtype, src, dst);
            }
        }
        Ok(())
    }

    fn kv_load(&self, cache: &mut KvBuf, slots: &[u32], bytes: &[u8]) -> Result<(), KernelError> {
        let (c, host_row) = (cache_of(cache)?, cache.row_bytes());
        let row = c.row_bytes();
        for (slot, at, n) in Self::neighbours(slots) {
            let mut packed = vec![0; n * row];
            let from = bytes[at * host_row..(at + n) * host_row].chunks_exact(host_row);
            for (src, dst) in from.zip(packed.chunks_exact_mut(row)) {
                layout::pack_row(c.dtype, src, dst);
            }
            self.gpu.gpu.write(c.at + slot * row as u64, &packed)?;
        }
        Ok(())
    }

    fn attention(
        &self,
        a: Attention<'_>,
        out: ViewMut<'_>,
        mass: Option<Mass<'_>>,
    ) -> Result<(), KernelError> {
        self.attend(&mut self.scratch(), &a, out, mass)
    }

    fn mla(&self, m: Mla<'_>, out: ViewMut<'_>, mass: Option<Mass<'_>>) -> Result<(), KernelError> {
        self.attend_latents(&mut self.scratch(), &m, out, mass)
    }
}
