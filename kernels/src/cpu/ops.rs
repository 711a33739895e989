//! Norms, rotary embedding, activations: row operations on lanes. Knows rows; nothing of batches or threads.

use super::isa::Isa;
use super::lanes::{Kernel, Simd, W};
use super::math::sigmoid;
use crate::backend::{Activation, RopeStyle};

struct RmsNorm<'a> {
    x: *const f32,
    out: *mut f32,
    w: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.w.len();
        let whole = n / W * W;
        // SAFETY: x and out hold n values each; they may be the same row: each vector is read before it is written.
        unsafe {
            let mut acc = [s.splat(0.0); 4];
            for (i, at) in (0..whole).step_by(W).enumerate() {
                let v = s.load(self.x.add(at));
                acc[i % 4] = s.fma(v, v, acc[i % 4]);
            }
            let mut squares = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
            for at in whole..n {
                squares += *self.x.add(at) * *self.x.add(at);
            }
            let inv = 1.0 / (squares / n as f32 + self.eps).sqrt();
            let f = s.splat(inv);
            for at in (0..whole).step_by(W) {
                let v = s.mul(s.load(self.x.add(at)), f);
                s.store(s.mul(v, s.load(self.w.as_ptr().add(at))), self.out.add(at));
            }
            for at in whole..n {
                *self.out.add(at) = *self.x.add(at) * inv * self.w[at];
            }
        }
    }
}

/// RMS norm of one row: squares in 64 lanes of f32, summed in a fixed order.
pub fn rms_norm(isa: Isa, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == w.len() && out.len() == w.len());
    isa.vectorize(RmsNorm { x: x.as_ptr(), out: out.as_mut_ptr(), w, eps });
}

/// The same in place.
pub fn rms_norm_in_place(isa: Isa, x: &mut [f32], w: &[f32], eps: f32) {
    assert!(x.len() == w.len());
    isa.vectorize(RmsNorm { x: x.as_ptr(), out: x.as_mut_ptr(), w, eps });
}

struct Rope<'a> {
    row: &'a mut [f32],
    head_dim: usize,
    offset: usize,
    style: RopeStyle,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // Plain loops: the compiler turns them into this ISA's vectors, shuffles included.
        let half = self.cos.len();
        assert!(self.sin.len() == half);
        for head in self.row.chunks_exact_mut(self.head_dim) {
            let x = &mut head[self.offset..][..2 * half];
            match self.style {
                RopeStyle::Adjacent => {
                    for ((p, c), s) in x.chunks_exact_mut(2).zip(self.cos).zip(self.sin) {
                        (p[0], p[1]) = (p[0] * c - p[1] * s, p[0] * s + p[1] * c);
                    }
                }
                RopeStyle::Halves => {
                    let (u, v) = x.split_at_mut(half);
                    for (((u, v), c), s) in u.iter_mut().zip(v).zip(self.cos).zip(self.sin) {
                        (*u, *v) = (*u * c - *v * s, *u * s + *v * c);
                    }
                }
            }
        }
    }
}

/// Rotates the rotary dimensions of every head of a row in place.
pub fn rope(
    isa: Isa,
    row: &mut [f32],
    head_dim: usize,
    offset: usize,
    style: RopeStyle,
    cos: &[f32],
    sin: &[f32],
) {
    isa.vectorize(Rope { row, head_dim, offset, style, cos, sin });
}

struct Glu<'a>(Activation, &'a mut [f32], &'a [f32]);

impl Kernel for Glu<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Glu(act, gate, up) = self;
        let n = gate.len();
        assert!(up.len() == n);
        let mut at = 0;
        while at < n {
            let len = W.min(n - at);
            let (mut g, mut u) = ([0.0; W], [0.0; W]);
            // SAFETY: whole vectors inside the slices, or the padded copies.
            unsafe {
                let (pg, pu) = if len == W {
                    (gate.as_ptr().add(at), up.as_ptr().add(at))
                } else {
                    g[..len].copy_from_slice(&gate[at..]);
                    u[..len].copy_from_slice(&up[at..]);
                    (g.as_ptr(), u.as_ptr())
                };
                let y = s.mul(activation(s, act, s.load(pg)), s.load(pu));
                if len == W {
                    s.store(y, gate.as_mut_ptr().add(at));
                } else {
                    s.store(y, g.as_mut_ptr());
                    gate[at..].copy_from_slice(&g[..len]);
                }
            }
            at += len;
        }
    }
}

#[inline(always)]
fn activation<S: Simd>(s: S, act: Activation, x: S::V) -> S::V {
    match act {
        // x / (1 + e^-x) loses nothing where 1 / (1 + e^-x) underflows.
        Activation::Silu => s.mul(x, sigmoid(s, x)),
        // 0.5 x (1 + tanh u) = x sigmoid(2u): no cancellation where tanh nears -1.
        Activation::GeluTanh => {
            const TWICE: f32 = 2.0 * 0.797_884_6;
            let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), s.splat(1.0));
            s.mul(x, sigmoid(s, s.mul(s.mul(x, s.splat(TWICE)), cubic)))
        }
    }
}

/// `gate = act(gate) * up`.
pub fn glu(isa: Isa, act: Activation, gate: &mut [f32], up: &[f32]) {
    isa.vectorize(Glu(act, gate, up));
}

struct Axpy<'a>(f32, &'a [f32], &'a mut [f32]);

impl Kernel for Axpy<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.2.iter_mut().zip(self.1).for_each(|(y, x)| *y += self.0 * x);
    }
}

/// `y += a x`, a product and a sum (not fused) on every ISA.
pub fn axpy(isa: Isa, a: f32, x: &[f32], y: &mut [f32]) {
    assert!(x.len() == y.len());
    isa.vectorize(Axpy(a, x, y));
}
