//! Evicting: a policy sees one layer's entries, and those it keeps move together; masses and positions go with them.
//! Knows buffers and policies; nothing of sequences.

use super::arena::LayerKv;
use super::policy::{AttentionKind, LayerView, Selection, select};
use super::pool::Pool;
use super::set::{Set, SetShape};
use crate::EngineError;
use crate::layers::rope::turn;
use kernels::{Buf, Device, KernelError, RopeHeads, RopeStyle};
use std::ops::Range;

/// What an eviction is told of the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Occasion {
    /// Entries that may stay.
    pub target: usize,
    /// Tokens so far.
    pub len: usize,
    /// Tokens up to the end of the latest prompt.
    pub prompt: usize,
}

/// One layer's masses `[kv_heads, slots]`, where a policy asks for them.
#[derive(Default)]
pub struct Masses {
    /// Of all queries.
    pub total: Option<Buf>,
    /// Of the latest.
    pub recent: Option<Buf>,
}

impl Masses {
    /// Zeros for some slots.
    pub fn clear(buf: &mut Buf, device: &Device, slots: &[u32]) -> Result<(), EngineError> {
        let heads = buf.rows();
        let mut at = 0;
        while at < slots.len() {
            let first = slots[at] as usize;
            let run = slots[at..].iter().enumerate().take_while(|(i, s)| **s as usize == first + i).count();
            device.write(buf.part_mut(heads, first..first + run), &zeros(heads * run)?)?;
            at += run;
        }
        Ok(())
    }
}

/// `n` zeros, or an error instead of an abort: what a policy looks at can be as large as the cache of a layer.
pub(crate) fn zeros(n: usize) -> Result<Vec<f32>, EngineError> {
    let mut out = Vec::new();
    let fail = |_| KernelError::Memory { what: "kv policy", bytes: n.saturating_mul(4) };
    out.try_reserve_exact(n).map_err(fail)?;
    out.resize(n, 0.0);
    Ok(out)
}

/// `[kv_heads, slots.len()]` of a mass.
pub fn read_mass(device: &Device, buf: &Buf, slots: &[u32]) -> Result<Vec<f32>, EngineError> {
    let mut all = zeros(buf.rows() * buf.cols())?;
    device.read(buf.view(buf.rows()), &mut all)?;
    let mut out = zeros(buf.rows() * slots.len())?;
    for (out, row) in out.chunks_exact_mut(slots.len().max(1)).zip(all.chunks_exact(buf.cols())) {
        out.iter_mut().zip(slots).for_each(|(o, s)| *o = row[*s as usize]);
    }
    Ok(out)
}

/// The inverse.
pub fn write_mass(device: &Device, buf: &mut Buf, slots: &[u32], values: &[f32]) -> Result<(), EngineError> {
    let (heads, cols) = (buf.rows(), buf.cols());
    let mut all = zeros(heads * cols)?;
    device.read(buf.view(heads), &mut all)?;
    for h in 0..heads {
        for (s, v) in slots.iter().zip(&values[h * slots.len()..]) {
            all[h * cols + *s as usize] = *v;
        }
    }
    Ok(device.write(buf.view_mut(heads), &all)?)
}

/// What a policy was shown, owned.
#[derive(Default)]
struct Shown {
    positions: Vec<u64>,
    keys: Vec<f32>,
    k_pe: Vec<f32>,
    values: Vec<f32>,
    mass_total: Vec<f32>,
    mass_recent: Vec<f32>,
    queries: Vec<f32>,
    query_positions: Vec<u64>,
}

/// `[heads, slots, width / heads]` of a buffer `[slots, width]`.
fn by_head(
    device: &Device,
    buf: &kernels::KvBuf,
    slots: &[u32],
    heads: usize,
) -> Result<Vec<f32>, EngineError> {
    let dim = buf.width() / heads;
    let mut out = zeros(heads * slots.len() * dim)?;
    for (h, part) in out.chunks_exact_mut((slots.len() * dim).max(1)).enumerate() {
        device.kv_read(buf, slots, h * dim..(h + 1) * dim, part)?;
    }
    Ok(out)
}

fn show(s: &SetShape, set: &Set, layer: &LayerKv) -> Result<Shown, EngineError> {
    let device = &layer.device;
    let (g, slots) = (&s.geometry, set.slots(set.entries));
    let mla = g.kind == AttentionKind::Mla;
    let mut out = Shown { positions: set.positions.concat(), ..Shown::default() };
    if s.needs.keys {
        out.keys = by_head(device, &layer.first, &slots, g.kv_heads)?;
        if mla {
            out.k_pe = by_head(device, &layer.second, &slots, 1)?;
        }
    }
    if s.needs.values && !mla {
        out.values = by_head(device, &layer.second, &slots, g.kv_heads)?;
    }
    if let Some(m) = &layer.masses.total {
        out.mass_total = read_mass(device, m, &slots)?;
    }
    if let Some(m) = &layer.masses.recent {
        out.mass_recent = match set.recent {
            0 => zeros(g.kv_heads * slots.len())?,
            _ => read_mass(device, m, &slots)?,
        };
    }
    out.query_positions = set.queries.iter().map(|q| q.0).collect();
    let dim = g.key + g.k_pe;
    out.queries = zeros(g.heads * dim * set.queries.len())?;
    out.queries.clear();
    for h in 0..g.heads {
        set.queries.iter().for_each(|q| out.queries.extend_from_slice(&q.1[h * dim..][..dim]));
    }
    Ok(out)
}

/// Lets the policy choose and moves what stays. With as few entries as may stay, nothing happens.
///
/// # Errors
/// The policy's; then nothing was evicted.
pub fn evict(
    s: &SetShape,
    set: &mut Set,
    layer: &mut LayerKv,
    pool: &mut Pool,
    o: Occasion,
    mut watch: impl FnMut(&LayerView<'_>, &Selection),
) -> Result<(), EngineError> {
    if set.entries <= o.target {
        return Ok(());
    }
    let shown = show(s, set, layer)?;
    let view = LayerView {
        geometry: &s.geometry,
        entries: set.entries,
        positions: &shown.positions,
        keys: &shown.keys,
        k_pe: &shown.k_pe,
        values: &shown.values,
        mass_total: &shown.mass_total,
        mass_recent: &shown.mass_recent,
        queries: &shown.queries,
        query_positions: &shown.query_positions,
        prompt: o.prompt,
        next: if s.compact { set.entries } else { o.len } as u64,
    };
    let kept = select(&*s.policy, &view, o.target)?;
    watch(&view, &kept);
    compact(s, set, layer, &kept)?;
    let slots = set.slots(kept.len());
    for (buf, old) in
        [(&mut layer.masses.total, &shown.mass_total), (&mut layer.masses.recent, &shown.mass_recent)]
    {
        if let Some(buf) = buf {
            let of = |h: usize| kept.head(h).iter().map(move |&i| old[h * view.entries + i as usize]);
            let values: Vec<f32> = (0..s.geometry.kv_heads).flat_map(of).collect();
            write_mass(&layer.device, buf, &slots, &values)?;
        }
    }
    for (h, positions) in set.positions.iter_mut().enumerate() {
        *positions = kept.head(h).iter().map(|&i| positions[i as usize]).collect();
    }
    set.shrink(pool, kept.len());
    set.evicted_at = o.len;
    set.recent = 0;
    Ok(())
}

/// Moves the entries that stay to the front, heads on their own where they differ, and turns keys to their new places.
fn compact(s: &SetShape, set: &Set, layer: &mut LayerKv, kept: &Selection) -> Result<(), EngineError> {
    let heads = kept.heads.max(1);
    for h in 0..heads {
        let moved = kept.head(h).iter().enumerate().filter(|(to, from)| **from as usize != *to);
        let moved: Vec<(usize, usize)> = moved.map(|(to, from)| (*from as usize, to)).collect();
        if moved.is_empty() {
            continue;
        }
        // In ascending order nothing is overwritten before it has moved.
        let moves: Vec<(u32, u32)> = moved.iter().map(|m| (set.slot(m.0), set.slot(m.1))).collect();
        let part = |width: usize| -> Range<usize> { h * (width / heads)..(h + 1) * (width / heads) };
        let LayerKv { device, first, second, .. } = layer;
        let (a, b) = (part(first.width()), part(second.width()));
        device.kv_move(first, &moves, a.clone())?;
        device.kv_move(second, &moves, b.clone())?;
        if s.compact {
            let r = &s.geometry.rotary;
            let style = if r.adjacent { RopeStyle::Adjacent } else { RopeStyle::Halves };
            let dims = 2 * r.freqs.len();
            let (buf, cols, heads) = match s.geometry.kind {
                AttentionKind::Gqa => {
                    (first, a, RopeHeads { head_dim: s.geometry.key, offset: r.start, dims, style })
                }
                AttentionKind::Mla => (second, b, RopeHeads { head_dim: dims, offset: 0, dims, style }),
            };
            let mut angles = device.alloc(ROTATED, dims)?;
            for some in moved.chunks(ROTATED) {
                let mut table = Vec::with_capacity(some.len() * dims);
                for (from, to) in some {
                    let back: Vec<_> = r.freqs.iter().map(|f| turn((from - to) as u64, *f)).collect();
                    table.extend(back.iter().map(|t| t.0 as f32));
                    table.extend(back.iter().map(|t| -t.1 as f32));
                }
                device.write(angles.view_mut(some.len()), &table)?;
                let slots: Vec<u32> = some.iter().map(|m| set.slot(m.1)).collect();
                device.kv_rotate(buf, &slots, cols.clone(), heads, angles.view(some.len()))?;
            }
        }
    }
    Ok(())
}

/// Entries rotated at a time.
const ROTATED: usize = 64;
