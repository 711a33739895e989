//! Byte-level BPE: the merges of a vocabulary, applied to one word at a time.
//!
//! GPT-2's scheme: every byte is written as one printable character, tokens and merges are strings of these, and the
//! pair with the lowest rank merges first, the leftmost of equals. Works on interned ids instead of strings; a heap over
//! a linked list makes a word of n bytes cost O(n log n). Knows nothing of special tokens and pre-tokenizers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasher, RandomState};

use super::TextError;
use super::vocab::MOST_TEXT;

/// The printable character that GPT-2's byte-level BPE writes for a byte.
pub fn byte_char(b: u8) -> char {
    match b {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
        // The rest is numbered from U+0100 on, in order: 0..=0x20, 0x7f..=0xa0, 0xad.
        0..=0x20 => char::from_u32(0x100 + u32::from(b)).expect("below U+0200"),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(b - 0x7f)).expect("below U+0200"),
        0xad => '\u{143}',
    }
}

/// The inverse of [`byte_char`]; `None` for a character that stands for no byte.
pub fn char_byte(c: char) -> Option<u8> {
    match c as u32 {
        v @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(v as u8),
        v @ 0x100..=0x120 => Some((v - 0x100) as u8),
        v @ 0x121..=0x142 => Some((v - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// A hash for the pair table: the standard one costs more than the merge. Seeded per process, as a file is not trusted
/// to be free of collisions made on purpose.
#[derive(Clone)]
struct PairHash(u64);

impl BuildHasher for PairHash {
    type Hasher = PairHasher;
    fn build_hasher(&self) -> PairHasher {
        PairHasher(self.0)
    }
}

struct PairHasher(u64);

impl std::hash::Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(b.into()));
    }
    fn write_u64(&mut self, v: u64) {
        let m = u128::from(v ^ self.0) * u128::from(0x9e37_79b9_7f4a_7c15u64);
        self.0 = (m as u64) ^ ((m >> 64) as u64);
    }
}

/// What a pair of symbols becomes.
#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    into: u32,
}

/// The merges of a vocabulary over symbols: ids below `n_vocab` are tokens, those above are strings which occur in a
/// merge (or as a byte) without being a token.
pub struct Bpe {
    merges: HashMap<u64, Merge, PairHash>,
    byte_symbol: [u32; 256],
    n_vocab: u32,
    /// For symbols that are no tokens: the tokens of their characters, as far as there are any.
    spelled: Vec<Vec<u32>>,
}

/// A place in the linked list of symbols of a word; `usize` would double it.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    prev: u32,
    next: u32,
}

/// A candidate merge: lowest rank first, then leftmost. The ids tell whether it is still what lies there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: u32,
    right: u32,
    left_id: u32,
    right_id: u32,
    into: u32,
}

/// Buffers kept between words.
#[derive(Default)]
pub struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

impl Bpe {
    /// `ids`: text of each token to its id, `n_vocab` of them. `merges`: "left right", rank = index.
    pub fn new(
        merges: &[String],
        n_vocab: u32,
        unknown: Option<u32>,
        lookup: impl Fn(&str) -> Option<u32>,
    ) -> Result<Self, TextError> {
        let mut extra: HashMap<String, u32> = HashMap::new();
        let mut intern = |s: &str| -> Result<u32, TextError> {
            if let Some(id) = lookup(s).or_else(|| extra.get(s).copied()) {
                return Ok(id);
            }
            let id = u32::try_from(extra.len())
                .ok()
                .and_then(|n| n_vocab.checked_add(n))
                .filter(|&id| id != NONE)
                .ok_or_else(|| TextError::invalid("tokenizer.ggml.merges", "too many merges"))?;
            extra.try_reserve(1).map_err(TextError::memory(merges.len()))?;
            extra.insert(s.to_owned(), id);
            Ok(id)
        };
        let seed = RandomState::new().hash_one(n_vocab);
        let mut table = HashMap::with_hasher(PairHash(seed));
        table.try_reserve(merges.len()).map_err(TextError::memory(merges.len()))?;
        let mut joined = String::new();
        for (rank, merge) in merges.iter().enumerate() {
            if merge.len() > 2 * MOST_TEXT {
                let reason = format!("entry {rank} has {} bytes", merge.len());
                return Err(TextError::invalid("tokenizer.ggml.merges", reason));
            }
            // The left side may itself begin with a space only in files that do not encode bytes; none do here.
            let (left, right) =
                merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty()).ok_or_else(|| {
                    TextError::invalid("tokenizer.ggml.merges", format!("entry {rank} is no pair: {merge:?}"))
                })?;
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let (l, r, into) = (intern(left)?, intern(right)?, intern(&joined)?);
            // Of pairs that occur twice the first, better rank counts.
            table.entry(pair(l, r)).or_insert(Merge { rank: rank as u32, into });
        }
        let mut byte_symbol = [0; 256];
        for b in 0..=255u8 {
            byte_symbol[usize::from(b)] = intern(byte_char(b).encode_utf8(&mut [0; 4]))?;
        }
        let mut spelled = Vec::new();
        spelled.try_reserve_exact(extra.len()).map_err(TextError::memory(extra.len()))?;
        spelled.resize(extra.len(), Vec::new());
        for (text, id) in &extra {
            spelled[(id - n_vocab) as usize] =
                text.chars().filter_map(|c| lookup(c.encode_utf8(&mut [0; 4])).or(unknown)).collect();
        }
        Ok(Self { merges: table, byte_symbol, n_vocab, spelled })
    }

    /// Appends the tokens of one word.
    pub fn encode_word(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let Scratch { symbols, queue } = scratch;
        symbols.clear();
        queue.clear();
        // Words of 4 GiB and more do not get their symbols linked in 32 bits: cut, which no reference defines anyway.
        for chunk in word.chunks(u32::MAX as usize - 1) {
            self.encode_chunk(chunk, symbols, queue, out);
        }
    }

    fn encode_chunk(
        &self,
        word: &[u8],
        symbols: &mut Vec<Symbol>,
        queue: &mut BinaryHeap<Reverse<Candidate>>,
        out: &mut Vec<u32>,
    ) {
        symbols.clear();
        let n = word.len() as u32;
        symbols.extend(word.iter().zip(0u32..).map(|(&b, i)| Symbol {
            id: self.byte_symbol[usize::from(b)],
            prev: i.checked_sub(1).unwrap_or(NONE),
            next: if i + 1 < n { i + 1 } else { NONE },
        }));
        for i in 1..n {
            self.push(symbols, queue, i - 1, i);
        }
        while let Some(Reverse(c)) = queue.pop() {
            let (l, r) = (symbols[c.left as usize], symbols[c.right as usize]);
            // A merged-away symbol keeps its id but is linked from nowhere: its left neighbour's `next` tells.
            if l.id != c.left_id || r.id != c.right_id || l.next != c.right {
                continue;
            }
            symbols[c.left as usize] = Symbol { id: c.into, prev: l.prev, next: r.next };
            symbols[c.right as usize].id = NONE;
            if r.next != NONE {
                symbols[r.next as usize].prev = c.left;
                self.push(symbols, queue, c.left, r.next);
            }
            if l.prev != NONE {
                self.push(symbols, queue, l.prev, c.left);
            }
        }
        let mut i = if n == 0 { NONE } else { 0 };
        while i != NONE {
            let s = symbols[i as usize];
            match s.id.checked_sub(self.n_vocab) {
                None => out.push(s.id),
                Some(k) => out.extend_from_slice(&self.spelled[k as usize]),
            }
            i = s.next;
        }
    }

    #[inline]
    fn push(&self, symbols: &[Symbol], queue: &mut BinaryHeap<Reverse<Candidate>>, left: u32, right: u32) {
        let (left_id, right_id) = (symbols[left as usize].id, symbols[right as usize].id);
        if let Some(m) = self.merges.get(&pair(left_id, right_id)) {
            queue.push(Reverse(Candidate { rank: m.rank, left, right, left_id, right_id, into: m.into }));
        }
    }
}

#[inline]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_characters_are_one_to_one() {
        let mut seen = std::collections::HashSet::new();
        for b in 0..=255u8 {
            let c = byte_char(b);
            assert!(seen.insert(c) && !c.is_whitespace() && !c.is_control());
            assert_eq!(char_byte(c), Some(b));
        }
        assert_eq!((byte_char(b' '), byte_char(b'\n'), byte_char(b'a')), ('Ġ', 'Ċ', 'a'));
        assert_eq!(char_byte('中'), None);
        assert_eq!(char_byte(' '), None);
    }

    fn tiny(merges: &[&str], tokens: &[&str]) -> Bpe {
        let merges: Vec<String> = merges.iter().map(|s| s.to_string()).collect();
        Bpe::new(&merges, tokens.len() as u32, None, |s| {
            tokens.iter().position(|t| *t == s).map(|i| i as u32)
        })
        .unwrap()
    }

    fn ids(bpe: &Bpe, word: &str) -> Vec<u32> {
        let mut out = Vec::new();
        bpe.encode_word(word.as_bytes(), &mut Scratch::default(), &mut out);
        out
    }

    #[test]
    fn lowest_rank_first_then_leftmost() {
        let b = tiny(&["b c", "a b", "a a"], &["a", "b", "c", "ab", "bc", "aa"]);
        assert_eq!(ids(&b, "abc"), [0, 4]);
        assert_eq!(ids(&b, "abab"), [3, 3]);
        assert_eq!(ids(&b, "aaa"), [5, 0]);
        assert_eq!(ids(&b, ""), Vec::<u32>::new());
    }

    #[test]
    fn merges_through_strings_that_are_no_tokens() {
        // "ab" is no token, but the way to "abc"; left over, it is spelled.
        let b = tiny(&["a b", "ab c"], &["a", "b", "c", "abc"]);
        assert_eq!(ids(&b, "abcab"), [3, 0, 1]);
    }

    #[test]
    fn a_long_word_takes_no_quadratic_time() {
        let b = tiny(&["a a", "aa aa", "aaaa aaaa"], &["a", "aa", "aaaa", "aaaaaaaa"]);
        let word = "a".repeat(1 << 20);
        let t = std::time::Instant::now();
        assert_eq!(ids(&b, &word).len(), 1 << 17);
        assert!(t.elapsed().as_secs() < 20);
    }

    #[test]
    fn a_merge_that_is_no_pair_is_an_error() {
        for bad in ["ab", "a ", " b", ""] {
            let e = Bpe::new(&[bad.to_string()], 0, None, |_| None).err().unwrap();
            assert!(e.to_string().contains("tokenizer.ggml.merges"), "{e}");
        }
    }
}
