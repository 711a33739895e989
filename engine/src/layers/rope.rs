//! Rotary embedding tables: frequencies, their scaling, and cosines and sines per position, from f64 angles.
//!
//! RoPE: arXiv:2104.09864. YaRN: arXiv:2309.00071. Positions may pass 2^31: angles are f64 throughout.

use crate::EngineError;
use crate::kv::Arena;
use kernels::{Buf, Device, View};

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

    /// Radians per position, `[dims / 2]`.
    pub fn freqs(&self) -> &[f64] {
        &self.freqs
    }

    /// Rotated dimensions.
    pub fn dims(&self) -> usize {
        self.freqs.len() * 2
    }

    /// Fills `out` with one row per position: dims/2 cosines, then dims/2 sines.
    pub fn table(&self, positions: &[u64], out: &mut Vec<f32>) {
        out.clear();
        out.resize(positions.len() * self.dims(), 0.0);
        for (&p, row) in positions.iter().zip(out.chunks_exact_mut(self.dims())) {
            let (cos, sin) = row.split_at_mut(self.freqs.len());
            for ((f, c), s) in self.freqs.iter().zip(cos).zip(sin) {
                let turned = turn(p, *f);
                *c = (turned.0 * self.magnitude) as f32;
                *s = (turned.1 * self.magnitude) as f32;
            }
        }
    }
}

/// Cosine and sine of p f. What rounding takes off the product is given back, so that the difference of two positions counts
/// alike wherever they lie.
pub(crate) fn turn(p: u64, f: f64) -> (f64, f64) {
    let angle = p as f64 * f;
    let (sin, cos) = angle.sin_cos();
    // Below, the rest is under 2^-32 and no f32 shows it.
    if p < 1 << 20 {
        return (cos, sin);
    }
    let (rest_sin, rest_cos) = (p as f64).mul_add(f, -angle).sin_cos();
    (cos * rest_cos - sin * rest_sin, sin * rest_cos + cos * rest_sin)
}

/// The cosines and sines of a batch's rows, made when a layer asks and kept as long as its positions are the same.
pub struct RopeTable {
    rope: Rope,
    /// `[n, dims]`.
    own: Buf,
    /// `[n, dims]`: at the positions where queries look at sinks.
    sink: Option<Buf>,
    /// Pass and set of positions that the two were made for.
    made: [Option<(u64, usize)>; 2],
    angles: Vec<f32>,
}

/// One layer's rotations, `[n, dims]`: dims/2 cosines, then dims/2 sines.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    /// Of keys, and of queries looking at the window.
    pub own: View<'a>,
    /// Of queries looking at sinks, where they differ.
    pub sink: Option<View<'a>>,
}

impl RopeTable {
    /// For batches of `n` rows; `sinks`: the cache may have some.
    pub fn new(dev: &Device, rope: &Rope, n: usize, sinks: bool) -> Result<Self, EngineError> {
        let own = dev.alloc(n, rope.dims())?;
        let sink = if sinks { Some(dev.alloc(n, rope.dims())?) } else { None };
        Ok(Self { rope: rope.clone(), own, sink, made: [None; 2], angles: Vec::new() })
    }

    /// The rotations of the batch that the cache has begun, in layer `l`.
    pub fn at(&mut self, dev: &Device, cache: &Arena, l: usize) -> Result<Angles<'_>, EngineError> {
        let (set, positions) = cache.positions(l);
        let n = positions.len();
        let made = Some((cache.pass(), set));
        if self.made[0] != made {
            self.rope.table(positions, &mut self.angles);
            dev.write(self.own.view_mut(n), &self.angles)?;
            self.made[0] = made;
        }
        let sink = match (cache.sink_positions(l), &mut self.sink) {
            (None, _) => None,
            (Some(_), None) => {
                return Err(EngineError::Option(
                    "the cache has sinks, but no buffers for them were made".into(),
                ));
            }
            (Some((set, positions)), Some(sink)) => {
                let made = Some((cache.pass(), set));
                if self.made[1] != made {
                    self.rope.table(positions, &mut self.angles);
                    dev.write(sink.view_mut(n), &self.angles)?;
                    self.made[1] = made;
                }
                Some(sink.view(n))
            }
        };
        Ok(Angles { own: self.own.view(n), sink })
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
    fn a_rotation_and_its_inverse_cancel_far_out() {
        // 1/3 is no f64: its product with a far position is rounded.
        let near = (5f64 / 3.0).sin_cos();
        for base in [1u64 << 31, 1 << 40, (1 << 50) + 12_345] {
            let (a, b) = (turn(base + 5, 1.0 / 3.0), turn(base, 1.0 / 3.0));
            let (cos, sin) = (a.0 * b.0 + a.1 * b.1, a.1 * b.0 - a.0 * b.1);
            assert!((sin - near.0).abs() < 1e-12 && (cos - near.1).abs() < 1e-12, "{base}");
        }
    }

    #[test]
    fn bad_parameters_are_refused() {
        assert!(Rope::new(3, 10_000.0, Scaling::None, None).is_err());
        assert!(Rope::new(4, f64::NAN, Scaling::None, None).is_err());
        assert!(Rope::new(4, 1e4, Scaling::None, Some(vec![1.0])).is_err());
    }
}
