//! Random blocks of every format with a wanted standard deviation, as fast as memory takes them: levels and inner scales
//! are random bits, only the outermost scale is set. Minimums are set so that values have mean 0, and scales of formats
//! whose levels are not symmetric get a random sign: a mean would add up over the columns of a matrix.

use half::{bf16, f16};
use kernels::testing::Rng;
use quant::DType;

/// How a format's blocks are drawn.
#[derive(Clone, Copy)]
enum Scheme {
    /// Values themselves, spread evenly.
    Float,
    /// An f16 scale at `d`; at `min`, if there is one, an f16 of the scale times the ratio.
    Scaled { d: usize, min: Option<(usize, f32)>, signed: bool },
    /// Q8_0: as `Scaled`, and -128 is no level of it.
    Bytes,
    /// MXFP4's power of two.
    Power,
}

/// Draws blocks of one format.
pub struct Blocks {
    dtype: DType,
    scheme: Scheme,
    /// Standard deviation of the values with a scale of 1.
    unit: f64,
}

impl Blocks {
    /// `None` for Q8_K, which is no format of weights.
    pub fn new(dtype: DType) -> Option<Self> {
        let scaled = |d, min, signed| Scheme::Scaled { d, min, signed };
        let scheme = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => Scheme::Float,
            DType::Q4_0 | DType::Q5_0 | DType::IQ4_NL | DType::IQ4_XS => scaled(0, None, true),
            // Levels 0..=15, 0..=31, 0..=3: the minimum is half the range, times the mean of the inner scales where these
            // and the inner minimums are spread alike.
            DType::Q4_1 => scaled(0, Some((2, -7.5)), false),
            DType::Q5_1 => scaled(0, Some((2, -15.5)), false),
            DType::Q4_K => scaled(0, Some((2, 7.5)), false),
            DType::Q5_K => scaled(0, Some((2, 15.5)), false),
            DType::Q2_K => scaled(80, Some((82, 1.5)), false),
            DType::Q3_K => scaled(108, None, true),
            DType::Q6_K => scaled(208, None, true),
            DType::Q8_0 => Scheme::Bytes,
            DType::MXFP4 => Scheme::Power,
            DType::Q8_K => return None,
        };
        let mut blocks = Self { dtype, scheme, unit: 1.0 };
        if !matches!(scheme, Scheme::Float) {
            blocks.unit = blocks.measure();
        }
        Some(blocks)
    }

    /// The standard deviation that a scale of 1 gives, from 4096 blocks.
    fn measure(&self) -> f64 {
        let f = self.dtype.format();
        let mut bytes = vec![0; 4096 * f.block_bytes];
        let mut values = vec![0.0; 4096 * f.block_len];
        self.fill(0.0, 1.0, &mut Rng(1), &mut bytes);
        (f.dequantize)(&bytes, &mut values);
        (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    }

    /// Whole blocks of values with this standard deviation. A mean other than 0 is for float formats.
    ///
    /// # Panics
    /// If `out` is not whole blocks.
    pub fn fill(&self, mean: f32, deviation: f32, rng: &mut Rng, out: &mut [u8]) {
        let size = self.dtype.format().block_bytes;
        assert!(out.len().is_multiple_of(size), "whole blocks");
        if matches!(self.scheme, Scheme::Float) {
            return self.floats(mean, deviation, rng, out);
        }
        let (words, tail) = out.as_chunks_mut::<8>();
        words.iter_mut().for_each(|w| *w = rng.bits().to_le_bytes());
        tail.copy_from_slice(&rng.bits().to_le_bytes()[..tail.len()]);
        let base = f64::from(deviation) / self.unit;
        for block in out.chunks_exact_mut(size) {
            match self.scheme {
                Scheme::Scaled { d, min, signed } => {
                    let scale = scale(base as f32, signed, rng);
                    block[d..d + 2].copy_from_slice(&scale.to_le_bytes());
                    if let Some((at, ratio)) = min {
                        let min = f16::from_f32(scale.to_f32() * ratio);
                        block[at..at + 2].copy_from_slice(&min.to_le_bytes());
                    }
                }
                Scheme::Bytes => {
                    block[..2].copy_from_slice(&scale(base as f32, false, rng).to_le_bytes());
                    block[2..].iter_mut().for_each(|q| *q = if *q == 0x80 { 0x81 } else { *q });
                }
                Scheme::Power => block[0] = power(base, rng),
                Scheme::Float => unreachable!("drawn above"),
            }
        }
    }

    /// Evenly spread: a range of 2 sqrt(3) deviations.
    fn floats(&self, mean: f32, deviation: f32, rng: &mut Rng, out: &mut [u8]) {
        let reach = deviation * 3f32.sqrt();
        match self.dtype {
            DType::F32 => out.as_chunks_mut().0.iter_mut().for_each(|v| {
                *v = (mean + reach * rng.unit()).to_le_bytes();
            }),
            DType::F16 => out.as_chunks_mut().0.iter_mut().for_each(|v| {
                *v = f16::from_f32(mean + reach * rng.unit()).to_le_bytes();
            }),
            _ => out.as_chunks_mut().0.iter_mut().for_each(|v| {
                *v = bf16::from_f32(mean + reach * rng.unit()).to_le_bytes();
            }),
        }
    }
}

/// A scale up to an eighth off `base`, and never 0.
fn scale(base: f32, signed: bool, rng: &mut Rng) -> f16 {
    let bits = rng.bits();
    let share = (bits >> 40) as f32 / (1u64 << 24) as f32;
    let d = f16::from_f32(base * (0.875 + 0.25 * share)).max(f16::from_bits(1));
    if signed && bits & 1 == 1 { -d } else { d }
}

/// MXFP4's exponent: of the two powers of two around `base` each as often as gives the wanted deviation. A code's value is
/// 2^(e - 128) times an integer, so that a scale of 1 is e = 128.
fn power(base: f64, rng: &mut Rng) -> u8 {
    let below = base.log2().floor();
    // Variances add up: a share s of the upper power gives (1 + 3 s) times the lower one's.
    let upper = ((base / below.exp2()).powi(2) - 1.0) / 3.0;
    let draw = (rng.bits() >> 11) as f64 / (1u64 << 53) as f64;
    (128.0 + below + f64::from(u8::from(draw < upper))).clamp(2.0, 254.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use quant::FORMATS;

    #[test]
    fn every_format_has_the_wanted_deviation_and_no_mean() {
        for f in FORMATS {
            let Some(blocks) = Blocks::new(f.dtype) else {
                assert_eq!(f.dtype, DType::Q8_K);
                continue;
            };
            for want in [0.5f32, 0.01, 0.002] {
                let n = 1 << 20;
                let mut bytes = vec![0; n / f.block_len * f.block_bytes];
                let mut values = vec![0.0; n];
                blocks.fill(0.0, want, &mut Rng(5), &mut bytes);
                (f.dequantize)(&bytes, &mut values);
                let of = |p: i32| values.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / n as f64;
                let (mean, deviation) = (of(1), of(2).sqrt());
                assert!(values.iter().all(|v| v.is_finite()));
                let off = deviation / f64::from(want) - 1.0;
                // Scales as small as 0.002 needs are subnormal f16 in some formats: a few steps.
                assert!(off.abs() < 0.03, "{}: deviation {deviation} instead of {want}", f.name);
                assert!(mean.abs() < 0.01 * f64::from(want), "{}: mean {mean} of {want}", f.name);
            }
        }
    }

    #[test]
    fn q8_0_has_no_level_of_minus_128() {
        let mut bytes = vec![0; 34 * 1000];
        Blocks::new(DType::Q8_0).expect("a format of weights").fill(0.0, 1.0, &mut Rng(5), &mut bytes);
        assert!(bytes.chunks_exact(34).all(|b| b[2..].iter().all(|q| *q != 0x80)));
    }
}
