//! exp(x) for x <= 0 from multiplications and additions alone, so that a seed gives the same text on every platform: the C
//! libraries' `expf` differ in the last bit. Written without branches so that the compiler vectorises the loops.
//!
//! Range reduction to |r| <= ln(2)/2 and a degree-6 Taylor polynomial: relative error below 3e-7 (a test says so).

/// exp(x) for x in [-inf, 0]; 0 below -87. Not meant for NaN.
#[inline(always)]
pub fn exp_neg(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
    let y = if x < -87.0 { -87.0 } else { x };
    let t = y * std::f32::consts::LOG2_E + MAGIC;
    let n = t - MAGIC;
    // ln 2 in two parts; n * HIGH is exact for |n| < 2^9.
    let r = (y - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let scale = f32::from_bits(t.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

const LANES: usize = 16;

/// `out[i] = exp(x[i] - max)`; returns their sum, taken in a fixed order. `max` must be the largest of `x`.
pub fn exp_shifted(x: &[f32], max: f32, out: &mut [f32]) -> f64 {
    assert_eq!(x.len(), out.len());
    let mut lanes = [0f64; LANES];
    let (xs, x_tail) = x.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, o) in xs.iter().zip(outs) {
        for i in 0..LANES {
            o[i] = exp_neg(x[i] - max);
        }
        for i in 0..LANES {
            lanes[i] += f64::from(o[i]);
        }
    }
    for ((x, o), l) in x_tail.iter().zip(out_tail).zip(&mut lanes) {
        *o = exp_neg(x - max);
        *l += f64::from(*o);
    }
    lanes.iter().sum()
}

/// The sum, taken in a fixed order.
pub fn sum(x: &[f32]) -> f64 {
    let (sixteens, tail) = x.as_chunks::<LANES>();
    let mut lanes = [0f64; LANES];
    for x in sixteens {
        for i in 0..LANES {
            lanes[i] += f64::from(x[i]);
        }
    }
    lanes.iter().sum::<f64>() + tail.iter().map(|&v| f64::from(v)).sum::<f64>()
}

/// The largest logit, and whether all of them are usable (no NaN, no +inf).
pub fn max_checked(x: &[f32]) -> (f32, bool) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    let (xs, tail) = x.as_chunks::<LANES>();
    for x in xs {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
            bad[i] |= u32::from(x[i].is_nan() | (x[i] == f32::INFINITY));
        }
    }
    let mut max = f32::NEG_INFINITY;
    for &x in lanes.iter().chain(tail) {
        max = if x > max { x } else { max };
    }
    let ok = bad.iter().all(|&b| b == 0) && tail.iter().all(|&x| x <= f32::MAX);
    (max, ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_f64() {
        let mut worst = 0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp_neg(x)) / want - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst}");
        assert_eq!(exp_neg(0.0), 1.0);
        assert_eq!(exp_neg(-88.0), 0.0);
        assert_eq!(exp_neg(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn max_and_sum() {
        let x: Vec<f32> = (0..1003).map(|i| ((i * 7919) % 1003) as f32 * 0.01 - 5.0).collect();
        let (max, ok) = max_checked(&x);
        assert!(ok && max == x.iter().copied().fold(f32::MIN, f32::max));
        let mut out = vec![0.0; x.len()];
        let sum = exp_shifted(&x, max, &mut out);
        let want: f64 = x.iter().map(|&v| f64::from(v - max).exp()).sum();
        assert!((sum / want - 1.0).abs() < 1e-6);
        for i in [0, 500, 1002] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut y = x.clone();
                y[i] = bad;
                assert!(!max_checked(&y).1);
            }
        }
    }
}
