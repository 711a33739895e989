//! Weights times the rows of prompts on f16 tensor cores: against f64, and closer against f64 of the rounded weights and
//! activations, on a machine that cuts what tensor cores cut. What a column gets depends neither on its neighbours nor on the entry point.

use crate::matmul::sorted;
use crate::matvec::packed;
use crate::{Gpu, n, p};
use half::f16;
use kernels::cuda::layout::{blocks, has_power, power, row_bytes};
use kernels::cuda::modules::{module, text_for};
use kernels::testing::{Fill, Rng, assert_bits, assert_close, weights};
use ptx::Param;
use quant::{DType, FORMATS};

/// Of the sum of magnitudes: weights and activations are each rounded to 2^-11.
const BAR: f32 = 1e-3;
/// The same of the rounded ones: what sums in place lose over rows of up to 1024.
const SUMS: f32 = 3e-5;

/// An entry point: name, features and columns of a block, threads.
#[derive(Clone, Copy)]
struct Entry(&'static str, usize, usize, u32);

const LARGE: Entry = Entry("matmul_256", 128, 256, 256);
const MIDDLE: Entry = Entry("matmul_128", 128, 128, 256);
const SMALL: Entry = Entry("matmul_32", 64, 32, 128);

/// A weight's format and shape, its GGUF bytes.
struct Matrix {
    dtype: DType,
    rows: usize,
    cols: usize,
    host: Vec<u8>,
}

impl Matrix {
    fn new(dtype: DType, rows: usize, cols: usize, fill: Fill, rng: &mut Rng) -> Self {
        Self { dtype, rows, cols, host: weights(dtype, rows, cols, fill, rng) }
    }

    fn host_row(&self, r: usize) -> &[u8] {
        let row = self.dtype.row_bytes(self.cols).unwrap();
        &self.host[r * row..][..row]
    }

    fn values(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        (self.dtype.format().dequantize)(&self.host, &mut out);
        out
    }

    /// Of each row; none of F16.
    fn powers(&self) -> Vec<f32> {
        let rows = 0..if has_power(self.dtype) { self.rows } else { 0 };
        rows.map(|r| power(self.dtype, self.host_row(r))).collect()
    }

    /// As the kernel rounds them.
    fn rounded(&self) -> Vec<f64> {
        let (values, powers) = (self.values(), self.powers());
        let all = values.chunks_exact(self.cols).zip(powers.into_iter().chain(std::iter::repeat(1.0)));
        all.flat_map(|(row, p)| row.iter().map(move |v| f16::from_f32(v * p).to_f64() / f64::from(p)))
            .collect()
    }

    /// On the device: rows and their powers.
    fn upload(&self, gpu: &mut Gpu) -> (u64, u64) {
        let powers = if has_power(self.dtype) { gpu.floats(&self.powers()) } else { 0 };
        (gpu.bytes(&packed(self.dtype, self.cols, &self.host)), powers)
    }
}

/// Rows of x in f16: address, bytes of a row, scales.
#[derive(Clone, Copy)]
struct Rows(u64, usize, u64);

/// Rounds x by the kernel, in a module of its own, and brings it here.
fn half_rows(gpu: &mut Gpu, x: &[f32], len: usize) -> (Rows, Vec<f64>) {
    let (rows, stride) = (x.len() / len, 64 * len.div_ceil(32));
    let mut other = Gpu::new(module("round").unwrap());
    let (dx, out, scales) = (other.floats(x), other.machine.alloc(rows * stride), other.room(rows));
    let threads = len.div_ceil(4).next_multiple_of(32).min(256) as u32;
    other.run("half_rows", [rows, 1], threads, &[p(dx), n(len), n(len), p(out), n(stride), p(scales)]);
    let (bytes, undo) = (other.machine.read(out, rows * stride).unwrap(), other.read(scales, rows));
    let values = bytes.chunks_exact(stride).zip(&undo).flat_map(|(row, s)| {
        let halves = row.chunks_exact(2).take(len).map(|b| f16::from_le_bytes([b[0], b[1]]));
        halves.map(|h| h.to_f64() * f64::from(*s)).collect::<Vec<_>>()
    });
    (Rows(gpu.bytes(&bytes), stride, gpu.floats(&undo)), values.collect())
}

/// What else a product is of.
#[derive(Clone, Copy)]
struct Job {
    columns: usize,
    matrix_rows: usize,
    /// Order, list of tiles, its length.
    grouped: (u64, u64, usize),
    share: usize,
    up: (u64, u64),
    act: usize,
    bias: u64,
    add: bool,
}

impl Job {
    fn of(columns: usize) -> Self {
        Self {
            columns,
            matrix_rows: 0,
            grouped: (0, 0, 0),
            share: 1,
            up: (0, 0),
            act: 0,
            bias: 0,
            add: false,
        }
    }
}

fn run(gpu: &mut Gpu, entry: Entry, m: &Matrix, w: (u64, u64), x: Rows, j: Job, out: u64) {
    let Entry(name, features, columns, threads) = entry;
    let rows = if j.matrix_rows == 0 { m.rows } else { j.matrix_rows };
    let made = if j.up.0 == 0 { features } else { features / 2 };
    let params: [Param; 20] = [
        p(w.0),
        p(row_bytes(m.dtype, m.cols) as u64),
        n(rows),
        n(rows),
        n(blocks(m.dtype, m.cols)),
        p(w.1),
        p(j.up.1),
        p(x.0),
        n(x.1),
        p(x.2),
        n(j.columns),
        p(j.grouped.0),
        p(j.grouped.1),
        n(j.share),
        p(j.up.0),
        n(j.act),
        p(j.bias),
        p(out),
        n(rows),
        n(usize::from(j.add)),
    ];
    let tiles = if j.grouped.1 == 0 { j.columns.div_ceil(columns) } else { j.grouped.2 };
    let shared = 256 * (features + columns);
    gpu.run_shared(name, [tiles, rows.div_ceil(made), 1], threads, shared / 4, &params);
}

fn gpu_of(dtype: DType) -> Gpu {
    let name = format!("matmul_half_{}", dtype.name().to_ascii_lowercase());
    assert!(text_for(&name, 75).is_none(), "Turing takes other kernels");
    Gpu::new(text_for(&name, 80).unwrap())
}

/// `W x` in f64, and the sum of magnitudes: of row r of w and row c of x.
fn exact(w: &[f64], x: &[f64], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let all = x.chunks_exact(cols).flat_map(|x| {
        w.chunks_exact(cols).map(move |w| {
            let products = w.iter().zip(x).map(|(w, x)| w * x);
            products.fold((0.0, 0.0), |(s, m), y| (s + y, m + y.abs()))
        })
    });
    all.unzip()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// A block's shared memory, its own and what it is launched with, is what every GPU since Ampere gives one.
#[test]
fn blocks_fit_every_gpu() {
    for f in FORMATS.iter().filter(|f| f.dtype != DType::F32) {
        let text = text_for(&format!("matmul_half_{}", f.name.to_ascii_lowercase()), 80).unwrap();
        let module = ptx::Module::parse(text.text).unwrap();
        for Entry(name, features, columns, _) in [LARGE, MIDDLE, SMALL] {
            let kernel = module.kernel(name).unwrap();
            let bytes = kernel.shared_bytes() + 256 * (features + columns);
            assert!(bytes <= 99 << 10, "{}, {name}: {bytes} bytes", f.name);
        }
    }
}

#[test]
fn rows_are_rounded_once() {
    for (i, len) in [1, 31, 33, 64, 70, 700].into_iter().enumerate() {
        let mut x = Rng(i as u64).activations(3 * len);
        let factor = [1.0, 1e-3, 1e30, 1e-29, 2e-44, 3e37][i];
        x.iter_mut().for_each(|v| *v *= factor);
        if i == 3 {
            (x[0], x[1], x[len]) = (f32::INFINITY, f32::NAN, -f32::INFINITY);
        }
        let (_, got) = half_rows(&mut Gpu::new(module("rows").unwrap()), &x, len);
        for (r, (got, x)) in got.chunks_exact(len).zip(x.chunks_exact(len)).enumerate() {
            let most = x.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
            for (g, v) in got.iter().zip(wide(x)) {
                let bar = 0.5f64.powi(11) * v.abs() + 0.5f64.powi(38) * most + 1e-40;
                let same = if v.is_finite() { (g - v).abs() <= bar } else { g.is_nan() == v.is_nan() };
                assert!(same, "{len} values by {factor:e}, row {r}: {g:e} of {v:e}");
            }
        }
    }
}

/// One product on some entry points: bits equal, and close to f64.
fn check(m: &Matrix, columns: usize, entries: &[Entry], seed: u64) {
    let mut rng = Rng(seed);
    let x = rng.activations(columns * m.cols);
    let bias: Vec<f32> = (0..m.rows).map(|_| rng.unit()).collect();
    let before: Vec<f32> = (0..columns * m.rows).map(|_| rng.unit()).collect();
    let (add, biased) = (seed.is_multiple_of(2), !seed.is_multiple_of(3));
    let mut gpu = gpu_of(m.dtype);
    let (rows, x_rounded) = half_rows(&mut gpu, &x, m.cols);
    let w = m.upload(&mut gpu);
    let db = if biased { gpu.floats(&bias) } else { 0 };
    let what = || format!("{} [{}, {}] x {columns}", m.dtype, m.rows, m.cols);
    let all: Vec<Vec<f32>> = entries
        .iter()
        .map(|e| {
            let out = gpu.floats(&before);
            run(&mut gpu, *e, m, w, rows, Job { bias: db, add, ..Job::of(columns) }, out);
            gpu.read(out, columns * m.rows)
        })
        .collect();
    for (got, e) in all.iter().zip(entries) {
        assert_bits(got, &all[0], || format!("{}: {} and {}", what(), e.0, entries[0].0));
    }
    for (w, x, bar) in [(wide(&m.values()), wide(&x), BAR), (m.rounded(), x_rounded, SUMS)] {
        let (mut want, mut scale) = exact(&w, &x, m.cols);
        for (i, (y, s)) in want.iter_mut().zip(&mut scale).enumerate() {
            let more = [(biased, bias[i % m.rows]), (add, before[i])];
            for v in more.into_iter().filter(|m| m.0).map(|m| f64::from(m.1)) {
                (*y, *s) = (*y + v, *s + v.abs());
            }
        }
        assert_close(&all[0], &want, &scale, bar, || format!("{}, bar {bar:e}", what()));
    }
    // The last column alone.
    let out = gpu.floats(&before[(columns - 1) * m.rows..]);
    let (one, _) = half_rows(&mut gpu, &x[(columns - 1) * m.cols..], m.cols);
    run(&mut gpu, SMALL, m, w, one, Job { bias: db, add, ..Job::of(1) }, out);
    assert_bits(&gpu.read(out, m.rows), &all[0][(columns - 1) * m.rows..], || format!("{}: alone", what()));
}

/// What is asked of an entry point of Q4_K's with one thing wrong.
pub(crate) fn suite(name: &str) {
    let entry = [SMALL, MIDDLE, LARGE].into_iter().find(|e| e.0 == name).unwrap();
    let (dtype, rng) = (DType::Q4_K, &mut Rng(1));
    check(&Matrix::new(dtype, 5, 256, Fill::Even, rng), 3, &[entry], 1);
    // Several blocks of features and of columns, the last of which are not whole.
    let cols = if name == SMALL.0 { 768 } else { 256 };
    check(&Matrix::new(dtype, entry.1 + 9, cols, Fill::Random, rng), entry.2 + 3, &[entry], 2);
    if name == SMALL.0 {
        layer_of_experts(dtype, entry, 23, 1);
    }
}

/// Every format, at rows of one block, of stages that end halfway, and of several groups.
#[test]
fn products_of_every_format_are_close_to_f64() {
    for (i, f) in FORMATS.iter().filter(|f| f.dtype != DType::F32).enumerate() {
        let lengths = match f.block_len {
            1 => [33, 520],
            32 => [1, 11],
            _ => [1, 3],
        };
        for (k, blocks) in lengths.into_iter().enumerate() {
            let (rows, columns) = [(5, 3), (66, 35)][k];
            let fill = [Fill::Even, Fill::Extreme, Fill::Random][(i + k) % 3];
            let m = Matrix::new(f.dtype, rows, blocks * f.block_len, fill, &mut Rng(i as u64));
            check(&m, columns, &[SMALL, MIDDLE], (i + k) as u64);
        }
    }
}

/// Partial blocks of features and columns of all sizes.
#[test]
fn blocks_of_all_sizes_give_the_same_bits() {
    for (i, (dtype, rows, cols, columns)) in [
        (DType::Q8_0, 131, 96, 130),
        (DType::Q4_0, 128, 96, 257),
        (DType::Q6_K, 1, 256, 65),
        (DType::F16, 130, 130, 257),
        (DType::F16, 65, 1, 1),
        (DType::BF16, 129, 100, 129),
        (DType::BF16, 31, 9, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let m = Matrix::new(dtype, rows, cols, Fill::Even, &mut Rng(7));
        check(&m, columns, &[LARGE, MIDDLE, SMALL], i as u64);
    }
}

/// Weights of any size: each row has a power of two of its own. What is not finite stays in its row.
#[test]
fn no_finite_weight_is_lost() {
    for dtype in [DType::Q4_K, DType::Q8_0, DType::Q8_K, DType::MXFP4, DType::Q6_K, DType::F16, DType::BF16] {
        let (rows, columns) = (6, 2);
        let mut m = Matrix::new(dtype, rows, 256, Fill::Even, &mut Rng(3));
        let row = m.host.len() / rows;
        let block = dtype.format().block_bytes;
        // The scale of row r: from the smallest that there is to the largest.
        let at = if dtype == DType::Q6_K { 208 } else { 0 };
        for (r, bytes) in m.host.chunks_exact_mut(row).enumerate() {
            for b in bytes.chunks_exact_mut(block) {
                let half = [1, 0x0400, 0x1400, 0x3c00, 0x7bff, 0x7e00u16][r].to_le_bytes();
                match dtype {
                    // The value itself, of either sign.
                    DType::F16 => [b[0], b[1]] = [half[0], half[1] | b[1] & 0x80],
                    DType::BF16 => {
                        let bits = [1, 0x0080, 0x3f81, 0x6000, 0x7d7f, 0x7fc0u16][r].to_le_bytes();
                        [b[0], b[1]] = [bits[0], bits[1] | b[1] & 0x80];
                    }
                    DType::Q8_K => {
                        let d = [1e-44f32, 1e-30, 1e-6, 1e4, 1e30, f32::NAN][r];
                        b[..4].copy_from_slice(&d.to_le_bytes());
                    }
                    DType::MXFP4 => b[0] = [0, 1, 2, 127, 200, 228][r],
                    DType::Q4_K => [b[0], b[1], b[2], b[3]] = [half[0], half[1], half[0], half[1]],
                    _ => b[at..at + 2].copy_from_slice(&half),
                }
            }
        }
        let mut gpu = gpu_of(dtype);
        let x = Rng(4).activations(columns * m.cols);
        let (x_rows, _) = half_rows(&mut gpu, &x, m.cols);
        let w = m.upload(&mut gpu);
        let out = gpu.room(columns * rows);
        run(&mut gpu, SMALL, &m, w, x_rows, Job::of(columns), out);
        let got = gpu.read(out, columns * rows);
        let (want, scale) = exact(&wide(&m.values()), &wide(&x), m.cols);
        for (i, g) in got.iter().enumerate() {
            if want[i].is_nan() {
                assert!(g.is_nan() && i % rows == rows - 1, "{dtype}, row {}: {g}", i % rows);
                continue;
            }
            // Below, f32 itself ends.
            let error = (f64::from(*g) - want[i]).abs();
            assert!(
                error <= f64::from(BAR) * scale[i] + 1e-44,
                "{dtype}, row {}: {g:e} of {:e}",
                i % rows,
                want[i]
            );
        }
    }
}

/// Of BF16 every value is what it is, down to 2^-30 of its row's largest; below, it is off by at most 2^-38 of that.
#[test]
fn bf16_is_exact_within_thirty_binades() {
    let (rows, cols) = (3, 64);
    let mut rng = Rng(5);
    let mut m = Matrix::new(DType::BF16, rows, cols, Fill::Even, &mut rng);
    for (r, row) in m.host.chunks_exact_mut(2 * cols).enumerate() {
        for (i, b) in row.chunks_exact_mut(2).enumerate() {
            let value = half::bf16::from_f32(rng.unit() + rng.unit().signum());
            let size = [0i32, 100, -60][r] - i as i32;
            b.copy_from_slice(&half::bf16::from_f64(value.to_f64() * 2f64.powi(size)).to_le_bytes());
        }
    }
    // A one in each column.
    let x: Vec<f32> = (0..cols * cols).map(|i| f32::from(u8::from(i % (cols + 1) == 0))).collect();
    let mut gpu = gpu_of(m.dtype);
    let (x_rows, _) = half_rows(&mut gpu, &x, cols);
    let (w, out) = (m.upload(&mut gpu), gpu.room(cols * rows));
    run(&mut gpu, SMALL, &m, w, x_rows, Job::of(cols), out);
    let got = gpu.read(out, cols * rows);
    for (r, row) in m.values().chunks_exact(cols).enumerate() {
        let most = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (i, v) in row.iter().enumerate() {
            let (g, bar) =
                (got[i * rows + r], if v.abs() >= most * 0.5f32.powi(30) { 0.0 } else { 0.5f32.powi(38) });
            assert!((g - v).abs() <= bar * most, "row {r}, value {i}: {g:e} of {v:e}");
        }
    }
}

/// Long rows of one sign, where every cut goes the same way, and of both.
#[test]
fn long_rows_stay_within_the_bar() {
    let (rows, cols, columns) = (5, 14336, 3);
    for (dtype, one_sign, bar) in
        [(DType::Q8_0, true, 4e-4), (DType::Q8_0, false, 2e-5), (DType::F16, true, 4e-4)]
    {
        let mut rng = Rng(9);
        let mut m = Matrix::new(dtype, rows, cols, Fill::Random, &mut rng);
        for b in m.host.chunks_exact_mut(dtype.format().block_bytes) {
            if dtype == DType::F16 {
                b.copy_from_slice(&f16::from_f32(0.5 + 0.5 * rng.unit().abs()).to_le_bytes());
                continue;
            }
            b[..2].copy_from_slice(&f16::from_f32(0.01).to_le_bytes());
            b[2..].iter_mut().filter(|_| one_sign).for_each(|q| *q = *q & 0x7f | 0x40);
        }
        let unit = |rng: &mut Rng| if one_sign { 0.5 + 0.5 * rng.unit().abs() } else { rng.unit() };
        let x: Vec<f32> = (0..columns * cols).map(|_| unit(&mut rng)).collect();
        let mut gpu = gpu_of(m.dtype);
        let (x_rows, _) = half_rows(&mut gpu, &x, cols);
        let w = m.upload(&mut gpu);
        let out = gpu.room(columns * rows);
        run(&mut gpu, SMALL, &m, w, x_rows, Job::of(columns), out);
        let (want, scale) = exact(&wide(&m.values()), &wide(&x), cols);
        let got = gpu.read(out, columns * rows);
        let errors = got.iter().zip(want.iter().zip(&scale)).map(|(g, (w, s))| (f64::from(*g) - w).abs() / s);
        println!("{dtype}, one sign: {one_sign}: {:.1e} of the sum", errors.fold(0.0, f64::max));
        assert_close(&got, &want, &scale, bar, || format!("{dtype}, one sign: {one_sign}"));
    }
}

#[test]
fn experts_and_gates() {
    for (act, (dtype, entry, tokens)) in [
        (DType::Q4_K, SMALL, 23),
        (DType::Q8_0, MIDDLE, 75),
        (DType::Q2_K, SMALL, 9),
        (DType::BF16, MIDDLE, 75),
        (DType::F16, SMALL, 23),
    ]
    .into_iter()
    .enumerate()
    {
        layer_of_experts(dtype, entry, tokens, act % 2);
    }
}

/// A layer of experts: gate and up with the activation between them, in one launch for all experts; and one matrix of each.
fn layer_of_experts(dtype: DType, entry: Entry, tokens: usize, act: usize) {
    let (experts, used, d, hidden) = (4, 2, 256, 70);
    let mut rng = Rng(31);
    let mut ids: Vec<u32> = (0..tokens * used).map(|_| (rng.bits() % experts as u64) as u32).collect();
    // One expert with more than a tile, one without any job, one with one at least.
    let many = if entry.2 == 128 { 133 } else { 34.min(tokens) };
    ids.iter_mut().enumerate().for_each(|(i, e)| *e = if i < many || *e == 3 { 1 } else { *e });
    ids[tokens * used - 1] = 0;
    let (order, tiles) = sorted(&ids, entry.2, experts);
    let [gate, up] = [0, 1].map(|_| Matrix::new(dtype, experts * hidden, d, Fill::Even, &mut rng));
    let x = rng.activations(tokens * d);
    let mut gpu = gpu_of(dtype);
    let (x_rows, _) = half_rows(&mut gpu, &x, d);
    let [dg, du] = [&gate, &up].map(|m| m.upload(&mut gpu));
    let grouped = (gpu.words(&order), gpu.words(&tiles), tiles.len() / 3);
    let by = |up| Job { matrix_rows: hidden, grouped, share: used, up, act, ..Job::of(ids.len()) };
    let [gated, gate_alone, up_alone] = [(dg, du), (dg, (0, 0)), (du, (0, 0))].map(|(w, up)| {
        let out = gpu.room(ids.len() * hidden);
        run(&mut gpu, entry, &gate, w, x_rows, by(up), out);
        gpu.read(out, ids.len() * hidden)
    });
    let (all, scale) = exact(&wide(&gate.values()), &wide(&x), d);
    for (j, e) in ids.iter().enumerate() {
        let at = (j / used * experts + *e as usize) * hidden;
        let of = |v: &[f64]| v[at..at + hidden].to_vec();
        let what = || format!("{dtype}, job {j}");
        assert_close(&gate_alone[j * hidden..][..hidden], &of(&all), &of(&scale), BAR, what);
    }
    let mut plain = Gpu::new(module("rows").unwrap());
    let (a, b, len) = (plain.floats(&gate_alone), plain.floats(&up_alone), gated.len());
    plain.run("glu", [len.div_ceil(256), 1], 256, &[p(a), n(len), p(b), n(len), n(len), n(act)]);
    assert_bits(&gated, &plain.read(a, len), || format!("{dtype}: gate and up at once"));
    // Without experts, on blocks of the other sizes.
    let first = ids.iter().position(|e| *e == 0).unwrap();
    for e in [LARGE, MIDDLE, SMALL] {
        let out = gpu.room(tokens * hidden);
        run(
            &mut gpu,
            e,
            &gate,
            dg,
            x_rows,
            Job { grouped: (0, 0, 0), columns: tokens, share: 1, ..by(du) },
            out,
        );
        let got = gpu.read(out, tokens * hidden);
        assert_bits(&gated[first * hidden..][..hidden], &got[first / used * hidden..][..hidden], || {
            e.0.into()
        });
    }
}
