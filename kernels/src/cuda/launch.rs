//! The kernels as typed calls: one function for each entry point of `src/*.cu`, the only place that launches one. Shapes were checked
//! by `Device`; what is checked here is what the kernels themselves ask for. Knows addresses and strides; nothing of what is computed.

mod attention;
mod rows;
mod skinny;

pub use rows::choices;
pub use skinny::Skinny;

use super::gpu::{Arg, Counted, GpuError, GpuInfo, KernelId, Launch};
use super::layout;
use super::modules::{self, Ptx};
use super::operands::{Cache, Floats, Input, Jobs, Matrix, Product, Sorted};
use crate::{Activation, Gating, GroupScore, Groups, KernelError, RopeHeads, RopeStyle};
use quant::DType;
use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard};

/// Columns that a product takes at once without tensor cores.
pub const COLUMNS: usize = 8;
/// Columns of weights in blocks where tensor cores need less than multiply-adds do, and weights are the load.
const SKINNY: RangeInclusive<usize> = 2..=TILE_COLUMNS;
/// Blocks along y and z of a grid.
const MAX_YZ: usize = 65_535;
/// Value dimensions of a head at most: attention.cu, DIMS x THREADS.
pub(super) const MAX_VALUE: usize = 512;
/// Query heads of a block of attention.
pub(super) const HEADS: usize = 8;
/// Cache entries that a block of attention takes at a time.
pub(super) const TILE: usize = 16;

pub(super) fn n(x: usize) -> Result<Arg, KernelError> {
    u32::try_from(x)
        .map(Arg::U32)
        .map_err(|_| KernelError::Shape(format!("{x} is more than a GPU's kernels count to")))
}

pub(super) fn p(x: u64) -> Arg {
    Arg::U64(x)
}

pub(super) fn flag(x: bool) -> Arg {
    Arg::U32(u32::from(x))
}

pub(super) fn refuse<T>(what: String) -> Result<T, KernelError> {
    Err(KernelError::Shape(format!("cuda: {what}")))
}

/// What kernels for many columns are told of jobs, of what is fused and of where the rows go.
pub(super) fn many_outputs(
    made: &Product,
    jobs: Option<Sorted>,
    up: Option<(Matrix, Activation)>,
) -> Result<[Arg; 10], KernelError> {
    let (order, tiles, share) = jobs.map_or((0, 0, 1), |j| (j.order, j.tiles, j.share));
    Ok([
        n(made.out.rows)?,
        p(order),
        p(tiles),
        n(share)?,
        p(up.map_or(0, |u| u.0.at)),
        flag(up.is_some_and(|u| u.1 == Activation::GeluTanh)),
        p(made.bias),
        p(made.out.at),
        n(made.out.stride)?,
        flag(made.add),
    ])
}

/// What kernels for few columns are told of up to three products.
fn three(products: &[Product]) -> Result<Vec<Arg>, KernelError> {
    let of = |i: usize| -> Result<[Arg; 6], KernelError> {
        Ok(match products.get(i) {
            Some(m) => [p(m.w.at), n(m.w.rows)?, p(m.bias), p(m.out.at), n(m.out.stride)?, flag(m.add)],
            None => [p(0), n(0)?, p(0), p(0), n(0)?, flag(false)],
        })
    };
    Ok([of(0)?, of(1)?, of(2)?].concat())
}

/// The entry for so many columns, and the rows that a warp of it makes.
fn for_columns<T: Copy>(entries: [T; 4], x: Input, jobs: Option<(u64, usize)>) -> T {
    entries[jobs.map_or(x.float.rows, |_| 1).next_power_of_two().ilog2() as usize]
}

/// Columns of a tile of products on tensor cores.
pub const TILE_COLUMNS: usize = 32;

/// Launches kernels, loading their modules when they are first asked for.
pub struct Launcher {
    gpu: Arc<Counted>,
    pub(super) capability: (u32, u32),
    /// Bytes of shared memory that a block may have.
    pub(super) shared: usize,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: Vec<&'static str>,
    /// By module and entry; whether its kernels may overlap.
    kernels: HashMap<(&'static str, &'static str), (KernelId, bool)>,
    /// By kind and the types of two caches, or twice one type.
    texts: HashMap<(&'static str, DType, DType), &'static Ptx>,
}

impl Launcher {
    pub fn new(gpu: Arc<Counted>) -> Self {
        let GpuInfo { capability, shared, .. } = gpu.gpu.info();
        Self { capability, shared: shared as usize, gpu, loaded: Mutex::default() }
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        // Entries are put in whole.
        self.loaded.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Loads a module now, so that nothing waits for it later.
    pub fn load(&self, module: &'static Ptx) -> Result<(), GpuError> {
        let mut loaded = self.loaded();
        if !loaded.modules.contains(&module.name) {
            self.gpu.gpu.load(module)?;
            loaded.modules.push(module.name);
        }
        Ok(())
    }

    fn kernel(&self, module: &'static Ptx, entry: &'static str) -> Result<(KernelId, bool), GpuError> {
        if let Some(k) = self.loaded().kernels.get(&(module.name, entry)) {
            return Ok(*k);
        }
        self.load(module)?;
        let k = (self.gpu.gpu.kernel(module.name, entry)?, module.overlaps());
        self.loaded().kernels.insert((module.name, entry), k);
        Ok(k)
    }

    /// Runs `entry` in blocks of `threads` with `shared` floats of shared memory. An empty grid does nothing.
    pub(super) fn run(
        &self,
        module: &'static Ptx,
        entry: &'static str,
        grid: [usize; 3],
        threads: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), KernelError> {
        if grid.contains(&0) {
            return Ok(());
        }
        if grid[0] > i32::MAX as usize || grid[1] > MAX_YZ || grid[2] > MAX_YZ {
            return refuse(format!("{entry} of {}: a grid of {grid:?}", module.name));
        }
        if 4 * shared > self.shared {
            let room = self.shared / 4;
            return refuse(format!("{entry} of {} needs {shared} shared values of {room}", module.name));
        }
        let (kernel, overlaps) = self.kernel(module, entry)?;
        let launch = Launch { grid: grid.map(|n| n as u32), threads, shared: 4 * shared as u32, overlaps };
        Ok(self.gpu.gpu.launch(kernel, launch, args)?)
    }

    /// The text of a module for this GPU, where it has one.
    pub(super) fn text(&self, name: &str) -> Option<&'static Ptx> {
        modules::text_for(name, 10 * self.capability.0 + self.capability.1)
    }

    fn base(&self, name: &str) -> Result<&'static Ptx, KernelError> {
        self.text(name).map_or_else(|| refuse(format!("no module {name}")), Ok)
    }

    /// The text of a kind of kernels for weights or caches of this type.
    pub(super) fn of(&self, kind: &'static str, dtype: DType) -> Result<&'static Ptx, KernelError> {
        let text = self.of_types(kind, dtype, dtype);
        text.map_or_else(|| refuse(format!("no {kind} kernels for {dtype}")), Ok)
    }

    /// Names are not put together for every launch.
    fn of_types(&self, kind: &'static str, first: DType, second: DType) -> Option<&'static Ptx> {
        let key = (kind, first, second);
        if let Some(text) = self.loaded().texts.get(&key) {
            return Some(text);
        }
        let text = self.text(&modules::name_of_pair(kind, first, second))?;
        self.loaded().texts.insert(key, text);
        Some(text)
    }

    /// Calls `f` for runs of at most as many rows as a grid has along y.
    fn rows(
        rows: usize,
        mut f: impl FnMut(Range<usize>) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        (0..rows).step_by(MAX_YZ).try_for_each(|i| f(i..rows.min(i + MAX_YZ)))
    }

    /// Norms of `x.cols / len` heads a row; out may be x.
    pub fn rms_norm(&self, x: Floats, w: u64, len: usize, eps: f32, out: Floats) -> Result<(), KernelError> {
        let m = self.base("rows")?;
        Self::rows(x.rows, |r| {
            let (x, out) = (x.part(r.clone()), out.part(r));
            let args = [p(x.at), n(x.stride)?, p(w), n(len)?, Arg::F32(eps), p(out.at), n(out.stride)?];
            self.run(m, "rms_norm", [x.cols / len, x.rows, 1], 256, 0, &args)
        })
    }

    /// Rotates in place heads of one pairing and as many dimensions, of one buffer or two, by the same angles.
    pub fn rope(&self, turned: &[(Floats, RopeHeads)], cos_sin: Floats) -> Result<(), KernelError> {
        let m = self.base("rows")?;
        let Some((&(first, h), rest)) = turned.split_first() else { return Ok(()) };
        let half = h.dims / 2;
        let heads = |x: Floats, h: RopeHeads, r: Range<usize>| {
            let count = x.cols / h.head_dim;
            let args = [p(x.part(r).at), n(x.stride)?, n(count)?, n(h.head_dim)?, n(h.offset)?];
            Ok::<_, KernelError>((count, args))
        };
        Self::rows(first.rows, |r| {
            let (count, x) = heads(first, h, r.clone())?;
            let (more, y) = match rest.first() {
                Some(&(y, h)) => heads(y, h, r.clone())?,
                None => (0, [p(0), n(0)?, n(0)?, n(0)?, n(0)?]),
            };
            let (cs, halves) = (cos_sin.part(r.clone()), flag(h.style == RopeStyle::Halves));
            let args = [&x[..], &y, &[n(half)?, halves, p(cs.at), n(cs.stride)?]].concat();
            self.run(m, "rope", [((count + more) * half).div_ceil(128), r.len(), 1], 128, 0, &args)
        })
    }

    /// gate = act(gate) * up.
    pub fn glu(&self, gate: Floats, up: Floats, act: Activation) -> Result<(), KernelError> {
        let m = self.base("rows")?;
        let act = flag(act == Activation::GeluTanh);
        Self::rows(gate.rows, |r| {
            let (gate, up) = (gate.part(r.clone()), up.part(r));
            let args = [p(gate.at), n(gate.stride)?, p(up.at), n(up.stride)?, n(gate.cols)?, act];
            self.run(m, "glu", [gate.cols.div_ceil(256), gate.rows, 1], 256, 0, &args)
        })
    }

    /// `out[r] (=|+=) x[rows[r]]`; `rows` 0: row r.
    pub fn gather(&self, x: Floats, rows: u64, out: Floats, add: bool) -> Result<(), KernelError> {
        let m = self.base("rows")?;
        Self::rows(out.rows, |r| {
            let to = out.part(r.clone());
            let (from, ids) = match rows {
                0 => (x.part(r).at, 0),
                ids => (x.at, ids + 4 * r.start as u64),
            };
            let args = [p(from), n(x.stride)?, p(ids), n(out.cols)?, p(to.at), n(to.stride)?, flag(add)];
            self.run(m, "gather", [to.cols.div_ceil(256), to.rows, 1], 256, 0, &args)
        })
    }

    /// `out[r] (=|+=) shared[r] + sum_k weights[r][k] experts[r][k]`; `experts` has `used` rows for each of out; `shared` 0: none.
    pub fn mix_experts(
        &self,
        experts: Floats,
        weights: u64,
        used: usize,
        shared: u64,
        out: Floats,
        add: bool,
    ) -> Result<(), KernelError> {
        let m = self.base("rows")?;
        Self::rows(out.rows, |r| {
            let (to, from) = (out.part(r.clone()), experts.part(used * r.start..used * r.end));
            let beside = if shared == 0 { 0 } else { shared + 4 * (r.start * out.cols) as u64 };
            let weights = weights + 4 * (used * r.start) as u64;
            let args = [
                p(from.at),
                p(weights),
                n(used)?,
                p(beside),
                n(to.cols)?,
                p(to.at),
                n(to.stride)?,
                flag(add),
            ];
            self.run(m, "mix_experts", [to.cols.div_ceil(256), to.rows, 1], 256, 0, &args)
        })
    }

    fn input(&self, w: &Matrix, x: &Input) -> Result<(u64, usize), KernelError> {
        if !layout::rounds(w.dtype) {
            return Ok((x.float.at, x.float.stride));
        }
        let rounded = x.rounded.map_or_else(|| refuse("the input is not rounded".into()), Ok)?;
        Ok((rounded.at, rounded.stride))
    }

    /// Products that share an input: up to three of one format in a launch where columns are few.
    pub fn products(&self, products: &[Product], x: Input) -> Result<(), KernelError> {
        if x.float.rows == 0 {
            return Ok(());
        }
        let (mut few, many): (Vec<Product>, Vec<Product>) =
            products.iter().partition(|p| Self::takes_few(p.w, &x));
        many.into_iter().try_for_each(|p| self.matmul(p, x, None, None))?;
        few.sort_by_key(|p| p.w.dtype.name());
        let alike = few.chunk_by(|a, b| a.w.dtype == b.w.dtype);
        alike.flat_map(|p| p.chunks(3)).try_for_each(|some| self.few(some, x, None))
    }

    /// Whether the columns are few for such weights: [`Launcher::few`] takes them.
    fn takes_few(w: Matrix, x: &Input) -> bool {
        Self::takes_skinny(w, x) || (x.float.rows <= COLUMNS && x.halves(w.dtype).is_none())
    }

    /// Whether [`Launcher::skinny`] does.
    fn takes_skinny(w: Matrix, x: &Input) -> bool {
        layout::rounds(w.dtype) && SKINNY.contains(&x.float.rows) && x.halves(w.dtype).is_none()
    }

    /// One product of the rows that `jobs` makes; with `up`, of W's format, `act(W x) * (up x)`.
    pub fn product(
        &self,
        made: Product,
        x: Input,
        jobs: Jobs,
        up: Option<(Matrix, Activation)>,
    ) -> Result<(), KernelError> {
        match (jobs, up) {
            (Jobs::Sorted(jobs), _) => self.matmul(made, x, Some(jobs), up),
            (Jobs::Each { ids, share }, _) => self.experts(made, x, (ids, share), up),
            (Jobs::One, None) => self.products(&[made], x),
            (Jobs::One, Some(up)) => match made.out.rows {
                0 => Ok(()),
                _ if Self::takes_few(made.w, &x) => self.few_gated(made, up, x, None),
                _ => self.matmul(made, x, None, Some(up)),
            },
        }
    }

    /// Row j of out = matrix `ids[j]` of the stack times row `j / share` of x.
    fn experts(
        &self,
        made: Product,
        x: Input,
        (ids, share): (u64, usize),
        up: Option<(Matrix, Activation)>,
    ) -> Result<(), KernelError> {
        let most = MAX_YZ / share * share;
        for first in (0..made.out.rows).step_by(most) {
            let rows = first..made.out.rows.min(first + most);
            let x = x.part(first / share..rows.end.div_ceil(share));
            let jobs = Some((ids + 4 * first as u64, share));
            let some = Product { out: made.out.part(rows), ..made };
            match up {
                Some(up) => self.few_gated(some, up, x, jobs)?,
                None => self.few(&[some], x, jobs)?,
            }
        }
        Ok(())
    }

    /// One launch for up to three products of one format, or one for each of some jobs by expert.
    fn few(&self, products: &[Product], x: Input, jobs: Option<(u64, usize)>) -> Result<(), KernelError> {
        let w = products[0].w;
        if jobs.is_none() && Self::takes_skinny(w, &x) {
            return self.skinny(products, x, None);
        }
        let args = [three(products)?, self.few_inputs(w, x, jobs)?.to_vec()].concat();
        let entries = [("matvec_1", 1), ("matvec_2", 1), ("matvec_4", 2), ("matvec_8", 4)];
        let (entry, each) = for_columns(entries, x, jobs);
        let blocks = products.iter().map(|p| p.w.rows.div_ceil(4 * each)).sum();
        let grid = [blocks, jobs.map_or(1, |_| products[0].out.rows), 1];
        self.run(self.of("matvec", w.dtype)?, entry, grid, 128, 0, &args)
    }

    /// The same of gate and up, with the activation.
    fn few_gated(
        &self,
        made: Product,
        (up, act): (Matrix, Activation),
        x: Input,
        jobs: Option<(u64, usize)>,
    ) -> Result<(), KernelError> {
        let Product { w, out, .. } = made;
        if jobs.is_none() && Self::takes_skinny(w, &x) {
            return self.skinny(&[made], x, Some((up, act)));
        }
        let act = flag(act == Activation::GeluTanh);
        let made = [p(w.at), p(up.at), n(w.rows)?, act, p(out.at), n(out.stride)?];
        let args = [&made[..], &self.few_inputs(w, x, jobs)?].concat();
        let entries = [("gate_1", 1), ("gate_2", 1), ("gate_4", 1), ("gate_8", 2)];
        let (entry, each) = for_columns(entries, x, jobs);
        let grid = [w.rows.div_ceil(4 * each), jobs.map_or(1, |_| out.rows), 1];
        self.run(self.of("matvec", w.dtype)?, entry, grid, 128, 0, &args)
    }

    /// What kernels for few columns are told of rows of weights, x and jobs.
    fn few_inputs(&self, w: Matrix, x: Input, jobs: Option<(u64, usize)>) -> Result<[Arg; 8], KernelError> {
        let (at, stride) = self.input(&w, &x)?;
        let (ids, share) = jobs.unwrap_or((0, 1));
        Ok([
            p(w.row_bytes() as u64),
            p((w.row_bytes() * w.matrix_rows) as u64),
            n(layout::blocks(w.dtype, w.cols))?,
            p(at),
            n(stride)?,
            n(jobs.map_or(x.float.rows, |_| 1))?,
            p(ids),
            n(share)?,
        ])
    }

    /// Many columns: all of x for one matrix, or `jobs` by expert, row j of out being job j. With `up`, `act(W x) * (up x)`. A column's
    /// bits are those of the kernels for few, but for rows in f16.
    fn matmul(
        &self,
        made: Product,
        x: Input,
        jobs: Option<Sorted>,
        up: Option<(Matrix, Activation)>,
    ) -> Result<(), KernelError> {
        let Product { w, out, .. } = made;
        if let Some(halves) = x.halves(w.dtype) {
            return self.matmul_half(made, halves, jobs, up);
        }
        let (at, stride) = self.input(&w, &x)?;
        // What a block makes.
        let halves = if up.is_some() { 2 } else { 1 };
        let (features, threads) = if layout::rounds(w.dtype) { (64, 512) } else { (32, 256) };
        let args = [
            p(w.at),
            p(w.row_bytes() as u64),
            p((w.row_bytes() * w.matrix_rows) as u64),
            n(w.rows)?,
            n(layout::blocks(w.dtype, w.cols))?,
            p(at),
            n(stride)?,
        ];
        let args = [&args[..], &many_outputs(&made, jobs, up)?].concat();
        let tiles = jobs.map_or(out.rows.div_ceil(TILE_COLUMNS), |j| j.count);
        let grid = [tiles, w.rows.div_ceil(features / halves), 1];
        self.run(self.of("matmul", w.dtype)?, "matmul", grid, threads, 0, &args)
    }

    /// Sorts jobs by expert: `order` has room for one word each, `tiles` for three words for each of `jobs / columns + experts`.
    pub fn sort_experts(
        &self,
        ids: u64,
        jobs: usize,
        columns: usize,
        experts: usize,
        order: u64,
        tiles: u64,
    ) -> Result<(), KernelError> {
        let args = [p(ids), n(jobs)?, n(columns)?, p(order), p(tiles)];
        self.run(self.base("router")?, "sort_experts", [experts, 1, 1], 256, experts, &args)
    }

    /// `out[r][h] = sum_i x[r][h * step + i] w[h * head_rows + i]` over the first `len` rows of each head; out `[rows, heads, cols]`.
    pub fn transposed(
        &self,
        w: Matrix,
        (heads, head_rows, len): (usize, usize, usize),
        x: Floats,
        step: usize,
        out: u64,
    ) -> Result<(), KernelError> {
        let m = self.of("matvec", w.dtype)?;
        Self::rows(x.rows, |r| {
            let (x, to) = (x.part(r.clone()), out + 4 * (r.start * heads * w.cols) as u64);
            let args = [
                p(w.at),
                p(w.row_bytes() as u64),
                n(layout::blocks(w.dtype, w.cols))?,
                n(head_rows)?,
                n(len)?,
                p(x.at),
                n(x.stride)?,
                n(step)?,
                p(to),
            ];
            self.run(m, "transposed", [w.cols.div_ceil(128), heads, x.rows], 128, 0, &args)
        })
    }

    /// `out[j] = scale * table[ids[j]]`.
    pub fn embed(&self, table: Matrix, ids: u64, scale: f32, out: Floats) -> Result<(), KernelError> {
        let m = self.of("matvec", table.dtype)?;
        Self::rows(out.rows, |r| {
            let (to, ids) = (out.part(r.clone()), ids + 4 * r.start as u64);
            let args = [
                p(table.at),
                p(table.row_bytes() as u64),
                n(layout::blocks(table.dtype, table.cols))?,
                p(ids),
                Arg::F32(scale),
                p(to.at),
                n(to.stride)?,
            ];
            self.run(m, "embed", [table.cols.div_ceil(256), to.rows, 1], 256, 0, &args)
        })
    }

    /// Logits `[rows, experts]` of a router in f32.
    pub fn router_logits(&self, w: Matrix, x: Floats, logits: u64) -> Result<(), KernelError> {
        if w.dtype != DType::F32 || w.row_bytes() != 4 * w.cols {
            return refuse(format!("a router of {} with rows of {} values", w.dtype, w.cols));
        }
        let m = self.base("router")?;
        Self::rows(x.rows, |r| {
            let to = logits + 4 * (r.start * w.rows) as u64;
            let x = x.part(r);
            let args = [p(w.at), p(x.at), n(x.stride)?, n(w.cols)?, p(to)];
            self.run(m, "router_logits", [w.rows, x.rows, 1], 64, 0, &args)
        })
    }

    /// Chosen experts and their weights, `[rows, used]` each.
    pub fn route(
        &self,
        logits: Floats,
        gating: Gating,
        correction: u64,
        groups: Option<Groups>,
        (used, normalize, scale): (usize, bool, f32),
        ids: u64,
        weights: u64,
    ) -> Result<(), KernelError> {
        let m = self.base("router")?;
        let (count, kept, sums) =
            groups.map_or((0, 0, false), |g| (g.count, g.used, g.score == GroupScore::Top2Sum));
        Self::rows(logits.rows, |r| {
            let skip = 4 * (r.start * used) as u64;
            let l = logits.part(r);
            let args = [
                p(l.at),
                n(l.cols)?,
                flag(gating == Gating::Sigmoid),
                p(correction),
                n(count)?,
                n(kept)?,
                flag(sums),
                n(used)?,
                flag(normalize),
                Arg::F32(scale),
                p(ids + skip),
                p(weights + skip),
            ];
            self.run(m, "route", [1, l.rows, 1], 32, 2 * l.cols + count, &args)
        })
    }

    /// The module of a kind for a layer's two caches.
    pub(super) fn pair(
        &self,
        kind: &'static str,
        first: Cache,
        second: Cache,
    ) -> Result<&'static Ptx, KernelError> {
        let (a, b) = (first.dtype, second.dtype);
        let none = || {
            refuse(format!(
                "no {kind} kernels for caches of {a} and {b}: use one type, or two of f16, q8_0, q4_0"
            ))
        };
        self.of_types(kind, a, b).map_or_else(none, Ok)
    }

    /// Stores row i of each x in slot `slots[i]` of its cache; slots differ. One launch where both caches are of one type.
    pub fn cache_write(&self, stores: &[(Floats, Cache)], slots: u64) -> Result<(), KernelError> {
        if let [one @ (_, a), two @ (_, b)] = stores
            && a.dtype != b.dtype
        {
            return [one, two].into_iter().try_for_each(|s| self.cache_write(std::slice::from_ref(s), slots));
        }
        let Some(((x, cache), rest)) = stores.split_first() else { return Ok(()) };
        let (y, other) = rest.first().unwrap_or(&stores[0]);
        let m = self.of("store", cache.dtype)?;
        Self::rows(x.rows, |r| {
            let (x, y) = (x.part(r.clone()), y.part(r.clone()));
            let args = [
                p(x.at),
                n(x.stride)?,
                n(x.cols)?,
                p(cache.at),
                p(cache.row_bytes() as u64),
                p(y.at),
                n(y.stride)?,
                n(y.cols)?,
                p(other.at),
                p(other.row_bytes() as u64),
                p(slots + 4 * r.start as u64),
            ];
            let grid = [x.cols.max(y.cols).div_ceil(256), x.rows, stores.len()];
            self.run(m, "cache_write", grid, 256, 0, &args)
        })
    }

    /// Moves byte ranges of a cache's rows, `(from, to)` pairs of slots at `moves`, in order.
    pub fn kv_move(
        &self,
        cache: Cache,
        moves: u64,
        count: usize,
        ranges: [Range<usize>; 2],
    ) -> Result<(), KernelError> {
        let [a, b] = ranges;
        let bytes = a.len() + b.len();
        let args = [
            p(cache.at),
            p(cache.row_bytes() as u64),
            p(moves),
            n(count)?,
            n(a.start)?,
            n(a.len())?,
            n(b.start)?,
            n(b.len())?,
        ];
        self.run(self.base("cache")?, "kv_move", [bytes.div_ceil(256), 1, 1], 128, 0, &args)
    }

    /// `ids[i] = i % heads` for i below `count`.
    pub fn cycle(&self, ids: u64, count: usize, heads: usize) -> Result<(), KernelError> {
        let args = [p(ids), n(count)?, n(heads)?];
        self.run(self.base("cache")?, "cycle", [count.div_ceil(128), 1, 1], 128, 0, &args)
    }
}
