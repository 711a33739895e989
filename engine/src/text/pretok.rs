//! Pre-tokenizers: how a BPE vocabulary's text is cut into words before merging.
//!
//! A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`); each name stands for a sequence of regular expressions
//! (from the models' `tokenizer.json`; llama.cpp maps names to them in `llama-vocab.cpp`). Every expression in turn
//! cuts each piece into its matches and the gaps between them. The expressions are hand-written matchers here: they
//! take linear time on any text, which backtracking over `\s+(?!\S)` does not.
//! Knows nothing of ids and merges.

use super::unicode::{Classes, LETTER, LOWERISH, MARK, NUMBER, PUNCT, SPACE, SYMBOL, UPPERISH};

/// What a `tokenizer.ggml.pre` name implies besides the expressions.
#[derive(Clone, Copy, Debug)]
pub struct Pre {
    rules: &'static [Rule],
    /// A word that is a token is that token, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether BOS is added where the file does not say.
    pub add_bos: bool,
}

/// One regular expression.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// `[\r\n]`
    Newline,
    /// `C+` for a set of characters, with `\s?` before it if `space`.
    Run { set: Set, space: bool },
    /// `\p{N}{1,max}`
    Digits { max: usize },
    /// `[0-9][0-9][0-9]`
    ThreeAsciiDigits,
    /// `\s+$`
    TrailingSpace,
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?L+|\p{N}{1,digits}| ?[^\sL\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    /// with L = `\p{L}`, or `[\p{L}\p{M}]` if `marks`.
    Llama3 { digits: usize, marks: bool },
    /// ``[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+``
    DeepSeek3,
    /// `[^\r\n\p{L}\p{N}]?U*W+|[^\r\n\p{L}\p{N}]?U+W*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    /// with U = `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`, W = `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`.
    Tekken,
}

#[derive(Clone, Copy, Debug)]
enum Set {
    /// Any of these category bits.
    Category(u8),
    /// `[\p{P}$+<=>^~|]`, with a backtick if `backtick`.
    PunctuationAndSome { backtick: bool },
    /// Inclusive ranges, ascending.
    Ranges(&'static [(u32, u32)]),
}

/// `[一-龥぀-ゟ゠-ヿ]`
const CJK_KANA: Set = Set::Ranges(&[(0x3040, 0x309f), (0x30a0, 0x30ff), (0x4e00, 0x9fa5)]);
/// `[一-龥ࠀ-一가-퟿]`
const CJK_WIDE: Set = Set::Ranges(&[(0x800, 0x4e00), (0x4e00, 0x9fa5), (0xac00, 0xd7ff)]);
/// `[!-/:-~！-／：-～‘-‟　-。]`
const DEEPSEEK_PUNCT: Set = Set::Ranges(&[
    (0x21, 0x2f),
    (0x3a, 0x7e),
    (0x2018, 0x201f),
    (0x3000, 0x3002),
    (0xff01, 0xff0f),
    (0xff1a, 0xff5e),
]);
/// The cased letters as deepseek-llm lists them.
#[rustfmt::skip]
const DEEPSEEK_LETTERS: Set = Set::Ranges(&[
    (0x41, 0x5a), (0x61, 0x7a), (0xb5, 0xb5), (0xc0, 0xd6), (0xd8, 0xf6), (0xf8, 0x1ba), (0x1bc, 0x1bf),
    (0x1c4, 0x293), (0x295, 0x2af), (0x370, 0x373), (0x376, 0x377), (0x37b, 0x37d), (0x37f, 0x37f),
    (0x386, 0x386), (0x388, 0x38a), (0x38c, 0x38c), (0x38e, 0x3a1), (0x3a3, 0x3f5), (0x3f7, 0x481),
    (0x48a, 0x52f), (0x531, 0x556), (0x10a0, 0x10c5), (0x13a0, 0x13f5), (0x13f8, 0x13fd), (0x1c90, 0x1cba),
    (0x1cbd, 0x1cbf), (0x1d00, 0x1d2b), (0x1d6b, 0x1d77), (0x1d79, 0x1d9a), (0x1e00, 0x1f15),
    (0x1f18, 0x1f1d), (0x1f20, 0x1f45), (0x1f48, 0x1f4d), (0x1f50, 0x1f57), (0x1f59, 0x1f59),
    (0x1f5b, 0x1f5b), (0x1f5d, 0x1f5d), (0x1f5f, 0x1f7d), (0x1f80, 0x1fb4), (0x1fb6, 0x1fbc),
    (0x1fbe, 0x1fbe), (0x1fc2, 0x1fc4), (0x1fc6, 0x1fcc), (0x1fd0, 0x1fd3), (0x1fd6, 0x1fdb),
    (0x1fe0, 0x1fec), (0x1ff2, 0x1ff4), (0x1ff6, 0x1ffc), (0x2102, 0x2102), (0x2107, 0x2107),
    (0x210a, 0x2113), (0x2115, 0x2115), (0x2119, 0x211d), (0x2124, 0x2124), (0x2126, 0x2126),
    (0x2128, 0x2128), (0x212a, 0x212d), (0x212f, 0x2134), (0x2139, 0x2139), (0x213c, 0x213f),
    (0x2145, 0x2149), (0x214e, 0x214e), (0x2183, 0x2184), (0x2c00, 0x2c7b), (0x2c7e, 0x2ce4),
    (0x2ceb, 0x2cee), (0x2cf2, 0x2cf3), (0xa640, 0xa66d), (0xa680, 0xa69b), (0xa722, 0xa76f),
    (0xa771, 0xa787), (0xa78b, 0xa78e), (0xab70, 0xabbf), (0xfb00, 0xfb06), (0xfb13, 0xfb17),
    (0xff21, 0xff3a), (0xff41, 0xff5a), (0x10400, 0x1044f), (0x104b0, 0x104d3), (0x104d8, 0x104fb),
    (0x10c80, 0x10cb2), (0x10cc0, 0x10cf2), (0x118a0, 0x118df), (0x1e900, 0x1e943),
]);

const LLAMA3: &[Rule] = &[Rule::Llama3 { digits: 3, marks: false }];
const QWEN2: &[Rule] = &[Rule::Llama3 { digits: 1, marks: false }];
const QWEN35: &[Rule] = &[Rule::Llama3 { digits: 1, marks: true }];
const GPT2: &[Rule] = &[Rule::Gpt2];
const DIGIT_GPT2: &[Rule] = &[Rule::Digits { max: 1 }, Rule::Gpt2];
const TEKKEN: &[Rule] = &[Rule::Tekken];
const DEEPSEEK3: &[Rule] =
    &[Rule::Digits { max: 3 }, Rule::Run { set: CJK_KANA, space: false }, Rule::DeepSeek3];
const DEEPSEEK_LLM: &[Rule] = &[
    Rule::Newline,
    Rule::Run { set: DEEPSEEK_LETTERS, space: true },
    Rule::Run { set: DEEPSEEK_PUNCT, space: true },
    Rule::TrailingSpace,
    Rule::Run { set: CJK_WIDE, space: false },
    Rule::Digits { max: usize::MAX },
];
const DEEPSEEK_CODER: &[Rule] = &[
    Rule::Newline,
    Rule::Run { set: Set::Category(LETTER), space: true },
    Rule::Run { set: Set::Category(PUNCT), space: true },
    Rule::Run { set: CJK_WIDE, space: false },
    Rule::Digits { max: 1 },
];
const FALCON: &[Rule] = &[
    Rule::Run { set: Set::PunctuationAndSome { backtick: true }, space: false },
    Rule::Gpt2,
    Rule::ThreeAsciiDigits,
];
const DEFAULT: &[Rule] = &[
    Rule::Run { set: Set::PunctuationAndSome { backtick: false }, space: false },
    Rule::Gpt2,
    Rule::Digits { max: usize::MAX },
    Rule::ThreeAsciiDigits,
];

impl Pre {
    /// The pre-tokenizer of that name; `None` if there is none here.
    pub fn by_name(name: &str) -> Option<Self> {
        let plain = |rules| Self { rules, ignore_merges: false, add_bos: false };
        Some(match name {
            "default" => plain(DEFAULT),
            "deepseek-llm" => plain(DEEPSEEK_LLM),
            "deepseek-coder" => plain(DEEPSEEK_CODER),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => plain(DEEPSEEK3),
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
            | "lfm2" => Self { rules: LLAMA3, ignore_merges: true, add_bos: true },
            "dbrx" | "smaug-bpe" => plain(LLAMA3),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" | "stablelm2" | "hunyuan"
            | "solar-open" | "grok-2" => plain(QWEN2),
            "qwen35" => plain(QWEN35),
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "exaone4" | "gigachat" | "a.x-4.0"
            | "mellum" => plain(GPT2),
            "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" | "minerva-7b" => {
                plain(DIGIT_GPT2)
            }
            "falcon" => plain(FALCON),
            "tekken" => Self { rules: TEKKEN, ignore_merges: true, add_bos: true },
            _ => return None,
        })
    }

    /// Cuts `text` into words; calls `word` with each in order. Their concatenation is `text`.
    pub fn split<'t>(&self, text: &'t str, mut word: impl FnMut(&'t str)) {
        let s = Chars::new(text);
        let mut pieces = vec![(0, s.len())];
        let mut next = Vec::new();
        for rule in self.rules {
            next.clear();
            for &(start, end) in &pieces {
                s.split_piece(*rule, start, end, &mut next);
            }
            std::mem::swap(&mut pieces, &mut next);
        }
        for (start, end) in pieces {
            if start < end {
                word(&text[s.offset[start]..s.offset[end]]);
            }
        }
    }
}

/// A text as characters with their categories and byte offsets (one more than characters).
struct Chars {
    chars: Vec<char>,
    class: Vec<u8>,
    offset: Vec<usize>,
}

impl Chars {
    fn new(text: &str) -> Self {
        let classes = Classes::get();
        let mut s = Self {
            chars: Vec::with_capacity(text.len()),
            class: Vec::with_capacity(text.len()),
            offset: Vec::with_capacity(text.len() + 1),
        };
        for (at, c) in text.char_indices() {
            s.chars.push(c);
            s.class.push(classes.of(c));
            s.offset.push(at);
        }
        s.offset.push(text.len());
        s
    }

    fn len(&self) -> usize {
        self.chars.len()
    }

    /// Appends to `out` the matches of `rule` in `start..end` and the gaps between them.
    fn split_piece(&self, rule: Rule, start: usize, end: usize, out: &mut Vec<(usize, usize)>) {
        let piece = Piece { chars: &self.chars[..end], class: &self.class[..end] };
        let trailing = matches!(rule, Rule::TrailingSpace).then(|| piece.trailing_space(start));
        let (mut i, mut gap) = (start, start);
        while i < end {
            let found = match trailing {
                // Known at once for the whole piece; searching for it anew at each space would be quadratic.
                Some(tail) => {
                    i = tail;
                    (tail < end).then_some(end)
                }
                None => piece.match_at(rule, i),
            };
            match found {
                Some(to) => {
                    if gap < i {
                        out.push((gap, i));
                    }
                    out.push((i, to));
                    (i, gap) = (to, to);
                }
                None => i += 1,
            }
        }
        if gap < end {
            out.push((gap, end));
        }
    }
}

/// The text up to the end of the piece at hand: what lies behind it does not exist for the expressions.
struct Piece<'a> {
    chars: &'a [char],
    class: &'a [u8],
}

impl Piece<'_> {
    #[inline]
    fn char(&self, i: usize) -> Option<char> {
        self.chars.get(i).copied()
    }

    /// Whether there is a character at `i` in any of `bits`.
    #[inline]
    fn is(&self, i: usize, bits: u8) -> bool {
        self.class.get(i).is_some_and(|c| c & bits != 0)
    }

    /// Whether there is a character at `i` in none of `bits`.
    #[inline]
    fn is_not(&self, i: usize, bits: u8) -> bool {
        self.class.get(i).is_some_and(|c| c & bits == 0)
    }

    #[inline]
    fn newline(&self, i: usize) -> bool {
        matches!(self.char(i), Some('\r' | '\n'))
    }

    /// The first place from `i` on where `f` fails.
    #[inline]
    fn run(&self, mut i: usize, f: impl Fn(usize) -> bool) -> usize {
        while f(i) {
            i += 1;
        }
        i
    }

    fn trailing_space(&self, start: usize) -> usize {
        let mut tail = self.chars.len();
        while tail > start && self.is(tail - 1, SPACE) {
            tail -= 1;
        }
        tail
    }

    fn in_set(&self, i: usize, set: Set) -> bool {
        let Some(c) = self.char(i) else { return false };
        match set {
            Set::Category(bits) => self.class[i] & bits != 0,
            Set::PunctuationAndSome { backtick } => {
                self.class[i] & PUNCT != 0
                    || matches!(c, '$' | '+' | '<' | '=' | '>' | '^' | '~' | '|')
                    || (backtick && c == '`')
            }
            Set::Ranges(ranges) => {
                let c = c as u32;
                let at = ranges.partition_point(|&(_, last)| last < c);
                ranges.get(at).is_some_and(|&(first, _)| first <= c)
            }
        }
    }

    /// The end of the match of `rule` that begins at `i` (which lies in the piece), leftmost alternative first.
    fn match_at(&self, rule: Rule, i: usize) -> Option<usize> {
        let end = match rule {
            Rule::Newline => i + usize::from(self.newline(i)),
            Rule::Run { set, space } => {
                // `\s?` is greedy: a space that is itself in the set is taken as the prefix first, with the same end.
                let from = i + usize::from(space && self.is(i, SPACE) && self.in_set(i + 1, set));
                let to = self.run(from, |k| self.in_set(k, set));
                if to == from { i } else { to }
            }
            Rule::Digits { max } => self.digits(i, max),
            Rule::ThreeAsciiDigits => {
                let all = (i..i + 3).all(|k| self.char(k).is_some_and(|c| c.is_ascii_digit()));
                if all { i + 3 } else { i }
            }
            Rule::TrailingSpace => {
                let tail = self.trailing_space(i);
                if tail == i { self.chars.len() } else { i }
            }
            Rule::Gpt2 => self.gpt2(i),
            Rule::Llama3 { digits, marks } => self.llama3(i, digits, marks),
            Rule::DeepSeek3 => self.deepseek3(i),
            Rule::Tekken => self.tekken(i),
        };
        (end > i).then_some(end)
    }

    fn digits(&self, i: usize, max: usize) -> usize {
        self.run(i, |k| k - i < max && self.is(k, NUMBER))
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d`; `i` itself if there is none.
    fn contraction(&self, i: usize, any_case: bool) -> usize {
        if self.char(i) != Some('\'') {
            return i;
        }
        let at = |k| match self.char(k) {
            Some(c) if any_case => c.to_ascii_lowercase(),
            Some(c) => c,
            None => '\0',
        };
        match (at(i + 1), at(i + 2)) {
            ('s' | 't' | 'm' | 'd', _) => i + 2,
            ('r' | 'v', 'e') | ('l', 'l') => i + 3,
            _ => i,
        }
    }

    /// `\s+(?!\S)|\s+`
    fn spaces(&self, i: usize) -> usize {
        let to = self.run(i, |k| self.is(k, SPACE));
        // Before a non-space the last space is left to be its prefix, if that leaves anything.
        if to < self.chars.len() && to > i + 1 { to - 1 } else { to }
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+`
    fn newlines_or_spaces(&self, i: usize) -> usize {
        let to = self.run(i, |k| self.is(k, SPACE));
        match (i..to).rev().find(|&k| self.newline(k)) {
            Some(last) => last + 1,
            None => self.spaces(i),
        }
    }

    fn gpt2(&self, i: usize) -> usize {
        let to = self.contraction(i, false);
        if to > i {
            return to;
        }
        let from = i + usize::from(self.char(i) == Some(' '));
        for bit in [LETTER, NUMBER] {
            if self.is(from, bit) {
                return self.run(from, |k| self.is(k, bit));
            }
        }
        let other = |k| self.is_not(k, SPACE | LETTER | NUMBER);
        if other(from) { self.run(from, other) } else { self.spaces(i) }
    }

    fn llama3(&self, i: usize, digits: usize, marks: bool) -> usize {
        let letters = if marks { LETTER | MARK } else { LETTER };
        let to = self.contraction(i, true);
        if to > i {
            return to;
        }
        let prefix = self.is_not(i, LETTER | NUMBER) && !self.newline(i) && self.is(i + 1, letters);
        if prefix || self.is(i, letters) {
            return self.run(i + 1, |k| self.is(k, letters));
        }
        if self.is(i, NUMBER) {
            return self.digits(i, digits);
        }
        let from = i + usize::from(self.char(i) == Some(' '));
        let other = |k| self.is_not(k, SPACE | NUMBER | letters);
        if other(from) {
            return self.run(self.run(from, other), |k| self.newline(k));
        }
        self.newlines_or_spaces(i)
    }

    fn deepseek3(&self, i: usize) -> usize {
        let ascii_letter = |k| self.char(k).is_some_and(|c| c.is_ascii_alphabetic());
        if self.char(i).is_some_and(|c| c.is_ascii_punctuation()) && ascii_letter(i + 1) {
            return self.run(i + 1, ascii_letter);
        }
        let prefix =
            self.is_not(i, LETTER | PUNCT | SYMBOL) && !self.newline(i) && self.is(i + 1, LETTER | MARK);
        if prefix || self.is(i, LETTER | MARK) {
            return self.run(i + 1, |k| self.is(k, LETTER | MARK));
        }
        let from = i + usize::from(self.char(i) == Some(' '));
        let punct = |k| self.is(k, PUNCT | SYMBOL);
        if punct(from) {
            return self.run(self.run(from, punct), |k| self.newline(k));
        }
        if self.is(i, SPACE) { self.newlines_or_spaces(i) } else { i }
    }

    /// The end of `U*W+` at `i`. U and W overlap (marks, letters without case), so `U*` may have to give back.
    fn capitalised(&self, i: usize) -> Option<usize> {
        let upper = self.run(i, |k| self.is(k, UPPERISH));
        let lower = self.run(upper, |k| self.is(k, LOWERISH));
        if lower > upper {
            return Some(lower);
        }
        (i..upper).rev().find(|&k| self.is(k, LOWERISH)).map(|k| k + 1)
    }

    fn tekken(&self, i: usize) -> usize {
        let prefix = self.is_not(i, LETTER | NUMBER) && !self.newline(i);
        let from = |skip: usize| self.run(i + skip, |k| self.is(k, UPPERISH));
        // In the order of the expression: `U*W+` with and without the prefix, then `U+`: no W follows it here.
        let word = (prefix.then(|| self.capitalised(i + 1)).flatten())
            .or_else(|| self.capitalised(i))
            .or_else(|| (prefix && from(1) > i + 1).then(|| from(1)))
            .or_else(|| (from(0) > i).then(|| from(0)));
        if let Some(to) = word {
            return to;
        }
        if self.is(i, NUMBER) {
            return i + 1;
        }
        let from = i + usize::from(self.char(i) == Some(' '));
        let other = |k| self.is_not(k, SPACE | LETTER | NUMBER);
        if other(from) {
            return self.run(self.run(from, other), |k| matches!(self.char(k), Some('\r' | '\n' | '/')));
        }
        self.newlines_or_spaces(i)
    }
}
