//! `mma` and `ldmatrix` against products written out by row and column.

use crate::{kernel, launch};
use half::{bf16, f16};

/// Runs a kernel whose 32 threads each load `n` words, and store 4.
fn run(body: &str, inputs: &[Vec<[u32; 32]>]) -> Vec<[u32; 4]> {
    let registers: usize = inputs.iter().map(Vec::len).sum();
    let mut load = format!("mul.wide.u32 %rd2, %r0, {};\nadd.s64 %rd2, %rd1, %rd2;\n", 4 * registers);
    for i in 0..registers {
        load += &format!("ld.global.u32 %r{}, [%rd2+{}];\n", 10 + i, 4 * i);
    }
    let store = "mul.wide.u32 %rd3, %r0, 16;\nadd.s64 %rd3, %rd0, %rd3;\nst.global.v4.u32 [%rd3], {%r1, %r2, %r3, %r4};\nret;";
    let flat: Vec<&[u32; 32]> = inputs.iter().flatten().collect();
    let bytes: Vec<u8> = (0..32).flat_map(|l| flat.iter().flat_map(move |r| r[l].to_le_bytes())).collect();
    let out = launch(&kernel(&format!("{load}{body}\n{store}")), 32, 512, &bytes).unwrap();
    let words: Vec<u32> = out.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    words.chunks_exact(4).map(|w| w.try_into().unwrap()).collect()
}

/// Register r of lane l of a 16 x (16 or 32) matrix A, as the tables of the ISA put it: `n` elements a register.
fn a_at(l: usize, r: usize, i: usize, n: usize) -> (usize, usize) {
    let row = if r == 0 || r == 2 { l >> 2 } else { (l >> 2) + 8 };
    let col = (l % 4) * n + i + if r >= 2 { 4 * n } else { 0 };
    (row, col)
}

fn b_at(l: usize, r: usize, i: usize, n: usize) -> (usize, usize) {
    ((l % 4) * n + i + if r == 1 { 4 * n } else { 0 }, l >> 2)
}

fn c_at(l: usize, r: usize) -> (usize, usize) {
    (if r < 2 { l >> 2 } else { (l >> 2) + 8 }, (l % 4) * 2 + (r & 1))
}

fn pack(f: impl Fn(usize, usize) -> u32) -> impl Fn(usize) -> [u32; 32] {
    move |r| std::array::from_fn(|l| f(l, r))
}

#[test]
fn half_products() {
    let a = |r: usize, k: usize| ((3 * r + 5 * k) % 17) as f32 - 8.0;
    let b = |k: usize, n: usize| ((7 * k + 2 * n) % 13) as f32 * 0.25 - 1.5;
    let c = |r: usize, n: usize| r as f32 - n as f32 * 0.5;
    for (ty, bits) in [
        ("f16", (|x| f16::from_f32(x).to_bits()) as fn(f32) -> u16),
        ("bf16", |x| bf16::from_f32(x).to_bits()),
    ] {
        let two = |x: f32, y: f32| u32::from(bits(x)) | u32::from(bits(y)) << 16;
        let ra = pack(|l, r| {
            let (row, k) = a_at(l, r, 0, 2);
            two(a(row, k), a(row, k + 1))
        });
        let rb = pack(|l, r| {
            let (k, col) = b_at(l, r, 0, 2);
            two(b(k, col), b(k + 1, col))
        });
        let rc = pack(|l, r| {
            let (row, col) = c_at(l, r);
            c(row, col).to_bits()
        });
        let body = format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.{ty}.{ty}.f32 {{%r1, %r2, %r3, %r4}}, {{%r10, %r11, %r12, %r13}}, \
             {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};"
        );
        let got = run(&body, &[(0..4).map(ra).collect(), (0..2).map(rb).collect(), (0..4).map(rc).collect()]);
        for (l, got) in got.iter().enumerate() {
            for (r, got) in got.iter().enumerate() {
                let (row, col) = c_at(l, r);
                let want = c(row, col) + (0..16).map(|k| a(row, k) * b(k, col)).sum::<f32>();
                assert_eq!(f32::from_bits(*got), want, "{ty}: row {row}, column {col}");
            }
        }
    }
}

/// One shape of byte products, a of type `ty`: registers of a, b and c.
fn check_bytes(shape: &str, ty: &str, registers: [usize; 3]) {
    let a = |r: usize, k: usize| ((31 * r + 17 * k) % 256) as u8;
    let b = |k: usize, n: usize| ((13 * k + 41 * n) % 256) as u8;
    let of_a = |a: u8| if ty == "u8" { i32::from(a) } else { i32::from(a as i8) };
    let four = |f: &dyn Fn(usize) -> u8| u32::from_le_bytes([0, 1, 2, 3].map(f));
    let ra = pack(|l, r| {
        four(&|i| {
            let (row, k) = a_at(l, r, i, 4);
            a(row, k)
        })
    });
    let rb = pack(|l, r| {
        four(&|i| {
            let (k, col) = b_at(l, r, i, 4);
            b(k, col)
        })
    });
    let rc = pack(|l, r| (l * 4 + r) as u32);
    let [na, nb, nc] = registers;
    let list =
        |from: usize, n: usize| (from..from + n).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(", ");
    let unused: String = (nc..4).map(|i| format!("mov.u32 %r{}, 0;\n", 1 + i)).collect();
    let body = format!(
        "{unused}mma.sync.aligned.{shape}.row.col.s32.{ty}.s8.s32 {{{}}}, {{{}}}, {{{}}}, {{{}}};",
        list(1, nc),
        list(10, na),
        list(10 + na, nb),
        list(10 + na + nb, nc)
    );
    let got = run(&body, &[(0..na).map(ra).collect(), (0..nb).map(rb).collect(), (0..nc).map(rc).collect()]);
    for (l, got) in got.iter().enumerate() {
        for (r, got) in got[..nc].iter().enumerate() {
            let (row, col) = c_at(l, r);
            let dot: i32 = (0..16 * nb).map(|k| of_a(a(row, k)) * i32::from(b(k, col) as i8)).sum();
            assert_eq!(*got as i32, dot + (l * 4 + r) as i32, "{shape} of {ty}: row {row}, column {col}");
        }
    }
}

#[test]
fn byte_products() {
    for ty in ["s8", "u8"] {
        check_bytes("m16n8k32", ty, [4, 2, 4]);
        check_bytes("m16n8k16", ty, [2, 1, 4]);
        check_bytes("m8n8k16", ty, [1, 1, 2]);
    }
}

#[test]
fn matrices_are_spread_over_lanes() {
    // Row r of matrix m lies at 128 m + 16 r; its element c is 64 m + 8 r + c.
    let fill = "mul.lo.u32 %r5, %r0, 8;\nmul.wide.u32 %rd4, %r0, 16;\nmov.u64 %rd5, buffer;\nadd.s64 %rd5, %rd5, %rd4;\n\
                add.u32 %r6, %r5, 1;\nshl.b32 %r6, %r6, 16;\nor.b32 %r20, %r5, %r6;\nadd.u32 %r21, %r20, 0x20002;\n\
                add.u32 %r22, %r21, 0x20002;\nadd.u32 %r23, %r22, 0x20002;\nst.shared.v4.u32 [%rd5], {%r20, %r21, %r22, %r23};\n\
                bar.warp.sync -1;\n";
    for trans in [false, true] {
        let t = if trans { ".trans" } else { "" };
        let body =
            format!("{fill}ldmatrix.sync.aligned.m8n8.x4{t}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%rd5];");
        for (l, got) in run(&body, &[vec![[0; 32]]]).iter().enumerate() {
            for (m, got) in got.iter().enumerate() {
                let element = |j: usize| {
                    let (row, col) = if trans { (2 * (l % 4) + j, l / 4) } else { (l / 4, 2 * (l % 4) + j) };
                    (64 * m + 8 * row + col) as u32
                };
                assert_eq!(*got, element(0) | element(1) << 16, "lane {l}, matrix {m}");
            }
        }
    }
    let body = format!(
        "{fill}mov.u32 %r3, 0;\nmov.u32 %r4, 0;\nldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r1, %r2}}, [%rd5];"
    );
    assert_eq!(run(&body, &[vec![[0; 32]]])[0], [0x1_0000, 0x41_0040, 0, 0]);
    let body = format!(
        "{fill}mov.u32 %r2, 0;\nmov.u32 %r3, 0;\nmov.u32 %r4, 0;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%rd5];"
    );
    assert_eq!(run(&body, &[vec![[0; 32]]])[5], [0xb_000a, 0, 0, 0]);
}
