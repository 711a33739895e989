//! One thread, one instruction, a result worked out by hand.

use crate::{one, run};

/// `op d, a, b, ...` on 32-bit registers.
fn op(op: &str, args: &[u32]) -> u32 {
    let moves: String =
        args.iter().enumerate().map(|(i, a)| format!("mov.u32 %r{}, {a};\n", i + 2)).collect();
    let list: Vec<String> = (0..args.len()).map(|i| format!("%r{}", i + 2)).collect();
    one(&format!("{moves}{op} %r1, {};", list.join(", ")))
}

fn f(op_name: &str, args: &[f32]) -> f32 {
    let bits: Vec<u32> = args.iter().map(|x| x.to_bits()).collect();
    f32::from_bits(op(op_name, &bits))
}

const M1: u32 = u32::MAX;

#[test]
fn integers() {
    assert_eq!(op("add.u32", &[M1, 3]), 2);
    assert_eq!(op("add.s32", &[5, M1]), 4);
    assert_eq!(op("sub.s32", &[3, 5]), M1 - 1);
    assert_eq!(op("mul.lo.u32", &[0x1_0001, 0x1_0001]), 0x2_0001);
    assert_eq!(op("mul.lo.s32", &[M1, 7]), M1 - 6);
    assert_eq!(op("mul.hi.u32", &[M1, M1]), M1 - 1);
    assert_eq!(op("mul.hi.s32", &[M1, M1]), 0);
    assert_eq!(op("mad.lo.u32", &[3, 4, 5]), 17);
    assert_eq!(op("mad.lo.s32", &[M1, 4, 5]), 1);
    assert_eq!(op("mad.hi.u32", &[0x8000_0000, 4, 5]), 7);
    assert_eq!(op("mad.hi.s32", &[0x8000_0000, 4, 5]), 3);
    assert_eq!(op("div.u32", &[M1, 16]), 0x0fff_ffff);
    assert_eq!(op("div.s32", &[-7i32 as u32, 2]), -3i32 as u32);
    assert_eq!(op("rem.u32", &[23, 7]), 2);
    assert_eq!(op("rem.s32", &[-7i32 as u32, 2]), M1);
    assert_eq!(op("min.u32", &[1, M1]), 1);
    assert_eq!(op("min.s32", &[1, M1]), M1);
    assert_eq!(op("max.u32", &[1, M1]), M1);
    assert_eq!(op("max.s32", &[1, M1]), 1);
    assert_eq!(op("neg.s32", &[5]), -5i32 as u32);
    assert_eq!(op("abs.s32", &[-5i32 as u32]), 5);
    assert_eq!(op("and.b32", &[12, 10]), 8);
    assert_eq!(op("or.b32", &[12, 10]), 14);
    assert_eq!(op("xor.b32", &[12, 10]), 6);
    assert_eq!(op("not.b32", &[12]), !12);
    assert_eq!(op("shl.b32", &[3, 4]), 48);
    assert_eq!(op("shl.b32", &[3, 32]), 0);
    assert_eq!(op("shr.u32", &[0x8000_0000, 31]), 1);
    assert_eq!(op("shr.u32", &[0x8000_0000, 99]), 0);
    assert_eq!(op("shr.s32", &[0x8000_0000, 99]), M1);
    assert_eq!(op("popc.b32", &[0xf0f0]), 8);
    assert_eq!(op("clz.b32", &[1]), 31);
    assert_eq!(op("brev.b32", &[1]), 0x8000_0000);
    assert_eq!(op("mov.b32", &[77]), 77);
    let halves = "mov.u16 %h1, 0x1234;\nmov.u16 %h2, 0xabcd;\nmov.b32 %r1, {%h1, %h2};";
    assert_eq!(one(halves), 0xabcd_1234);
}

#[test]
fn fields_of_bits() {
    assert_eq!(op("bfe.u32", &[0xabcd_1234, 8, 8]), 0x12);
    assert_eq!(op("bfe.s32", &[0xabcd_1234, 24, 8]), 0xffff_ffab);
    assert_eq!(op("bfe.s32", &[0x0000_7234, 12, 3]), M1);
    assert_eq!(op("bfi.b32", &[0xff, 0, 4, 8]), 0xff0);
    assert_eq!(op("bfi.b32", &[0x5, 0xffff_ffff, 8, 4]), 0xffff_f5ff);
    assert_eq!(op("prmt.b32", &[0x3322_1100, 0x7766_5544, 0x7632]), 0x7766_3322);
    assert_eq!(op("prmt.b32", &[0x0000_80ff, 0, 0x000a]), 0xffff_ff00);
    assert_eq!(op("prmt.b32", &[0x0000_80ff, 0, 0x2298]), 0x0000_ffff);
    // a & b | c: the table is (0xf0 & 0xcc) | 0xaa.
    let lop3 = "mov.u32 %r2, 12;\nmov.u32 %r3, 10;\nmov.u32 %r4, 1;\nlop3.b32 %r1, %r2, %r3, %r4, 0xea;";
    assert_eq!(one(lop3), 0b1001);
    assert_eq!(op("shf.l.wrap.b32", &[0x8000_0000, 1, 33]), 3);
    assert_eq!(op("shf.r.wrap.b32", &[0x10, 0xabc, 4]), 0xc000_0001);
    assert_eq!(op("shf.l.clamp.b32", &[7, 1, 40]), 7);
    assert_eq!(op("shf.r.clamp.b32", &[7, 9, 40]), 9);
}

#[test]
fn dot_products_of_bytes() {
    // (1, 2, 3, -4) . (5, -6, 7, 8) = 5 - 12 + 21 - 32.
    let (a, b) = (0xfc03_0201, 0x0807_fa05);
    assert_eq!(op("dp4a.s32.s32", &[a, b, 100]), 82);
    // As unsigned: (1, 2, 3, 252) . (5, 250, 7, 8).
    assert_eq!(op("dp4a.u32.u32", &[a, b, 0]), 5 + 500 + 21 + 2016);
    assert_eq!(op("dp4a.u32.s32", &[a, b, 0]), (5 - 12 + 21 + 2016) as u32);
    assert_eq!(op("dp4a.s32.u32", &[a, b, 0]), 5 + 500 + 21 - 32);
}

#[test]
fn wide_integers() {
    let low = "cvt.u32.u64 %r1, %rd2;";
    let high = "shr.u64 %rd2, %rd2, 32;\ncvt.u32.u64 %r1, %rd2;";
    let mul = "mov.u32 %r2, -2;\nmul.wide.s32 %rd2, %r2, 3;\n";
    assert_eq!((one(&format!("{mul}{low}")), one(&format!("{mul}{high}"))), (-6i32 as u32, M1));
    let mul = "mov.u32 %r2, -1;\nmul.wide.u32 %rd2, %r2, 2;\n";
    assert_eq!((one(&format!("{mul}{low}")), one(&format!("{mul}{high}"))), (M1 - 1, 1));
    let mad = "mov.u64 %rd3, 10;\nmov.u32 %r2, -3;\nmad.wide.s32 %rd2, %r2, 3, %rd3;\n";
    assert_eq!((one(&format!("{mad}{low}")), one(&format!("{mad}{high}"))), (1, 0));
    for (op, a, b, want) in [
        ("add.s64", 0xffff_ffffu64, 1u64, 1u64 << 32),
        ("sub.s64", 0, 1, u64::MAX),
        ("mul.lo.s64", 1 << 33, 6, 6 << 33),
        ("and.b64", 0xff00_ff00_ff00_ff00, 0x0ff0_0ff0_0ff0_0ff0, 0x0f00_0f00_0f00_0f00),
        ("or.b64", 1 << 40, 1, 1 << 40 | 1),
        ("xor.b64", 3 << 40, 1 << 40, 1 << 41),
        ("div.u64", 1 << 40, 1 << 20, 1 << 20),
        ("rem.u64", (1 << 40) + 5, 1 << 20, 5),
        ("min.u64", 1 << 40, 2, 2),
        ("max.u64", 1 << 40, 2, 1 << 40),
    ] {
        let body = format!("mov.u64 %rd3, {a};\nmov.u64 %rd4, {b};\n{op} %rd2, %rd3, %rd4;\n");
        let got = u64::from(one(&format!("{body}{low}"))) | u64::from(one(&format!("{body}{high}"))) << 32;
        assert_eq!(got, want, "{op}");
    }
    assert_eq!(
        one("mov.u64 %rd2, 1;\nshl.b64 %rd2, %rd2, 35;\nshr.u64 %rd2, %rd2, 33;\ncvt.u32.u64 %r1, %rd2;"),
        4
    );
    assert_eq!(one("mov.u64 %rd2, -8;\nshr.s64 %rd2, %rd2, 1;\ncvt.u32.u64 %r1, %rd2;"), -4i32 as u32);
}

#[test]
fn floats() {
    assert_eq!(f("add.rn.f32", &[1.0, 2f32.powi(-24)]), 1.0);
    assert_eq!(f("add.f32", &[1.5, 2.25]), 3.75);
    assert_eq!(f("sub.rn.f32", &[1.0, 3.0]), -2.0);
    assert_eq!(f("mul.rn.f32", &[-0.5, 3.0]), -1.5);
    assert_eq!(f("div.rn.f32", &[1.0, 3.0]), 0.333_333_34);
    assert_eq!(f("rcp.rn.f32", &[3.0]), 0.333_333_34);
    assert_eq!(f("sqrt.rn.f32", &[2.0]), std::f32::consts::SQRT_2);
    // One rounding: (1 + 2^-12)^2 - 1 - 2^-11 = 2^-24.
    let e = 1.0 + 2f32.powi(-12);
    assert_eq!(f("fma.rn.f32", &[e, e, -1.0 - 2f32.powi(-11)]), 2f32.powi(-24));
    assert_eq!(f("min.f32", &[f32::NAN, 2.0]), 2.0);
    assert_eq!(f("max.f32", &[2.0, f32::NAN]), 2.0);
    assert_eq!(op("min.f32", &[0, 0x8000_0000]), 0x8000_0000);
    assert_eq!(op("max.f32", &[0x8000_0000, 0]), 0);
    assert_eq!(f("min.f32", &[-1.0, 2.0]), -1.0);
    assert_eq!(f("max.f32", &[-1.0, 2.0]), 2.0);
    assert_eq!(f("neg.f32", &[1.5]), -1.5);
    assert_eq!(f("abs.f32", &[-1.5]), 1.5);
    // Subnormals stay, and the NaN that arithmetic makes is the hardware's.
    assert_eq!(f("mul.rn.f32", &[2f32.powi(-126), 0.5]), 2f32.powi(-127));
    assert_eq!(op("add.rn.f32", &[0x7f80_0000, 0xff80_0000]), 0x7fff_ffff);
}

#[test]
fn halves() {
    let h = |x: f32| u32::from(half::f16::from_f32(x).to_bits());
    let b = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
    let two = |lo: u32, hi: u32| lo | hi << 16;
    assert_eq!(op("add.rn.f16x2", &[two(h(1.0), h(2048.0)), two(h(0.5), h(1.0))]), two(h(1.5), h(2048.0)));
    assert_eq!(op("mul.rn.f16x2", &[two(h(1.5), h(-2.0)), two(h(4.0), h(3.0))]), two(h(6.0), h(-6.0)));
    assert_eq!(op("sub.rn.f16x2", &[two(h(1.0), h(1.0)), two(h(3.0), h(0.25))]), two(h(-2.0), h(0.75)));
    // 2048 * 1 + 1 = 2049 is a tie that goes to 2048; with 2^-24 more it is none.
    assert_eq!(op("fma.rn.f16x2", &[two(h(2048.0), 0), two(h(1.0), 0), two(h(1.0), 0)]), h(2048.0));
    let tiny = h(2f32.powi(-24));
    assert_eq!(
        op("fma.rn.f16x2", &[two(h(1.0), tiny), two(h(2049.0), tiny), two(tiny, 0)]) & 0xffff,
        h(2048.0)
    );
    assert_eq!(op("min.f16x2", &[two(h(1.0), 0x7e00), two(h(2.0), h(3.0))]), two(h(1.0), h(3.0)));
    assert_eq!(op("max.f16x2", &[two(h(1.0), 0x7e00), two(h(2.0), h(3.0))]), two(h(2.0), h(3.0)));
    assert_eq!(op("neg.f16x2", &[two(h(1.0), h(-2.0))]), two(h(-1.0), h(2.0)));
    assert_eq!(op("abs.f16x2", &[two(h(1.0), h(-2.0))]), two(h(1.0), h(2.0)));
    // bf16 has 8 bits: 1 + 2^-8 is a tie, to even; with 2^-30 more it is not, though f32 and f64 alike see it.
    assert_eq!(op("fma.rn.bf16x2", &[b(1.0), b(1.0), b(2f32.powi(-8))]), b(1.0));
    assert_eq!(op("add.rn.bf16x2", &[b(1.0), b(2f32.powi(-9))]), b(1.0));
    assert_eq!(op("mul.rn.bf16x2", &[two(b(3.0), b(0.5)), two(b(5.0), b(8.0))]), two(b(15.0), b(4.0)));
    // Just above or below a tie only a sum that keeps every bit rounds right.
    let x = 1.0 + 2f32.powi(-4); // x * x = 1 + 2^-3 + 2^-8, a tie
    assert_eq!(op("fma.rn.bf16x2", &[b(x), b(x), b(0.0)]), b(1.125));
    assert_eq!(op("fma.rn.bf16x2", &[b(x), b(x), b(2f32.powi(-100))]), b(1.125 + 2f32.powi(-7)));
    assert_eq!(op("fma.rn.bf16x2", &[b(x), b(x), b(-2f32.powi(-100))]), b(1.125));
    let scalar =
        "mov.u16 %h1, 0x3c00;\nmov.u16 %h2, 0x4000;\nadd.rn.f16 %h3, %h1, %h2;\ncvt.u32.u16 %r1, %h3;";
    assert_eq!(one(scalar), h(3.0));
}

#[test]
fn conversions() {
    let c = |ty: &str, x: u32| op(&format!("cvt.{ty}"), &[x]);
    let fc = |ty: &str, x: f32| c(ty, x.to_bits());
    assert_eq!(c("s32.s8", 0x1ff), M1);
    assert_eq!(c("u32.u8", 0x1ff), 0xff);
    assert_eq!(c("s32.s16", 0x8000), 0xffff_8000);
    assert_eq!(c("u32.u16", 0x1_8000), 0x8000);
    assert_eq!(f32::from_bits(c("rn.f32.s32", -7i32 as u32)), -7.0);
    assert_eq!(f32::from_bits(c("rn.f32.u32", 0xffff_ffff)), 4_294_967_296.0);
    assert_eq!(f32::from_bits(c("rn.f32.s8", 0x80)), -128.0);
    assert_eq!(f32::from_bits(c("rn.f32.u8", 0x80)), 128.0);
    assert_eq!(f32::from_bits(c("rn.f32.s16", 0xffff)), -1.0);
    assert_eq!(f32::from_bits(c("rn.f32.u16", 0xffff)), 65535.0);
    for (x, rzi, rni, rmi, rpi) in [(2.5f32, 2, 2, 2, 3), (-2.5, -2, -2, -3, -2), (3.5, 3, 4, 3, 4)] {
        assert_eq!(fc("rzi.s32.f32", x) as i32, rzi);
        assert_eq!(fc("rni.s32.f32", x) as i32, rni);
        assert_eq!(fc("rmi.s32.f32", x) as i32, rmi);
        assert_eq!(fc("rpi.s32.f32", x) as i32, rpi);
        assert_eq!(f32::from_bits(fc("rzi.f32.f32", x)), rzi as f32);
        assert_eq!(f32::from_bits(fc("rni.f32.f32", x)), rni as f32);
        assert_eq!(f32::from_bits(fc("rmi.f32.f32", x)), rmi as f32);
        assert_eq!(f32::from_bits(fc("rpi.f32.f32", x)), rpi as f32);
    }
    assert_eq!(fc("rzi.s32.f32", 3e10), i32::MAX as u32);
    assert_eq!(fc("rzi.s32.f32", f32::NAN), 0);
    assert_eq!(fc("rzi.u32.f32", -1.0), 0);
    assert_eq!(fc("rni.u32.f32", 2.5), 2);
    assert_eq!(fc("rmi.u32.f32", 2.5), 2);
    assert_eq!(fc("rpi.u32.f32", 2.5), 3);
    assert_eq!(
        one("mov.u32 %r2, -1;\ncvt.s64.s32 %rd2, %r2;\nshr.u64 %rd2, %rd2, 32;\ncvt.u32.u64 %r1, %rd2;"),
        M1
    );
    assert_eq!(
        one("mov.u32 %r2, -1;\ncvt.u64.u32 %rd2, %r2;\nshr.u64 %rd2, %rd2, 32;\ncvt.u32.u64 %r1, %rd2;"),
        0
    );
    assert_eq!(one("mov.u32 %r2, 0x12348;\ncvt.u16.u32 %h1, %r2;\ncvt.u32.u16 %r1, %h1;"), 0x2348);
    assert_eq!(one("mov.f32 %f1, 0f3F800000;\ncvt.rn.f16.f32 %h1, %f1;\ncvt.u32.u16 %r1, %h1;"), 0x3c00);
    assert_eq!(one("mov.u16 %h1, 0xc000;\ncvt.f32.f16 %f1, %h1;\nmov.b32 %r1, %f1;"), (-2f32).to_bits());
    assert_eq!(
        one("mov.u16 %h1, 0x0001;\ncvt.f32.f16 %f1, %h1;\nmov.b32 %r1, %f1;"),
        2f32.powi(-24).to_bits()
    );
    assert_eq!(one("mov.u16 %h1, 0xc000;\ncvt.f32.bf16 %f1, %h1;\nmov.b32 %r1, %f1;"), (-2f32).to_bits());
    // To even on a tie, 65520 is the first to become infinite.
    assert_eq!(one("mov.f32 %f1, 0f477FEFFF;\ncvt.rn.f16.f32 %h1, %f1;\ncvt.u32.u16 %r1, %h1;"), 0x7bff);
    assert_eq!(one("mov.f32 %f1, 0f477FF000;\ncvt.rn.f16.f32 %h1, %f1;\ncvt.u32.u16 %r1, %h1;"), 0x7c00);
    assert_eq!(one("mov.f32 %f1, 0f3F808000;\ncvt.rn.bf16.f32 %h1, %f1;\ncvt.u32.u16 %r1, %h1;"), 0x3f80);
    assert_eq!(op("cvt.rn.f16x2.f32", &[1f32.to_bits(), 2f32.to_bits()]), 0x3c00_4000);
    assert_eq!(op("cvt.rn.bf16x2.f32", &[1f32.to_bits(), 2f32.to_bits()]), 0x3f80_4000);
    let long = "mov.u64 %rd2, -3;\ncvt.rn.f32.s64 %f1, %rd2;\nmov.b32 %r1, %f1;";
    assert_eq!(one(long), (-3f32).to_bits());
    let long = "mov.u64 %rd2, 1099511627776;\ncvt.rn.f32.u64 %f1, %rd2;\ncvt.rzi.u64.f32 %rd3, %f1;\nshr.u64 %rd3, %rd3, 20;\ncvt.u32.u64 %r1, %rd3;";
    assert_eq!(one(long), 1 << 20);
    assert_eq!(
        one("mov.f32 %f1, 0fC0400000;\ncvt.rzi.s64.f32 %rd2, %f1;\ncvt.u32.u64 %r1, %rd2;"),
        -3i32 as u32
    );
}

#[test]
fn comparisons_and_selection() {
    let yes = |compare: &str, a: u32, b: u32| {
        one(&format!(
            "mov.u32 %r2, {a};\nmov.u32 %r3, {b};\nsetp.{compare} %p1, %r2, %r3;\nselp.u32 %r1, 1, 0, %p1;"
        ))
    };
    let table = [
        ("eq", [0, 1, 0]),
        ("ne", [1, 0, 1]),
        ("lt", [1, 0, 0]),
        ("le", [1, 1, 0]),
        ("gt", [0, 0, 1]),
        ("ge", [0, 1, 1]),
    ];
    for (c, want) in table {
        assert_eq!([(1, 2), (2, 2), (3, 2)].map(|(a, b)| yes(&format!("{c}.u32"), a, b)), want, "{c}");
        assert_eq!([(M1, 2), (2, 2), (3, 2)].map(|(a, b)| yes(&format!("{c}.s32"), a, b)), want, "{c}");
        let f = |x: f32| x.to_bits();
        assert_eq!(
            [(-1.0, 2.0), (2.0, 2.0), (3.0, 2.0)].map(|(a, b)| yes(&format!("{c}.f32"), f(a), f(b))),
            want,
            "{c}"
        );
        // NaN: ordered comparisons fail, unordered ones hold.
        assert_eq!(yes(&format!("{c}.f32"), f(f32::NAN), f(2.0)), 0, "{c}");
        assert_eq!(yes(&format!("{c}u.f32"), f(f32::NAN), f(2.0)), 1, "{c}u");
        assert_eq!(
            [(-1.0, 2.0), (2.0, 2.0), (3.0, 2.0)].map(|(a, b)| yes(&format!("{c}u.f32"), f(a), f(b))),
            want,
            "{c}u"
        );
    }
    assert_eq!((yes("num.f32", 0, 0), yes("nan.f32", 0, 0x7fc0_0000)), (1, 1));
    assert_eq!(
        (yes("lo.u32", 1, 2), yes("ls.u32", 2, 2), yes("hi.u32", 1, 2), yes("hs.u32", 2, 2)),
        (1, 1, 0, 1)
    );
    let both = "setp.eq.u32 %p1, %r0, 0;\nsetp.eq.and.u32 %p2|%p3, %r0, 1, %p1;\nselp.b32 %r2, 1, 0, %p2;\n\
                selp.b32 %r3, 2, 0, %p3;\nor.b32 %r1, %r2, %r3;";
    assert_eq!(run(both, 2, &[]).unwrap(), [2, 0]);
    let not = "setp.eq.u32 %p1, %r0, 0;\nsetp.eq.or.u32 %p2, %r0, 2, !%p1;\nselp.b32 %r1, 1, 0, %p2;";
    assert_eq!(run(not, 3, &[]).unwrap(), [0, 1, 1]);
    let logic = "setp.eq.u32 %p1, %r0, 0;\nsetp.le.u32 %p2, %r0, 1;\nand.pred %p3, %p1, %p2;\nor.pred %p4, %p1, %p2;\n\
                 xor.pred %p5, %p1, %p2;\nnot.pred %p6, %p5;\nmov.pred %p7, %p6;\nselp.u32 %r1, 1, 0, %p3;\n\
                 @%p4 add.u32 %r1, %r1, 2;\n@%p5 add.u32 %r1, %r1, 4;\n@!%p7 add.u32 %r1, %r1, 8;";
    assert_eq!(run(logic, 3, &[]).unwrap(), [3, 14, 0]);
    assert_eq!(
        one(
            "mov.f32 %f1, 0f3F800000;\nmov.f32 %f2, 0f40000000;\nsetp.lt.f32 %p1, %f1, %f2;\nselp.f32 %f3, %f1, %f2, %p1;\nmov.b32 %r1, %f3;"
        ),
        0x3f80_0000
    );
}

#[test]
fn memory_of_every_width() {
    let data: Vec<u8> = (0..32).map(|i| 0xf0 + i as u8 % 16).collect();
    let at = |load: &str| run(load, 1, &data).unwrap()[0];
    assert_eq!(at("ld.global.u8 %r1, [%rd1+3];"), 0xf3);
    assert_eq!(at("ld.global.s8 %r1, [%rd1+3];"), 0xffff_fff3);
    assert_eq!(at("ld.global.u16 %h1, [%rd1+2];\ncvt.u32.u16 %r1, %h1;"), 0xf3f2);
    assert_eq!(at("ld.global.s16 %r1, [%rd1+2];"), 0xffff_f3f2);
    assert_eq!(at("ld.global.nc.u32 %r1, [%rd1+4];"), 0xf7f6_f5f4);
    assert_eq!(
        at("ld.global.u64 %rd2, [%rd1+8];\nshr.u64 %rd2, %rd2, 32;\ncvt.u32.u64 %r1, %rd2;"),
        0xfffe_fdfc
    );
    assert_eq!(at("ld.global.v2.u32 {%r2, %r1}, [%rd1+8];"), 0xfffe_fdfc);
    assert_eq!(at("ld.global.nc.v4.u32 {%r2, %r3, %r1, %r4}, [%rd1];"), 0xfbfa_f9f8);
    assert_eq!(at("ld.u32 %r1, [%rd1];"), 0xf3f2_f1f0);
    let store = "mov.u32 %r2, 0x12345678;\nst.global.u8 [%rd1+1], %r2;\nst.global.u16 [%rd1+2], %r2;\nld.global.u32 %r1, [%rd1];";
    assert_eq!(at(store), 0x5678_78f0);
    let vector = "mov.u32 %r2, 7;\nmov.u32 %r3, 9;\nst.global.v2.u32 [%rd1+8], {%r2, %r3};\nld.global.u32 %r1, [%rd1+12];";
    assert_eq!(at(vector), 9);
    let shared = "mov.u32 %r2, 7;\nst.shared.u32 [buffer+8], %r2;\nld.shared.u32 %r1, [buffer+8];";
    assert_eq!(at(shared), 7);
    // Generic addresses of shared memory, there and back.
    let generic = "mov.u64 %rd2, buffer;\ncvta.shared.u64 %rd3, %rd2;\nmov.u32 %r2, 5;\nst.u32 [%rd3+4], %r2;\n\
                   cvta.to.shared.u64 %rd4, %rd3;\nld.shared.u32 %r1, [%rd4+4];\ncvta.to.global.u64 %rd5, %rd1;";
    assert_eq!(at(generic), 5);
    let local = ".local .align 4 .b8 depot[16];\nmov.u64 %rd2, depot;\nst.local.u32 [%rd2+4], %r0;\nld.local.u32 %r1, [%rd2+4];";
    assert_eq!(run(local, 3, &[]).unwrap(), [0, 1, 2]);
}

#[test]
fn atomics() {
    let word = |x: u32| x.to_le_bytes().to_vec();
    // 40 threads each get a different old value; the sum is there in the end.
    let mut got = run("atom.global.add.u32 %r1, [%rd1], 2;", 40, &word(10)).unwrap();
    got.sort_unstable();
    assert_eq!(got, (0..40).map(|i| 10 + 2 * i).collect::<Vec<_>>());
    let after =
        |op: &str, start: u32| run(&format!("{op}\nld.global.u32 %r1, [%rd1];"), 1, &word(start)).unwrap()[0];
    assert_eq!(after("red.global.add.u32 [%rd1], 5;", 3), 8);
    assert_eq!(after("atom.global.min.s32 %r2, [%rd1], -1;", 3), M1);
    assert_eq!(after("atom.global.max.u32 %r2, [%rd1], 7;", 3), 7);
    assert_eq!(after("atom.global.min.u32 %r2, [%rd1], 7;", 3), 3);
    assert_eq!(after("atom.global.max.s32 %r2, [%rd1], -1;", 3), 3);
    assert_eq!(after("atom.global.and.b32 %r2, [%rd1], 6;", 3), 2);
    assert_eq!(after("atom.global.or.b32 %r2, [%rd1], 6;", 3), 7);
    assert_eq!(after("atom.global.xor.b32 %r2, [%rd1], 6;", 3), 5);
    assert_eq!(after("atom.global.exch.b32 %r2, [%rd1], 6;", 3), 6);
    assert_eq!(after("atom.global.cas.b32 %r2, [%rd1], 3, 9;", 3), 9);
    assert_eq!(after("atom.global.cas.b32 %r2, [%rd1], 4, 9;", 3), 3);
    assert_eq!(after("atom.global.inc.u32 %r2, [%rd1], 3;", 3), 0);
    assert_eq!(after("atom.global.inc.u32 %r2, [%rd1], 4;", 3), 4);
    let float = "mov.f32 %f1, 0f3F800000;\natom.global.add.f32 %f2, [%rd1], %f1;\nld.global.u32 %r1, [%rd1];";
    assert_eq!(run(float, 1, &word(2f32.to_bits())).unwrap()[0], 3f32.to_bits());
    let shared = "setp.eq.u32 %p1, %r0, 0;\n@%p1 st.shared.u32 [buffer], %r0;\nbar.sync 0;\n\
                  atom.shared.add.u32 %r2, [buffer], 1;\nbar.sync 0;\nld.shared.u32 %r1, [buffer];";
    assert_eq!(run(shared, 70, &[]).unwrap(), [70; 70]);
}
