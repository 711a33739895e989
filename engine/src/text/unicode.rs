//! Unicode general categories of a character, as bits, for the pre-tokenizers.
//!
//! The sets are those of Unicode's `\p{..}` (tables of the `regex-syntax` crate, expanded once into one byte a
//! code point: 1.1 MB, made on first use). Knows nothing of tokens.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{L}`.
pub const LETTER: u8 = 1;
/// `\p{N}`.
pub const NUMBER: u8 = 2;
/// `\p{M}`.
pub const MARK: u8 = 4;
/// `\p{P}`.
pub const PUNCT: u8 = 8;
/// `\p{S}`.
pub const SYMBOL: u8 = 16;
/// `\s`: the property White_Space.
pub const SPACE: u8 = 32;
/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`: what may begin a capitalised word.
pub const UPPERISH: u8 = 64;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`: what may continue it.
pub const LOWERISH: u8 = 128;

const CLASSES: [(&str, u8); 8] = [
    (r"\p{L}", LETTER),
    (r"\p{N}", NUMBER),
    (r"\p{M}", MARK),
    (r"\p{P}", PUNCT),
    (r"\p{S}", SYMBOL),
    (r"\s", SPACE),
    (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", UPPERISH),
    (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", LOWERISH),
];

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut table = vec![0u8; 0x11_0000];
    for (pattern, bit) in CLASSES {
        for (first, last) in ranges(pattern) {
            table[first as usize..=last as usize].iter_mut().for_each(|b| *b |= bit);
        }
    }
    table
});

/// The inclusive ranges of a character class written as a regex. The patterns are constants of this crate.
fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(pattern).expect("constant pattern");
    match hir.kind() {
        HirKind::Class(Class::Unicode(c)) => {
            c.ranges().iter().map(|r| (u32::from(r.start()), u32::from(r.end()))).collect()
        }
        _ => unreachable!("constant pattern {pattern} is a class"),
    }
}

/// The classifier; holding it saves the check for the table on every character.
#[derive(Clone, Copy)]
pub struct Classes(&'static [u8]);

impl Classes {
    /// Makes the table if need be.
    pub fn get() -> Self {
        Self(&TABLE)
    }

    /// The category bits of `c`; 0 for control characters, unassigned code points and the like.
    #[inline]
    pub fn of(self, c: char) -> u8 {
        self.0[c as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn categories() {
        let c = Classes::get();
        for (ch, bits) in [
            ('a', LETTER | LOWERISH),
            ('A', LETTER | UPPERISH),
            ('ǅ', LETTER | UPPERISH),
            ('中', LETTER | UPPERISH | LOWERISH),
            ('5', NUMBER),
            ('½', NUMBER),
            ('\u{301}', MARK | UPPERISH | LOWERISH),
            ('!', PUNCT),
            ('$', SYMBOL),
            (' ', SPACE),
            ('\u{85}', SPACE),
            ('\u{3000}', SPACE),
            ('\u{0}', 0),
            ('\u{200b}', 0),
            ('\u{e000}', 0),
            ('\u{10ffff}', 0),
        ] {
            assert_eq!(c.of(ch), bits, "{ch:?}");
        }
    }
}
