//! The `Backend` trait: the coarse operations a forward pass is made of, and `Device`, which checks every shape before a
//! backend sees it. Operations are coarse so that a CPU can fuse them and a GPU can capture them into a graph.
//!
//! Numbers: activations are f32. A row's result never depends on how many other rows the call holds, nor on the number of
//! threads (fixed reduction orders; docs/numerics.md).

pub use crate::visible::{Span, Visible};
use crate::{Buf, KernelError, KvBuf, Limits, Place, Vector, View, ViewMut, Weight};
use quant::DType;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What an operation does with its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Overwrite it.
    Set,
    /// Add to it (the residual stream).
    Add,
}

/// The gate's activation of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// GELU in its tanh form: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    GeluTanh,
}

/// One product `out (=|+=) weight x (+ bias)`; several may share one input.
pub struct Product<'a> {
    /// `[out, in]`, a stack of one.
    pub weight: &'a Weight,
    /// `[out]`.
    pub bias: Option<&'a Vector>,
    /// `[n, out]`.
    pub out: ViewMut<'a>,
    /// Overwrite or accumulate.
    pub write: Write,
}

impl Product<'_> {
    /// The same of some of the rows.
    pub(crate) fn part(&mut self, rows: Range<usize>) -> Product<'_> {
        Product { weight: self.weight, bias: self.bias, out: self.out.part(rows), write: self.write }
    }
}

/// A gated feed-forward layer: `down(act(gate x) * up x)`.
#[derive(Clone, Copy)]
pub struct Ffn<'a> {
    /// `[hidden, d]` (a stack: one per expert).
    pub gate: &'a Weight,
    /// `[hidden, d]`.
    pub up: &'a Weight,
    /// `[d, hidden]`.
    pub down: &'a Weight,
    /// The gate's activation.
    pub act: Activation,
}

/// How expert scores become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Over all experts (DeepSeek-V2, Qwen3).
    Softmax,
    /// Each expert on its own (DeepSeek-V3).
    Sigmoid,
}

/// How a group's score is made from its experts' (DeepSeek-V2 section 2.2, DeepSeek-V3 section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The best expert.
    Max,
    /// The sum of the two best.
    Top2Sum,
}

/// Group-limited routing: only experts of the best `used` of `count` equal groups may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Groups kept.
    pub used: usize,
    /// A group's score.
    pub score: GroupScore,
}

/// The router of a mixture of experts.
#[derive(Clone, Copy)]
pub struct Router<'a> {
    /// `[experts, d]`.
    pub weight: &'a Weight,
    /// Scores to probabilities.
    pub gating: Gating,
    /// `[experts]`, added to the probabilities for the choice only, never to the weights.
    pub correction: Option<&'a Vector>,
    /// Group limits.
    pub groups: Option<Groups>,
    /// Experts per token.
    pub used: usize,
    /// Whether the chosen probabilities are divided by their sum.
    pub normalize: bool,
    /// Factor on the weights, last.
    pub scale: f32,
}

/// The router's choice for `n` tokens: `used` experts each, best first, ties to the lower id. A GPU keeps it to itself, so that
/// nobody waits for it: the lists are empty then.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// Experts per token.
    pub used: usize,
    /// `[n, used]` expert ids.
    pub ids: Vec<u32>,
    /// `[n, used]` weights.
    pub weights: Vec<f32>,
    pub(crate) kept: Option<Kept>,
}

/// Routes that lie in a device's working memory until it routes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub place: Place,
    pub rows: usize,
    /// Which call of `route` made them.
    pub call: u64,
}

impl Routes {
    /// Routes that were chosen elsewhere: `ids` and `weights` `[n, used]`.
    pub fn new(used: usize, ids: Vec<u32>, weights: Vec<f32>) -> Self {
        Self { used, ids, weights, kept: None }
    }
}

/// Which dimensions of a head a rotary embedding pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pairs (2i, 2i+1): llama and deepseek2 files.
    Adjacent,
    /// Pairs (i, i + dims/2): qwen and gemma files.
    Halves,
}

/// Where in a row of heads the rotary dimensions lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeHeads {
    /// Values per head; the row is a whole number of heads.
    pub head_dim: usize,
    /// First rotated dimension of a head.
    pub offset: usize,
    /// Rotated dimensions, even.
    pub dims: usize,
    /// Pairing.
    pub style: RopeStyle,
}

/// Grouped-query attention over a cache: `out[h] = softmax(scale q[h] K[g]^T) V[g]`, `g = h / (heads / kv_heads)`.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `[n, heads * key_dim]`.
    pub q: View<'a>,
    /// The same queries rotated for sink spans.
    pub q_sink: Option<View<'a>>,
    /// Width `kv_heads * key_dim`.
    pub k: &'a KvBuf,
    /// Width `kv_heads * value_dim`.
    pub v: &'a KvBuf,
    /// `n` rows.
    pub visible: &'a Visible,
}

/// Attention mass: the softmax probabilities that a call's queries give to cached entries, summed over the queries and over the
/// query heads of each key head (H2O, arXiv:2306.14048, keeps the running sum; TOVA, arXiv:2401.06104, the last query's alone;
/// SnapKV, arXiv:2404.14469, that of the last 16 to 64).
///
/// An entry's mass is *added* to what `out` holds: first over the heads of the group in a fixed order, then row by row in
/// ascending order. So the bits depend neither on threads nor on how the rows are cut into calls. Every row counted adds
/// `heads / kv_heads` (MLA: `heads`) to the sum over its entries, up to rounding; entries a row does not see get nothing from it.
pub struct Mass<'a> {
    /// `[kv_heads, slots]`, slots as in the cache; `[1, slots]` for MLA, whose heads share one latent.
    pub out: ViewMut<'a>,
    /// The query rows of the call that count.
    pub rows: Range<usize>,
}

/// The up-projections of the latent, as files hold them.
#[derive(Clone, Copy)]
pub enum MlaUp<'a> {
    /// `attn_k_b`, transposed, `[heads][latent, nope]`, and `attn_v_b` `[heads][value, latent]`.
    Split {
        /// Stack of `heads` matrices `[latent, nope]`.
        k_b: &'a Weight,
        /// Stack of `heads` matrices `[value, latent]`.
        v_b: &'a Weight,
    },
    /// `attn_kv_b` `[heads * (nope + value), latent]`: per head the key rows, then the value rows.
    Joint {
        /// The joint matrix, a stack of one.
        kv_b: &'a Weight,
    },
}

/// Multi-head latent attention over the cached latent and shared rotary key (DeepSeek-V2, section 2.1):
/// score of entry s for head h = scale (q_nope[h]^T W_k[h] c_s + q_pe[h]^T k_pe_s); output = W_v[h] sum_s p_s c_s.
/// The backend picks the absorbed form (q_nope^T W_k first) or the expanded one by cost.
#[derive(Clone, Copy)]
pub struct Mla<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key dimensions without rotation.
    pub nope: usize,
    /// Rotary dimensions.
    pub rope: usize,
    /// Value dimensions.
    pub value: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `[n, heads * (nope + rope)]`, the last `rope` of each head rotated.
    pub q: View<'a>,
    /// The same queries rotated for sink spans.
    pub q_sink: Option<View<'a>>,
    /// Normalised latents, width kv_lora_rank.
    pub latent: &'a KvBuf,
    /// Rotated shared keys, width `rope`.
    pub k_pe: &'a KvBuf,
    /// W_k and W_v.
    pub up: MlaUp<'a>,
    /// `n` rows.
    pub visible: &'a Visible,
}

/// The operations. Implementors may assume checked shapes: only [`Device`] calls these. `prompts` are those of
/// [`Device::for_rows`], or empty.
#[allow(missing_docs)] // each is described on `Device`
pub trait Backend: Send + Sync {
    fn name(&self) -> String;
    /// Where its operands lie.
    fn place(&self) -> Place {
        Place::HOST
    }
    fn held(&self) -> usize {
        0
    }
    fn scratch_bytes(&self, limits: &Limits) -> usize;
    fn reserve(&self, limits: &Limits) -> Result<(), KernelError>;
    /// A pass over rows of these prompts begins; see [`Device::for_rows`].
    fn begin(&self, _prompts: &[u32]) {}
    fn start(&self) -> Result<(), KernelError> {
        Ok(())
    }
    fn alloc(&self, rows: usize, cols: usize) -> Result<Buf, KernelError>;
    fn alloc_kv(&self, dtype: DType, slots: usize, width: usize) -> Result<KvBuf, KernelError>;
    fn upload(&self, host: Weight) -> Result<Weight, KernelError>;
    fn upload_vector(&self, host: Vector) -> Result<Vector, KernelError> {
        Ok(host)
    }
    fn write(&self, out: ViewMut<'_>, values: &[f32]) -> Result<(), KernelError>;
    fn read(&self, x: View<'_>, values: &mut [f32]) -> Result<(), KernelError>;
    fn best(&self, x: View<'_>, k: usize, out: &mut Vec<(u32, f32)>) -> Result<(), KernelError>;
    fn gather(&self, x: View<'_>, rows: &[u32], out: ViewMut<'_>) -> Result<(), KernelError>;
    fn copy(&self, x: View<'_>, out: ViewMut<'_>) -> Result<(), KernelError>;
    fn embed(&self, table: &Weight, ids: &[u32], scale: f32, out: ViewMut<'_>) -> Result<(), KernelError>;
    fn rms_norm(&self, x: View<'_>, w: &Vector, eps: f32, out: ViewMut<'_>) -> Result<(), KernelError>;
    fn rms_norm_heads(&self, x: ViewMut<'_>, w: &Vector, eps: f32) -> Result<(), KernelError>;
    fn add(&self, x: View<'_>, acc: ViewMut<'_>) -> Result<(), KernelError>;
    fn rope(&self, x: ViewMut<'_>, heads: RopeHeads, cos_sin: View<'_>) -> Result<(), KernelError>;
    fn rope_both(
        &self,
        x: (ViewMut<'_>, RopeHeads),
        y: (ViewMut<'_>, RopeHeads),
        cos_sin: View<'_>,
    ) -> Result<(), KernelError> {
        self.rope(x.0, x.1, cos_sin)?;
        self.rope(y.0, y.1, cos_sin)
    }
    fn matmul(&self, prompts: &[u32], x: View<'_>, products: &mut [Product<'_>]) -> Result<(), KernelError>;
    fn ffn(
        &self,
        prompts: &[u32],
        f: Ffn<'_>,
        x: View<'_>,
        out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError>;
    fn route(&self, r: Router<'_>, x: View<'_>, routes: &mut Routes) -> Result<(), KernelError>;
    fn moe(
        &self,
        prompts: &[u32],
        experts: Ffn<'_>,
        routes: &Routes,
        shared: Option<Ffn<'_>>,
        x: View<'_>,
        out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError>;
    fn kv_write(&self, x: View<'_>, cache: &mut KvBuf, slots: &[u32]) -> Result<(), KernelError>;
    fn kv_write_both(
        &self,
        first: (View<'_>, &mut KvBuf),
        second: (View<'_>, &mut KvBuf),
        slots: &[u32],
    ) -> Result<(), KernelError> {
        self.kv_write(first.0, first.1, slots)?;
        self.kv_write(second.0, second.1, slots)
    }
    fn kv_move(&self, cache: &mut KvBuf, moves: &[(u32, u32)], cols: Range<usize>)
    -> Result<(), KernelError>;
    fn kv_read(
        &self,
        cache: &KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError>;
    fn kv_rotate(
        &self,
        cache: &mut KvBuf,
        slots: &[u32],
        cols: Range<usize>,
        heads: RopeHeads,
        cos_sin: View<'_>,
    ) -> Result<(), KernelError>;
    fn kv_save(&self, cache: &KvBuf, slots: &[u32], out: &mut [u8]) -> Result<(), KernelError>;
    fn kv_load(&self, cache: &mut KvBuf, slots: &[u32], bytes: &[u8]) -> Result<(), KernelError>;
    fn attention(
        &self,
        a: Attention<'_>,
        out: ViewMut<'_>,
        mass: Option<Mass<'_>>,
    ) -> Result<(), KernelError>;
    fn mla(&self, m: Mla<'_>, out: ViewMut<'_>, mass: Option<Mass<'_>>) -> Result<(), KernelError>;
}

/// A backend behind its shape checks. Clones count their buffers together; see [`Device::counting`].
#[derive(Clone)]
pub struct Device(pub(crate) Arc<dyn Backend>, pub(crate) Arc<AtomicUsize>, pub(crate) Option<Arc<[u32]>>);

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// Values that [`Device::receive`] copies at a time: a MiB.
const STAGED: usize = 1 << 18;

pub(crate) fn shape(ok: bool, op: &str, detail: impl FnOnce() -> String) -> Result<(), KernelError> {
    if ok { Ok(()) } else { Err(KernelError::Shape(format!("{op}: {}", detail()))) }
}

impl Device {
    /// Wraps a backend.
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend), Arc::default(), None)
    }

    /// The same device with a count of its own: [`Device::allocated`] of it and its clones begins at 0.
    pub fn counting(&self) -> Self {
        Self(self.0.clone(), Arc::default(), None)
    }

    /// Bytes of all activations that [`Device::alloc`] of this handle and its clones has made, freed ones included.
    pub fn allocated(&self) -> usize {
        self.1.load(Relaxed)
    }

    /// Refuses operands of another device.
    pub(crate) fn near(&self, op: &'static str, places: impl AsRef<[Place]>) -> Result<(), KernelError> {
        let here = self.0.place();
        if places.as_ref().iter().all(|p| *p == here) { Ok(()) } else { Err(KernelError::Place { op }) }
    }

    fn near_ffn(&self, op: &'static str, f: &Ffn<'_>) -> Result<(), KernelError> {
        self.near(op, [f.gate.place(), f.up.place(), f.down.place()])
    }

    /// What the device is, for people: `cpu (avx512vnni, 2 threads)`.
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// Whether operands lie in the process's own memory: the CPU.
    pub fn is_host(&self) -> bool {
        self.0.place() == Place::HOST
    }

    /// Bytes of a GPU's memory that are held for weights, caches, activations and scratch; 0 on the CPU.
    pub fn held(&self) -> usize {
        self.0.held()
    }

    /// Bytes of scratch memory that calls within `limits` need, all of it.
    pub fn scratch_bytes(&self, limits: &Limits) -> usize {
        self.0.scratch_bytes(limits)
    }

    /// Allocates that much, once, for the calling thread and those of the device; calls within the limits allocate nothing that
    /// stays. Calls of attention beyond them are an error.
    ///
    /// # Errors
    /// Memory that cannot be had; an instruction set asked for that is not here.
    pub fn reserve(&self, limits: &Limits) -> Result<(), KernelError> {
        self.0.reserve(limits)
    }

    /// Activations `[rows, cols]`, zeroed.
    pub fn alloc(&self, rows: usize, cols: usize) -> Result<Buf, KernelError> {
        let buf = self.0.alloc(rows, cols)?;
        self.1.fetch_add(buf.bytes(), Relaxed);
        Ok(buf)
    }

    /// A cache `[slots, width]` of one of [`KvBuf::TYPES`].
    pub fn alloc_kv(&self, dtype: DType, slots: usize, width: usize) -> Result<KvBuf, KernelError> {
        self.0.alloc_kv(dtype, slots, width)
    }

    /// Makes a host weight usable on the device; on the CPU it stays where it is (mapped).
    pub fn upload(&self, host: Weight) -> Result<Weight, KernelError> {
        self.0.upload(host)
    }

    /// The same for a vector, which keeps its values on the host, too.
    pub fn upload_vector(&self, host: Vector) -> Result<Vector, KernelError> {
        self.0.upload_vector(host)
    }

    /// Copies `values` (row-major, exactly the window) to the device.
    pub fn write(&self, out: ViewMut<'_>, values: &[f32]) -> Result<(), KernelError> {
        shape(values.len() == out.rows() * out.cols(), "write", || format!("{} values", values.len()))?;
        self.near("write", [out.place()])?;
        self.0.write(out, values)
    }

    /// Copies a window to the host, row-major.
    pub fn read(&self, x: View<'_>, values: &mut [f32]) -> Result<(), KernelError> {
        shape(values.len() == x.rows() * x.cols(), "read", || format!("{} values", values.len()))?;
        self.near("read", [x.place()])?;
        self.0.read(x, values)
    }

    /// Copies a window `[n, d]` of `from`'s memory here, by way of the host; waits for what `from` was asked for before.
    pub fn receive(&self, from: &Device, x: View<'_>, mut out: ViewMut<'_>) -> Result<(), KernelError> {
        let (n, d) = (x.rows(), x.cols());
        shape(n == out.rows() && d == out.cols(), "receive", || format!("{n} rows of {d}"))?;
        let step = (STAGED / d.max(1)).clamp(1, n.max(1));
        let mut staged = vec![0.0; step * d];
        for first in (0..n).step_by(step) {
            let rows = first..n.min(first + step);
            let staged = &mut staged[..rows.len() * d];
            from.read(x.part(rows.clone()), staged)?;
            self.write(out.part(rows), staged)?;
        }
        Ok(())
    }

    /// `out[i] = x[rows[i]]`.
    pub fn gather(&self, x: View<'_>, rows: &[u32], out: ViewMut<'_>) -> Result<(), KernelError> {
        let inside = rows.iter().all(|&r| (r as usize) < x.rows());
        shape(inside && rows.len() == out.rows() && x.cols() == out.cols(), "gather", || {
            format!("{} rows", rows.len())
        })?;
        self.near("gather", [x.place(), out.place()])?;
        self.0.gather(x, rows, out)
    }

    /// `out[i] = scale * table[ids[i]]`, table `[vocab, d]`, out `[n, d]`.
    pub fn embed(
        &self,
        table: &Weight,
        ids: &[u32],
        scale: f32,
        out: ViewMut<'_>,
    ) -> Result<(), KernelError> {
        let inside = ids.iter().all(|&i| (i as usize) < table.rows());
        shape(
            inside && table.count() == 1 && ids.len() == out.rows() && table.cols() == out.cols(),
            "embed",
            || format!("table [{}, {}], out [{}, {}]", table.rows(), table.cols(), out.rows(), out.cols()),
        )?;
        self.near("embed", [out.place()])?;
        self.0.embed(table, ids, scale, out)
    }

    /// `out = x / sqrt(mean(x^2) + eps) * w` per row (arXiv:1910.07467); x, out `[n, d]`, w `[d]`.
    pub fn rms_norm(&self, x: View<'_>, w: &Vector, eps: f32, out: ViewMut<'_>) -> Result<(), KernelError> {
        shape(x.rows() == out.rows() && x.cols() == out.cols() && w.len() == x.cols(), "rms_norm", || {
            format!(
                "x [{}, {}], weight [{}], out [{}, {}]",
                x.rows(),
                x.cols(),
                w.len(),
                out.rows(),
                out.cols()
            )
        })?;
        self.near("rms_norm", [x.place(), w.place(), out.place()])?;
        self.0.rms_norm(x, w, eps, out)
    }

    /// The same in place over each run of `w.len()` columns (per-head QK norm).
    pub fn rms_norm_heads(&self, x: ViewMut<'_>, w: &Vector, eps: f32) -> Result<(), KernelError> {
        shape(!w.is_empty() && x.cols().is_multiple_of(w.len()), "rms_norm_heads", || {
            format!("[{}] into {}", w.len(), x.cols())
        })?;
        self.near("rms_norm_heads", [x.place(), w.place()])?;
        self.0.rms_norm_heads(x, w, eps)
    }

    /// `acc += x`.
    pub fn add(&self, x: View<'_>, acc: ViewMut<'_>) -> Result<(), KernelError> {
        shape(x.rows() == acc.rows() && x.cols() == acc.cols(), "add", || {
            format!("{} and {} columns", x.cols(), acc.cols())
        })?;
        self.near("add", [x.place(), acc.place()])?;
        self.0.add(x, acc)
    }

    fn check_rope(&self, x: &ViewMut<'_>, h: RopeHeads, cos_sin: &View<'_>) -> Result<(), KernelError> {
        let fits = h.head_dim > 0
            && h.dims.is_multiple_of(2)
            && h.offset + h.dims <= h.head_dim
            && x.cols().is_multiple_of(h.head_dim);
        shape(fits && cos_sin.cols() == h.dims && cos_sin.rows() == x.rows(), "rope", || {
            format!("{h:?}, x [{}, {}], angles [{}, {}]", x.rows(), x.cols(), cos_sin.rows(), cos_sin.cols())
        })?;
        self.near("rope", [x.place(), cos_sin.place()])
    }

    /// Rotates pairs (a, b) of each head in place to (a cos - b sin, a sin + b cos) (arXiv:2104.09864).
    /// `cos_sin` is `[n, dims]`: row i holds dims/2 cosines, then dims/2 sines.
    pub fn rope(&self, x: ViewMut<'_>, heads: RopeHeads, cos_sin: View<'_>) -> Result<(), KernelError> {
        self.check_rope(&x, heads, &cos_sin)?;
        self.0.rope(x, heads, cos_sin)
    }

    /// The same of queries and keys, which pair their dimensions alike, at once.
    pub fn rope_both(
        &self,
        x: (ViewMut<'_>, RopeHeads),
        y: (ViewMut<'_>, RopeHeads),
        cos_sin: View<'_>,
    ) -> Result<(), KernelError> {
        self.check_rope(&x.0, x.1, &cos_sin)?;
        self.check_rope(&y.0, y.1, &cos_sin)?;
        shape(x.1.style == y.1.style, "rope", || format!("{:?} and {:?}", x.1, y.1))?;
        self.0.rope_both(x, y, cos_sin)
    }

    /// Products that share the input x `[n, in]`; it is quantised once.
    pub fn matmul(&self, x: View<'_>, products: &mut [Product<'_>]) -> Result<(), KernelError> {
        for p in products.iter() {
            let w = p.weight;
            self.near("matmul", [x.place(), w.place(), p.out.place()])?;
            p.bias.map_or(Ok(()), |b| self.near("matmul", [b.place()]))?;
            let bias = p.bias.is_none_or(|b| b.len() == w.rows());
            let out = p.out.rows() == x.rows() && p.out.cols() == w.rows();
            shape(w.count() == 1 && w.cols() == x.cols() && bias && out, "matmul", || {
                let (r, c) = (p.out.rows(), p.out.cols());
                format!(
                    "weight [{}, {}, {}], x [{}, {}], out [{r}, {c}]",
                    w.count(),
                    w.rows(),
                    w.cols(),
                    x.rows(),
                    x.cols()
                )
            })?;
        }
        self.0.matmul(self.prompts(x.rows())?, x, products)
    }

    /// One product.
    pub fn linear(
        &self,
        weight: &Weight,
        x: View<'_>,
        out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError> {
        self.matmul(x, &mut [Product { weight, bias: None, out, write }])
    }

    fn check_ffn(f: &Ffn<'_>, d: usize, op: &str) -> Result<(), KernelError> {
        let (g, u, w) = (f.gate, f.up, f.down);
        let counts = g.count() == u.count() && u.count() == w.count();
        let dims =
            g.cols() == d && u.cols() == d && w.rows() == d && g.rows() == u.rows() && u.rows() == w.cols();
        shape(counts && dims, op, || {
            format!(
                "d {d}, gate [{}, {}], up [{}, {}], down [{}, {}]",
                g.rows(),
                g.cols(),
                u.rows(),
                u.cols(),
                w.rows(),
                w.cols()
            )
        })
    }

    /// A gated feed-forward layer (stacks of one); x, out `[n, d]`.
    pub fn ffn(&self, f: Ffn<'_>, x: View<'_>, out: ViewMut<'_>, write: Write) -> Result<(), KernelError> {
        Self::check_ffn(&f, x.cols(), "ffn")?;
        shape(f.gate.count() == 1 && x.rows() == out.rows() && x.cols() == out.cols(), "ffn", || {
            "out".into()
        })?;
        self.near_ffn("ffn", &f)?;
        self.near("ffn", [x.place(), out.place()])?;
        self.0.ffn(self.prompts(x.rows())?, f, x, out, write)
    }

    /// Chooses experts for each row of x `[n, d]`.
    pub fn route(&self, r: Router<'_>, x: View<'_>, routes: &mut Routes) -> Result<(), KernelError> {
        let e = r.weight.rows();
        let groups = r.groups.is_none_or(|g| {
            g.count > 0
                && e.is_multiple_of(g.count)
                && g.used > 0
                && g.used <= g.count
                && r.used <= g.used * (e / g.count)
        });
        let correction = r.correction.is_none_or(|c| c.len() == e);
        let ok = r.weight.count() == 1 && r.weight.cols() == x.cols() && r.used > 0 && r.used <= e;
        shape(ok && groups && correction, "route", || {
            format!("{e} experts, {} used, groups {:?}", r.used, r.groups)
        })?;
        self.near("route", [r.weight.place(), x.place()])?;
        r.correction.map_or(Ok(()), |c| self.near("route", [c.place()]))?;
        // Those that another device kept.
        routes.kept = None;
        self.0.route(r, x, routes)
    }

    /// `out (=|+=) sum_k weight_k expert_k(x) + shared(x)`; `experts` are stacks of one matrix per expert.
    pub fn moe(
        &self,
        experts: Ffn<'_>,
        routes: &Routes,
        shared: Option<Ffn<'_>>,
        x: View<'_>,
        out: ViewMut<'_>,
        write: Write,
    ) -> Result<(), KernelError> {
        Self::check_ffn(&experts, x.cols(), "moe")?;
        if let Some(s) = &shared {
            Self::check_ffn(s, x.cols(), "moe, shared")?;
        }
        self.near_ffn("moe", &experts)?;
        shared.iter().try_for_each(|s| self.near_ffn("moe", s))?;
        self.near("moe", [x.place(), out.place()])?;
        let e = experts.gate.count();
        let n = x.rows() * routes.used;
        let ids = match &routes.kept {
            Some(k) => {
                self.near("moe", [k.place])?;
                k.rows == x.rows()
            }
            None => {
                let inside = routes.ids.iter().all(|&i| (i as usize) < e);
                routes.ids.len() == n && routes.weights.len() == n && inside
            }
        };
        shape(ids && x.rows() == out.rows() && x.cols() == out.cols(), "moe", || {
            format!("{} routes", routes.ids.len())
        })?;
        self.0.moe(self.prompts(x.rows())?, experts, routes, shared, x, out, write)
    }

    fn check_visible(v: &Visible, n: usize, slots: usize, op: &str) -> Result<(), KernelError> {
        let inside = v.spans.iter().all(|s| s.start as usize + s.len as usize <= slots);
        let seen = (0..v.rows()).all(|i| !v.row(i).is_empty());
        shape(v.rows() == n && inside && seen, op, || format!("spans of {} rows for {n} queries", v.rows()))
    }

    fn check_mass(
        &self,
        mass: &Option<Mass<'_>>,
        n: usize,
        heads: usize,
        slots: usize,
    ) -> Result<(), KernelError> {
        let Some(m) = mass else { return Ok(()) };
        self.near("attention mass", [m.out.place()])?;
        let rows = m.rows.start <= m.rows.end && m.rows.end <= n;
        shape(rows && m.out.rows() == heads && m.out.cols() == slots, "attention mass", || {
            let (r, c) = (m.out.rows(), m.out.cols());
            format!("rows {:?} of {n}, out [{r}, {c}], not [{heads}, {slots}]", m.rows)
        })
    }

    /// Grouped-query attention; out `[n, heads * value_dim]`.
    pub fn attention(&self, a: Attention<'_>, out: ViewMut<'_>) -> Result<(), KernelError> {
        self.attention_mass(a, out, None)
    }

    /// [`Device::attention`], which also adds up attention mass where asked. The outputs' bits stay what they are without.
    ///
    /// # Errors
    /// Besides shapes: [`KernelError::Scratch`] where memory was reserved without [`Limits::mass`].
    pub fn attention_mass(
        &self,
        a: Attention<'_>,
        out: ViewMut<'_>,
        mass: Option<Mass<'_>>,
    ) -> Result<(), KernelError> {
        let ok = a.kv_heads > 0
            && a.heads.is_multiple_of(a.kv_heads)
            && a.k.width().is_multiple_of(a.kv_heads)
            && a.v.width().is_multiple_of(a.kv_heads);
        shape(ok, "attention", || format!("{} heads, {} kv heads", a.heads, a.kv_heads))?;
        let (kd, vd) = (a.k.width() / a.kv_heads, a.v.width() / a.kv_heads);
        let n = a.q.rows();
        let q2 = a.q_sink.is_none_or(|s| s.rows() == n && s.cols() == a.q.cols());
        let fits = a.q.cols() == a.heads * kd && out.cols() == a.heads * vd && out.rows() == n;
        shape(q2 && fits && a.k.slots() == a.v.slots(), "attention", || {
            format!(
                "{} heads of {kd}/{vd}, q [{n}, {}], out [{}, {}]",
                a.heads,
                a.q.cols(),
                out.rows(),
                out.cols()
            )
        })?;
        Self::check_visible(a.visible, n, a.k.slots(), "attention")?;
        self.check_mass(&mass, n, a.kv_heads, a.k.slots())?;
        self.near("attention", [a.q.place(), a.k.place(), a.v.place(), out.place()])?;
        a.q_sink.map_or(Ok(()), |q| self.near("attention", [q.place()]))?;
        self.0.attention(a, out, mass)
    }

    /// Multi-head latent attention; out `[n, heads * value]`.
    pub fn mla(&self, m: Mla<'_>, out: ViewMut<'_>) -> Result<(), KernelError> {
        self.mla_mass(m, out, None)
    }

    /// [`Device::mla`], which also adds up attention mass where asked; errors as [`Device::attention_mass`].
    pub fn mla_mass(&self, m: Mla<'_>, out: ViewMut<'_>, mass: Option<Mass<'_>>) -> Result<(), KernelError> {
        let (h, n, c) = (m.heads, m.q.rows(), m.latent.width());
        let up = match m.up {
            MlaUp::Split { k_b, v_b } => {
                let k = k_b.count() == h && k_b.rows() == c && k_b.cols() == m.nope;
                k && v_b.count() == h && v_b.rows() == m.value && v_b.cols() == c
            }
            MlaUp::Joint { kv_b } => {
                kv_b.count() == 1 && kv_b.rows() == h * (m.nope + m.value) && kv_b.cols() == c
            }
        };
        let q2 = m.q_sink.is_none_or(|s| s.rows() == n && s.cols() == m.q.cols());
        let q = m.q.cols() == h * (m.nope + m.rope)
            && m.k_pe.width() == m.rope
            && m.k_pe.slots() == m.latent.slots();
        shape(h > 0 && up && q && q2 && out.rows() == n && out.cols() == h * m.value, "mla", || {
            let dims = format!("nope {}, rope {}, value {}, latent {c}", m.nope, m.rope, m.value);
            format!("{h} heads, {dims}, q [{n}, {}], out [{}, {}]", m.q.cols(), out.rows(), out.cols())
        })?;
        Self::check_visible(m.visible, n, m.latent.slots(), "mla")?;
        self.check_mass(&mass, n, 1, m.latent.slots())?;
        let (a, b) = match m.up {
            MlaUp::Split { k_b, v_b } => (k_b.place(), v_b.place()),
            MlaUp::Joint { kv_b } => (kv_b.place(), kv_b.place()),
        };
        self.near("mla", [a, b, m.q.place(), m.latent.place(), m.k_pe.place(), out.place()])?;
        m.q_sink.map_or(Ok(()), |q| self.near("mla", [q.place()]))?;
        self.0.mla(m, out, mass)
    }
}
