//! The router of a mixture of experts: exact f32 logits, probabilities, group limits, the best few.
//! DeepSeek-V2 (arXiv:2405.04434, section 2.2.2), DeepSeek-V3 (arXiv:2412.19437, section 2.1.2). Knows one row at a time.

use super::isa::Isa;
use super::lanes::{Kernel, Simd, W};
use super::matmul::with_scratch;
use super::scratch::Shared;
use super::{Pool, math};
use crate::backend::{Gating, GroupScore, Router, Routes};
use crate::{KernelError, Limits, View};
use quant::DType;

/// Kept between calls.
#[derive(Default)]
pub struct Memory {
    logits: Vec<f32>,
    choice: Vec<f32>,
    groups: Vec<f32>,
    chosen: Vec<usize>,
    kept: Vec<usize>,
}

impl Memory {
    /// Makes room for calls within the limits.
    pub fn reserve(&mut self, l: &Limits) -> Result<(), KernelError> {
        let n = l.tokens * l.experts;
        let fail = |_| KernelError::Memory { what: "router", bytes: 4 * n };
        self.logits.try_reserve_exact(n.saturating_sub(self.logits.len())).map_err(fail)?;
        self.choice.try_reserve_exact(l.experts.saturating_sub(self.choice.len())).map_err(fail)
    }
}

struct Dot(*const f32, *const f32, usize);

impl Kernel for Dot {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Dot(a, b, n) = self;
        // SAFETY: n values are readable (unaligned) at both.
        unsafe {
            let mut acc = [s.splat(0.0); 4];
            let whole = n / W * W;
            for (i, at) in (0..whole).step_by(W).enumerate() {
                acc[i % 4] = s.fma(s.load(a.add(at)), s.load(b.add(at)), acc[i % 4]);
            }
            let mut sum = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
            for at in whole..n {
                sum += a.add(at).read_unaligned() * b.add(at).read_unaligned();
            }
            sum
        }
    }
}

/// Turns logits into probabilities (before the sum, for softmax).
struct Gate<'a>(&'a mut [f32], Gating);

impl Kernel for Gate<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Gate(p, gating) = self;
        let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for chunk in p.chunks_mut(W) {
            let mut v = [0.0; W];
            v[..chunk.len()].copy_from_slice(chunk);
            // SAFETY: sixteen floats.
            unsafe {
                let x = s.load(v.as_ptr());
                let y = match gating {
                    Gating::Sigmoid => math::sigmoid(s, x),
                    Gating::Softmax => math::exp(s, s.sub(x, s.splat(max))),
                };
                s.store(y, v.as_mut_ptr());
            }
            chunk.copy_from_slice(&v[..chunk.len()]);
        }
        if gating == Gating::Softmax {
            let sum: f32 = p.iter().sum();
            p.iter_mut().for_each(|p| *p /= sum);
        }
    }
}

/// Logits `[n, experts]`: each a dot product in f32, in 64 lanes summed in a fixed order.
fn logits(pool: &Pool, isa: Isa, r: &Router<'_>, x: View<'_>, out: &mut [f32]) {
    // Rows of the input outside: the weights of eight experts stay in the second-level cache, a prompt's rows do not.
    const EXPERTS: usize = 8;
    let (e, d) = (r.weight.rows(), x.cols());
    let ptr = Shared(out.as_mut_ptr());
    let task = |i: usize| {
        let experts = i * EXPERTS..e.min((i + 1) * EXPERTS);
        let dots = |w: &[*const f32]| {
            for t in 0..x.rows() {
                for (w, row) in w.iter().zip(experts.clone()) {
                    let y = isa.vectorize(Dot(*w, x.row(t).as_ptr(), d));
                    // SAFETY: inside [n, experts]; this expert is this task's alone.
                    unsafe { *ptr.at(t * e + row) = y };
                }
            }
        };
        let mut w = [std::ptr::null(); EXPERTS];
        let w = &mut w[..experts.len()];
        if r.weight.dtype() == DType::F32 {
            w.iter_mut().zip(experts.clone()).for_each(|(w, row)| *w = r.weight.row(0, row).as_ptr().cast());
            dots(w);
        } else {
            with_scratch(experts.len() * d, |rows| {
                for ((w, to), row) in w.iter_mut().zip(rows.chunks_exact_mut(d)).zip(experts.clone()) {
                    (r.weight.dtype().format().dequantize)(r.weight.row(0, row), to);
                    *w = to.as_ptr();
                }
                dots(w);
            });
        }
    };
    let tasks = e.div_ceil(EXPERTS);
    pool.share(tasks, x.rows() * e * d, task);
}

/// See `Device::route`.
pub fn route(pool: &Pool, isa: Isa, mem: &mut Memory, r: Router<'_>, x: View<'_>, routes: &mut Routes) {
    let experts = r.weight.rows();
    routes.used = r.used;
    routes.ids.clear();
    routes.weights.clear();
    mem.logits.clear();
    mem.logits.resize(x.rows() * experts, 0.0);
    logits(pool, isa, &r, x, &mut mem.logits);
    let Memory { logits, choice, groups, chosen, kept } = mem;
    for p in logits.chunks_exact_mut(experts) {
        isa.vectorize(Gate(p, r.gating));
        choice.clear();
        choice.extend_from_slice(p);
        if let Some(c) = r.correction {
            choice.iter_mut().zip(c.data.iter()).for_each(|(p, c)| *p += c);
        }
        if let Some(g) = r.groups {
            let size = experts / g.count;
            groups.clear();
            for c in choice.chunks(size) {
                best(c, 2.min(size), chosen);
                groups.push(match g.score {
                    GroupScore::Max => c[chosen[0]],
                    GroupScore::Top2Sum => chosen.iter().map(|&i| c[i]).sum(),
                });
            }
            best(groups, g.used, kept);
            for (i, c) in choice.chunks_mut(size).enumerate() {
                if !kept.contains(&i) {
                    c.fill(f32::NEG_INFINITY);
                }
            }
        }
        best(choice, r.used, chosen);
        let sum: f32 = if r.normalize { chosen.iter().map(|&e| p[e]).sum::<f32>() + 1e-20 } else { 1.0 };
        for &e in chosen.iter() {
            routes.ids.push(e as u32);
            routes.weights.push(p[e] / sum * r.scale);
        }
    }
}

/// Indices of the `n` largest values, largest first, ties to the lower index, NaN above all: `n` is small, so an insertion
/// into a short list beats a sort.
fn best(v: &[f32], n: usize, out: &mut Vec<usize>) {
    out.clear();
    for (i, x) in v.iter().enumerate() {
        if out.len() == n && x.total_cmp(&v[out[n - 1]]).is_le() {
            continue;
        }
        let at = out.partition_point(|&j| v[j].total_cmp(x).is_ge());
        out.truncate(n - 1);
        out.insert(at, i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Groups;
    use crate::{HostBytes, Vector, Weight};

    /// The same semantics with sorts, in f64 up to the choice.
    fn twin(r: &Router<'_>, w: &[f32], x: &[f32]) -> Vec<(usize, f64)> {
        let e = r.weight.rows();
        let d = x.len();
        let mut p: Vec<f64> =
            (0..e).map(|i| (0..d).map(|j| f64::from(w[i * d + j]) * f64::from(x[j])).sum()).collect();
        match r.gating {
            Gating::Sigmoid => p.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp())),
            Gating::Softmax => {
                let sum: f64 = p.iter().map(|v| v.exp()).sum();
                p.iter_mut().for_each(|v| *v = v.exp() / sum);
            }
        }
        let mut c: Vec<f64> = p.clone();
        if let Some(b) = r.correction {
            c.iter_mut().zip(b.data.iter()).for_each(|(c, b)| *c += f64::from(*b));
        }
        let sorted = |v: &[f64]| {
            let mut o: Vec<usize> = (0..v.len()).collect();
            o.sort_by(|&a, &b| v[b].total_cmp(&v[a]));
            o
        };
        if let Some(g) = r.groups {
            let size = e / g.count;
            let scores: Vec<f64> = c
                .chunks(size)
                .map(|c| {
                    let o = sorted(c);
                    if g.score == GroupScore::Max { c[o[0]] } else { o.iter().take(2).map(|&i| c[i]).sum() }
                })
                .collect();
            let keep = sorted(&scores);
            for (i, c) in c.chunks_mut(size).enumerate() {
                if !keep[..g.used].contains(&i) {
                    c.fill(f64::NEG_INFINITY);
                }
            }
        }
        let ids = &sorted(&c)[..r.used];
        let sum = if r.normalize { ids.iter().map(|&i| p[i]).sum() } else { 1.0 };
        ids.iter().map(|&i| (i, p[i] / sum * f64::from(r.scale))).collect()
    }

    #[test]
    fn choices_match_the_twin() {
        let mut seed = 1u32;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for (e, used, count) in [(8, 2, 1), (64, 6, 1), (64, 6, 8), (256, 8, 8), (160, 6, 8), (128, 8, 1)] {
            let d = 100;
            let n = 9;
            let w: Vec<f32> = (0..e * d).map(|_| next()).collect();
            let x: Vec<f32> = (0..n * d).map(|_| next() * 0.3).collect();
            let bytes = HostBytes::from_vec(w.iter().flat_map(|v| v.to_le_bytes()).collect());
            let weight = Weight::host(DType::F32, 1, e, d, bytes).unwrap();
            let bias = Vector::new((0..e).map(|_| next() * 0.1).collect());
            for (gating, score, correction) in [
                (Gating::Softmax, GroupScore::Max, None),
                (Gating::Sigmoid, GroupScore::Top2Sum, Some(&bias)),
            ] {
                let groups = (count > 1).then_some(Groups { count, used: 4, score });
                let normalize = gating == Gating::Sigmoid;
                let weight = &weight;
                let r = Router { weight, gating, correction, groups, used, normalize, scale: 2.5 };
                let mut seen: Option<Routes> = None;
                for isa in Isa::available() {
                    for threads in [1, 3] {
                        let mut routes = Routes::default();
                        let pool = Pool::new(threads);
                        let rows = View::from_host(&x, d);
                        route(&pool, isa, &mut Memory::default(), r, rows, &mut routes);
                        for t in 0..n {
                            let want = twin(&r, &w, &x[t * d..][..d]);
                            for (k, (id, p)) in want.iter().enumerate() {
                                assert_eq!(routes.ids[t * used + k] as usize, *id, "{e} experts, token {t}");
                                assert!((f64::from(routes.weights[t * used + k]) - p).abs() < 2e-6);
                            }
                            // Alone, to the bit.
                            let mut one = Routes::default();
                            let row = View::from_host(&x[t * d..][..d], d);
                            route(&pool, isa, &mut Memory::default(), r, row, &mut one);
                            assert_eq!(one.weights, &routes.weights[t * used..][..used]);
                        }
                        if let Some(s) = &seen {
                            assert_eq!(s.ids, routes.ids);
                        }
                        seen = Some(routes);
                    }
                }
            }
        }
    }

    #[test]
    fn the_best_with_ties_and_nan() {
        let mut out = Vec::new();
        best(&[1.0, 3.0, 3.0, 2.0], 3, &mut out);
        assert_eq!(out, [1, 2, 3]);
        best(&[f32::NAN, 3.0, f32::NAN, 2.0], 3, &mut out);
        assert_eq!(out, [0, 2, 1]);
        best(&[5.0], 1, &mut out);
        assert_eq!(out, [0]);
    }
}
