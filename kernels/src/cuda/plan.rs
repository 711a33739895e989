//! A prompt's rows in tiles that walk the cache together, as `src/prompt.cu` takes them: the CPU's plan in plain words. Knows rows and
//! slots; nothing of heads, memory or launches.

use crate::Visible;
use crate::cpu::attention::rows;
use std::ops::Range;

/// Lanes of a tile: query heads of one key head times rows. On tensor cores more.
pub const LANES: usize = 64;
/// See [`LANES`].
pub const HALF_LANES: usize = 128;

/// The tiles of a call.
#[derive(Default)]
pub struct Plan {
    plan: rows::Plan,
    /// First row, rows, first segment, segments, first range.
    pub tiles: Vec<[u32; 5]>,
    /// First slot, the one after the last, whether they are sinks.
    pub segments: Vec<[u32; 3]>,
    /// For each tile, segment and row the slots it sees: first, and the one after the last.
    pub ranges: Vec<[u32; 2]>,
}

/// Heads of a group that a tile of `lanes` takes at once.
pub fn heads(group: usize, lanes: usize) -> usize {
    group.min(lanes)
}

impl Plan {
    /// Plans rows `rows` for groups of `group` query heads to a key head, in tiles of `lanes`; keeps its memory.
    pub fn set(&mut self, visible: &Visible, rows: Range<usize>, group: usize, lanes: usize) {
        self.plan.clear();
        let mut at = rows.start;
        while at < rows.end {
            at = self.plan.push(visible, at, rows.end, lanes / heads(group, lanes));
        }
        let word = |x: usize| u32::try_from(x).expect("lists of spans are counted in 32 bits");
        self.tiles.clear();
        self.tiles.extend(
            self.plan.tiles.iter().map(|t| {
                [t.rows.start, t.rows.len(), t.segments.start, t.segments.len(), t.ranges].map(word)
            }),
        );
        self.segments.clear();
        self.segments.extend(self.plan.segments.iter().map(|s| [s.start, s.end, u32::from(s.sink)]));
        self.ranges.clear();
        self.ranges.extend(self.plan.ranges.iter().map(|r| [r.0, r.1]));
    }
}
