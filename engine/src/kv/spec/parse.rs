//! The grammar of a `--kv` string, and errors that point into it. Knows no policy.
//!
//! ```text
//! term = name [":" arg {"," arg}] ["(" term ")"] ["+" term]
//! arg  = [name "="] value
//! ```

use super::SpecError;
use std::ops::Range;

/// Characters a string may have: far above any sensible one.
const LONGEST: usize = 4096;
/// Wrappers around wrappers.
const DEEPEST: usize = 16;
/// Characters of the excerpt before and after the word.
const AROUND: usize = 40;

/// A piece of the text and where it stands, in bytes.
#[derive(Clone, Debug)]
pub struct Word {
    pub text: String,
    pub at: Range<usize>,
}

#[derive(Clone, Debug)]
pub struct Arg {
    pub key: Option<Word>,
    pub value: Word,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub name: Word,
    pub args: Vec<Arg>,
    pub inner: Option<Box<Node>>,
    pub plus: Option<Box<Node>>,
}

/// An error about the bytes `at` of `text`.
pub fn error(text: &str, at: Range<usize>, message: impl Into<String>) -> SpecError {
    let clean = |s: &str| -> Vec<char> { s.chars().map(|c| if c.is_control() { '?' } else { c }).collect() };
    let (before, word, after) = (clean(&text[..at.start]), clean(&text[at.clone()]), clean(&text[at.end..]));
    let mut excerpt: Vec<char> = Vec::new();
    if before.len() > AROUND {
        excerpt.push('…');
    }
    excerpt.extend(&before[before.len().saturating_sub(AROUND)..]);
    let start = excerpt.len();
    excerpt.extend(word.iter().take(2 * AROUND));
    let end = excerpt.len();
    excerpt.extend(after.iter().take(AROUND));
    if word.len() > 2 * AROUND || after.len() > AROUND {
        excerpt.push('…');
    }
    let message: String = clean(&message.into()).into_iter().take(400).collect();
    SpecError { message, excerpt: excerpt.into_iter().collect(), at: start..end }
}

/// The tree of a string.
pub fn parse(text: &str) -> Result<Node, SpecError> {
    if text.chars().count() > LONGEST {
        return Err(error(text, 0..0, format!("longer than {LONGEST} characters")));
    }
    let mut p = Parser { text, at: 0 };
    let node = p.term(0)?;
    match p.peek() {
        None => Ok(node),
        Some(c) => Err(error(text, p.at..p.at + c.len_utf8(), format!("`{c}` is not expected here"))),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn take(&mut self, c: char) -> bool {
        let there = self.peek() == Some(c);
        self.at += if there { c.len_utf8() } else { 0 };
        there
    }

    /// All up to one of `ends`, trimmed.
    fn word(&mut self, ends: &[char]) -> Word {
        let rest = &self.text[self.at..];
        let whole = &rest[..rest.find(ends).unwrap_or(rest.len())];
        let start = self.at + (whole.len() - whole.trim_start().len());
        self.at += whole.len();
        let text = whole.trim();
        Word { text: text.into(), at: start.min(self.at)..start.min(self.at) + text.len() }
    }

    fn term(&mut self, depth: usize) -> Result<Node, SpecError> {
        let name = self.word(&[':', ',', '=', '(', ')', '+']);
        if name.text.is_empty() {
            return Err(error(self.text, name.at, "the name of a kv policy is expected here"));
        }
        if depth > DEEPEST {
            return Err(error(self.text, name.at, format!("more than {DEEPEST} policies in one")));
        }
        let mut node = Node { name, args: Vec::new(), inner: None, plus: None };
        if self.take(':') {
            loop {
                let word = self.word(&[',', '=', '(', ')', '+']);
                let arg = if self.take('=') {
                    if word.text.is_empty() {
                        return Err(error(
                            self.text,
                            word.at,
                            "the name of a parameter is expected before `=`",
                        ));
                    }
                    Arg { key: Some(word), value: self.word(&[',', '=', '(', ')', '+']) }
                } else if word.text.is_empty() {
                    return Err(error(self.text, word.at, "a parameter is expected here"));
                } else {
                    Arg { key: None, value: word }
                };
                node.args.push(arg);
                if !self.take(',') {
                    break;
                }
            }
        }
        let open = self.at;
        if self.take('(') {
            node.inner = Some(Box::new(self.term(depth + 1)?));
            if !self.take(')') {
                return Err(error(self.text, open..open + 1, "this bracket is not closed"));
            }
            self.word(&[':', ',', '=', '(', ')', '+']);
        }
        if self.take('+') {
            node.plus = Some(Box::new(self.term(depth + 1)?));
        }
        Ok(node)
    }
}
