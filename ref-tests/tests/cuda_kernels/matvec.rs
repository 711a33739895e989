//! Weights of every format times one row, floats up to eight; rows of embedding tables; rounding of activations.

use crate::matmul::gated;
use crate::{Gpu, n, p, without_a_wait};
use kernels::cpu::Pool;
use kernels::cpu::isa::Isa;
use kernels::cpu::matmul::{Input, multiply_with};
use kernels::cpu::quantized::{Block, Quantized};
use kernels::cuda::layout::{blocks, pack_row, row_bytes};
use kernels::cuda::modules::{module, name_of, of_format, text_for};
use kernels::testing::{Fill, Rng, assert_bits, lengths, weights};
use kernels::{HostBytes, Vector, View, ViewMut, Weight, Write};
use ptx::{Fault, Param, PtxError};
use quant::{DType, FORMATS};

pub(crate) fn scalar() -> Isa {
    Isa::named("scalar").unwrap()
}

pub(crate) fn rounds(dtype: DType) -> bool {
    kernels::cpu::table::rounds_activations(dtype)
}

/// Rows as the device holds them.
pub(crate) fn packed(dtype: DType, cols: usize, host: &[u8]) -> Vec<u8> {
    let (from, to) = (dtype.row_bytes(cols).unwrap(), row_bytes(dtype, cols));
    let mut out = vec![0; host.len() / from * to];
    for (src, dst) in host.chunks_exact(from).zip(out.chunks_exact_mut(to)) {
        pack_row(dtype, src, dst);
    }
    out
}

/// A rounded block as `struct Block` of matvec.cu.
fn device_block(b: &Block) -> Vec<u8> {
    let mut out: Vec<u8> = b.q.iter().map(|q| *q as u8).collect();
    let mut float = |x: f32| out.extend(x.to_le_bytes());
    b.scale.iter().chain(&b.sum).for_each(|x| float(*x));
    for i in 0..8 {
        float(b.sum_lo[i]);
        float(b.sum_hi[i]);
    }
    for run in b.q.chunks_exact(16) {
        out.extend(run.iter().map(|q| i32::from(*q)).sum::<i32>().to_le_bytes());
    }
    assert_eq!(out.len(), 448);
    out
}

pub(crate) struct Case {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) columns: usize,
    pub(crate) fill: Fill,
    pub(crate) bias: bool,
    pub(crate) add: bool,
}

/// Inputs on both sides: the weight, x on the host, and x on the device with its stride.
pub(crate) fn input(gpu: &mut Gpu, dtype: DType, cols: usize, x: &[f32]) -> (Quantized, u64, usize) {
    let mut q = Quantized::new();
    if !rounds(dtype) {
        let at = gpu.floats(x);
        return (q, at, cols);
    }
    q.set_with(scalar(), &Pool::new(1), View::from_host(x, cols));
    let bytes: Vec<u8> = (0..q.rows()).flat_map(|i| q.row(i).iter().flat_map(device_block)).collect();
    let at = gpu.bytes(&bytes);
    (q, at, cols.div_ceil(256))
}

/// Host weights, activations, bias and what `out` held before.
pub(crate) fn operands(c: &Case, seed: u64) -> (Vec<u8>, Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut rng = Rng(seed);
    let host = weights(c.dtype, c.rows, c.cols, c.fill, &mut rng);
    let x = rng.activations(c.columns * c.cols);
    let bias = (0..c.rows).map(|_| rng.unit()).collect();
    let before = (0..c.columns * c.rows).map(|_| rng.unit()).collect();
    (host, x, bias, before)
}

/// A product that is not there.
pub(crate) const NONE: [Param; 6] =
    [Param::U64(0), Param::U32(0), Param::U64(0), Param::U64(0), Param::U32(0), Param::U32(0)];

/// Rows of a block for so many columns.
fn rows_of_a_block(columns: usize) -> usize {
    4 * columns.next_power_of_two().div_ceil(2)
}

/// What the kernels of `text` make of a case.
fn device(text: &str, c: &Case, seed: u64) -> Result<Vec<f32>, PtxError> {
    let (host, x, bias, before) = operands(c, seed);
    let mut gpu = Gpu::of_text(text)?;
    let (_, dx, stride) = input(&mut gpu, c.dtype, c.cols, &x);
    let w = gpu.weights(&packed(c.dtype, c.cols, &host));
    let db = if c.bias { gpu.floats(&bias) } else { 0 };
    let out = if c.add { gpu.floats(&before) } else { gpu.room(c.columns * c.rows) };
    let row = row_bytes(c.dtype, c.cols);
    let entry = [1, 2, 4, 8].into_iter().find(|k| *k >= c.columns).unwrap();
    let product = [p(w), n(c.rows), p(db), p(out), n(c.rows), n(usize::from(c.add))];
    let shared = [
        p(row as u64),
        p((row * c.rows) as u64),
        n(blocks(c.dtype, c.cols)),
        p(dx),
        n(stride),
        n(c.columns),
        p(0),
        n(1),
    ];
    let params = [&product[..], &NONE, &NONE, &shared].concat();
    let grid = [c.rows.div_ceil(rows_of_a_block(c.columns)), 1, 1];
    gpu.try_run(&format!("matvec_{entry}"), grid, 128, 0, &params)?;
    gpu.try_read(out, c.columns * c.rows)
}

/// What the scalar kernel makes of it.
pub(crate) fn twin(c: &Case, seed: u64) -> Vec<f32> {
    scalar_product(c, seed, &operands(c, seed).1)
}

/// The same of another x.
fn scalar_product(c: &Case, seed: u64, x: &[f32]) -> Vec<f32> {
    let (host, _, bias, mut out) = operands(c, seed);
    let weight = Weight::host(c.dtype, 1, c.rows, c.cols, HostBytes::from_vec(host)).unwrap();
    let (pool, float) = (Pool::new(1), View::from_host(x, c.cols));
    let mut q = Quantized::new();
    q.set_with(scalar(), &pool, float);
    let input = Input { float, rounded: rounds(c.dtype).then_some(&q).into() };
    let bias = c.bias.then(|| Vector::new(bias));
    let write = if c.add { Write::Add } else { Write::Set };
    let to = ViewMut::from_host(&mut out, c.rows);
    multiply_with(scalar(), &pool, &weight, 0, input, bias.as_ref(), to, write);
    out
}

fn check(c: &Case, seed: u64) {
    let got = device(of_format(c.dtype).text, c, seed).unwrap_or_else(|e| panic!("{e}"));
    assert_bits(&got, &twin(c, seed), || {
        format!("{} [{}, {}] x {}, {:?}", c.dtype, c.rows, c.cols, c.columns, c.fill)
    });
}

/// What is asked of `matvec_1` with one thing wrong.
pub(crate) fn suite(dtype: DType) {
    // Float rows may end anywhere: behind one of each eight that the loop is unrolled to.
    let rest = |n: usize| if rounds(dtype) { 0 } else { 32 * n + 3 };
    let case = |rows, cols, bias, add| Case { dtype, rows, cols, columns: 1, fill: Fill::Random, bias, add };
    for c in [
        // And a row shorter than a warp.
        case(2, if rounds(dtype) { 256 } else { 3 }, false, false),
        case(5, 1280 + rest(0), true, false),
        case(4, 768 + rest(1), false, true),
        case(3, 256 + rest(2), false, false),
        case(2, 512 + rest(3), true, true),
        case(1, 256 + rest(4), false, false),
    ] {
        check(&c, 5);
    }
    Experts { dtype, rows: 2, cols: 512 + rest(5), ids: vec![1, 3, 0], share: 2 }.check();
    // Both ways to a third product, rows that fill a block and that do not; more groups than are loaded at a time.
    for (rows, rest) in [(&[5, 4, 3][..], rest(6)), (&[1, 8], rest(7))] {
        Several { dtype, rows, cols: 9 * 256 + rest, columns: 1 }.check();
    }
}

/// Columns that `matvec.cu` takes of such weights.
fn most(dtype: DType) -> usize {
    if rounds(dtype) { 1 } else { 8 }
}

/// A kernel that does not wait for those before it, on any path, or reads what they write before it does, is noticed.
#[test]
fn kernels_that_do_not_wait_are_caught() {
    for dtype in [DType::Q4_K, DType::F16] {
        let text = text_for(&name_of("matvec", dtype), 90).unwrap().text;
        let (wait, ret) = ("griddepcontrol.wait;", "ret;");
        let start = text.find("entry matvec_1(").unwrap();
        let end = text[start..].find(".entry ").map_or(text.len(), |e| start + e);
        let c = Case { dtype, rows: 5, cols: 512, columns: 1, fill: Fill::Random, bias: true, add: true };
        let experts = Experts { dtype, rows: 5, cols: 512, ids: vec![1, 3, 0], share: 2 };
        let run = |text: &str| device(text, &c, 5).map(|_| ()).and(experts.device(text).map(|_| ()));
        assert_eq!(run(text), Ok(()));
        for mutant in without_a_wait(text, "matvec_1") {
            let fault = run(&mutant).expect_err("a thread that never waits, or reads who chooses before");
            let PtxError::Run { fault, .. } = fault else { panic!("{fault}") };
            assert!(matches!(fault, Fault::NoWait | Fault::Early { .. }), "{dtype}: {fault}");
        }
        // All of them at the end.
        let body = text[start..end].replace(wait, "").replace(ret, &format!("{wait}\n{ret}"));
        let mutant = [&text[..start], &body, &text[end..]].concat();
        let Err(PtxError::Run { fault, .. }) = run(&mutant) else { panic!("it reads what is being written") };
        assert!(matches!(fault, Fault::Early { access: "read", by: Some(_), .. }), "{dtype}: {fault}");
    }
}

/// Every format at every boundary length; every number of columns; random and extreme bytes; bias and adding.
#[test]
fn products_have_the_scalar_kernels_bits() {
    for f in FORMATS {
        for (i, &cols) in lengths(f.dtype).iter().enumerate() {
            let columns = 1 + i % most(f.dtype);
            let rows = [1, 3, 4, 5, 9][i % 5];
            let fill = [Fill::Random, Fill::Extreme][i / 2 % 2];
            let (bias, add) = (i % 2 == 0, i % 3 == 0);
            check(&Case { dtype: f.dtype, rows, cols, columns, fill, bias, add }, i as u64);
        }
        for columns in 1..=most(f.dtype) {
            // More groups than are loaded at a time, and a rest.
            let cols = if columns.is_power_of_two() { 13 * 256 } else { 768 };
            let c =
                Case { dtype: f.dtype, rows: 6, cols, columns, fill: Fill::Random, bias: false, add: false };
            check(&c, 100 + columns as u64);
        }
    }
}

/// Jobs of a mixture of experts: job j multiplies matrix ids[j] with row j / share.
struct Experts {
    dtype: DType,
    rows: usize,
    cols: usize,
    ids: Vec<u32>,
    share: usize,
}

impl Experts {
    const COUNT: usize = 5;

    fn check(&self) {
        let got = self.device(of_format(self.dtype).text).unwrap_or_else(|e| panic!("{e}"));
        assert_bits(&got, &self.twin(), || format!("{}, {:?}", self.dtype, self.ids));
    }

    fn operands(&self) -> (Vec<u8>, Vec<f32>) {
        let mut rng = Rng(7);
        let host = weights(self.dtype, Self::COUNT * self.rows, self.cols, Fill::Random, &mut rng);
        (host, rng.activations(self.ids.len().div_ceil(self.share) * self.cols))
    }

    fn device(&self, text: &str) -> Result<Vec<f32>, PtxError> {
        let Self { dtype, rows, cols, .. } = *self;
        let (host, x) = self.operands();
        let mut gpu = Gpu::of_text(text)?;
        let (_, dx, stride) = input(&mut gpu, dtype, cols, &x);
        let w = gpu.weights(&packed(dtype, cols, &host));
        let (ids, out) = (gpu.words(&self.ids), gpu.room(self.ids.len() * rows));
        let row = row_bytes(dtype, cols);
        let product = [p(w), n(rows), p(0), p(out), n(rows), n(0)];
        let shared = [
            p(row as u64),
            p((row * rows) as u64),
            n(blocks(dtype, cols)),
            p(dx),
            n(stride),
            n(1),
            p(ids),
            n(self.share),
        ];
        let params = [&product[..], &NONE, &NONE, &shared].concat();
        gpu.try_run("matvec_1", [rows.div_ceil(4), self.ids.len(), 1], 128, 0, &params)?;
        gpu.try_read(out, self.ids.len() * rows)
    }

    fn twin(&self) -> Vec<f32> {
        let Self { dtype, rows, cols, .. } = *self;
        let (host, x) = self.operands();
        let weight = Weight::host(dtype, Self::COUNT, rows, cols, HostBytes::from_vec(host)).unwrap();
        let (pool, float) = (Pool::new(1), View::from_host(&x, cols));
        let mut q = Quantized::new();
        q.set_with(scalar(), &pool, float);
        let of = |(j, id): (usize, &u32)| {
            let mut all = vec![0.0; float.rows() * rows];
            let input = Input { float, rounded: rounds(dtype).then_some(&q).into() };
            let to = ViewMut::from_host(&mut all, rows);
            multiply_with(scalar(), &pool, &weight, *id as usize, input, None, to, Write::Set);
            all[j / self.share * rows..][..rows].to_vec()
        };
        self.ids.iter().enumerate().flat_map(of).collect()
    }
}

#[test]
fn experts_pick_their_matrix() {
    for dtype in [DType::Q4_K, DType::Q8_0, DType::F16] {
        Experts { dtype, rows: 6, cols: 512, ids: vec![4, 0, 2, 4, 1, 3], share: 2 }.check();
    }
}

/// Products of one input, of so many rows each: the second has a bias, the third is added to what is there.
pub(crate) struct Several {
    pub(crate) dtype: DType,
    pub(crate) rows: &'static [usize],
    pub(crate) cols: usize,
    pub(crate) columns: usize,
}

impl Several {
    fn check(&self) {
        let got = self.device(of_format(self.dtype).text).unwrap_or_else(|e| panic!("{e}"));
        assert_bits(&got, &self.twin(), || format!("{}, {:?}", self.dtype, self.rows));
    }

    fn case(&self, i: usize) -> Case {
        let Self { dtype, rows, cols, columns } = *self;
        Case { dtype, rows: rows[i], cols, columns, fill: Fill::Random, bias: i == 1, add: i == 2 }
    }

    fn device(&self, text: &str) -> Result<Vec<f32>, PtxError> {
        self.run(text, |gpu, products, dx, stride| {
            let row = row_bytes(self.dtype, self.cols);
            let all = self.rows.iter().map(|r| r.div_ceil(rows_of_a_block(self.columns))).sum();
            let shared = [p(row as u64), p(0), n(blocks(self.dtype, self.cols)), p(dx), n(stride)];
            let params = [products, &shared, &[n(self.columns), p(0), n(1)]].concat();
            let entry = format!("matvec_{}", self.columns.next_power_of_two());
            gpu.try_run(&entry, [all, 1, 1], 128, 0, &params)
        })
    }

    /// What `launch` makes, which is given the products' parameters, x and its stride.
    pub(crate) fn run(
        &self,
        text: &str,
        launch: impl Fn(&mut Gpu, &[Param], u64, usize) -> Result<(), PtxError>,
    ) -> Result<Vec<f32>, PtxError> {
        let Self { dtype, rows, cols, columns } = *self;
        let mut gpu = Gpu::of_text(text)?;
        let (_, dx, stride) = input(&mut gpu, dtype, cols, &self.x());
        let (mut params, mut outs) = (Vec::new(), Vec::new());
        for (i, &rows) in rows.iter().enumerate() {
            let (host, _, bias, before) = operands(&self.case(i), i as u64);
            let w = gpu.weights(&packed(dtype, cols, &host));
            let db = if i == 1 { gpu.floats(&bias) } else { 0 };
            let out = if i == 2 { gpu.floats(&before) } else { gpu.room(columns * rows) };
            params.extend([p(w), n(rows), p(db), p(out), n(rows), n(usize::from(i == 2))]);
            outs.push((out, columns * rows));
        }
        params.extend(std::iter::repeat_n(NONE, 3 - rows.len()).flatten());
        launch(&mut gpu, &params, dx, stride)?;
        outs.into_iter().try_fold(Vec::new(), |all, (at, n)| Ok([all, gpu.try_read(at, n)?].concat()))
    }

    fn x(&self) -> Vec<f32> {
        Rng(3).activations(self.columns * self.cols)
    }

    pub(crate) fn twin(&self) -> Vec<f32> {
        let x = self.x();
        (0..self.rows.len()).flat_map(|i| scalar_product(&self.case(i), i as u64, &x)).collect()
    }
}

/// Products of one input in one launch are what each is in its own.
#[test]
fn up_to_three_products_share_a_launch() {
    for dtype in [DType::Q4_K, DType::Q8_0, DType::F16] {
        for rows in [&[5, 3, 8][..], &[4, 9], &[1, 1, 4]] {
            Several { dtype, rows, cols: 512, columns: most(dtype).min(3) }.check();
        }
    }
}

/// Gate and up in one launch: what the scalar kernel makes of both, and the activation's own kernel of that. For columns, and for jobs by expert.
#[test]
fn gate_and_up_share_a_launch() {
    FORMATS.iter().for_each(|f| gates(f.dtype));
}

pub(crate) fn gates(dtype: DType) {
    let (rows, experts, f) = (6, 3, dtype.format());
    let shapes = [(1, 256), (2, 32), (1, 2304), (1, 320), (3, 2304), (8, 320), (0, 512)];
    for (i, (columns, cols)) in shapes.into_iter().enumerate() {
        if columns > most(f.dtype) {
            continue;
        }
        let cols = cols.max(f.block_len).next_multiple_of(f.block_len);
        let jobs = columns == 0;
        let ids: Vec<u32> = if jobs { vec![2, 0, 1, 2] } else { vec![0; columns] };
        let (share, count, act) = if jobs { (2, experts, 1) } else { (1, 1, columns % 2) };
        let mut rng = Rng(columns as u64);
        let [gate, up] = [0, 1].map(|_| weights(f.dtype, count * rows, cols, Fill::Random, &mut rng));
        let mut x = rng.activations(ids.len() / share * cols);
        // Gates of all sizes: those of random bytes are so large that activations are 0 or the gate itself.
        let size = 0.1f32.powi(i as i32);
        x.iter_mut().for_each(|x| *x *= size);
        let mut gpu = Gpu::new(of_format(f.dtype));
        let (q, dx, stride) = input(&mut gpu, f.dtype, cols, &x);
        let [dg, du] = [&gate, &up].map(|m| gpu.weights(&packed(f.dtype, cols, m)));
        let dids = if jobs { gpu.words(&ids) } else { 0 };
        let out = gpu.room(ids.len() * rows);
        let row = row_bytes(f.dtype, cols);
        let at_once = if jobs { 1 } else { columns };
        let params = [
            p(dg),
            p(du),
            n(rows),
            n(act),
            p(out),
            n(rows),
            p(row as u64),
            p((row * rows) as u64),
            n(blocks(f.dtype, cols)),
            p(dx),
            n(stride),
            n(at_once),
            p(dids),
            n(share),
        ];
        let entry = format!("gate_{}", at_once.next_power_of_two());
        let each = rows_of_a_block(at_once.div_ceil(2));
        gpu.run(&entry, [rows.div_ceil(each), ids.len() / at_once], 128, &params);
        let got = gpu.read(out, ids.len() * rows);
        let want = gated(&ids, [gate, up], f.dtype, (cols, rows, count), &x, &q, share, act);
        assert_bits(&got, &want, || format!("{} {entry}, {cols} columns of weights", f.name));
    }
}

#[test]
fn embedding_rows_are_what_the_format_says() {
    let ids = [3u32, 0, 6, 3];
    for f in FORMATS {
        for cols in [f.block_len.max(32), 3 * f.block_len.max(32)] {
            for scale in [1.0f32, 22.627] {
                let host = weights(f.dtype, 7, cols, Fill::Random, &mut Rng(cols as u64));
                let mut gpu = Gpu::new(of_format(f.dtype));
                let w = gpu.weights(&packed(f.dtype, cols, &host));
                let (dids, out) = (gpu.words(&ids), gpu.room(ids.len() * cols));
                let row = row_bytes(f.dtype, cols);
                let k = blocks(f.dtype, cols);
                let params = [p(w), p(row as u64), n(k), p(dids), Param::F32(scale), p(out), n(cols)];
                gpu.run("embed", [cols.div_ceil(256), ids.len()], 256, &params);
                let mut want = vec![0.0; ids.len() * cols];
                let host_row = f.dtype.row_bytes(cols).unwrap();
                for (id, to) in ids.iter().zip(want.chunks_exact_mut(cols)) {
                    (f.dequantize)(&host[*id as usize * host_row..][..host_row], to);
                    to.iter_mut().for_each(|v| *v *= scale);
                }
                assert_bits(&gpu.read(out, want.len()), &want, || format!("{} of {cols}", f.name));
            }
        }
    }
}

/// The device's rounding against the CPU's, to the bit, for all lengths, zeros, outliers, the very large and the very small.
#[test]
fn activations_are_rounded_as_on_the_cpu() {
    let ptx = module("round").unwrap();
    for (i, cols) in [1, 31, 32, 33, 255, 256, 257, 511, 512, 700].into_iter().enumerate() {
        let mut rng = Rng(i as u64);
        let rows = 3;
        let mut x = rng.activations(rows * cols);
        let factor = [1.0, 1e-3, 1e30, 1e-29, 1e-38, 1e-44][i % 6];
        x.iter_mut().for_each(|v| *v *= factor);
        if i % 4 == 3 {
            (x[0], x[cols - 1], x[cols]) = (f32::NAN, f32::INFINITY, -f32::INFINITY);
        }
        let mut q = Quantized::new();
        q.set_with(scalar(), &Pool::new(1), View::from_host(&x, cols));
        let blocks = cols.div_ceil(256);
        let mut gpu = Gpu::new(ptx);
        let dx = gpu.floats(&x);
        let out = gpu.machine.alloc(rows * blocks * 448);
        gpu.run("round_rows", [blocks, rows], 256, &[p(dx), n(cols), n(cols), p(out), n(blocks)]);
        let got = gpu.machine.read(out, rows * blocks * 448).unwrap();
        let want: Vec<u8> = (0..rows).flat_map(|r| q.row(r).iter().flat_map(device_block)).collect();
        for (k, (g, w)) in got.chunks_exact(448).zip(want.chunks_exact(448)).enumerate() {
            assert_eq!(g[..256], w[..256], "integers of block {k}, {cols} columns, factor {factor}");
            assert_eq!(g[384..], w[384..], "sums of block {k}, {cols} columns");
            for (g, w) in g[256..384].chunks_exact(4).zip(w[256..384].chunks_exact(4)) {
                let (g, w) = [g, w].map(|b| f32::from_le_bytes(b.try_into().unwrap())).into();
                let same = g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan() || g == 0.0 && w == 0.0;
                assert!(same, "scale {g:e}, not {w:e}, block {k}, {cols} columns, factor {factor}");
            }
        }
    }
}

/// A norm or a gate before the rounding is what its own kernel gives, rounded.
#[test]
fn norms_and_gates_are_rounded_at_once() {
    let ptx = module("round").unwrap();
    for (i, cols) in [1usize, 17, 256, 300, 700].into_iter().enumerate() {
        let mut rng = Rng(i as u64);
        let (rows, blocks) = (2, cols.div_ceil(256));
        let (x, up) = (rng.activations(rows * cols), rng.activations(rows * cols));
        let w: Vec<f32> = (0..cols).map(|_| rng.unit()).collect();
        let act = i % 2;
        let mut plain = Gpu::new(module("rows").unwrap());
        let (dx, du, dw) = (plain.floats(&x), plain.floats(&up), plain.floats(&w));
        let normed = plain.room(rows * cols);
        let (c, eps) = (n(cols), Param::F32(1e-5));
        plain.run("rms_norm", [1, rows], 256, &[p(dx), c, p(dw), c, eps, p(normed), c]);
        let normed = plain.read(normed, rows * cols);
        plain.run("glu", [cols.div_ceil(256), rows], 256, &[p(dx), c, p(du), c, c, n(act)]);
        let gated = plain.read(dx, rows * cols);
        let rounded = |entry: &str, params: &dyn Fn(&mut Gpu, u64) -> Vec<Param>| {
            let mut gpu = Gpu::new(ptx);
            let out = gpu.machine.alloc(rows * blocks * 448);
            let params = params(&mut gpu, out);
            gpu.run(entry, [blocks, rows], 256, &params);
            (gpu.machine.read(out, rows * blocks * 448).unwrap(), gpu)
        };
        let of = |x: &[f32]| rounded("round_rows", &|g, out| vec![p(g.floats(x)), c, c, p(out), n(blocks)]).0;
        let (got, _) = rounded("round_glu", &|g, out| {
            vec![p(g.floats(&x)), c, p(g.floats(&up)), c, c, n(act), p(out), n(blocks)]
        });
        assert!(got == of(&gated), "gate of {cols}");
        for keep in [false, true] {
            let y = std::cell::Cell::new(0);
            let (got, gpu) = rounded("round_norm", &|g, out| {
                y.set(if keep { g.room(rows * cols) } else { 0 });
                let (dx, dw) = (g.floats(&x), g.floats(&w));
                vec![p(dx), c, p(g.constant(dw)), c, eps, p(y.get()), c, p(out), n(blocks)]
            });
            assert!(got == of(&normed), "norm of {cols}");
            if keep {
                assert_bits(&gpu.read(y.get(), rows * cols), &normed, || format!("norm of {cols}"));
            }
        }
    }
}
