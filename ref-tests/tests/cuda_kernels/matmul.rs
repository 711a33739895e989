//! Weights of every format times many rows, on every text that ships: dense, by expert, gate and up together. All against the scalar
//! kernel, to the bit.

use crate::matvec::{Case, input, operands, packed, rounds, scalar, twin};
use crate::{Gpu, n, p};
use kernels::cpu::Pool;
use kernels::cpu::matmul::{Input, multiply_with};
use kernels::cpu::quantized::Quantized;
use kernels::cuda::layout::{blocks, row_bytes};
use kernels::cuda::modules::{Ptx, module, text_for};
use kernels::testing::{Fill, Rng, assert_bits, lengths, weights};
use kernels::{HostBytes, View, ViewMut, Weight, Write};
use quant::{DType, FORMATS};

/// The texts of a format's products: for Turing and, where it is another, for all later GPUs.
fn texts(dtype: DType) -> Vec<&'static Ptx> {
    texts_of("matmul", dtype)
}

/// The same of another kind of kernels.
pub(crate) fn texts_of(kind: &str, dtype: DType) -> Vec<&'static Ptx> {
    let name = format!("{kind}_{}", dtype.name().to_ascii_lowercase());
    let mut all: Vec<_> = [75, 80].map(|sm| text_for(&name, sm).unwrap()).into();
    all.dedup_by_key(|t| t.name);
    all
}

/// What `matmul` takes; zero pointers are absent.
#[derive(Clone, Copy)]
struct Job {
    dtype: DType,
    rows: usize,
    cols: usize,
    w: u64,
    x: (u64, usize),
    columns: usize,
    /// Order, list of tiles, its length.
    grouped: (u64, u64, usize),
    share: usize,
    up: u64,
    act: usize,
    bias: u64,
    out: u64,
    add: bool,
}

fn run(gpu: &mut Gpu, j: &Job) {
    let row = row_bytes(j.dtype, j.cols);
    let (order, list, tiles) = j.grouped;
    let (features, threads) = if rounds(j.dtype) { (64, 512) } else { (32, 256) };
    let made = if j.up == 0 { features } else { features / 2 };
    let params = [
        p(j.w),
        p(row as u64),
        p((row * j.rows) as u64),
        n(j.rows),
        n(blocks(j.dtype, j.cols)),
        p(j.x.0),
        n(j.x.1),
        n(j.columns),
        p(order),
        p(list),
        n(j.share),
        p(j.up),
        n(j.act),
        p(j.bias),
        p(j.out),
        n(j.rows),
        n(usize::from(j.add)),
    ];
    let tiles = if list == 0 { j.columns.div_ceil(32) } else { tiles };
    gpu.run("matmul", [tiles, j.rows.div_ceil(made)], threads, &params);
}

fn check(text: &'static Ptx, c: &Case, seed: u64) {
    let (host, x, bias, before) = operands(c, seed);
    let mut gpu = Gpu::new(text);
    let (_, dx, stride) = input(&mut gpu, c.dtype, c.cols, &x);
    let w = gpu.bytes(&packed(c.dtype, c.cols, &host));
    let db = if c.bias { gpu.floats(&bias) } else { 0 };
    let out = if c.add { gpu.floats(&before) } else { gpu.room(c.columns * c.rows) };
    let job = Job {
        dtype: c.dtype,
        rows: c.rows,
        cols: c.cols,
        w,
        x: (dx, stride),
        columns: c.columns,
        grouped: (0, 0, 0),
        share: 1,
        up: 0,
        act: 0,
        bias: db,
        out,
        add: c.add,
    };
    run(&mut gpu, &job);
    assert_bits(&gpu.read(out, c.columns * c.rows), &twin(c, seed), || {
        format!("{} [{}, {}] x {}, {:?}", text.name, c.rows, c.cols, c.columns, c.fill)
    });
}

/// Every text of every format, at boundary lengths of rows, with partial tiles of features and of columns.
#[test]
fn many_columns_have_the_scalar_kernels_bits() {
    let shapes = [(1, 9), (64, 32), (70, 33), (31, 17), (33, 1), (65, 67)];
    for f in FORMATS {
        for text in texts(f.dtype) {
            let some: Vec<usize> = lengths(f.dtype).into_iter().filter(|l| *l <= 1024).collect();
            for (i, (rows, columns)) in shapes.into_iter().enumerate() {
                let cols = some[(i * 5 + 3) % some.len()];
                let fill = [Fill::Random, Fill::Extreme][i % 2];
                let (bias, add) = (i % 2 == 0, i % 3 == 0);
                check(text, &Case { dtype: f.dtype, rows, cols, columns, fill, bias, add }, i as u64);
            }
        }
    }
}

/// Jobs by expert: the order is a stable sort, tiles of `columns` cover it, the rest of the list is empty.
pub(crate) fn sorted(ids: &[u32], columns: usize, experts: usize) -> (Vec<u32>, Vec<u32>) {
    let mut gpu = Gpu::new(module("router").unwrap());
    let tiles = ids.len() / columns + experts;
    let (dids, order, list) = (gpu.words(ids), gpu.room(ids.len()), gpu.room(3 * tiles));
    let params = [p(dids), n(ids.len()), n(columns), p(order), p(list)];
    gpu.run_shared("sort_experts", [experts, 1, 1], 256, experts, &params);
    let words = |at, n| gpu.read(at, n).iter().map(|x| x.to_bits()).collect();
    (words(order, ids.len()), words(list, 3 * tiles))
}

#[test]
fn jobs_are_sorted_by_expert() {
    for (jobs, experts, columns) in
        [(1, 1, 32), (7, 3, 128), (256, 4, 32), (257, 64, 32), (600, 9, 128), (1000, 2, 32)]
    {
        let mut rng = Rng(jobs as u64);
        // The first experts get most; some none.
        let ids: Vec<u32> = (0..jobs)
            .map(|_| {
                let e = (rng.bits() % experts as u64) as u32;
                e.min((rng.bits() % experts as u64) as u32)
            })
            .collect();
        let (order, tiles) = sorted(&ids, columns, experts);
        let mut want: Vec<u32> = (0..jobs as u32).collect();
        want.sort_by_key(|j| ids[*j as usize]);
        assert_eq!(order, want, "{jobs} jobs, {experts} experts");
        let mut list = Vec::new();
        let mut first = 0;
        for e in 0..experts as u32 {
            let end = first + ids.iter().filter(|i| **i == e).count() as u32;
            let tiles = (first..end).step_by(columns);
            tiles.for_each(|at| list.extend([e, at, end.min(at + columns as u32)]));
            first = end;
        }
        list.resize(tiles.len(), 0);
        assert_eq!(tiles, list, "{jobs} jobs, {experts} experts");
    }
}

/// A layer of experts: gate and up with the activation between them, then down, each in one launch for all experts.
#[test]
fn experts_take_their_rows_in_one_launch() {
    let (experts, tokens, used, d, hidden) = (5, 23, 2, 256, 37);
    for dtype in [DType::Q4_K, DType::Q6_K, DType::Q8_0, DType::Q2_K, DType::MXFP4, DType::F16] {
        for (act, text) in texts(dtype).into_iter().enumerate() {
            let mut rng = Rng(31);
            let mut ids: Vec<u32> =
                (0..tokens * used).map(|_| (rng.bits() % experts as u64) as u32).collect();
            // One expert with more than a tile, one without any job.
            ids.iter_mut().enumerate().for_each(|(i, e)| *e = if i < 34 || *e == 3 { 1 } else { *e });
            let (order, tiles) = sorted(&ids, 32, experts);
            let [gate, up] = [0, 1].map(|_| weights(dtype, experts * hidden, d, Fill::Random, &mut rng));
            let x = rng.activations(tokens * d);
            let mut gpu = Gpu::new(text);
            let (q, dx, stride) = input(&mut gpu, dtype, d, &x);
            let [dg, du] = [&gate, &up].map(|m| gpu.bytes(&packed(dtype, d, m)));
            let grouped = (gpu.words(&order), gpu.words(&tiles), tiles.len() / 3);
            let out = gpu.room(ids.len() * hidden);
            let job = Job {
                dtype,
                rows: hidden,
                cols: d,
                w: dg,
                x: (dx, stride),
                columns: ids.len(),
                grouped,
                share: used,
                up: du,
                act,
                bias: 0,
                out,
                add: false,
            };
            run(&mut gpu, &job);
            let got = gpu.read(out, ids.len() * hidden);
            let want = gated(&ids, [gate, up], dtype, (d, hidden, experts), &x, &q, used, act);
            assert_bits(&got, &want, || format!("{}, activation {act}", text.name));
        }
    }
}

/// What the scalar kernel makes of gate and up, and the kernel of the plain layer of both.
pub(crate) fn gated(
    ids: &[u32],
    matrices: [Vec<u8>; 2],
    dtype: DType,
    (d, hidden, experts): (usize, usize, usize),
    x: &[f32],
    q: &Quantized,
    used: usize,
    act: usize,
) -> Vec<f32> {
    let tokens = x.len() / d;
    let [gate, up] = matrices.map(|host| {
        let weight = Weight::host(dtype, experts, hidden, d, HostBytes::from_vec(host)).unwrap();
        let of = |e: usize| {
            let mut all = vec![0.0; tokens * hidden];
            let input = Input { float: View::from_host(x, d), rounded: rounds(dtype).then_some(q).into() };
            let to = ViewMut::from_host(&mut all, hidden);
            multiply_with(scalar(), &Pool::new(1), &weight, e, input, None, to, Write::Set);
            all
        };
        let all: Vec<Vec<f32>> = (0..experts).map(of).collect();
        let rows = ids.iter().enumerate();
        rows.flat_map(|(j, e)| all[*e as usize][j / used * hidden..][..hidden].to_vec()).collect::<Vec<f32>>()
    });
    let mut gpu = Gpu::new(module("rows").unwrap());
    let (dg, du) = (gpu.floats(&gate), gpu.floats(&up));
    let len = gate.len();
    gpu.run("glu", [len.div_ceil(256), 1], 256, &[p(dg), n(len), p(du), n(len), n(len), n(act)]);
    gpu.read(dg, len)
}

/// Heads that each have a matrix (absorbed MLA) are experts too: jobs i with matrix i % heads.
#[test]
fn heads_are_experts() {
    let (heads, rows, latent, nope) = (3, 14, 70, 64);
    let ids: Vec<u32> = (0..(rows * heads) as u32).map(|j| j % heads as u32).collect();
    let (order, tiles) = sorted(&ids, 32, heads);
    let dtype = DType::Q8_0;
    let mut rng = Rng(5);
    let host = weights(dtype, heads * latent, nope, Fill::Random, &mut rng);
    let x = rng.activations(ids.len() * nope);
    for text in texts(dtype) {
        let mut gpu = Gpu::new(text);
        let (q, dx, stride) = input(&mut gpu, dtype, nope, &x);
        let w = gpu.bytes(&packed(dtype, nope, &host));
        let grouped = (gpu.words(&order), gpu.words(&tiles), tiles.len() / 3);
        let out = gpu.room(ids.len() * latent);
        let job = Job {
            dtype,
            rows: latent,
            cols: nope,
            w,
            x: (dx, stride),
            columns: ids.len(),
            grouped,
            share: 1,
            up: 0,
            act: 0,
            bias: 0,
            out,
            add: false,
        };
        run(&mut gpu, &job);
        let got = gpu.read(out, ids.len() * latent);
        let weight = Weight::host(dtype, heads, latent, nope, HostBytes::from_vec(host.clone())).unwrap();
        for h in 0..heads {
            let mut all = vec![0.0; ids.len() * latent];
            let input = Input { float: View::from_host(&x, nope), rounded: Some(&q).into() };
            let to = ViewMut::from_host(&mut all, latent);
            multiply_with(scalar(), &Pool::new(1), &weight, h, input, None, to, Write::Set);
            for j in (h..ids.len()).step_by(heads) {
                assert_bits(&got[j * latent..][..latent], &all[j * latent..][..latent], || {
                    format!("head {h}, job {j}")
                });
            }
        }
    }
}
