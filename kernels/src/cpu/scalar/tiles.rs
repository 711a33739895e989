//! The specification of tile products, which prompts take where there are such instructions: weights and activations rounded to
//! bf16, sums in f32. A row's sum goes in runs of [`RUN`] values, each in tiles of 32: products of even and odd values are
//! added by fused multiply-adds in two chains, these to each other, and that to the run.

use super::{Format, Group, Kind, groups};
use crate::cpu::tiles::{DEPTH, Line, Panel, ROWS, lines};

/// Values that are summed before they are added to the result.
pub const RUN: usize = 2048;

/// To the nearest bf16, ties to even; what is too small for a normal number becomes zero, NaNs become quiet.
#[inline(always)]
pub fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        (bits >> 16) as u16 | 0x40
    } else if x.abs() < f32::MIN_POSITIVE {
        (bits >> 16) as u16 & 0x8000
    } else {
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
    }
}

/// Results that are no normal numbers are zeros: the instruction knows no others.
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// See `tiles::Writer::set`.
pub fn interleave(rows: &[&[f32]], to: &mut [Line]) {
    to.fill(Line::ZERO);
    for (r, row) in rows.iter().enumerate() {
        for (i, pair) in row.chunks(2).enumerate() {
            let high = pair.get(1).map_or(0, |x| bf16(*x));
            to[i].0[r] = u32::from(bf16(pair[0])) | u32::from(high) << 16;
        }
    }
}

/// The weights of a group.
fn values(kind: Kind, g: &Group) -> [f32; 256] {
    std::array::from_fn(|i| {
        let q = f32::from(g.q[i]);
        match kind {
            Kind::Plain => g.d[i / 32] * q,
            Kind::Min => q.mul_add(g.d[i / 32], g.m[i / 32]),
            Kind::Scale16 => g.d[i / 32] * g.sc[i / 16] as f32 * q,
            Kind::Min16 => q.mul_add(g.d[i / 32] * g.sc[i / 16] as f32, g.m[i / 16]),
        }
    })
}

/// `y[c * rows + r] = row r of w . row c of x`, where `w` holds rows of `row_bytes`.
pub fn tile_rows<F: Format>(w: &[u8], row_bytes: usize, x: Panel<'_>, y: &mut [f32]) {
    let n = w.len() / row_bytes;
    let mut weights = Vec::new();
    for (r, row) in w.chunks_exact(row_bytes).enumerate() {
        weights.clear();
        groups::<F>(row, |_, src| {
            let mut g = Group::ZERO;
            F::unpack(src, &mut g);
            weights.extend(values(F::KIND, &g).map(|v| widen(bf16(v))));
        });
        for c in 0..x.rows {
            let block = &x.lines[c / ROWS * lines(x.cols)..][..lines(x.cols)];
            let mut sum = 0.0;
            for (w, x) in weights.chunks(RUN).zip(block.chunks(RUN / DEPTH * ROWS)) {
                let mut run = 0.0f32;
                for (w, x) in w.chunks_exact(DEPTH).zip(x.chunks_exact(ROWS)) {
                    let (mut even, mut odd) = (0.0f32, 0.0f32);
                    for (w, x) in w.chunks_exact(2).zip(x) {
                        let pair = x.0[c % ROWS];
                        even = flush(w[0].mul_add(widen(pair as u16), even));
                        odd = flush(w[1].mul_add(widen((pair >> 16) as u16), odd));
                    }
                    run = flush(run + flush(even + odd));
                }
                sum += run;
            }
            y[c * n + r] = sum;
        }
    }
}
