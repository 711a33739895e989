//! Rotary embedding tables: frequencies, their scaling, and cosines and sines per position, from f64 angles.
//!
//! RoPE: arXiv:2104.09864. YaRN: arXiv:2309.00071. Positions may pass 2^31: angles are f64 throughout.

/// How frequencies are stretched for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// As trained.
    None,
    /// All angles divided by the factor.
    Linear(f64),
    /// YaRN's ramp between interpolated and original frequencies.
    Yarn {
        /// Context extension.
        factor: f64,
        /// Trained context.
        original_context: f64,
        /// Rotations above which a dimension is left alone.
        beta_fast: f64,
        /// Rotations below which it is interpolated.
        beta_slow: f64,
        /// Factor on cos and sin, if the file sets it; else 1 + 0.1 ln factor.
        attn_factor: Option<f64>,
        /// A further factor on cos and sin.
        extra_factor: f64,
    },
}

/// The rotary embedding of one kind of layer.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `[dims / 2]` radians per position.
    freqs: Vec<f64>,
    /// Factor on cos and sin.
    magnitude: f64,
}

impl Rope {
    /// Frequencies `base^(-2i/dims)`, divided by `freq_factors[i]` (Llama 3's `rope_freqs.weight`) and scaled.
    ///
    /// # Errors
    /// Says what is wrong: odd dims, a base that is not above 1, factors of another length or not positive.
    pub fn new(
        dims: usize,
        base: f64,
        scaling: Scaling,
        freq_factors: Option<Vec<f32>>,
    ) -> Result<Self, String> {
        if dims == 0 || !dims.is_multiple_of(2) {
            return Err(format!("{dims} rotary dimensions; an even number is needed"));
        }
        if !base.is_finite() || base <= 1.0 {
            return Err(format!("frequency base {base} is not above 1"));
        }
        let mut freqs: Vec<f64> = (0..dims / 2).map(|i| base.powf(-2.0 * i as f64 / dims as f64)).collect();
        if let Some(f) = freq_factors {
            if f.len() != freqs.len() || f.iter().any(|v| !v.is_finite() || *v <= 0.0) {
                return Err(format!(
                    "rope_freqs.weight has {} values for {dims} dimensions, or bad ones",
                    f.len()
                ));
            }
            freqs.iter_mut().zip(f).for_each(|(x, f)| *x /= f64::from(f));
        }
        let mut magnitude = 1.0;
        match scaling {
            Scaling::None => {}
            Scaling::Linear(factor) => freqs.iter_mut().for_each(|x| *x /= factor),
            Scaling::Yarn { factor, original_context, beta_fast, beta_slow, attn_factor, extra_factor } => {
                // The dimension at which a full context makes `rotations` turns (YaRN, section 3.2).
                let turns = |rotations: f64| {
                    let x = original_context / (rotations * 2.0 * std::f64::consts::PI);
                    dims as f64 * x.ln() / (2.0 * base.ln())
                };
                let low = turns(beta_fast).floor().max(0.0);
                let high = turns(beta_slow).ceil().min(dims as f64 - 1.0);
                for (i, x) in freqs.iter_mut().enumerate() {
                    let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    *x = *x / factor * ramp + *x * (1.0 - ramp);
                }
                magnitude = attn_factor.unwrap_or(yarn_mscale(factor, 1.0)) * extra_factor;
            }
        }
        Ok(Self { freqs, magnitude })
    }

    /// The same frequencies with another factor on cos and sin.
    pub fn with_magnitude(self, magnitude: f64) -> Self {
        Self { magnitude, ..self }
    }

    /// Rotated dimensions.
    pub fn dims(&self) -> usize {
        self.freqs.len() * 2
    }

    /// Fills `out` with one row per position: dims/2 cosines, then dims/2 sines.
    pub fn table(&self, positions: &[u64], out: &mut Vec<f32>) {
        out.clear();
        for &p in positions {
            let angle = |f: &f64| p as f64 * f;
            out.extend(self.freqs.iter().map(|f| (angle(f).cos() * self.magnitude) as f32));
            out.extend(self.freqs.iter().map(|f| (angle(f).sin() * self.magnitude) as f32));
        }
    }
}

/// YaRN's attention factor: `0.1 m ln(factor) + 1`, or 1 without extension.
pub fn yarn_mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yarn_leaves_fast_dimensions_and_interpolates_slow_ones() {
        let yarn = Scaling::Yarn {
            factor: 40.0,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attn_factor: None,
            extra_factor: 1.0,
        };
        let plain = Rope::new(64, 10_000.0, Scaling::None, None).unwrap();
        let r = Rope::new(64, 10_000.0, yarn, None).unwrap();
        // Corrections for DeepSeek-V2-Lite's geometry: low = 10, high = 23.
        assert_eq!(r.freqs[..=10], plain.freqs[..=10]);
        assert!(r.freqs[11] < plain.freqs[11]);
        for i in 23..32 {
            assert!((r.freqs[i] * 40.0 / plain.freqs[i] - 1.0).abs() < 1e-12);
        }
        assert!((r.magnitude - (1.0 + 0.1 * 40f64.ln())).abs() < 1e-12);
    }

    #[test]
    fn far_positions_keep_their_angle() {
        let r = Rope::new(2, 10_000.0, Scaling::None, None).unwrap();
        let mut t = Vec::new();
        r.table(&[1 << 33], &mut t);
        assert!((f64::from(t[0]) - ((1u64 << 33) as f64).cos()).abs() < 1e-7);
    }

    #[test]
    fn bad_parameters_are_refused() {
        assert!(Rope::new(3, 10_000.0, Scaling::None, None).is_err());
        assert!(Rope::new(4, f64::NAN, Scaling::None, None).is_err());
        assert!(Rope::new(4, 1e4, Scaling::None, Some(vec![1.0])).is_err());
    }
}
