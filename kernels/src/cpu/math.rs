//! Exponentials on lanes. exp2 comes in two parts, 2^f and an integer exponent, so that a softmax can keep its maximum an
//! integer and rescale by exact powers of two. Knows nothing of attention.

use super::lanes::Simd;

/// log2(e).
pub const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// `x = n + f` with integer n, |f| <= 1/2: returns (2^f, n). |x| <= 2^22. Relative error of 2^f below 2^-23.
#[inline(always)]
#[allow(clippy::approx_constant)] // the first coefficient is near ln 2, not ln 2
pub fn exp2_parts<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    // Minimax over [-1/2, 1/2] for the relative error (2e-9 before rounding); constant term 1.
    const C: [f32; 6] =
        [0.693_147_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_887_5, 0.000_153_533_59];
    let n = s.round(x);
    let f = s.sub(x, n);
    (horner(s, &C, f), n)
}

/// 1 + c0 x + c1 x^2 + ...
#[inline(always)]
fn horner<S: Simd>(s: S, c: &[f32; 6], x: S::V) -> S::V {
    let mut p = s.splat(c[5]);
    for c in c[..5].iter().rev() {
        p = s.fma(p, x, s.splat(*c));
    }
    s.fma(p, x, s.splat(1.0))
}

/// e^x, at most 2 units in the last place off while the result is normal; 0 below -104, infinite above 88.73, NaN for NaN.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const C: [f32; 6] = [1.0, 0.499_999_94, 0.166_664_3, 0.041_668_01, 0.008_374_236, 0.001_384_355_7];
    // ln 2 in two parts; the first has trailing zeros, so that its product with n is exact.
    const HI: f32 = 0.693_359_4;
    const LO: f32 = -2.121_944_4e-4;
    // The variable comes second: it is what max and min return for NaN.
    let y = s.min(s.splat(89.0), s.max(s.splat(-105.0), x));
    let n = s.round(s.mul(y, s.splat(LOG2_E)));
    let r = s.fma(n, s.splat(-LO), s.fma(n, s.splat(-HI), y));
    let p = horner(s, &C, r);
    // Two steps: n may pass 127, and the second rounds once into the denormal range.
    let half = s.round(s.mul(n, s.splat(0.5)));
    let v = s.scale2(s.scale2(p, half), s.sub(n, half));
    // scale2 reads NaN as an exponent of its own making: put the NaN back.
    s.pick(x, s.splat(f32::INFINITY), v, s.add(x, v))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::lanes::{Kernel, W};
    use super::*;

    struct Exp([f32; W]);
    impl Kernel for Exp {
        type Out = [f32; W];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; W] {
            let mut out = [0.0; W];
            // SAFETY: sixteen floats each.
            unsafe { s.store(exp(s, s.load(self.0.as_ptr())), out.as_mut_ptr()) };
            out
        }
    }

    struct Exp2([f32; W]);
    impl Kernel for Exp2 {
        type Out = [f32; W];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; W] {
            let mut out = [0.0; W];
            // SAFETY: sixteen floats each.
            unsafe {
                let (p, n) = exp2_parts(s, s.load(self.0.as_ptr()));
                s.store(s.scale2(p, n), out.as_mut_ptr());
            }
            out
        }
    }

    fn ulps(got: f32, want: f64) -> f64 {
        let near = want as f32;
        let ulp = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
        (f64::from(got) - want).abs() / ulp
    }

    #[test]
    fn exponentials_are_within_two_ulp() {
        for isa in Isa::available() {
            let mut worst = [0.0f64; 2];
            for i in 0..400_000 {
                let x = -87.0 + 175.5 * i as f32 / 400_000.0;
                let y = isa.vectorize(Exp([x; W]))[i % W];
                worst[0] = worst[0].max(ulps(y, f64::from(x).exp()));
                let x = -125.0 + 250.0 * i as f32 / 400_000.0;
                let y = isa.vectorize(Exp2([x; W]))[i % W];
                worst[1] = worst[1].max(ulps(y, f64::from(x).exp2()));
            }
            assert!(worst[0] <= 2.0 && worst[1] <= 2.0, "{worst:?} ulp");
        }
    }

    #[test]
    fn exponential_at_its_ends() {
        for isa in Isa::available() {
            let e = |x: f32| isa.vectorize(Exp([x; W]))[3];
            assert_eq!(e(0.0), 1.0);
            assert_eq!(e(f32::NEG_INFINITY), 0.0);
            assert_eq!(e(-200.0), 0.0);
            assert_eq!(e(f32::INFINITY), f32::INFINITY);
            assert_eq!(e(100.0), f32::INFINITY);
            assert!(e(f32::NAN).is_nan());
            assert!(e(-100.0) > 0.0 && (f64::from(e(-100.0)) - (-100f64).exp()).abs() < 1.5e-45);
        }
    }
}
