//! `mma` and `ldmatrix`: where each lane's registers lie in the matrices (PTX ISA, "Matrix multiply-accumulate instructions"), and the
//! products. Knows registers as arrays over lanes.

use crate::float16::{Half, bf16, f16};
use crate::op::Mma;

/// One register of all lanes.
pub type Lanes = [u64; 32];

/// Element (row of A or column of B, k) that part `i` of register `r` of a lane holds; `n` elements lie in a register.
fn place(lane: usize, r: usize, i: usize, n: usize, a: bool) -> (usize, usize) {
    let (group, inside) = (lane / 4, lane % 4);
    // A: registers 0 and 2 hold row `group`, 1 and 3 row `group + 8`; the later pair the second half of k.
    let (row, half) = if a { (group + 8 * (r % 2), r / 2) } else { (group, r) };
    (row, n * inside + i + 4 * n * half)
}

/// Row and column of C or D that register `r` of a lane holds.
fn result(lane: usize, r: usize) -> (usize, usize) {
    (lane / 4 + 8 * (r / 2), 2 * (lane % 4) + r % 2)
}

/// The power of two below which x has no bits as a float of 24 bits; of f32's subnormals where it is small.
fn unit(x: f64) -> f64 {
    let exponent = (x.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    f64::from(exponent.max(-126) - 23).exp2()
}

/// The sum as the coarsest tensor cores take it (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; later ones keep a few more
/// bits): everything is cut, not rounded, at the last of the 24 bits of the largest, and so is the sum.
fn add(terms: impl Iterator<Item = f64> + Clone) -> f32 {
    let sum = terms.clone().sum::<f64>();
    if !sum.is_finite() {
        return sum as f32;
    }
    let cut = |x: f64, unit: f64| (x / unit).trunc() * unit;
    let unit_of_all = unit(terms.clone().fold(0.0, |m, x| m.max(x.abs())));
    let sum: f64 = terms.map(|x| cut(x, unit_of_all)).sum();
    cut(sum, unit(sum)) as f32
}

/// `d = a b + c`: a is 16 (or 8) x k, b k x 8, the registers' order that of [`Mma::registers`].
pub fn multiply(kind: Mma, a: &[Lanes], b: &[Lanes], c: &[Lanes]) -> Vec<Lanes> {
    let whole = !matches!(kind, Mma::F16 | Mma::Bf16);
    // Elements in a register, bits of one.
    let (n, bits) = if whole { (4, 8) } else { (2, 16) };
    let value = |x: u64, of_a: bool| match kind {
        Mma::F16 => f16::wide(x & 0xffff),
        Mma::Bf16 => bf16::wide(x & 0xffff),
        Mma::Bytes { unsigned } | Mma::BytesHalf { unsigned } | Mma::BytesSmall { unsigned } => {
            if unsigned && of_a { f64::from(x as u8) } else { f64::from(x as u8 as i8) }
        }
    };
    let (mut left, mut right) = ([[0.0f64; 32]; 16], [[0.0f64; 32]; 8]);
    for lane in 0..32 {
        for i in 0..n {
            for (r, a) in a.iter().enumerate() {
                let (row, k) = place(lane, r, i, n, true);
                left[row][k] = value(a[lane] >> (bits * i), true);
            }
            for (r, b) in b.iter().enumerate() {
                let (col, k) = place(lane, r, i, n, false);
                right[col][k] = value(b[lane] >> (bits * i), false);
            }
        }
    }
    let depth = 4 * n * b.len();
    let at = |r: usize, lane: usize| {
        let (row, col) = result(lane, r);
        let products = (0..depth).map(|k| left[row][k] * right[col][k]);
        let c = c[r][lane];
        if whole {
            u64::from((c as u32).wrapping_add(products.sum::<f64>() as i32 as u32))
        } else {
            crate::alu::out(add(products.chain([f64::from(f32::from_bits(c as u32))])))
        }
    };
    (0..c.len()).map(|r| std::array::from_fn(|lane| at(r, lane))).collect()
}

/// What each lane gets of an 8 x 8 matrix of 16-bit elements, given by its rows of 16 bytes.
pub fn spread(rows: &[[u8; 16]; 8], transpose: bool) -> Lanes {
    std::array::from_fn(|lane| {
        let element = |j: usize| {
            let (outer, inner) = (lane / 4, 2 * (lane % 4) + j);
            let (row, col) = if transpose { (inner, outer) } else { (outer, inner) };
            u64::from(u16::from_le_bytes([rows[row][2 * col], rows[row][2 * col + 1]]))
        };
        element(0) | element(1) << 16
    })
}

#[cfg(test)]
mod tests {
    use super::{add, place, result, spread};

    /// Shapes and strides of values as CuTe writes a layout: value v of lane l lies at the sum of the strides times v's digits.
    type Values = &'static [(usize, usize)];

    fn at(lanes: [usize; 2], values: Values, lane: usize, mut v: usize) -> usize {
        let mut sum = lane % 4 * lanes[0] + lane / 4 * lanes[1];
        for (shape, stride) in values {
            (sum, v) = (sum + v % shape * stride, v / shape);
        }
        sum
    }

    /// CUTLASS 4.2, cute/atom/mma_traits_sm75.hpp and _sm80.hpp: strides of (l % 4, l / 4) and of values in A [M, K], B [N, K], C [M, N], the
    /// first dimension fastest. Written by others than the ISA's tables, and in use.
    #[test]
    fn fragments_lie_as_in_cutlass() {
        type Fragment = ([usize; 2], Values);
        let c_16: Fragment = ([32, 1], &[(2, 16), (2, 8)]);
        let shapes: [(&str, usize, usize, Fragment, Fragment, Fragment); 4] = [
            (
                "m16n8k16 f16, bf16",
                16,
                2,
                ([32, 1], &[(2, 16), (2, 8), (2, 128)]),
                ([16, 1], &[(2, 8), (2, 64)]),
                c_16,
            ),
            (
                "m16n8k32 s8",
                16,
                4,
                ([64, 1], &[(4, 16), (2, 8), (2, 256)]),
                ([32, 1], &[(4, 8), (2, 128)]),
                c_16,
            ),
            ("m16n8k16 s8", 16, 4, ([64, 1], &[(4, 16), (2, 8)]), ([32, 1], &[(4, 8)]), c_16),
            ("m8n8k16 s8", 8, 4, ([32, 1], &[(4, 8)]), ([32, 1], &[(4, 8)]), ([16, 1], &[(2, 8)])),
        ];
        let count = |values: Values| values.iter().map(|v| v.0).product::<usize>();
        for (name, m, n, a, b, c) in shapes {
            for lane in 0..32 {
                for v in 0..count(a.1) {
                    let (row, k) = place(lane, v / n, v % n, n, true);
                    assert_eq!(row + m * k, at(a.0, a.1, lane, v), "{name}: A, lane {lane}, value {v}");
                }
                for v in 0..count(b.1) {
                    let (col, k) = place(lane, v / n, v % n, n, false);
                    assert_eq!(col + 8 * k, at(b.0, b.1, lane, v), "{name}: B, lane {lane}, value {v}");
                }
                for v in 0..count(c.1) {
                    let (row, col) = result(lane, v);
                    assert_eq!(row + m * col, at(c.0, c.1, lane, v), "{name}: C, lane {lane}, value {v}");
                }
            }
        }
    }

    /// The same of ldmatrix (copy_traits_sm75.hpp, SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T), in bits of a matrix.
    #[test]
    fn matrices_are_spread_as_in_cutlass() {
        let rows: [[u8; 16]; 8] = std::array::from_fn(|r| std::array::from_fn(|b| (16 * r + b) as u8));
        let element = |bit: usize| u64::from(u16::from_le_bytes([(bit / 8) as u8, (bit / 8 + 1) as u8]));
        let (plain, turned) = (spread(&rows, false), spread(&rows, true));
        for lane in 0..32 {
            assert_eq!(plain[lane], element(32 * lane) | element(32 * lane + 16) << 16, "lane {lane}");
            let first = 256 * (lane % 4) + 16 * (lane / 4);
            assert_eq!(turned[lane], element(first) | element(first + 128) << 16, "lane {lane}, turned");
        }
    }

    #[test]
    fn sums_are_cut() {
        let sum = |x: &[f64]| add(x.iter().copied());
        // Beside 2^24 the unit is 2: each of these is lost, though they are 4.5 together.
        assert_eq!(sum(&[1.0, 1.0, 16_777_216.0, 1.0, 1.5]), 16_777_216.0);
        // Beside 2^24 - 1 it is 1; the sum, beyond 2^24, has a unit of 2.
        assert_eq!(sum(&[16_777_215.0, 1.0, 1.0, 1.5, 1.0]), 16_777_218.0);
        assert_eq!(sum(&[1.0, -16_777_215.0, 1.75, 1.0, -1.5]), -16_777_213.0);
        assert_eq!(sum(&[-3.0, 3.0]), 0.0);
        assert_eq!(sum(&[f64::from(f32::MAX), f64::from(f32::MAX)]), f32::INFINITY);
        assert_eq!(sum(&[1e-45, 2e-45]), f32::from_bits(1));
        assert!(sum(&[f64::NAN, 1.0]).is_nan() && sum(&[f64::INFINITY, 1.0]) == f32::INFINITY);
    }
}
