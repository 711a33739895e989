//! What query rows see, arranged for blocked kernels: tiles of rows that share a walk over the cache (prompts), and a row's
//! own list of entries cut in fixed parts (decoding). Knows slots and rows; nothing of heads or numbers.

use crate::backend::{Span, Visible};
use std::ops::Range;

/// A run of slots that some row of a tile sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub start: u32,
    pub end: u32,
    pub sink: bool,
}

/// Consecutive rows that walk the cache together.
#[derive(Clone, Debug)]
pub struct TileRows {
    /// Rows of the call.
    pub rows: Range<usize>,
    /// Of the plan's segments.
    pub segments: Range<usize>,
    /// Where its ranges begin.
    pub ranges: usize,
}

/// The tiles of a call. Kept between calls, so that it allocates only while it grows.
#[derive(Default)]
pub struct Plan {
    pub tiles: Vec<TileRows>,
    pub segments: Vec<Segment>,
    /// Per tile `[segments][rows]`: the slots of the segment that the row sees, empty as (0, 0).
    pub ranges: Vec<(u32, u32)>,
}

/// A row's spans with those that continue each other joined.
fn spans(row: &[Span]) -> impl Iterator<Item = Segment> + '_ {
    let mut i = 0;
    std::iter::from_fn(move || {
        let first = row.get(i)?;
        let mut s = Segment { start: first.start, end: first.start + first.len, sink: first.sink };
        i += 1;
        while let Some(n) = row.get(i).filter(|n| n.start == s.end && n.sink == s.sink) {
            s.end += n.len;
            i += 1;
        }
        Some(s)
    })
}

fn meets(a: &Segment, b: &Segment) -> bool {
    a.sink == b.sink && a.start < b.end && b.start < a.end
}

impl Plan {
    /// Forgets all tiles.
    pub fn clear(&mut self) {
        self.tiles.clear();
        self.segments.clear();
        self.ranges.clear();
    }

    /// The first slot that any tile's row sees, and the one after the last.
    pub fn slots(&self) -> (u32, u32) {
        let start = self.segments.iter().map(|s| s.start).min().unwrap_or(0);
        (start, self.segments.iter().map(|s| s.end).max().unwrap_or(start))
    }

    /// Adds a tile that starts at row `first` and takes at most `most` rows of `..end`; returns the row after it. Rows join as
    /// long as they see something the tile already sees: rows of other sequences do not.
    pub fn push(&mut self, v: &Visible, first: usize, end: usize, most: usize) -> usize {
        let base = self.segments.len();
        self.segments.extend(spans(v.row(first)));
        let mut last = first + 1;
        while last < end && last - first < most && self.join(base, v.row(last)) {
            last += 1;
        }
        let ranges = self.ranges.len();
        let (n, segments) = (last - first, self.segments.len() - base);
        self.ranges.resize(ranges + n * segments, (0, 0));
        for row in first..last {
            let mut j = 0;
            for s in spans(v.row(row)) {
                // `join` widened the segments so that each span lies in one, in order.
                while !(meets(&self.segments[base + j], &s)
                    && self.segments[base + j].start <= s.start
                    && s.end <= self.segments[base + j].end)
                {
                    j += 1;
                }
                self.ranges[ranges + j * n + row - first] = (s.start, s.end);
                j += 1;
            }
        }
        self.tiles.push(TileRows { rows: first..last, segments: base..self.segments.len(), ranges });
        last
    }

    /// Makes room for a row in the segments from `base` on; false if it meets none of them.
    fn join(&mut self, base: usize, row: &[Span]) -> bool {
        if !spans(row).any(|s| self.segments[base..].iter().any(|g| meets(g, &s))) {
            return false;
        }
        let mut j = base;
        for s in spans(row) {
            match self.segments[j..].iter().position(|g| meets(g, &s)) {
                Some(t) => {
                    let g = &mut self.segments[j + t];
                    (g.start, g.end) = (g.start.min(s.start), g.end.max(s.end));
                    j += t + 1;
                }
                None => {
                    self.segments.insert(j, s);
                    j += 1;
                }
            }
        }
        true
    }

    /// The segments of a tile, each with what its rows see of it.
    pub fn walk(&self, t: &TileRows) -> impl Iterator<Item = (Segment, &[(u32, u32)])> {
        let n = t.rows.len();
        let at = t.ranges;
        let segments = &self.segments[t.segments.clone()];
        segments.iter().enumerate().map(move |(i, s)| (*s, &self.ranges[at + i * n..][..n]))
    }
}

/// Entries of a part of a row's list at least, and parts of a row at most. A part's length depends on the row's own length
/// alone, so that neither threads nor neighbours move a boundary.
const PART: usize = 128;
const PARTS: usize = 64;

/// Entries of each part (the last may be shorter) of a row that sees `seen`.
pub fn part_len(seen: usize) -> usize {
    PART.max(seen.div_ceil(PARTS).next_multiple_of(PART / 2))
}

/// Parts of a row that sees `seen`.
pub fn parts(seen: usize) -> usize {
    seen.div_ceil(part_len(seen))
}

/// The spans of entries `list` of a row's own list.
pub fn slice(row: &[Span], list: Range<usize>) -> impl Iterator<Item = Segment> + '_ {
    let mut at = 0;
    spans(row).filter_map(move |s| {
        let len = (s.end - s.start) as usize;
        let (a, b) = (list.start.clamp(at, at + len), list.end.clamp(at, at + len));
        let cut = Segment { start: s.start + (a - at) as u32, end: s.start + (b - at) as u32, sink: s.sink };
        at += len;
        (a < b).then_some(cut)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u32, end: u32, sink: bool) -> Span {
        Span { start, len: end - start, sink }
    }

    /// Every row gets back its own list, in order, out of the shared walk.
    #[test]
    fn tiles_keep_every_row_s_list() {
        let mut v = Visible::default();
        // A ring of 16 slots after 4 sinks, window 10, written around its end; then another sequence.
        for t in 0..40u32 {
            let mut spans = vec![span(0, 4, true)];
            let first = t.saturating_sub(9);
            let (a, b) = (4 + first % 16, 4 + t % 16 + 1);
            if a < b {
                spans.push(span(a, b, false))
            } else {
                spans.extend([span(a, 20, false), span(4, b, false)])
            }
            v.push(spans);
        }
        v.push([span(100, 103, false)]);
        v.push([span(100, 104, false)]);
        v.push([span(0, 4, true), span(100, 105, false)]);
        for most in [1, 2, 5, 7] {
            let mut p = Plan::default();
            let mut at = 0;
            while at < v.rows() {
                at = p.push(&v, at, v.rows(), most);
            }
            assert!(p.tiles.iter().all(|t| t.rows.len() <= most));
            for t in &p.tiles {
                for r in t.rows.clone() {
                    let got: Vec<(u32, bool)> = p
                        .walk(t)
                        .flat_map(|(s, ranges)| {
                            let (a, b) = ranges[r - t.rows.start];
                            assert!(a == b || (s.start <= a && b <= s.end));
                            (a..b).map(move |x| (x, s.sink))
                        })
                        .collect();
                    let want: Vec<_> = v
                        .row(r)
                        .iter()
                        .flat_map(|s| (s.start..s.start + s.len).map(|x| (x, s.sink)))
                        .collect();
                    assert_eq!(got, want, "row {r}, at most {most}");
                }
            }
            assert!(most == 1 || p.tiles.iter().all(|t| t.rows.start >= 40 || t.rows.end <= 40));
        }
    }

    #[test]
    fn parts_cover_the_list() {
        for seen in (1..3000).chain([8191, 8192, 8193, 131_072, 1 << 20]) {
            assert!(parts(seen) <= PARTS && parts(seen) * part_len(seen) >= seen);
        }
        let row = [span(5, 8, true), span(10, 14, false), span(14, 20, false)];
        let all: Vec<u32> = [0..4, 4..5, 5..13]
            .into_iter()
            .flat_map(|l| slice(&row, l).flat_map(|s| s.start..s.end).collect::<Vec<_>>())
            .collect();
        assert_eq!(all, [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]);
    }
}
