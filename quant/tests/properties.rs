//! Properties of every format, through the format table alone: no input makes it panic, packing has a bounded error, finite
//! values stay finite, and what is stored exactly comes back exactly.
//! Must not know how a format is laid out.

use proptest::prelude::*;
use quant::{DType, FORMATS, Format};

/// The largest |error| of packing values spread over [-max, max], as a share of max: about twice the step between levels. The
/// search trades the extremes, which it may clip, for a smaller error overall.
const ERROR_SHARE: &[(DType, f32)] = &[
    (DType::F32, 0.0),
    (DType::F16, 1.0 / 2048.0),
    (DType::BF16, 1.0 / 256.0),
    (DType::Q4_0, 0.25),
    (DType::Q4_1, 0.2),
    (DType::Q5_0, 0.12),
    (DType::Q5_1, 0.1),
    (DType::Q8_0, 1.0 / 250.0),
    (DType::Q2_K, 0.8),
    (DType::Q3_K, 0.5),
    (DType::Q4_K, 0.25),
    (DType::Q5_K, 0.12),
    (DType::Q6_K, 0.06),
    (DType::Q8_K, 1.0 / 253.9),
];

/// The smallest f16: what is below is rounded to it or to zero.
const F16_STEP: f32 = 6e-8;

/// Formats that give back exactly what they once gave: packing the result of a packing changes nothing, as long as the scale is
/// a normal f16. (With minimums or scales of scales another choice may be as good.)
const IDEMPOTENT: &[DType] =
    &[DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q5_0, DType::Q8_0, DType::Q8_K];

fn unpack(f: &Format, bytes: &[u8]) -> Vec<f32> {
    let mut y = vec![0.0; bytes.len() / f.block_bytes * f.block_len];
    (f.dequantize)(bytes, &mut y);
    y
}

fn pack(f: &Format, x: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0xaa; f.dtype.row_bytes(x.len()).unwrap()];
    (f.quantize.unwrap())(x, &mut bytes, importance);
    bytes
}

fn writable() -> impl Iterator<Item = &'static Format> {
    FORMATS.iter().filter(|f| f.quantize.is_some())
}

/// 512 values of one magnitude, with some zeros and repeated values among them.
/// `exponents` sets the magnitude, a power of two.
fn values(exponents: std::ops::Range<i32>) -> impl Strategy<Value = Vec<f32>> {
    let one = prop_oneof![6 => -1.0f32..=1.0, 1 => Just(0.0f32), 1 => Just(1.0f32), 1 => Just(-1.0f32)];
    (prop::collection::vec(one, 512), exponents)
        .prop_map(|(v, e)| v.into_iter().map(|x| x * 2f32.powi(e)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 2 * 292)) {
        for f in FORMATS {
            unpack(f, &bytes[..2 * f.block_bytes]);
        }
    }

    #[test]
    fn any_bits_are_packed(
        x in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 512),
        w in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 512),
    ) {
        for f in writable() {
            pack(f, &x, None);
            pack(f, &x, Some(&w));
        }
    }

    #[test]
    fn finite_values_stay_finite(
        x in prop::collection::vec(any::<u32>().prop_map(|b| f32::from_bits(b & !0x4000_0000)), 256),
        huge in prop::collection::vec(-f32::MAX..=f32::MAX, 256),
        w in prop::collection::vec(0.0f32..1e30, 512),
    ) {
        let x = [x, huge].concat();
        for f in writable() {
            for w in [None, Some(&w[..])] {
                let y = unpack(f, &pack(f, &x, w));
                prop_assert!(y.iter().all(|y| !y.is_nan()), "{}", f.name);
                if f.block_len > 1 {
                    prop_assert!(y.iter().all(|y| y.is_finite()), "{}", f.name);
                }
            }
        }
    }

    #[test]
    fn error_is_bounded(x in values(-6..12)) {
        for f in writable() {
            let share = ERROR_SHARE.iter().find(|e| e.0 == f.dtype).expect("a bound for each format").1;
            let y = unpack(f, &pack(f, &x, None));
            for (x, y) in x.chunks(f.block_len).zip(y.chunks(f.block_len)) {
                let max = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                for (x, y) in x.iter().zip(y) {
                    prop_assert!((x - y).abs() <= share * max + F16_STEP, "{}: {x} became {y}, max {max}", f.name);
                }
            }
        }
    }

    #[test]
    fn packing_twice_changes_nothing(x in values(-4..12)) {
        for dtype in IDEMPOTENT {
            let f = dtype.format();
            let once = unpack(f, &pack(f, &x, None));
            let twice = unpack(f, &pack(f, &once, None));
            prop_assert_eq!(&once, &twice, "{}", f.name);
        }
    }

    #[test]
    fn blocks_do_not_see_each_other(x in values(-12..12), w in prop::collection::vec(0.0f32..1.0, 512)) {
        for f in writable() {
            let n = f.block_len.max(32);
            let (whole, w) = (pack(f, &x, Some(&w)), &w);
            let parts = x.chunks(n).zip(w.chunks(n)).flat_map(|(x, w)| pack(f, x, Some(w)));
            prop_assert_eq!(&whole, &parts.collect::<Vec<_>>(), "{}", f.name);
        }
    }
}

#[test]
fn zeros_are_stored_as_zeros() {
    for f in writable() {
        assert!(unpack(f, &pack(f, &[0.0; 256], None)).iter().all(|&y| y == 0.0), "{}", f.name);
        assert!(unpack(f, &pack(f, &[0.0; 256], Some(&[0.0; 256]))).iter().all(|&y| y == 0.0), "{}", f.name);
    }
}

#[test]
fn a_value_that_is_not_finite_shows() {
    for f in writable().filter(|f| f.block_len > 1) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5; 512];
            x[3] = bad;
            let y = unpack(f, &pack(f, &x, None));
            assert!(y[..f.block_len].iter().all(|y| y.is_nan()), "{}: {bad} is hidden", f.name);
            assert!(y[256..].iter().all(|y| y.is_finite()), "{}: {bad} spreads", f.name);
        }
    }
}

#[test]
fn importance_is_heeded() {
    // One value in sixteen matters; its error must fall, at the others' expense.
    let x: Vec<f32> = (0..4096).map(|i| ((i * 7919 % 4093) as f32 / 4093.0 - 0.5) * 0.1).collect();
    let w: Vec<f32> = (0..4096).map(|i| if i % 16 == 1 { 1.0 } else { 0.001 }).collect();
    let searched = [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1];
    let searched = searched.iter().chain(&[DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K]);
    for f in searched.map(|d| d.format()) {
        let error = |y: &[f32]| {
            x.iter().zip(y).skip(1).step_by(16).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt()
        };
        let (plain, aware) =
            (error(&unpack(f, &pack(f, &x, None))), error(&unpack(f, &pack(f, &x, Some(&w)))));
        assert!(aware < 0.7 * plain, "{}: {plain} without, {aware} with importance", f.name);
    }
}

#[test]
fn lengths_that_do_not_match_are_refused() {
    for f in FORMATS {
        let src = vec![0; 2 * f.block_bytes];
        let mut dst = vec![0.0; 2 * f.block_len + 1];
        let refused = std::panic::catch_unwind(move || (f.dequantize)(&src, &mut dst));
        assert!(refused.is_err(), "{} read into too long a destination", f.name);
    }
}
