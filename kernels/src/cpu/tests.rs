//! The shared property test of the matrix kernels: every format on every instruction set this CPU has, at every boundary
//! length, against the scalar specification; that one against a product in f64 of the dequantised weights.

use super::Pool;
use super::isa::Isa;
use super::matmul::{Input, Rounded, columns, matmul, product_with};
use super::quantized::Quantized;
use super::table::SEVERAL;
use super::tiles::Tiles;
use crate::backend::Write;
use crate::testing::*;
use crate::{HostBytes, Vector, View, ViewMut, Weight};
use quant::{DType, FORMATS};

struct Case {
    w: Weight,
    x: Vec<f32>,
    n: usize,
}

fn case(dtype: DType, rows: usize, cols: usize, n: usize, fill: Fill, seed: u64) -> Case {
    let mut rng = Rng(seed);
    let bytes = HostBytes::from_vec(weights(dtype, rows, cols, fill, &mut rng));
    let w = Weight::host(dtype, 1, rows, cols, bytes).unwrap();
    Case { w, x: rng.activations(n * cols), n }
}

fn multiply(isa: Isa, c: &Case) -> Vec<f32> {
    let pool = Pool::new(1);
    let float = View::from_host(&c.x, c.w.cols());
    let mut q = Quantized::new();
    q.set_with(isa, &pool, float);
    let x = columns(&c.w, Input { float, rounded: Rounded::Int8(&q) }, 0, 0..c.n);
    let mut y = vec![f32::NAN; c.n * c.w.rows()];
    product_with(isa, &c.w, 0, 0..c.w.rows(), &x, &mut y);
    y
}

/// The product that rows of prompts take where there are tiles; `None` for float weights, which have none.
fn multiply_tiles(isa: Isa, c: &Case) -> Option<Vec<f32>> {
    if !super::matmul::needs_quantized(&c.w) {
        return None;
    }
    let pool = Pool::new(1);
    let float = View::from_host(&c.x, c.w.cols());
    let mut t = Tiles::default();
    t.set_all(isa, &pool, float);
    let x = columns(&c.w, Input { float, rounded: Rounded::Bf16(&t) }, 0, 0..c.n);
    let mut y = vec![f32::NAN; c.n * c.w.rows()];
    product_with(isa, &c.w, 0, 0..c.w.rows(), &x, &mut y);
    Some(y)
}

fn exact(c: &Case) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut size) = (vec![], vec![]);
    let mut row = vec![0.0; c.w.cols()];
    for x in c.x.chunks_exact(c.w.cols()) {
        for r in 0..c.w.rows() {
            (c.w.dtype().format().dequantize)(c.w.row(0, r), &mut row);
            let terms = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            y.push(terms.clone().sum());
            size.push(terms.map(f64::abs).sum());
        }
    }
    (y, size)
}

/// Every format, length, number of rows and of columns that matters, without their full product.
fn cases(mut f: impl FnMut(DType, usize, usize, usize, Fill)) {
    for format in FORMATS {
        let lengths = lengths(format.dtype);
        for (i, &cols) in lengths.iter().enumerate() {
            f(format.dtype, 5, cols, 1, Fill::Random);
            f(format.dtype, ROWS[i % ROWS.len()], cols, COLUMNS[i % COLUMNS.len()], Fill::Random);
            f(format.dtype, 9, cols, 5, Fill::Extreme);
        }
        let cols = lengths[lengths.len() - 2];
        for rows in ROWS {
            f(format.dtype, rows, cols, 2, Fill::Random);
            f(format.dtype, rows, cols, 9, Fill::Random);
        }
        // More rows and columns than a kernel holds at once.
        f(format.dtype, 133, cols, 53, Fill::Random);
        for n in COLUMNS {
            f(format.dtype, 6, cols, n, Fill::Extreme);
            f(format.dtype, 33, cols, n, Fill::Random);
        }
    }
}

#[test]
fn scalar_is_the_f64_product_within_the_tolerance() {
    for format in FORMATS {
        for cols in lengths(format.dtype) {
            let mut c = case(format.dtype, 4, cols, 3, Fill::Random, 7);
            // The tolerance is for values spread evenly: beside an outlier the others are rounded coarsely.
            let mut rng = Rng(8);
            c.x.fill_with(|| rng.unit());
            let (want, size) = exact(&c);
            let what = || format!("{} x {cols}", format.name);
            assert_close(&multiply(Isa::Scalar, &c), &want, &size, format.dot_tolerance, what);
        }
    }
}

#[test]
fn every_instruction_set_gives_the_scalar_bits() {
    let sets: Vec<Isa> = Isa::available().into_iter().filter(|i| *i != Isa::Scalar).collect();
    cases(|dtype, rows, cols, n, fill| {
        let c = case(dtype, rows, cols, n, fill, (rows * cols + n) as u64);
        let want = multiply(Isa::Scalar, &c);
        for &isa in &sets {
            let got = multiply(isa, &c);
            let what = || format!("{dtype} on {}, {rows} x {cols} by {n}, {fill:?}", isa.name());
            if isa == Isa::Portable {
                // No fused multiply-add: a rounding more per sub-block.
                let size = exact(&c).1;
                let want: Vec<f64> = want.iter().map(|&v| v.into()).collect();
                assert_close(&got, &want, &size, 2e-5, what);
            } else {
                assert_bits(&got, &want, what);
            }
        }
    });
}

/// Weights and activations are each off by at most 2^-9.
const TILE_TOLERANCE: f32 = 1.0 / 256.0;

#[test]
fn scalar_tiles_are_the_f64_product_within_the_tolerance() {
    for format in FORMATS {
        for cols in lengths(format.dtype).into_iter().chain([2048, 4352]) {
            let c = case(format.dtype, 4, cols, 3, Fill::Random, 7);
            let Some(got) = multiply_tiles(Isa::Scalar, &c) else { continue };
            let (want, size) = exact(&c);
            assert_close(&got, &want, &size, TILE_TOLERANCE, || format!("{} x {cols}", format.name));
        }
    }
}

#[test]
fn tiles_give_the_scalar_bits() {
    for isa in Isa::available().into_iter().filter(|i| i.has_tiles()) {
        let check = |dtype, rows: usize, cols: usize, n: usize, fill| {
            let c = case(dtype, rows, cols, n, fill, (rows * cols + n) as u64);
            let Some(want) = multiply_tiles(Isa::Scalar, &c) else { return };
            let got = multiply_tiles(isa, &c).expect("the same format");
            assert_bits(&got, &want, || format!("{dtype} in tiles, {rows} x {cols} by {n}, {fill:?}"));
        };
        cases(check);
        for format in FORMATS {
            // More values than a run has, and not a whole number of groups.
            check(format.dtype, 67, 4096 + 256, 33, Fill::Random);
            check(format.dtype, 35, 2048 + format.block_len.max(32), 17, Fill::Even);
        }
    }
}

#[test]
fn rounding_gives_the_same_bits_everywhere() {
    let mut rng = Rng(3);
    for len in [1, 31, 32, 33, 256, 300, 1024] {
        let mut x = rng.activations(len);
        x[len / 2] = 1e-38;
        x[len - 1] = -40.0;
        let pool = Pool::new(1);
        let mut want = Quantized::new();
        want.set_with(Isa::Scalar, &pool, View::from_host(&x, len));
        for isa in Isa::available() {
            let mut got = Quantized::new();
            got.set_with(isa, &pool, View::from_host(&x, len));
            for (g, w) in got.row(0).iter().zip(want.row(0)) {
                assert_eq!(g.q, w.q);
                assert_eq!((g.off, g.off16), (w.off, w.off16));
                for (g, w) in [(g.scale, w.scale), (g.sum, w.sum), (g.sum_lo, w.sum_lo), (g.sum_hi, w.sum_hi)]
                {
                    assert_bits(&g, &w, || format!("rounding {len} values on {}", isa.name()));
                }
            }
        }
    }
}

#[test]
fn values_that_are_not_numbers_show() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for isa in Isa::available() {
            let mut c = case(DType::Q8_0, 3, 64, 1, Fill::Random, 1);
            c.x[40] = bad;
            assert!(multiply(isa, &c).iter().all(|y| y.is_nan()), "{bad} on {}", isa.name());
        }
    }
}

/// A row's bits depend neither on the other rows of the batch, nor on the threads, nor on where chunks end.
#[test]
fn results_do_not_depend_on_batch_or_threads() {
    for format in FORMATS {
        let cols = 512;
        let c = case(format.dtype, 203, cols, 19, Fill::Random, 5);
        let whole = multiply(Isa::current(), &c);
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for n in [1, 2, 4, 19] {
                let mut out = vec![f32::NAN; n * 203];
                let x = View::from_host(&c.x[..n * cols], cols);
                matmul(&pool, &c.w, 0, x, None, ViewMut::from_host(&mut out, 203), Write::Set);
                let what = || format!("{}, {n} rows, {threads} threads", format.name);
                assert_bits(&out, &whole[..n * 203], what);
            }
        }
    }
}

#[test]
fn bias_and_accumulation() {
    let c = case(DType::Q8_0, 40, 64, 2, Fill::Random, 5);
    let plain = multiply(Isa::current(), &c);
    let bias: Vec<f32> = (0..40).map(|i| i as f32).collect();
    let v = Vector::new(bias.clone());
    let pool = Pool::new(2);
    for (write, add) in [(Write::Set, 0.0), (Write::Add, 1.0)] {
        let mut out = vec![1.0; 80];
        let x = View::from_host(&c.x, 64);
        matmul(&pool, &c.w, 0, x, Some(&v), ViewMut::from_host(&mut out, 40), write);
        let want: Vec<f32> = plain.iter().enumerate().map(|(i, y)| add + (y + bias[i % 40])).collect();
        assert_bits(&out, &want, || format!("{write:?}"));
    }
}

/// Prints the speed of every format, in the order of `docs/performance.md`: not a test, a quick look.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let all = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = std::env::var("THREADS").map_or(all, |t| t.parse().expect("a number"));
    let isa = Isa::current();
    let (pool, peak) = (Pool::new(threads), super::machine::int8_peak(isa, threads));
    let (bandwidth, float) =
        (super::machine::read_bandwidth(threads), super::machine::float_peak(isa, threads));
    let giga = |v: Option<f64>| v.unwrap_or(f64::NAN) / 1e9;
    println!(
        "{}, {threads} threads: {:.1} GB/s, {:.0} int8 GMAC/s, {:.0} f32 GMAC/s",
        isa.name(),
        bandwidth / 1e9,
        giga(peak),
        giga(float)
    );
    let ns = std::env::var("N").unwrap_or_else(|_| "1,4,512".to_owned());
    let only = std::env::var("TYPES").unwrap_or_default();
    for f in FORMATS.iter().filter(|f| only.is_empty() || only.split(',').any(|o| o == f.name)) {
        let (rows, cols) = (2048, 2048);
        let bytes = (rows * f.dtype.row_bytes(cols).unwrap()) as f64;
        let macs = (rows * cols) as f64;
        print!("{:8}", f.name);
        for n in ns.split(',').map(|n| n.parse::<usize>().expect("a number")) {
            let t = time_matmul(isa, &pool, f.dtype, rows, cols, n);
            let rate = bytes / t;
            print!(" n={n} {:.1} GB/s {:.0}%", rate / 1e9, 100.0 * rate / bandwidth);
            if n > SEVERAL {
                let rate = n as f64 * macs / t;
                print!(" {:.0} GMAC/s {:.0}%", rate / 1e9, 100.0 * rate / peak.unwrap_or(f64::NAN));
            }
            print!(";");
        }
        println!();
    }
}
