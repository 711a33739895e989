//! Attention of one query row over one part of its list of entries, dimensions in lanes: what decoding needs, where a block
//! of keys serves only the few query heads of its group. Knows a cache, a part, and the heads of one group.

use super::super::cache;
use super::super::isa::Isa;
use super::super::lanes::{Gemm, Kernel, Simd, W, padded};
use super::super::math::exp2_parts;
use super::super::scratch::Cut;
use super::rows::{Segment, slice};
use super::tile::{CUT, LAZY, UNSEEN};
use crate::backend::Span;
use crate::{KernelError, KvBuf};
use std::ops::Range;

/// Entries converted at a time: keys and values of a group stay in the first-level cache.
const BLOCK: usize = 32;

/// One part of one row's attention for the query heads of one key head.
pub struct Part<'a> {
    pub k: &'a KvBuf,
    pub v: &'a KvBuf,
    /// First columns of this head's key and value.
    pub k_col: usize,
    pub v_col: usize,
    /// Lengths.
    pub key: usize,
    pub value: usize,
    /// `[group * key]`.
    pub q: &'a [f32],
    pub q_sink: &'a [f32],
    /// Scale, in powers of two.
    pub scale: f32,
    /// The row's spans, and which entries of its list.
    pub row: &'a [Span],
    pub list: Range<usize>,
}

/// A part's result: weighted sums `[group][stride]`, and each head's maximum (an integer) and sum of weights.
pub struct State<'a> {
    pub out: &'a mut [f32],
    pub stride: usize,
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    /// Where the weights of all entries are kept, relative to the maximum, if they are: `[group][row]`, a row at least the
    /// list in whole blocks.
    pub kept: Option<&'a mut [f32]>,
}

/// Entries of the list that are done, and the weights kept of them: empty, or `[group][row]`.
struct Kept<'a> {
    weights: &'a mut [f32],
    row: usize,
    done: usize,
}

struct Work<'a> {
    key_pad: usize,
    value_pad: usize,
    q: &'a mut [f32],
    q_sink: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    scores: &'a mut [f32],
    sums: &'a mut [f32],
    sink: [bool; BLOCK],
}

/// Computes a part. `out` rows hold whole vectors.
pub fn part(isa: Isa, p: &Part<'_>, area: &mut [f32], state: State<'_>) -> Result<(), KernelError> {
    let group = state.max.len();
    let (key_pad, value_pad) = (padded(p.key), padded(p.value));
    assert!(p.q.len() == group * p.key && p.q_sink.len() == p.q.len() && state.sum.len() == group);
    assert!(state.stride >= value_pad && state.out.len() >= group * state.stride);
    let mut area = Cut(area);
    const WHAT: &str = "attention of one row";
    let mut w = Work {
        key_pad,
        value_pad,
        q: area.take(group * key_pad, WHAT)?,
        q_sink: area.take(group * key_pad, WHAT)?,
        keys: area.take(BLOCK * key_pad, WHAT)?,
        values: area.take(BLOCK * value_pad, WHAT)?,
        scores: area.take(group * BLOCK, WHAT)?,
        sums: area.take(group * W, WHAT)?,
        sink: [false; BLOCK],
    };
    for h in 0..group {
        for (to, from) in [(&mut *w.q, p.q), (&mut *w.q_sink, p.q_sink)] {
            let row = &mut to[h * key_pad..][..key_pad];
            row[p.key..].fill(0.0);
            row.iter_mut().zip(&from[h * p.key..][..p.key]).for_each(|(t, f)| *t = f * p.scale);
        }
    }
    w.sums.fill(0.0);
    state.max.fill(-CUT);
    let State { out, stride, max, sum, kept } = state;
    let weights = kept.unwrap_or(&mut []);
    let row = weights.len() / group;
    assert!(row == 0 || row >= p.list.len().next_multiple_of(BLOCK));
    let mut kept = Kept { weights, row, done: 0 };
    for h in 0..group {
        out[h * stride..][..value_pad].fill(0.0);
    }
    let mut len = 0;
    for s in slice(p.row, p.list.clone()) {
        let Segment { mut start, end, sink } = s;
        while start < end {
            let n = (BLOCK - len).min((end - start) as usize);
            let slot = start as usize;
            // SAFETY: rows len..len + n of [BLOCK][pad].
            unsafe {
                let keys = w.keys.as_mut_ptr().add(len * key_pad);
                cache::read(isa, p.k, slot, n, p.k_col, p.key, keys, key_pad);
                let values = w.values.as_mut_ptr().add(len * value_pad);
                cache::read(isa, p.v, slot, n, p.v_col, p.value, values, value_pad);
            }
            w.sink[len..len + n].fill(sink);
            len += n;
            start += n as u32;
            if len == BLOCK {
                let kept = &mut kept;
                isa.vectorize(Add { w: &mut w, len, out: &mut *out, stride, max: &mut *max, kept });
                len = 0;
            }
        }
    }
    if len > 0 {
        isa.vectorize(Add { w: &mut w, len, out, stride, max, kept: &mut kept });
    }
    for (h, sum) in sum.iter_mut().enumerate() {
        // The lanes' order of `Simd::sum`, which is the same on every ISA.
        let mut v: [f32; W] = w.sums[h * W..][..W].try_into().expect("a vector");
        for half in [8, 4, 2, 1] {
            (0..half).for_each(|i| v[i] += v[i + half]);
        }
        *sum = v[0];
    }
    Ok(())
}

struct Add<'a, 'b> {
    w: &'a mut Work<'b>,
    len: usize,
    out: &'a mut [f32],
    stride: usize,
    max: &'a mut [f32],
    kept: &'a mut Kept<'b>,
}

impl Kernel for Add<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Add { w, len, out, stride, max, kept } = self;
        let group = max.len();
        let mut h = 0;
        while h + 4 <= group {
            score::<S, 4>(s, w, len, h);
            h += 4;
        }
        while h + 2 <= group {
            score::<S, 2>(s, w, len, h);
            h += 2;
        }
        if h < group {
            score::<S, 1>(s, w, len, h);
        }
        for (h, max) in max.iter_mut().enumerate() {
            let row = &mut kept.weights[h * kept.row..][..kept.row];
            soften(s, w, h, max, &mut out[h * stride..][..w.value_pad], row, kept.done);
        }
        kept.done += len;
        assert!(len <= BLOCK && out.len() >= group * stride && stride >= w.value_pad);
        // SAFETY: scores [group][BLOCK], values [BLOCK][value_pad], out [group][stride].
        unsafe {
            s.gemm(Gemm {
                rows: group,
                vectors: w.value_pad / W,
                depth: len,
                a: w.scores.as_ptr(),
                a_row: BLOCK,
                a_k: 1,
                b: w.values.as_ptr(),
                b_row: w.value_pad,
                c: out.as_mut_ptr(),
                c_row: stride,
                accumulate: true,
            });
        }
    }
}

/// Scores of heads h..h + H: a vector of 16 dot products at a time, H heads by 16 / H entries.
#[inline(always)]
fn score<S: Simd, const H: usize>(s: S, w: &mut Work<'_>, len: usize, h: usize) {
    let pad = w.key_pad;
    let step = W / H;
    assert!((h + H) * pad <= w.q.len() && w.q_sink.len() == w.q.len() && w.keys.len() >= BLOCK * pad);
    for e0 in (0..BLOCK).step_by(step) {
        if e0 >= len {
            for i in 0..H {
                w.scores[(h + i) * BLOCK + e0..][..step].fill(UNSEEN);
            }
            continue;
        }
        let mut rows = [s.splat(0.0); W];
        for e in 0..step.min(len - e0) {
            let q = if w.sink[e0 + e] { &*w.q_sink } else { &*w.q };
            let mut acc = [s.splat(0.0); H];
            for d in (0..pad).step_by(W) {
                // SAFETY: d + 16 <= pad, rows inside by the assertion.
                unsafe {
                    let k = s.load(w.keys.as_ptr().add((e0 + e) * pad + d));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = s.fma(k, s.load(q.as_ptr().add((h + i) * pad + d)), *acc);
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                rows[i * step + e] = *acc;
            }
        }
        let mut sums = [0.0f32; W];
        let cut = s.min(s.max(s.sums(&rows), s.splat(-CUT)), s.splat(CUT));
        // SAFETY: sixteen floats.
        unsafe { s.store(cut, sums.as_mut_ptr()) };
        for i in 0..H {
            let to = &mut w.scores[(h + i) * BLOCK + e0..][..step];
            to.copy_from_slice(&sums[i * step..][..step]);
            to[step.min(len - e0)..].fill(UNSEEN);
        }
    }
}

/// Turns the scores of head h into weights, and keeps them after the `done` others unless `kept` is empty.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    w: &mut Work<'_>,
    h: usize,
    max: &mut f32,
    out: &mut [f32],
    kept: &mut [f32],
    done: usize,
) {
    assert!(kept.is_empty() || (done.is_multiple_of(BLOCK) && done + BLOCK <= kept.len()));
    let scores = &mut w.scores[h * BLOCK..][..BLOCK];
    let sums = &mut w.sums[h * W..][..W];
    // SAFETY: whole vectors of slices of these lengths.
    unsafe {
        let mut x = [s.splat(0.0); BLOCK / W];
        for (i, x) in x.iter_mut().enumerate() {
            *x = s.load(scores.as_ptr().add(i * W));
        }
        let top = s.hmax(s.max(x[0], x[1]));
        let mut sum = s.load(sums.as_ptr());
        if top - *max > LAZY {
            let next = s.splat(top);
            let mut v = [0.0; W];
            s.store(s.round(next), v.as_mut_ptr());
            let shift = s.splat(*max - v[0]);
            *max = v[0];
            for d in (0..out.len()).step_by(W) {
                let o = out.as_mut_ptr().add(d);
                s.store(s.scale2(s.load(o), shift), o);
            }
            if !kept.is_empty() {
                for e in (0..done).step_by(W) {
                    let p = kept.as_mut_ptr().add(e);
                    s.store(s.scale2(s.load(p), shift), p);
                }
            }
            sum = s.scale2(sum, shift);
        }
        let m = s.splat(*max);
        for (i, x) in x.into_iter().enumerate() {
            let (p, n) = exp2_parts(s, x);
            let p = s.scale2(p, s.sub(n, m));
            sum = s.add(sum, p);
            s.store(p, scores.as_mut_ptr().add(i * W));
        }
        s.store(sum, sums.as_mut_ptr());
    }
    if !kept.is_empty() {
        kept[done..][..BLOCK].copy_from_slice(scores);
    }
}
