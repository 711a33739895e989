//! Kernels alone, each launched over and over behind one another: matrix-vector products of every format against the bandwidth, products with
//! many columns, attention of a decoded token and of a prompt, MLA at the shapes of DeepSeek-V3. Launches are those that the backend makes.

use super::row::{Bar, Row};
use super::timed::{Call, Timed};
use super::yardstick::Peaks;
use crate::synth::Blocks;
use anyhow::{Context as _, Result};
use kernels::cuda::{CudaBackend, layout};
use kernels::testing::Rng;
use kernels::*;
use quant::{DType, FORMATS};

/// More than any second-level cache holds, so that weights come from memory.
const BEYOND_CACHES: usize = 256 << 20;

/// A GPU and what it can do.
pub struct Bench {
    /// The GPU.
    pub gpu: Timed,
    /// Its operations.
    pub dev: Device,
    /// What it can do at most.
    pub peaks: Peaks,
    /// Sizes for an interpreter.
    pub toy: bool,
}

/// The modules that attention is made of are all but these.
const NOT_ATTENTION: [&str; 7] = ["matvec", "matmul", "round", "rows", "router", "cache", "store"];

fn attention_only(calls: Vec<Call>) -> Vec<Call> {
    let other = |c: &Call| NOT_ATTENTION.iter().any(|m| c.kernel.starts_with(m));
    calls.into_iter().filter(|c| !other(c)).collect()
}

/// The kernels, each once, and how often.
fn names(calls: &[Call]) -> String {
    let mut all: Vec<(&str, usize)> = Vec::new();
    for c in calls {
        match all.iter_mut().find(|a| a.0 == c.kernel) {
            Some(a) => a.1 += 1,
            None => all.push((&c.kernel, 1)),
        }
    }
    let each = |&(name, n): &(&str, usize)| if n == 1 { name.to_owned() } else { format!("{n} {name}") };
    all.iter().map(each).collect::<Vec<_>>().join(", ")
}

fn values(n: usize) -> Vec<f32> {
    let mut rng = Rng(3);
    (0..n).map(|_| rng.unit()).collect()
}

/// Each row sees entries of its own, `depth` of them; of a prompt, row i the first i + 1.
fn visible(rows: usize, depth: usize, prompt: bool) -> Visible {
    let mut v = Visible::default();
    v.set_prompt(if prompt { rows } else { 0 });
    for i in 0..rows {
        let (start, len) = if prompt { (0, i + 1) } else { (i * depth, depth) };
        v.push([Span { start: start as u32, len: len as u32, sink: false }]);
    }
    v
}

impl Bench {
    /// On a GPU.
    ///
    /// # Errors
    /// The backend's.
    pub fn new(gpu: Timed, peaks: Peaks, toy: bool) -> Result<Self> {
        let dev = Device::new(CudaBackend::new(Box::new(gpu.clone()), "cuda")?);
        Ok(Self { gpu, dev, peaks, toy })
    }

    fn buf(&self, rows: usize, cols: usize) -> Result<Buf> {
        let mut b = self.dev.alloc(rows, cols)?;
        let x = values(cols);
        self.dev.write(b.view_mut(rows), &x.repeat(rows))?;
        Ok(b)
    }

    /// A cache whose rows are all alike.
    fn cache(&self, dtype: DType, slots: usize, width: usize) -> Result<KvBuf> {
        let mut c = self.dev.alloc_kv(dtype, slots, width)?;
        let some = slots.min(4096);
        // Lists of that many slots, more than the rows that are timed may need.
        self.dev.reserve(&Limits { tokens: some, ..Limits::default() })?;
        let x = self.buf(some, width)?;
        for first in (0..slots).step_by(some) {
            let ids: Vec<u32> = (first..slots.min(first + some)).map(|s| s as u32).collect();
            self.dev.kv_write(x.view(ids.len()), &mut c, &ids)?;
        }
        Ok(c)
    }

    /// Copies of a random matrix on the device, as many as no cache holds.
    fn matrices(&self, dtype: DType, rows: usize, cols: usize, most: usize) -> Result<Vec<Weight>> {
        let mut bytes = vec![0; rows * dtype.row_bytes(cols)?];
        match Blocks::new(dtype) {
            Some(b) => b.fill(0.0, 0.02, &mut Rng(1), &mut bytes),
            None => {
                bytes =
                    kernels::testing::weights(dtype, rows, cols, kernels::testing::Fill::Random, &mut Rng(1))
            }
        }
        let bytes = HostBytes::from_vec(bytes);
        let n = BEYOND_CACHES.div_ceil(bytes.len()).clamp(1, most);
        let one = || Ok(self.dev.upload(Weight::host(dtype, 1, rows, cols, bytes.clone())?)?);
        (0..n).map(|_| one()).collect()
    }

    /// Matrix-vector products of every format, for one column and eight: a feed-forward matrix of Llama-3.1-8B.
    ///
    /// # Errors
    /// What keeps all from being measured; what keeps one is its row.
    pub fn matvec(&self, row: &mut dyn FnMut(Row)) -> Result<()> {
        for f in FORMATS {
            for columns in [1, 8] {
                let name = format!("{} x {columns}", f.name);
                let one = self.products(f.dtype, columns, 16).map(|(seconds, bytes, _)| {
                    let (rate, share) = (bytes / seconds, bytes / seconds / self.peaks.copied);
                    Row::new(
                        "matrix-vector",
                        &name,
                        rate / 1e9,
                        "GB/s",
                        format!("{:.0}% of copying", 100.0 * share),
                    )
                });
                row(one.unwrap_or_else(|e| Row::failed("matrix-vector", name, format!("{e:#}"))));
            }
        }
        Ok(())
    }

    /// Products with 2048 columns, a prompt's, and with 32, of as many sequences.
    ///
    /// # Errors
    /// As [`Bench::matvec`].
    pub fn matmul(&self, row: &mut dyn FnMut(Row)) -> Result<()> {
        let many = if self.toy { 33 } else { 2048 };
        for f in FORMATS {
            for columns in [many, 32] {
                let name = format!("{} x {columns}", f.name);
                let one = self.products(f.dtype, columns, 1).map(|(seconds, _, operations)| {
                    let rate = operations / seconds;
                    let int8 = layout::rounds(f.dtype) && columns == 32;
                    let peak = if int8 { self.peaks.s8 } else { self.peaks.f16 };
                    let note = format!("{:.0}% of the mma peak", 100.0 * rate / peak);
                    Row::new("matrix-matrix", &name, rate / 1e12, "TFLOP/s", note)
                });
                row(one.unwrap_or_else(|e| Row::failed("matrix-matrix", name, format!("{e:#}"))));
            }
        }
        Ok(())
    }

    /// Seconds, bytes of weights and operations of one product.
    fn products(&self, dtype: DType, columns: usize, most: usize) -> Result<(f64, f64, f64)> {
        let (rows, cols) = if self.toy { (64, 256) } else { (14_336, 4096) };
        let weights = self.matrices(dtype, rows, cols, if self.toy { 2 } else { most })?;
        let x = self.buf(columns, cols)?;
        let mut out = self.dev.alloc(columns, rows)?;
        let mut limits = Limits { tokens: columns, ..Limits::default() };
        limits.product(&weights[0]);
        self.dev.reserve(&limits)?;
        let prompts = vec![if columns > 32 { columns as u32 } else { 0 }; columns];
        let dev = self.dev.for_rows(&prompts);
        let calls = self.gpu.note(|| {
            weights.iter().try_for_each(|w| dev.linear(w, x.view(columns), out.view_mut(columns), Write::Set))
        })?;
        let rounding = |c: &Call| c.kernel.starts_with("round");
        let calls: Vec<Call> = calls.into_iter().filter(|c| !rounding(c)).collect();
        let each = self.gpu.seconds(&calls, self.toy)? / weights.len() as f64;
        let bytes = rows * layout::row_bytes(dtype, cols);
        Ok((each, bytes as f64, 2.0 * (rows * cols * columns) as f64))
    }

    /// Grouped attention at the shape of Llama-3.1-8B: tokens decoded at depth, and a prompt.
    ///
    /// # Errors
    /// As [`Bench::matvec`].
    pub fn attention(&self, row: &mut dyn FnMut(Row)) -> Result<()> {
        let (decoded, prompts): (&[(usize, usize)], &[usize]) = if self.toy {
            (&[(1, 70)], &[20])
        } else {
            (&[(1, 4096), (1, 32_768), (8, 4096)], &[2048, 8192])
        };
        for dtype in [DType::F16, DType::Q8_0] {
            for &(rows, depth) in decoded {
                let name = format!("decoding, {dtype}, {rows} at {depth}");
                let one = self.grouped(dtype, rows, depth, false).map(|(seconds, bytes, _, kernels)| {
                    let share = 100.0 * bytes / seconds / self.peaks.copied;
                    Row::new(
                        "attention",
                        &name,
                        seconds * 1e6,
                        "us",
                        format!("{share:.0}% of copying; {kernels}"),
                    )
                });
                row(one.unwrap_or_else(|e| Row::failed("attention", name, format!("{e:#}"))));
            }
            for &n in prompts {
                let name = format!("prompt, {dtype}, {n}");
                let one = self.grouped(dtype, n, n, true).map(|(seconds, _, operations, kernels)| {
                    let rate = operations / seconds / 1e12;
                    Row::new("attention", &name, rate, "TFLOP/s", kernels)
                });
                row(one.unwrap_or_else(|e| Row::failed("attention", name, format!("{e:#}"))));
            }
        }
        Ok(())
    }

    fn grouped(
        &self,
        dtype: DType,
        rows: usize,
        depth: usize,
        prompt: bool,
    ) -> Result<(f64, f64, f64, String)> {
        let (heads, kv_heads, head) = if self.toy { (4, 2, 32) } else { (32, 8, 128) };
        let v = visible(rows, depth, prompt);
        let slots = if prompt { rows } else { rows * depth };
        let (k, values) =
            (self.cache(dtype, slots, kv_heads * head)?, self.cache(dtype, slots, kv_heads * head)?);
        let q = self.buf(rows, heads * head)?;
        let mut out = self.dev.alloc(rows, heads * head)?;
        self.reserve(rows, depth, heads, head, 0)?;
        let scale = 1.0 / (head as f32).sqrt();
        let a = Attention {
            heads,
            kv_heads,
            scale,
            q: q.view(rows),
            q_sink: None,
            k: &k,
            v: &values,
            visible: &v,
        };
        let calls = attention_only(self.gpu.note(|| self.dev.attention(a, out.view_mut(rows)))?);
        let seconds = self.gpu.seconds(&calls, self.toy)?;
        let seen: usize = (0..rows).map(|i| v.seen(i)).sum();
        let bytes = (k.bytes() + values.bytes()) as f64;
        Ok((seconds, bytes, 4.0 * (seen * heads * head) as f64, names(&calls)))
    }

    /// Room for attention, of latents or not.
    fn reserve(&self, rows: usize, slots: usize, heads: usize, value: usize, latent: usize) -> Result<()> {
        let wide = heads * value.max(latent);
        let (max_in, max_out) = (heads * 192, heads * 192);
        let limits = Limits {
            tokens: rows,
            max_in,
            max_out,
            min_row_bytes: 64,
            max_heads_out: wide,
            latent,
            slots,
            heads,
            ..Limits::default()
        };
        Ok(self.dev.reserve(&limits)?)
    }

    /// Absorbed MLA at the shapes of DeepSeek-V3 (128 heads, latents of 512 and keys of 64), decoding.
    ///
    /// # Errors
    /// As [`Bench::matvec`].
    pub fn mla(&self, row: &mut dyn FnMut(Row)) -> Result<()> {
        let (batches, depths): (&[usize], &[usize]) =
            if self.toy { (&[1], &[70]) } else { (&[1, 8, 64], &[4096, 16_384, 65_536]) };
        for &depth in depths {
            for &batch in batches {
                let name = format!("{batch} at {depth}");
                let one = self.latent(batch, depth).map(|(seconds, bytes, operations, kernels)| {
                    let (read, done) = (bytes / seconds, operations / seconds);
                    let (of_read, of_mma) = (read / self.peaks.copied, done / self.peaks.f16);
                    let note = format!(
                        "{:.0}% of copying, {:.1} TFLOP/s, {:.0}% of the mma peak; {kernels}",
                        100.0 * of_read,
                        done / 1e12,
                        100.0 * of_mma
                    );
                    let reached = (of_read / 0.6).max(of_mma / 0.4);
                    let bar = Bar::least("60% of copying or 40% of the mma peak", reached, 1.0);
                    Row::new("MLA decoding, 128 heads, f16", &name, seconds * 1e6, "us", note).bar(bar)
                });
                row(one
                    .unwrap_or_else(|e| Row::failed("MLA decoding, 128 heads, f16", name, format!("{e:#}"))));
            }
        }
        Ok(())
    }

    fn latent(&self, rows: usize, depth: usize) -> Result<(f64, f64, f64, String)> {
        let (heads, latent, nope, rope, value) =
            if self.toy { (8, 64, 32, 32, 32) } else { (128, 512, 128, 64, 128) };
        let slots = rows * depth;
        let (c, k_pe) = (self.cache(DType::F16, slots, latent)?, self.cache(DType::F16, slots, rope)?);
        let stack = |rows: usize, cols: usize| -> Result<Weight> {
            let bytes = vec![0; heads * rows * DType::Q8_0.row_bytes(cols)?];
            Ok(self.dev.upload(Weight::host(DType::Q8_0, heads, rows, cols, HostBytes::from_vec(bytes))?)?)
        };
        let (k_b, v_b) = (stack(latent, nope)?, stack(value, latent)?);
        let q = self.buf(rows, heads * (nope + rope))?;
        let mut out = self.dev.alloc(rows, heads * value)?;
        self.reserve(rows, depth, heads, value, latent).context("working memory")?;
        let visible = visible(rows, depth, false);
        let m = Mla {
            heads,
            nope,
            rope,
            value,
            scale: 0.1,
            q: q.view(rows),
            q_sink: None,
            latent: &c,
            k_pe: &k_pe,
            up: MlaUp::Split { k_b: &k_b, v_b: &v_b },
            visible: &visible,
        };
        let calls = attention_only(self.gpu.note(|| self.dev.mla(m, out.view_mut(rows)))?);
        let seconds = self.gpu.seconds(&calls, self.toy)?;
        let operations = 2.0 * (rows * depth * heads) as f64 * (2 * latent + rope) as f64;
        Ok((seconds, (c.bytes() + k_pe.bytes()) as f64, operations, names(&calls)))
    }
}
