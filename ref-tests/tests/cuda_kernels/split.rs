//! F16 and BF16 weights times the rows of prompts on tensor cores, activations in parts: against f64, on a machine that cuts what tensor
//! cores cut. What a column gets depends neither on its neighbours nor on the entry point.

use crate::matmul::sorted;
use crate::matvec::packed;
use crate::{Gpu, n, p};
use kernels::cuda::layout::row_bytes;
use kernels::cuda::modules::{Ptx, module, text_for};
use kernels::testing::{Fill, Rng, assert_bits, assert_close, weights};
use quant::DType;

const TYPES: [DType; 2] = [DType::F16, DType::BF16];

fn text(dtype: DType) -> &'static Ptx {
    let name = format!("matmul_split_{}", dtype.name().to_ascii_lowercase());
    assert!(text_for(&name, 75).is_none(), "Turing takes other kernels");
    text_for(&name, 80).unwrap()
}

/// An entry point: name, features and columns of a block, threads, bytes of shared memory.
struct Entry(&'static str, usize, usize, u32, usize);

fn entries(dtype: DType) -> [Entry; 2] {
    let columns = if dtype == DType::F16 { 128 } else { 64 };
    [Entry("matmul", 256, columns, 256, 98304), Entry("matmul_32", 64, 32, 128, 40960)]
}

/// Rows of x in parts: address, bytes of a row, scales (0: none).
fn split(gpu: &mut Gpu, dtype: DType, x: &[f32], len: usize) -> (u64, usize, u64) {
    let (rows, f16) = (x.len() / len, dtype == DType::F16);
    let stride = len.div_ceil(32) * if f16 { 128 } else { 192 };
    let (dx, out) = (gpu.floats(x), gpu.machine.alloc(rows * stride));
    let scales = if f16 { gpu.room(rows) } else { 0 };
    gpu.run("split_rows", [rows, 1], 256, &[p(dx), n(len), n(len), p(out), n(stride), p(scales)]);
    (out, stride, scales)
}

/// What a product is of: all but the weights, the rows and the output.
#[derive(Clone, Copy, Default)]
struct Job {
    rows: usize,
    cols: usize,
    columns: usize,
    /// Order, list of tiles, its length.
    grouped: (u64, u64, usize),
    share: usize,
    up: u64,
    act: usize,
    bias: u64,
    add: bool,
}

/// Columns `part` of the weights' with the same of x, to `out`.
fn run(
    gpu: &mut Gpu,
    dtype: DType,
    e: &Entry,
    j: &Job,
    w: u64,
    x: (u64, usize, u64),
    part: [usize; 2],
    out: u64,
) {
    let row = row_bytes(dtype, j.cols);
    let Entry(name, features, columns, threads, shared) = *e;
    let made = if j.up == 0 { features } else { features / 2 };
    let each = if dtype == DType::F16 { 128 } else { 192 };
    let params = [
        p(w + 2 * part[0] as u64),
        p(row as u64),
        p((row * j.rows) as u64),
        n(j.rows),
        n(part[1] - part[0]),
        p(x.0 + (part[0] / 32 * each) as u64),
        n(x.1),
        p(x.2),
        n(j.columns),
        p(j.grouped.0),
        p(j.grouped.1),
        n(j.share),
        p(j.up),
        n(j.act),
        p(j.bias),
        p(out),
        n(j.rows),
        n(usize::from(j.add)),
    ];
    let tiles = if j.grouped.1 == 0 { j.columns.div_ceil(columns) } else { j.grouped.2 };
    gpu.run_shared(name, [tiles, j.rows.div_ceil(made), 1], threads, shared / 4, &params);
}

/// Weights as they count.
fn values(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / 2];
    (dtype.format().dequantize)(bytes, &mut out);
    out
}

/// `W x` in f64, and the sum of magnitudes: of row r of w and row c of x.
fn exact(w: &[f32], x: &[f32], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let all = x.chunks_exact(cols).flat_map(|x| {
        w.chunks_exact(cols).map(move |w| {
            let products = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            products.fold((0.0, 0.0), |(s, m), y| (s + y, m + y.abs()))
        })
    });
    all.unzip()
}

#[test]
fn parts_are_the_activations() {
    for dtype in TYPES {
        for (i, len) in [1, 31, 32, 33, 70, 512, 700].into_iter().enumerate() {
            let mut rng = Rng(i as u64);
            let mut x = rng.activations(3 * len);
            let factor = [1.0, 1e-3, 1e30, 1e-29, 1e-37, 2e-44, 3e37][i];
            x.iter_mut().for_each(|v| *v *= factor);
            if i == 4 {
                (x[0], x[1], x[len]) = (f32::INFINITY, f32::NAN, -f32::INFINITY);
            }
            let mut gpu = Gpu::new(text(dtype));
            let (at, stride, scales) = split(&mut gpu, dtype, &x, len);
            let bytes = gpu.machine.read(at, 3 * stride).unwrap();
            let parts = stride / (64 * len.div_ceil(32));
            for (r, row) in x.chunks_exact(len).enumerate() {
                let scale = if scales == 0 { 1.0 } else { f64::from(gpu.read(scales, 3)[r]) };
                let largest =
                    row.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
                for k in 0..len.div_ceil(32) * 32 {
                    let part = |p: usize| {
                        let at = r * stride + 64 * (k / 32 * parts + p) + k % 32 * 2;
                        f64::from(values(dtype, &bytes[at..at + 2])[0])
                    };
                    let got: f64 = (0..parts).rev().map(part).sum::<f64>() * scale;
                    let want = f64::from(*row.get(k).unwrap_or(&0.0));
                    if !want.is_finite() {
                        assert!(
                            got.is_nan() == want.is_nan() && (want.is_nan() || got == want),
                            "{got} of {want}"
                        );
                        continue;
                    }
                    // Parts of F16 end 2^38 below the largest; both end where the type itself does.
                    let bar = 0.5f64.powi(23) * want.abs()
                        + if parts == 2 { 0.5f64.powi(38) * largest } else { 0.0 };
                    assert!(
                        (got - want).abs() <= bar + 1e-40,
                        "{dtype}, {len} values by {factor:e}: {got:e} of {want:e}"
                    );
                }
            }
        }
    }
}

/// Boundary shapes, with partial blocks of features, columns and elements: bias, adding, both entry points.
#[test]
fn products_are_close_to_f64() {
    let shapes = [(1, 33, 1), (64, 32, 33), (300, 96, 130), (65, 40, 129), (256, 130, 64), (31, 513, 3)];
    for dtype in TYPES {
        for (i, (rows, cols, columns)) in shapes.into_iter().enumerate() {
            let mut rng = Rng(i as u64);
            let host = weights(dtype, rows, cols, [Fill::Random, Fill::Even][i % 2], &mut rng);
            let x = rng.activations(columns * cols);
            let bias: Vec<f32> = (0..rows).map(|_| rng.unit()).collect();
            let before: Vec<f32> = (0..columns * rows).map(|_| rng.unit()).collect();
            let (add, biased) = (i % 2 == 0, i % 3 != 0);
            let mut gpu = Gpu::new(text(dtype));
            let parts = split(&mut gpu, dtype, &x, cols);
            let w = gpu.bytes(&packed(dtype, cols, &host));
            let db = if biased { gpu.floats(&bias) } else { 0 };
            let j = Job { rows, cols, columns, share: 1, bias: db, add, ..Job::default() };
            let (mut want, mut scale) = exact(&values(dtype, &host), &x, cols);
            for (i, (y, s)) in want.iter_mut().zip(&mut scale).enumerate() {
                let more = [(biased, bias[i % rows]), (add, before[i])];
                for v in more.into_iter().filter(|m| m.0).map(|m| f64::from(m.1)) {
                    (*y, *s) = (*y + v, *s + v.abs());
                }
            }
            let all = entries(dtype).map(|e| {
                let out = gpu.floats(&before);
                run(&mut gpu, dtype, &e, &j, w, parts, [0, cols], out);
                let got = gpu.read(out, columns * rows);
                assert_close(&got, &want, &scale, 1e-6, || {
                    format!("{dtype} [{rows}, {cols}] x {columns}, {}", e.0)
                });
                got
            });
            assert_bits(&all[0], &all[1], || {
                format!("{dtype} [{rows}, {cols}] x {columns}: the entry points")
            });
            // The last column alone.
            let out = gpu.floats(&before[(columns - 1) * rows..]);
            let one = split(&mut gpu, dtype, &x[(columns - 1) * cols..], cols);
            run(&mut gpu, dtype, &entries(dtype)[1], &Job { columns: 1, ..j }, w, one, [0, cols], out);
            assert_bits(&gpu.read(out, rows), &all[0][(columns - 1) * rows..], || {
                format!("{dtype}: a column alone")
            });
        }
    }
}

/// Long rows of one sign, where every rounding and every cut goes the same way: in pieces, as the backend takes them.
#[test]
fn long_rows_stay_within_the_bar() {
    let (rows, cols, columns) = (5, 14336, 3);
    for dtype in TYPES {
        let mut rng = Rng(9);
        let mut positive = |n: usize| (0..n).map(|_| 0.5 + 0.5 * rng.unit().abs()).collect::<Vec<f32>>();
        let half = |v: &f32| {
            if dtype == DType::F16 {
                half::f16::from_f32(*v).to_bits()
            } else {
                half::bf16::from_f32(*v).to_bits()
            }
        };
        let host: Vec<u8> = positive(rows * cols).iter().flat_map(|v| half(v).to_le_bytes()).collect();
        let x = positive(columns * cols);
        let (want, scale) = exact(&values(dtype, &host), &x, cols);
        let mut gpu = Gpu::new(text(dtype));
        let parts = split(&mut gpu, dtype, &x, cols);
        let (w, out) = (gpu.bytes(&packed(dtype, cols, &host)), gpu.room(columns * rows));
        for first in (0..cols).step_by(4096) {
            let j = Job { rows, cols, columns, share: 1, add: first > 0, ..Job::default() };
            run(&mut gpu, dtype, &entries(dtype)[1], &j, w, parts, [first, cols.min(first + 4096)], out);
        }
        let got = gpu.read(out, columns * rows);
        let worst = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) / w - 1.0).abs()).fold(0.0, f64::max);
        println!("{dtype}: {worst:.1e} of the sum");
        assert_close(&got, &want, &scale, 1e-6, || format!("{dtype}, long rows"));
    }
}

/// A layer of experts: gate and up with the activation between them, in one launch for all experts; and one matrix of each.
#[test]
fn experts_and_gates() {
    let (experts, tokens, used, d, hidden) = (5, 23, 2, 96, 70);
    for (act, dtype) in TYPES.into_iter().enumerate() {
        let mut rng = Rng(31);
        let mut ids: Vec<u32> = (0..tokens * used).map(|_| (rng.bits() % experts as u64) as u32).collect();
        // One expert with more than a tile, one without any job.
        ids.iter_mut().enumerate().for_each(|(i, e)| *e = if i < 34 || *e == 3 { 1 } else { *e });
        let (order, tiles) = sorted(&ids, 32, experts);
        let [gate, up] = [0, 1].map(|_| weights(dtype, experts * hidden, d, Fill::Even, &mut rng));
        let x = rng.activations(tokens * d);
        let mut gpu = Gpu::new(text(dtype));
        let parts = split(&mut gpu, dtype, &x, d);
        let [dg, du] = [&gate, &up].map(|m| gpu.bytes(&packed(dtype, d, m)));
        let grouped = (gpu.words(&order), gpu.words(&tiles), tiles.len() / 3);
        let [big, small] = entries(dtype);
        let by = |up: u64| Job {
            rows: hidden,
            cols: d,
            columns: ids.len(),
            grouped,
            share: used,
            up,
            act,
            ..Job::default()
        };
        let [gated, gate_alone, up_alone] = [(dg, du), (dg, 0), (du, 0)].map(|(w, up)| {
            let out = gpu.room(ids.len() * hidden);
            run(&mut gpu, dtype, &small, &by(up), w, parts, [0, d], out);
            gpu.read(out, ids.len() * hidden)
        });
        let (all, scale) = exact(&values(dtype, &gate), &x, d);
        for (j, e) in ids.iter().enumerate() {
            let at = (j / used * experts + *e as usize) * hidden;
            let of = |v: &[f64]| v[at..at + hidden].to_vec();
            assert_close(&gate_alone[j * hidden..][..hidden], &of(&all), &of(&scale), 1e-6, || {
                format!("{dtype}, job {j}")
            });
        }
        let mut plain = Gpu::new(module("rows").unwrap());
        let (a, b, len) = (plain.floats(&gate_alone), plain.floats(&up_alone), gated.len());
        plain.run("glu", [len.div_ceil(256), 1], 256, &[p(a), n(len), p(b), n(len), n(len), n(act)]);
        assert_bits(&gated, &plain.read(a, len), || format!("{dtype}: gate and up at once"));
        // Without experts, on blocks of both sizes.
        let one = |up: u64| Job { grouped: (0, 0, 0), columns: tokens, share: 1, ..by(up) };
        let [a, b] = [big, small].map(|e| {
            let out = gpu.room(tokens * hidden);
            run(&mut gpu, dtype, &e, &one(du), dg, parts, [0, d], out);
            gpu.read(out, tokens * hidden)
        });
        assert_bits(&a, &b, || format!("{dtype}: gate and up, the entry points"));
        let first = ids.iter().position(|e| *e == 0).unwrap();
        assert_bits(&gated[first * hidden..][..hidden], &a[first / used * hidden..][..hidden], || {
            "alone".into()
        });
    }
}
