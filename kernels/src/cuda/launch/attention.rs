//! Launches of attention with grouped heads: which kernels a layer's caches and heads take, in tiles of a prompt's rows and in parts of what
//! decoding sees. Decided by the GPU, the types of the caches and the layer's shape alone.

use super::{Arg, HEADS, Launcher, MAX_VALUE, TILE, n, p, refuse};
use crate::KernelError;
use crate::cuda::modules::Ptx;
use crate::cuda::operands::{Cache, Floats, Gqa, Lists, Tiles};
use crate::cuda::plan;
use quant::DType;

// What every kernel of attention is told, in the order of their parameters.
impl Gqa {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn queries(&self) -> Result<[Arg; 5], KernelError> {
        let k = p(self.k.row_bytes() as u64);
        Ok([p(self.q.at), p(self.q_sink), n(self.q.stride)?, p(self.k.at), k])
    }

    fn values(&self) -> [Arg; 2] {
        [p(self.v.at), p(self.v.row_bytes() as u64)]
    }

    fn grouping(&self) -> Result<[Arg; 2], KernelError> {
        Ok([n(self.kv_heads)?, n(self.group())?])
    }

    fn shape(&self) -> Result<[Arg; 3], KernelError> {
        Ok([n(self.key)?, n(self.value)?, Arg::F32(self.scale)])
    }
}

/// A kernel on tensor cores (`src/lanes.cuh`): heads (or lanes) and threads of a block, bytes of its shared memory, the caches' types.
struct Tensor {
    entry: &'static str,
    heads: usize,
    threads: u32,
    shared: usize,
    types: [u32; 2],
}

impl Tensor {
    fn types(&self) -> [Arg; 2] {
        self.types.map(Arg::U32)
    }
}

/// Entry points for heads of so many values: over f16 caches, and over others.
type Entries = [(usize, [&'static str; 2])];

/// Tiles of a prompt's rows.
const PROMPTS: &Entries = &[
    (64, ["prompt_64", "packed_64"]),
    (96, ["prompt_96", "packed_96"]),
    (128, ["prompt_128", "packed_128"]),
    (256, ["prompt_256", "packed_256"]),
];
/// Parts of what decoding sees, for eight heads in two f16 parts.
const EIGHT: &Entries = &[
    (64, ["attend_64", "packed_64"]),
    (128, ["attend_128", "packed_128"]),
    (256, ["attend_256", "packed_256"]),
];
/// For 16 in one.
const SIXTEEN: &Entries =
    &[(64, ["attend_many_64", "packed_many_64"]), (128, ["attend_many_128", "packed_many_128"])];

/// A cache's type as kernels count them: values take a half, a fourth ... of four bytes.
fn number(dtype: DType) -> Option<u32> {
    [DType::F16, DType::Q8_0, DType::Q4_0].iter().position(|t| *t == dtype).map(|i| i as u32)
}

/// What of a layer decides: the larger of its heads' dimensions, of keys and of values, and the types of both caches.
struct Shape {
    dims: usize,
    types: [u32; 2],
}

impl Shape {
    /// None where tensor cores do not take such heads.
    fn of(a: &Gqa) -> Option<Self> {
        let types = [number(a.k.dtype)?, number(a.v.dtype)?];
        let whole = |dim: usize, t: u32| dim.is_multiple_of(if t == 0 { 8 } else { 32 });
        (whole(a.key, types[0]) && whole(a.value, types[1]))
            .then_some(Self { dims: a.key.max(a.value), types })
    }

    fn packed(&self) -> bool {
        self.types != [0, 0]
    }

    /// The entry point and its dimensions.
    fn entry(&self, of: &Entries) -> Option<(usize, &'static str)> {
        of.iter().find(|e| e.0 >= self.dims).map(|e| (e.0, e.1[usize::from(self.packed())]))
    }

    /// Bytes of a row of keys and values in shared memory: in f16, and as the caches have it.
    fn row(&self, dims: usize) -> (usize, usize) {
        (4 * dims + 16, self.types.iter().map(|t| (2 * dims) >> t).sum::<usize>() + 32)
    }
}

impl Launcher {
    /// Whether prompts over such caches go in tiles; others go row by row.
    pub fn takes_prompts(&self, first: Cache, second: Cache, value: usize) -> bool {
        value <= 256 && self.pair("prompt", first, second).is_ok()
    }

    /// For tiles of a prompt's rows, where tensor cores take them: three stages of 32 rows, or two in f16 and two as they are.
    fn tiles_on_tensor_cores(&self, a: &Gqa) -> Option<(&'static Ptx, Tensor)> {
        let shape = Shape::of(a)?;
        let (dims, entry) = shape.entry(PROMPTS)?;
        let (half, packed) = shape.row(dims);
        let shared = 32 * if shape.packed() { 2 * (half + packed) } else { 3 * half };
        self.tensor(
            "prompt_half",
            Tensor { entry, shared, heads: plan::HALF_LANES, threads: 256, types: shape.types },
        )
    }

    /// For parts of what decoding sees: for each warp three stages of 16 rows, and one unpacked. More than its sums take in the end.
    fn parts_on_tensor_cores(&self, a: &Gqa) -> Option<(&'static Ptx, Tensor)> {
        let shape = Shape::of(a)?;
        let sixteen = if a.group() > 8 { shape.entry(SIXTEEN).map(|e| (e, 16)) } else { None };
        let ((dims, entry), heads) = sixteen.or(shape.entry(EIGHT).map(|e| (e, 8)))?;
        let (half, packed) = shape.row(dims);
        let warps = if dims > 128 { 2 } else { 4 };
        let shared = 16 * warps as usize * if shape.packed() { 3 * packed + half } else { 3 * half };
        self.tensor("attend_half", Tensor { entry, shared, heads, threads: 32 * warps, types: shape.types })
    }

    /// With its text, where this GPU takes it.
    fn tensor(&self, module: &str, t: Tensor) -> Option<(&'static Ptx, Tensor)> {
        self.text(module).filter(|_| t.shared <= self.shared).map(|text| (text, t))
    }

    /// Lanes of a tile of a prompt's rows.
    pub fn prompt_lanes(&self, a: &Gqa) -> usize {
        self.tiles_on_tensor_cores(a).map_or(plan::LANES, |t| t.1.heads)
    }

    /// Attention of a prompt's rows; out `[rows, heads * value]`.
    pub fn prompt(&self, a: &Gqa, t: Tiles, out: Floats) -> Result<(), KernelError> {
        let grid = [t.count, a.kv_heads * a.group().div_ceil(t.heads), 1];
        let args = [
            &a.queries()?[..],
            &a.values(),
            &a.grouping()?,
            &[n(t.heads)?],
            &a.shape()?,
            &[p(t.tiles), p(t.segments), p(t.ranges), p(out.at), n(out.stride)?],
        ]
        .concat();
        if let Some((m, k)) = self.tiles_on_tensor_cores(a) {
            return self.run(m, k.entry, grid, k.threads, k.shared / 4, &[&args[..], &k.types()].concat());
        }
        let entry = match a.value {
            0..=128 => "prompt_2",
            129..=256 => "prompt_4",
            value => return refuse(format!("prompts with heads of {value} values; 256 are possible")),
        };
        self.run(self.pair("prompt", a.k, a.v)?, entry, grid, 256, 0, &args)
    }

    /// Parts `[rows, heads, splits, value + 2]` of grouped-query attention.
    pub fn attend(&self, a: &Gqa, l: Lists, parts: u64) -> Result<(), KernelError> {
        if a.value > MAX_VALUE {
            return refuse(format!("heads of {} values; {MAX_VALUE} are possible", a.value));
        }
        let args = [
            &a.queries()?[..],
            &a.values(),
            &a.grouping()?,
            &a.shape()?,
            &[p(l.spans), p(l.ends), n(l.parts.split)?, n(l.parts.most)?, p(parts)],
        ]
        .concat();
        let grid = |heads: usize| [l.splits, a.kv_heads * a.group().div_ceil(heads), l.rows];
        if let Some((m, k)) = self.parts_on_tensor_cores(a) {
            let args = [&args[..], &k.types()].concat();
            return self.run(m, k.entry, grid(k.heads), k.threads, k.shared / 4, &args);
        }
        let m = self.pair("attention", a.k, a.v)?;
        self.run(m, "attend", grid(HEADS), 128, TILE * (a.key + 1), &args)
    }

    /// The parts put together: out `[rows, heads * value]`; the caches only say which module is loaded already.
    pub fn merge(
        &self,
        (first, second): (Cache, Cache),
        parts: u64,
        (heads, value): (usize, usize),
        l: Lists,
        out: Floats,
    ) -> Result<(), KernelError> {
        let m = self.pair("attention", first, second)?;
        let args = [
            p(parts),
            n(l.splits)?,
            n(value)?,
            p(l.spans),
            p(l.ends),
            n(l.parts.split)?,
            n(l.parts.most)?,
            p(out.at),
            n(out.stride)?,
        ];
        self.run(m, "merge", [heads, l.rows, 1], 128, 0, &args)
    }

    /// Adds the probabilities of row `row` to mass `[kv_heads, slots]`, after `attend`.
    pub fn mass(&self, a: &Gqa, l: Lists, row: usize, parts: u64, mass: Floats) -> Result<(), KernelError> {
        let m = self.pair("mass", a.k, a.v)?;
        let group = a.group();
        let args = [
            &a.queries()?[..],
            &a.grouping()?,
            &a.shape()?,
            &[
                p(l.spans),
                p(l.ends),
                n(row)?,
                n(l.parts.split)?,
                n(l.parts.most)?,
                p(parts),
                n(l.splits)?,
                p(mass.at),
                n(mass.stride)?,
            ],
        ]
        .concat();
        self.run(m, "mass", [l.longest.div_ceil(64), a.kv_heads, 1], 128, 2 * group, &args)
    }
}
