//! Weights of every block format times 2 to 32 rows on tensor cores, on every text that ships: alone, several of one input, gate and up
//! together. All against the scalar kernel, to the bit.

use crate::matmul::{gated, texts_of};
use crate::matvec::{Case, NONE, Several, input, operands, packed, rounds, twin};
use crate::{Gpu, n, p, without_a_wait};
use kernels::cuda::Skinny;
use kernels::cuda::layout::{blocks, row_bytes};
use kernels::cuda::modules::{Ptx, text_for};
use kernels::testing::{Fill, Rng, assert_bits, lengths, weights};
use ptx::{Fault, Param, PtxError};
use quant::{DType, FORMATS};

/// Every format in blocks.
fn formats() -> impl Iterator<Item = DType> {
    FORMATS.iter().map(|f| f.dtype).filter(|d| rounds(*d))
}

/// What is asked of a kernel beside its products; `up` with its activation.
struct Job {
    dtype: DType,
    cols: usize,
    x: (u64, usize),
    columns: usize,
    up: (u64, usize),
}

fn run(
    gpu: &mut Gpu,
    newer: bool,
    k: Skinny,
    rows: &[usize],
    products: &[Param],
    j: &Job,
) -> Result<(), PtxError> {
    let rest = [
        p(j.up.0),
        n(j.up.1),
        n(row_bytes(j.dtype, j.cols)),
        n(blocks(j.dtype, j.cols)),
        p(j.x.0),
        n(j.x.1),
        n(j.columns),
    ];
    let made = if j.up.0 == 0 { k.features } else { k.features / 2 };
    let grid = [j.columns.div_ceil(k.columns), rows.iter().map(|r| r.div_ceil(made)).sum(), 1];
    gpu.try_run(k.entry, grid, 256, k.shared(j.dtype, newer) / 4, &[products, &rest].concat())
}

/// What the kernels of `text` make of a case.
fn device(text: &str, newer: bool, k: Skinny, c: &Case, seed: u64) -> Result<Vec<f32>, PtxError> {
    let (host, x, bias, before) = operands(c, seed);
    let mut gpu = Gpu::of_text(text)?;
    let (_, dx, stride) = input(&mut gpu, c.dtype, c.cols, &x);
    let w = gpu.bytes(&packed(c.dtype, c.cols, &host));
    let db = if c.bias { gpu.floats(&bias) } else { 0 };
    let out = if c.add { gpu.floats(&before) } else { gpu.room(c.columns * c.rows) };
    let product = [p(w), n(c.rows), p(db), p(out), n(c.rows), n(usize::from(c.add))];
    let job = Job { dtype: c.dtype, cols: c.cols, x: (dx, stride), columns: c.columns, up: (0, 0) };
    run(&mut gpu, newer, k, &[c.rows], &[&product[..], &NONE, &NONE].concat(), &job)?;
    gpu.try_read(out, c.columns * c.rows)
}

fn check(text: &'static Ptx, k: Skinny, c: &Case, seed: u64) {
    let got = device(text.text, text.target() >= 80, k, c, seed).unwrap_or_else(|e| panic!("{e}"));
    assert_bits(&got, &twin(c, seed), || {
        format!("{} of {} [{}, {}] x {}, {:?}", k.entry, text.name, c.rows, c.cols, c.columns, c.fill)
    });
}

/// What is asked of an entry point with one thing wrong.
pub(crate) fn suite(sm: u32, dtype: DType, e: usize) {
    let text = texts_of("skinny", dtype).into_iter().find(|t| t.target() == sm).unwrap();
    boundaries(text, dtype, e, 0);
    (0..3).for_each(|i| several(text, dtype, Skinny::ALL[e], i));
    gates(text, dtype, e);
}

/// Every kernel of every text of every format.
#[test]
fn few_columns_have_the_scalar_kernels_bits() {
    for (f, dtype) in formats().enumerate() {
        for (t, text) in texts_of("skinny", dtype).into_iter().enumerate() {
            (0..Skinny::ALL.len()).for_each(|e| boundaries(text, dtype, e, 3 * t + f));
        }
    }
}

/// Weights are asked for before activations are there, and nothing is read.
#[test]
fn kernels_that_do_not_wait_are_caught() {
    let c = Case {
        dtype: DType::Q4_K,
        rows: 33,
        cols: 512,
        columns: 3,
        fill: Fill::Random,
        bias: true,
        add: true,
    };
    let text = text_for("skinny_q4_k", 90).unwrap().text;
    for k in Skinny::ALL {
        let run = |text: &str| device(text, true, k, &c, 5).map(|_| ());
        assert_eq!(run(text), Ok(()));
        for mutant in without_a_wait(text, k.entry) {
            let Err(PtxError::Run { fault, .. }) = run(&mutant) else {
                panic!("{}: a wait is missing", k.entry)
            };
            assert!(matches!(fault, Fault::NoWait | Fault::Early { .. }), "{}: {fault}", k.entry);
        }
    }
}

/// Boundary lengths of rows, of which rings hold all and not all, partial tiles of features and of columns, random and extreme bytes.
fn boundaries(text: &'static Ptx, dtype: DType, e: usize, seed: usize) {
    let shapes = [(1, 3), (16, 8), (33, 5), (17, 17), (32, 9), (15, 1), (47, 16), (70, 32)];
    let all = lengths(dtype);
    for i in 0..5 {
        let at = i + 2 * e + seed;
        let (rows, columns) = shapes[at % shapes.len()];
        // All lengths in turn; and rows longer than a ring.
        let cols = if i == 4 { (9 + e) * 256 } else { all[(at * 3 + i) % all.len()] };
        let fill = [Fill::Random, Fill::Extreme][i % 2];
        let c = Case { dtype, rows, cols, columns, fill, bias: i % 2 == 0, add: i % 3 == 0 };
        check(text, Skinny::ALL[e], &c, at as u64);
    }
}

/// Every number of columns up to two tiles.
#[test]
fn any_number_of_columns() {
    for dtype in [DType::Q4_K, DType::Q5_0, DType::Q2_K] {
        for columns in 1..=17 {
            let k = Skinny::ALL[columns % 3];
            let c = Case { dtype, rows: 18, cols: 768, columns, fill: Fill::Random, bias: false, add: false };
            check(texts_of("skinny", dtype).last().unwrap(), k, &c, columns as u64);
        }
    }
}

#[test]
fn up_to_three_products_share_a_launch() {
    for dtype in [DType::Q4_K, DType::Q8_0, DType::Q6_K] {
        (0..3).for_each(|i| several(texts_of("skinny", dtype)[i % 2], dtype, Skinny::ALL[i], i));
    }
}

/// Products of one input in one launch are what each is in its own.
fn several(text: &'static Ptx, dtype: DType, k: Skinny, i: usize) {
    let rows = [&[40, 3, 33][..], &[16, 17], &[1, 32, 4]][i];
    let s = Several { dtype, rows, cols: 1280, columns: 3 + 4 * i };
    let got = s.run(text.text, |gpu, products, dx, stride| {
        let job = Job { dtype, cols: s.cols, x: (dx, stride), columns: s.columns, up: (0, 0) };
        run(gpu, text.target() >= 80, k, rows, products, &job)
    });
    assert_bits(&got.unwrap_or_else(|e| panic!("{e}")), &s.twin(), || format!("{dtype}, {rows:?}"));
}

#[test]
fn gate_and_up_share_a_launch() {
    for dtype in formats() {
        (0..3).for_each(|i| gates(texts_of("skinny", dtype)[i % 2], dtype, i));
    }
}

/// Gate and up in one launch: what the scalar kernel makes of both, and the activation's own kernel of that.
fn gates(text: &'static Ptx, dtype: DType, e: usize) {
    let (k, rows, columns, act, cols) =
        (Skinny::ALL[e], [9, 31, 16][e], [8, 3, 13][e], e % 2, [1280, 256, 512][e]);
    let mut rng = Rng(e as u64);
    let [gate, up] = [0, 1].map(|_| weights(dtype, rows, cols, Fill::Random, &mut rng));
    let mut x = rng.activations(columns * cols);
    // Gates of all sizes: those of random bytes are so large that activations are 0 or the gate itself.
    x.iter_mut().enumerate().for_each(|(i, x)| *x *= 0.1f32.powi((i / cols % 7) as i32));
    let mut gpu = Gpu::new(text);
    let (q, dx, stride) = input(&mut gpu, dtype, cols, &x);
    let [dg, du] = [&gate, &up].map(|m| gpu.bytes(&packed(dtype, cols, m)));
    let out = gpu.room(columns * rows);
    let product = [p(dg), n(rows), p(0), p(out), n(rows), n(0)];
    let job = Job { dtype, cols, x: (dx, stride), columns, up: (du, act) };
    let products = [&product[..], &NONE, &NONE].concat();
    run(&mut gpu, text.target() >= 80, k, &[rows], &products, &job).unwrap_or_else(|e| panic!("{e}"));
    let got = gpu.read(out, columns * rows);
    let want = gated(&vec![0; columns], [gate, up], dtype, (cols, rows, 1), &x, &q, 1, act);
    assert_bits(&got, &want, || format!("{} of {}", k.entry, text.name));
}
