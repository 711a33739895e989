//! The specification of every matrix kernel, in plain Rust without `unsafe`: formats unpacked to integers, and the canonical
//! order of summation that all other kernels keep to (docs/numerics.md). Speed does not matter here.

mod float;
mod formats;
mod tiles;

pub use float::*;
pub use formats::*;
pub use tiles::*;

use super::quantized::Block;

/// How a format's sub-blocks of 32 values are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `d[b] * q`.
    Plain,
    /// `d[b] * q + m[b]`.
    Min,
    /// `d[b] * (sc[2b + h] * q)`, h the half.
    Scale16,
    /// `d[b] * (sc[2b + h] * q) + m[2b + h]`.
    Min16,
}

/// 256 weights as integers and scales; which of the scales mean something, [`Kind`] says.
pub struct Group {
    /// The integers.
    pub q: [i8; 256],
    /// Scale of each sub-block of 32.
    pub d: [f32; 8],
    /// Integer scale of each run of 16.
    pub sc: [i32; 16],
    /// Minimum, ready to be added: of each sub-block of 32 (the first 8) or run of 16.
    pub m: [f32; 16],
}

impl Group {
    /// All zeros.
    pub const ZERO: Self = Self { q: [0; 256], d: [0.0; 8], sc: [0; 16], m: [0.0; 16] };
}

/// A block format, seen in groups of 256 values: one block of 256, or eight of 32.
pub trait Format {
    /// Bytes of a block.
    const BLOCK_BYTES: usize;
    /// Blocks in a group: 1 or 8.
    const BLOCKS: usize;
    /// Bytes of a group.
    const BYTES: usize = Self::BLOCK_BYTES * Self::BLOCKS;
    /// How it is scaled.
    const KIND: Kind;

    /// Unpacks a group; `src.len() == BYTES`.
    fn unpack(src: &[u8], g: &mut Group);
}

/// Calls `f` for each group of a row; a last group that is not whole is filled up with zero bytes, which stand for zeros.
#[inline(always)]
pub fn groups<F: Format>(row: &[u8], mut f: impl FnMut(usize, &[u8])) {
    let whole = row.chunks_exact(F::BYTES);
    let rest = whole.remainder();
    let mut n = 0;
    for src in whole {
        f(n, src);
        n += 1;
    }
    if !rest.is_empty() {
        let mut padded = [0u8; MAX_GROUP_BYTES];
        padded[..rest.len()].copy_from_slice(rest);
        f(n, &padded[..F::BYTES]);
    }
}

/// The final sum of the 8 lanes.
#[inline(always)]
pub fn tree(a: &[f32; 8]) -> f32 {
    ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
}

/// Adds one group's products to the lanes: sub-block b to lane b, first the products, then the minima.
#[inline(always)]
pub fn accumulate(kind: Kind, g: &Group, x: &Block, acc: &mut [f32; 8]) {
    let dot16 = |i: usize| -> i32 {
        let (w, a) = (&g.q[16 * i..][..16], &x.q[16 * i..][..16]);
        w.iter().zip(a).map(|(&w, &a)| i32::from(w) * i32::from(a)).sum()
    };
    for (b, acc) in acc.iter_mut().enumerate() {
        let (lo, hi) = (dot16(2 * b), dot16(2 * b + 1));
        let dot = match kind {
            Kind::Plain | Kind::Min => lo + hi,
            Kind::Scale16 | Kind::Min16 => g.sc[2 * b] * lo + g.sc[2 * b + 1] * hi,
        };
        *acc = (dot as f32).mul_add(g.d[b] * x.scale[b], *acc);
        match kind {
            Kind::Plain | Kind::Scale16 => {}
            Kind::Min => *acc = g.m[b].mul_add(x.sum[b], *acc),
            Kind::Min16 => {
                *acc = g.m[2 * b].mul_add(x.sum_lo[b], *acc);
                *acc = g.m[2 * b + 1].mul_add(x.sum_hi[b], *acc);
            }
        }
    }
}

/// `y[c * rows + r] = row r of w . x[c]`; `w` holds `y.len() / x.len()` rows of `row_bytes`.
pub fn rows<F: Format>(w: &[u8], row_bytes: usize, x: &[&[Block]], y: &mut [f32]) {
    let n = w.len() / row_bytes;
    for (r, row) in w.chunks_exact(row_bytes).enumerate() {
        for (c, x) in x.iter().enumerate() {
            let mut acc = [0.0; 8];
            groups::<F>(row, |i, src| {
                let mut g = Group::ZERO;
                F::unpack(src, &mut g);
                accumulate(F::KIND, &g, &x[i], &mut acc);
            });
            y[c * n + r] = tree(&acc);
        }
    }
}
