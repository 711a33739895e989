//! The scale search behind every quantiser: which scale (and minimum) lets a group of values be stored on a few integer levels
//! with the least weighted squared error.
//!
//! The method: try a row of scales, fit each by linear least squares to the levels it leads to, keep the best; for super-blocks,
//! round the fitted scales to their own few bits, then alternate between moving those integers by one and refitting the
//! super-block's f16 scales. Candidates are judged after rounding to f16, by the error that the reader will see, so the search
//! also copes with scales near f16's ends. Weights are the importance of each value, or 1: then plain squared error is minimised.
//!
//! Must not know how any format lays out its bits.

use crate::formats::{F16Le, QK_K};

/// No format with f16 scales reaches beyond this; larger values are cut to it, so that sums of squares stay finite in f32.
const LIMIT: f32 = 4e8;
/// Weight of a value whose importance is zero, relative to the block's largest: it must not be stored as garbage.
const WEIGHT_FLOOR: f32 = 1e-6;
/// The smallest positive f16.
const F16_TINY: f32 = 5.960_464_5e-8;
/// Values summed side by side; fixed, so that sums are the same on every machine.
const LANES: usize = 8;

/// The integer levels of a format, both ends included; zero is among them.
#[derive(Clone, Copy)]
pub struct Levels {
    /// Lowest.
    pub lo: f32,
    /// Highest.
    pub hi: f32,
}

impl Levels {
    /// The level nearest to `v`, ties to even. Not `f32::round`, which would be a call for each value without SSE4.1.
    #[inline(always)]
    fn nearest(self, v: f32) -> f32 {
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves no bits for a fraction
        let v = if v > self.lo { v } else { self.lo };
        let v = if v < self.hi { v } else { self.hi };
        (v + SHIFT) - SHIFT
    }

    /// The level of each value of `x` for `value = scale * level + offset`.
    pub fn of(self, x: &[f32], scale: f32, offset: f32) -> impl Iterator<Item = i32> {
        let inv = inverse(scale);
        x.iter().map(move |x| self.nearest((x - offset) * inv) as i32)
    }
}

/// A group of values (a multiple of 8 of them) and their weights.
#[derive(Clone, Copy)]
pub struct Group<'a> {
    x: &'a [f32],
    w: &'a [f32],
}

/// A block ready for the search: finite values within what f16 scales can express, and weights within (0, 1].
pub struct Block<const N: usize> {
    x: [f32; N],
    w: [f32; N],
}

impl<const N: usize> Block<N> {
    /// `None` if a value is NaN or infinite. Importance that is negative or not finite counts as zero.
    pub fn new(x: &[f32], importance: Option<&[f32]>) -> Option<Self> {
        if !x.iter().all(|x| x.is_finite()) {
            return None;
        }
        let mut block = Self { x: [0.0; N], w: [1.0; N] };
        block.x.copy_from_slice(x);
        block.x.iter_mut().for_each(|x| *x = x.clamp(-LIMIT, LIMIT));
        if let Some(importance) = importance {
            let max = importance.iter().filter(|w| w.is_finite()).fold(0.0f32, |a, &b| a.max(b));
            if max > 0.0 {
                for (w, &i) in block.w.iter_mut().zip(importance) {
                    *w = if i.is_finite() { (i / max).max(WEIGHT_FLOOR) } else { WEIGHT_FLOOR };
                }
            }
        }
        Some(block)
    }

    /// All values as one group.
    pub fn group(&self) -> Group<'_> {
        Group { x: &self.x, w: &self.w }
    }

    /// The `j`-th sub-block of `len` values.
    pub fn sub(&self, j: usize, len: usize) -> Group<'_> {
        Group { x: &self.x[j * len..][..len], w: &self.w[j * len..][..len] }
    }
}

/// What least squares needs to know of a choice of levels q.
struct Sums {
    wq: f32,
    wqq: f32,
    wxq: f32,
}

impl<'a> Group<'a> {
    /// The values, cut to what the format can express.
    pub fn values(self) -> &'a [f32] {
        self.x
    }

    #[inline(always)]
    fn fold<const K: usize>(self, f: impl Fn(f32, f32) -> [f32; K]) -> [f32; K] {
        let mut acc = [[0.0; LANES]; K];
        let (x, w) = (self.x.as_chunks::<LANES>().0, self.w.as_chunks::<LANES>().0);
        for (x, w) in x.iter().zip(w) {
            for l in 0..LANES {
                let terms = f(x[l], w[l]);
                for k in 0..K {
                    acc[k][l] += terms[k];
                }
            }
        }
        acc.map(add_lanes)
    }

    fn sums(self, scale: f32, offset: f32, levels: Levels) -> Sums {
        let inv = inverse(scale);
        let (mut wq, mut wqq, mut wxq) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        let (x, w) = (self.x.as_chunks::<LANES>().0, self.w.as_chunks::<LANES>().0);
        for (x, w) in x.iter().zip(w) {
            let q: [f32; LANES] = std::array::from_fn(|l| levels.nearest((x[l] - offset) * inv));
            for l in 0..LANES {
                let t = w[l] * q[l];
                wq[l] += t;
                wqq[l] += t * q[l];
                wxq[l] += t * x[l];
            }
        }
        let [wq, wqq, wxq] = [wq, wqq, wxq].map(add_lanes);
        Sums { wq, wqq, wxq }
    }

    /// Weighted squared error of storing the group as `scale * level + offset`.
    pub fn error(self, scale: f32, offset: f32, levels: Levels) -> f32 {
        let inv = inverse(scale);
        let [e] = self.fold(|x, w| {
            let e = x - (scale * levels.nearest((x - offset) * inv) + offset);
            [w * e * e]
        });
        e
    }

    fn min_max(self) -> (f32, f32) {
        self.x.iter().fold((f32::MAX, f32::MIN), |(lo, hi), &x| (lo.min(x), hi.max(x)))
    }

    /// The value of largest magnitude, with its sign.
    pub fn extreme(self) -> f32 {
        let (lo, hi) = self.min_max();
        if -lo > hi { lo } else { hi }
    }

    /// The scale for `value = scale * level`; 0 for a group of zeros.
    pub fn fit_symmetric(self, levels: Levels) -> f32 {
        let extreme = self.extreme();
        if extreme == 0.0 {
            return 0.0;
        }
        // The extreme value may lie beyond the last level (by up to one) or, if it is not worth its weight in outliers, on a
        // level well inside; with a negative scale on the other end.
        let (steps, step) = if levels.lo > -10.0 { (16, 0.16) } else { (14, 0.25) };
        let (mut best, mut best_gain) = (extreme / levels.lo, 0.0);
        for end in [levels.lo, -levels.lo] {
            for i in 0..steps {
                let at = end * (1.0 + (0.9 - i as f32 * step) / end.abs());
                let s = self.sums(extreme / at, 0.0, levels);
                let gain = s.wxq * s.wxq / s.wqq;
                // By more than rounding: equals must resolve alike in all sub-blocks, so that their scales fit together.
                if s.wqq > 0.0 && gain > best_gain * (1.0 + 1e-6) {
                    best_gain = gain;
                    best = s.wxq / s.wqq;
                }
            }
        }
        best
    }

    /// Scale and minimum for `value = scale * level + min`, levels 0..=`hi`. With `floor_zero` the minimum is at most 0.
    pub fn fit_affine(self, hi: f32, floor_zero: bool) -> (f32, f32) {
        let levels = Levels { lo: 0.0, hi };
        let (mut lo, top) = self.min_max();
        if floor_zero {
            lo = lo.min(0.0);
        }
        if top <= lo {
            return (0.0, lo);
        }
        let [sw, swx] = self.fold(|x, w| [w, w * x]);
        let fit = |scale: f32, min: f32| {
            let s = self.sums(scale, min, levels);
            let det = sw * s.wqq - s.wq * s.wq;
            let (mut a, mut b) = ((sw * s.wxq - swx * s.wq) / det, (s.wqq * swx - s.wq * s.wxq) / det);
            if det <= 0.0 || (floor_zero && b > 0.0) {
                (a, b) = if s.wqq > 0.0 { (s.wxq / s.wqq, 0.0) } else { (scale, min) };
            }
            (a, b)
        };
        let plain = ((top - lo) / hi, lo);
        let mut best = (plain, self.error(plain.0, plain.1, levels));
        let better = |(scale, min): (f32, f32), than: f32| {
            let e = self.error(scale, min, levels);
            (scale > 0.0 && e < than).then_some(((scale, min), e))
        };
        let step = if hi < 8.0 { 0.12 } else { 0.15 };
        for i in 0..18 {
            let candidate = fit((top - lo) / (hi - 1.2 + i as f32 * step), lo);
            best = better(candidate, best.1).unwrap_or(best);
        }
        // Fitting and choosing levels in turn (Lloyd) until it no longer helps.
        for _ in 0..3 {
            match better(fit(best.0.0, best.0.1), best.1) {
                Some(b) => best = b,
                None => break,
            }
        }
        best.0
    }
}

/// Scales of a super-block of a format with minimums: `value = (d * scale) * level - (dmin * min)`.
pub struct AffineFit<const N: usize> {
    /// Scale of the scales.
    pub d: F16Le,
    /// Scale of the minimums.
    pub dmin: F16Le,
    /// Scale of each sub-block.
    pub scales: [u8; N],
    /// Minimum of each sub-block.
    pub mins: [u8; N],
}

/// Fits `N` sub-blocks with levels 0..=`hi` whose scales and minimums go from 0 to `scale_max`.
pub fn fit_affine_super<const N: usize>(block: &Block<QK_K>, hi: f32, scale_max: i32) -> AffineFit<N> {
    let levels = Levels { lo: 0.0, hi };
    let len = QK_K / N;
    let fits: [(f32, f32); N] = std::array::from_fn(|j| block.sub(j, len).fit_affine(hi, true));
    let max_scale = fits.iter().fold(0.0f32, |a, f| a.max(f.0));
    let max_min = fits.iter().fold(0.0f32, |a, f| a.max(-f.1));
    let near = |v: f32, d: f32| (v * inverse(d) + 0.5).clamp(0.0, scale_max as f32) as i32;
    let round_all = |d: f32, dmin: f32| fits.map(|(s, m)| (near(s, d), near(-m, dmin)));
    let error = |j: usize, d: f32, dmin: f32, (s, m): (i32, i32)| {
        block.sub(j, len).error(d * s as f32, -(dmin * m as f32), levels)
    };
    let total =
        |d: f32, dmin: f32, ints: &[(i32, i32); N]| (0..N).map(|j| error(j, d, dmin, ints[j])).sum::<f32>();

    // The largest scale need not get the largest integer: a few others are tried for the rounding that suits the rest.
    let tries = scale_max.min(20) / 3;
    let at = |max: f32, k: i32| f16_scale(max / (scale_max - k) as f32);
    let mut best = (at(max_scale, 0), at(max_min, 0));
    let mut ints = round_all(best.0, best.1);
    let mut best_error = total(best.0, best.1, &ints);
    for k in 1..2 * tries {
        let try_at =
            if k < tries { (at(max_scale, k), best.1) } else { (best.0, at(max_min, k - tries + 1)) };
        let t = round_all(try_at.0, try_at.1);
        let e = total(try_at.0, try_at.1, &t);
        if e < best_error {
            (best, best_error, ints) = (try_at, e, t);
        }
    }
    for _ in 0..3 {
        let (d, dmin) = best;
        let (mut a, mut b, mut c, mut xa, mut xb) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let mut moved_error = 0.0;
        for (j, int) in ints.iter_mut().enumerate() {
            let (s0, m0) = *int;
            let mut least = error(j, d, dmin, (s0, m0));
            for (ds, dm) in [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)] {
                let (s, m) = (s0 + ds, m0 + dm);
                if (0..=scale_max).contains(&s) && (0..=scale_max).contains(&m) {
                    let e = error(j, d, dmin, (s, m));
                    if e < least {
                        (least, *int) = (e, (s, m));
                    }
                }
            }
            moved_error += least;
            let (s, m) = (int.0 as f32, int.1 as f32);
            let group = block.sub(j, len);
            let q = group.sums(d * s, -(dmin * m), levels);
            let [w, wx] = group.fold(|x, w| [w, w * x]);
            a += f64::from(s * s * q.wqq);
            b += f64::from(s * m * q.wq);
            c += f64::from(m * m * w);
            xa += f64::from(s * q.wxq);
            xb += f64::from(m * wx);
        }
        let det = a * c - b * b;
        let mut refit = (((xa * c - b * xb) / det) as f32, ((b * xa - a * xb) / det) as f32);
        if !(det > 1e-9 * a * c && refit.1 >= 0.0) {
            refit = if a > 0.0 { (((xa + f64::from(dmin) * b) / a) as f32, dmin) } else { best };
        }
        let refit = (f16_scale(refit.0), f16_scale(refit.1));
        let e = total(refit.0, refit.1, &ints);
        if refit == best || e >= moved_error {
            break;
        }
        best = refit;
    }
    AffineFit {
        d: F16Le::from_f32(best.0),
        dmin: F16Le::from_f32(best.1),
        scales: ints.map(|i| i.0 as u8),
        mins: ints.map(|i| i.1 as u8),
    }
}

/// Scales of a super-block without minimums: `value = (d * scale) * level`.
pub struct SymmetricFit<const N: usize> {
    /// Scale of the scales.
    pub d: F16Le,
    /// Scale of each sub-block.
    pub scales: [i8; N],
}

/// Fits `N` sub-blocks whose scales go from `-scale_max` to `scale_max - 1`.
pub fn fit_symmetric_super<const N: usize>(
    block: &Block<QK_K>,
    levels: Levels,
    scale_max: i32,
) -> SymmetricFit<N> {
    let len = QK_K / N;
    let fits: [f32; N] = std::array::from_fn(|j| block.sub(j, len).fit_symmetric(levels));
    let max = fits.iter().fold(0.0f32, |a, &s| if s.abs() > a.abs() { s } else { a });
    let (lo, hi) = (-scale_max, scale_max - 1);
    let round_all =
        |d: f32| fits.map(|s| (s * inverse(d)).round_ties_even().clamp(lo as f32, hi as f32) as i32);
    let error = |j: usize, d: f32, s: i32| block.sub(j, len).error(d * s as f32, 0.0, levels);
    let total = |d: f32, ints: &[i32; N]| (0..N).map(|j| error(j, d, ints[j])).sum::<f32>();

    let mut best = f16_scale(max / lo as f32);
    let mut ints = round_all(best);
    let mut best_error = total(best, &ints);
    for k in 1..8 {
        let d = f16_scale(max / (lo + k) as f32);
        let t = round_all(d);
        let e = total(d, &t);
        if e < best_error {
            (best, best_error, ints) = (d, e, t);
        }
    }
    for _ in 0..3 {
        let d = best;
        let (mut a, mut xa, mut moved_error) = (0.0, 0.0, 0.0);
        for (j, int) in ints.iter_mut().enumerate() {
            let s0 = *int;
            let mut least = error(j, d, s0);
            for s in [s0 - 1, s0 + 1] {
                if (lo..=hi).contains(&s) {
                    let e = error(j, d, s);
                    if e < least {
                        (least, *int) = (e, s);
                    }
                }
            }
            moved_error += least;
            let s = *int as f32;
            let q = block.sub(j, len).sums(d * s, 0.0, levels);
            a += f64::from(s * s * q.wqq);
            xa += f64::from(s * q.wxq);
        }
        let refit = if a > 0.0 { f16_scale((xa / a) as f32) } else { best };
        let e = total(refit, &ints);
        if refit == best || e >= moved_error {
            break;
        }
        best = refit;
    }
    SymmetricFit { d: F16Le::from_f32(best), scales: ints.map(|s| s as i8) }
}

/// The candidate (scale, offset) of least error.
pub fn least_error(
    group: Group<'_>,
    levels: Levels,
    candidates: impl Iterator<Item = (f32, f32)>,
) -> (f32, f32) {
    let mut best = ((0.0, 0.0), f32::MAX);
    for c in candidates {
        let e = group.error(c.0, c.1, levels);
        if e < best.1 {
            best = (c, e);
        }
    }
    best.0
}

/// The f16 scale for `value = scale * level`. Among the candidates is every scale that puts the extreme value on a level, so
/// values that already are multiples of an f16 come back exactly.
pub fn symmetric_f16(group: Group<'_>, levels: Levels) -> f32 {
    let (fitted, extreme) = (group.fit_symmetric(levels), group.extreme());
    // Negative levels suffice: there is one more of them, and a scale of the other sign mirrors the rest.
    let on_levels = (levels.lo as i32..0).map(|q| f16_beside(extreme / q as f32, 0));
    let candidates = [0, 1, -1].map(|ulps| f16_beside(fitted, ulps)).into_iter().chain(on_levels);
    least_error(group, levels, candidates.map(|d| (d, 0.0))).0
}

/// The f16 scale and minimum for `value = scale * level + min`.
pub fn affine_f16(group: Group<'_>, levels: Levels) -> (f32, f32) {
    let (lo, top) = group.min_max();
    if lo == top {
        // One value: the scale makes up for what rounding took from the minimum.
        let min = f16_beside(lo, 0);
        let min = if min > lo { f16_beside(lo, if lo < 0.0 { 1 } else { -1 }) } else { min };
        return least_error(
            group,
            levels,
            (0..=levels.hi as i32).map(|q| (f16_beside((lo - min) / q.max(1) as f32, 0), min)),
        );
    }
    let fitted = group.fit_affine(levels.hi, false);
    let plain = ((top - lo) / levels.hi, lo);
    let steps = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)];
    let candidates = [fitted, plain]
        .into_iter()
        .flat_map(|(d, m)| steps.map(|(a, b)| (f16_beside(d, a), f16_beside(m, b))));
    least_error(group, levels, candidates)
}

fn add_lanes(a: [f32; LANES]) -> f32 {
    ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]))
}

/// `1 / scale`, or 0: then every value is stored as the level nearest to 0.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Rounded to f16, but neither to infinity nor (unless it is zero) to zero.
pub fn f16_scale(x: f32) -> f32 {
    if x == 0.0 || x.is_nan() {
        return 0.0;
    }
    F16Le::from_f32(x.abs().clamp(F16_TINY, 65504.0).copysign(x)).to_f32()
}

/// Rounded to f16 within its range, `ulps` steps away from zero (towards it, if negative).
pub fn f16_beside(x: f32, ulps: i32) -> f32 {
    let bits = i32::from(F16Le::from_f32(x.abs().min(65504.0)).to_bits());
    let bits = (bits + ulps).clamp(0, 0x7bff) as u16;
    F16Le(bits.to_le_bytes()).to_f32().copysign(x)
}
