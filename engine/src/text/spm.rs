//! SentencePiece's BPE: adjacent pieces merge while their concatenation is a token, the highest score first.
//!
//! The algorithm of SentencePiece's `bpe` model as llama.cpp runs it: leftmost of equal scores; a character that is in no
//! token falls back to `<0xXX>` byte tokens. Knows nothing of special tokens and of where spaces are added.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// What the merging needs of a vocabulary.
pub trait Pieces {
    /// The token with exactly this text.
    fn token(&self, text: &str) -> Option<u32>;
    /// A token's score: higher merges earlier.
    fn score(&self, id: u32) -> f32;
    /// Appends what stands for one byte of a character without a token.
    fn byte(&self, byte: u8, out: &mut Vec<u32>);
    /// Length in bytes of the longest token: longer pairs need no looking up.
    fn longest(&self) -> usize;
}

/// A piece of the text: `len` bytes from `at`; 0 bytes once merged into its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    at: usize,
    len: usize,
    prev: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}

/// Appends the tokens of `text`, in which spaces are U+2581 already.
pub fn encode(vocab: &impl Pieces, text: &str, out: &mut Vec<u32>) {
    let mut symbols: Vec<Symbol> = (text.char_indices().enumerate())
        .map(|(i, (at, c))| Symbol { at, len: c.len_utf8(), prev: i.wrapping_sub(1), next: i + 1 })
        .collect();
    let Some(last) = symbols.last_mut() else { return };
    last.next = NONE;

    let mut queue = BinaryHeap::new();
    for i in 1..symbols.len() {
        push(vocab, text, &symbols, &mut queue, i - 1, i);
    }
    while let Some(c) = queue.pop() {
        let (l, r) = (symbols[c.left], symbols[c.right]);
        if l.len == 0 || r.len == 0 || l.len + r.len != c.len {
            continue;
        }
        symbols[c.left] = Symbol { len: c.len, next: r.next, ..l };
        symbols[c.right].len = 0;
        if r.next != NONE {
            symbols[r.next].prev = c.left;
        }
        push(vocab, text, &symbols, &mut queue, l.prev, c.left);
        push(vocab, text, &symbols, &mut queue, c.left, r.next);
    }

    let mut i = 0;
    while i != NONE {
        let s = symbols[i];
        let piece = &text[s.at..s.at + s.len];
        match vocab.token(piece) {
            Some(id) => out.push(id),
            None => piece.bytes().for_each(|b| vocab.byte(b, out)),
        }
        i = s.next;
    }
}

fn push(
    vocab: &impl Pieces,
    text: &str,
    symbols: &[Symbol],
    queue: &mut BinaryHeap<Candidate>,
    left: usize,
    right: usize,
) {
    if left == NONE || right == NONE {
        return;
    }
    let (l, r) = (symbols[left], symbols[right]);
    let len = l.len + r.len;
    if len > vocab.longest() {
        return;
    }
    if let Some(id) = vocab.token(&text[l.at..l.at + len]) {
        queue.push(Candidate { score: vocab.score(id), left, right, len });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Toy(Vec<(&'static str, f32)>);
    impl Pieces for Toy {
        fn token(&self, text: &str) -> Option<u32> {
            self.0.iter().position(|t| t.0 == text).map(|i| i as u32)
        }
        fn score(&self, id: u32) -> f32 {
            self.0[id as usize].1
        }
        fn byte(&self, byte: u8, out: &mut Vec<u32>) {
            out.push(1000 + u32::from(byte));
        }
        fn longest(&self) -> usize {
            self.0.iter().map(|t| t.0.len()).max().unwrap_or(0)
        }
    }

    fn ids(v: &Toy, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        encode(v, text, &mut out);
        out
    }

    #[test]
    fn highest_score_first_then_leftmost() {
        let v = Toy(vec![("a", 0.0), ("b", 0.0), ("ab", -1.0), ("ba", -2.0), ("bab", -3.0)]);
        assert_eq!(ids(&v, "abab"), [2, 2]);
        assert_eq!(ids(&v, "bab"), [4]);
        assert_eq!(ids(&v, ""), Vec::<u32>::new());
        let v = Toy(vec![("a", 0.0), ("aa", -1.0)]);
        assert_eq!(ids(&v, "aaa"), [1, 0]);
    }

    #[test]
    fn a_character_without_token_becomes_bytes() {
        let v = Toy(vec![("a", 0.0)]);
        assert_eq!(ids(&v, "aéa"), [0, 1000 + 0xc3, 1000 + 0xa9, 0]);
    }

    #[test]
    fn nan_scores_do_not_hang() {
        let v = Toy(vec![("a", 0.0), ("aa", f32::NAN), ("aaa", f32::NAN)]);
        assert!(!ids(&v, "aaaaaa").is_empty());
    }
}
