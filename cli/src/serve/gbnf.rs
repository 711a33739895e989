//! llama.cpp's grammars (GBNF) in the notation that llguidance reads. A grammar without recursion becomes one regular
//! expression, which is exact. With recursion its rules become Lark's, character by character; where a text could go on in a
//! literal or in a class of characters, the literal wins, so that a few texts of the grammar cannot come: none that is not of
//! it can.

use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

/// Levels of brackets, and rules within rules.
const DEEPEST: usize = 100;
/// Bytes of a regular expression.
const LONGEST: usize = 1 << 18;

enum Item {
    /// An escaped regular expression of exactly one character.
    Class(String),
    Literal(String),
    Rule(String),
    Group(Vec<Vec<Item>>),
    /// With a suffix: `*`, `+`, `?`, `{m,n}`.
    Repeated(Box<Item>, String),
}

type Rules = HashMap<String, Vec<Vec<Item>>>;

/// What a grammar becomes.
#[derive(Debug, PartialEq)]
pub enum Converted {
    Regex(String),
    Lark(String),
}

/// Converts a grammar.
///
/// # Errors
/// What is wrong with it, with its line.
pub fn convert(text: &str) -> Result<Converted, String> {
    let mut p = Parser { chars: text.chars().peekable(), line: 1 };
    let rules = p.rules().map_err(|e| format!("line {}: {e}", p.line))?;
    if !rules.contains_key("root") {
        return Err("there is no rule root".into());
    }
    match regex_of(&rules, "root", 0)? {
        Some(regex) => Ok(Converted::Regex(regex)),
        None => lark(&rules).map(Converted::Lark),
    }
}

struct Parser<'t> {
    chars: Peekable<Chars<'t>>,
    line: usize,
}

impl Parser<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.chars.next();
        self.line += usize::from(c == Some('\n'));
        c
    }

    /// Skips white space and comments; line breaks only where they may stand.
    fn space(&mut self, breaks: bool) {
        while let Some(&c) = self.chars.peek() {
            match c {
                '#' => while self.chars.next_if(|c| *c != '\n').is_some() {},
                ' ' | '\t' | '\r' => drop(self.next()),
                '\n' if breaks => drop(self.next()),
                _ => return,
            }
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '-' || *c == '_') {
            name.push(c);
        }
        name
    }

    fn rules(&mut self) -> Result<Rules, String> {
        let mut rules = Rules::new();
        loop {
            self.space(true);
            if self.chars.peek().is_none() {
                return Ok(rules);
            }
            let name = self.name();
            self.space(false);
            let sign: String = self.chars.by_ref().take(3).collect();
            if name.is_empty() || sign != "::=" {
                return Err("a rule is NAME ::= ...".into());
            }
            self.space(true);
            let body = self.alternatives(0)?;
            if rules.insert(name.clone(), body).is_some() {
                return Err(format!("two rules are called {name}"));
            }
            if !matches!(self.chars.peek(), None | Some('\n')) {
                return Err("something is left over behind a rule".into());
            }
        }
    }

    fn alternatives(&mut self, depth: usize) -> Result<Vec<Vec<Item>>, String> {
        if depth > DEEPEST {
            return Err("too many brackets".into());
        }
        let mut all = vec![self.sequence(depth)?];
        while self.chars.next_if_eq(&'|').is_some() {
            self.space(true);
            all.push(self.sequence(depth)?);
        }
        Ok(all)
    }

    fn sequence(&mut self, depth: usize) -> Result<Vec<Item>, String> {
        let mut items = Vec::new();
        while let Some(&c) = self.chars.peek() {
            let item = match c {
                '"' => self.literal()?,
                '[' => self.class()?,
                '.' => {
                    self.next();
                    Item::Class("[\\s\\S]".into())
                }
                '(' => {
                    self.next();
                    self.space(true);
                    let inner = self.alternatives(depth + 1)?;
                    if self.next() != Some(')') {
                        return Err("a bracket is not closed".into());
                    }
                    Item::Group(inner)
                }
                c if c.is_ascii_alphanumeric() || c == '_' => Item::Rule(self.name()),
                '<' | '!' => return Err("tokens in grammars are not supported".into()),
                _ => break,
            };
            items.push(self.repeated(item)?);
            self.space(depth > 0);
        }
        Ok(items)
    }

    fn repeated(&mut self, item: Item) -> Result<Item, String> {
        Ok(match self.chars.peek() {
            Some('*' | '+' | '?') => Item::Repeated(Box::new(item), self.next().into_iter().collect()),
            Some('{') => {
                let mut suffix = String::new();
                while let Some(c) = self.chars.next_if(|c| c.is_ascii_digit() || "{, ".contains(*c)) {
                    suffix.extend((c != ' ').then_some(c));
                }
                if self.next() != Some('}') || suffix.len() < 2 || suffix.len() > 12 || suffix == "{," {
                    return Err("a repetition is {m}, {m,} or {m,n}".into());
                }
                Item::Repeated(Box::new(item), suffix.replace("{,", "{0,") + "}")
            }
            _ => item,
        })
    }

    /// A character of a literal or a class, escapes read.
    fn character(&mut self) -> Result<char, String> {
        let code = |p: &mut Self, n: usize| {
            let hex: String = (0..n).filter_map(|_| p.next()).collect();
            u32::from_str_radix(&hex, 16)
                .ok()
                .and_then(char::from_u32)
                .ok_or(format!("\\{hex} is no character"))
        };
        match self.next().ok_or("it ends too early")? {
            '\\' => match self.next() {
                Some('x') => code(self, 2),
                Some('u') => code(self, 4),
                Some('U') => code(self, 8),
                Some('t') => Ok('\t'),
                Some('r') => Ok('\r'),
                Some('n') => Ok('\n'),
                Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => Ok(c),
                other => Err(format!("unknown escape {other:?}")),
            },
            c => Ok(c),
        }
    }

    fn literal(&mut self) -> Result<Item, String> {
        self.next();
        let mut text = String::new();
        while self.chars.next_if_eq(&'"').is_none() {
            text.push(self.character()?);
        }
        Ok(Item::Literal(text))
    }

    fn class(&mut self) -> Result<Item, String> {
        self.next();
        let mut out = String::from("[");
        if self.chars.next_if_eq(&'^').is_some() {
            out.push('^');
        }
        let mut empty = true;
        while self.chars.next_if_eq(&']').is_none() {
            let c = self.character()?;
            let _ = write!(out, "\\u{{{:x}}}", c as u32);
            if self.chars.next_if_eq(&'-').is_some() {
                if self.chars.peek() == Some(&']') {
                    out.push_str("\\-");
                } else {
                    let _ = write!(out, "-\\u{{{:x}}}", self.character()? as u32);
                }
            }
            empty = false;
        }
        if empty {
            return Err("an empty class of characters".into());
        }
        out.push(']');
        Ok(Item::Class(out))
    }
}

fn escaped(text: &str) -> String {
    text.chars().map(|c| format!("\\u{{{:x}}}", c as u32)).collect()
}

/// The regular expression of a rule; `None` where it is recursive.
fn regex_of(rules: &Rules, name: &str, depth: usize) -> Result<Option<String>, String> {
    let body = rules.get(name).ok_or_else(|| format!("there is no rule {name}"))?;
    // Without recursion no path is longer than there are rules.
    if depth > rules.len().min(DEEPEST) {
        return Ok(None);
    }
    regex_of_alternatives(rules, body, depth)
}

fn regex_of_alternatives(rules: &Rules, all: &[Vec<Item>], depth: usize) -> Result<Option<String>, String> {
    let mut parts = Vec::new();
    for sequence in all {
        let mut part = String::new();
        for item in sequence {
            match regex_of_item(rules, item, depth)? {
                Some(r) => part += &r,
                None => return Ok(None),
            }
            if part.len() > LONGEST {
                return Err("the grammar is too large".into());
            }
        }
        parts.push(part);
    }
    Ok(Some(format!("(?:{})", parts.join("|"))))
}

fn regex_of_item(rules: &Rules, item: &Item, depth: usize) -> Result<Option<String>, String> {
    Ok(match item {
        Item::Class(c) => Some(c.clone()),
        Item::Literal(t) => Some(escaped(t)),
        Item::Rule(name) => regex_of(rules, name, depth + 1)?,
        Item::Group(all) => regex_of_alternatives(rules, all, depth)?,
        Item::Repeated(inner, suffix) => {
            regex_of_item(rules, inner, depth)?.map(|r| format!("(?:{r}){suffix}"))
        }
    })
}

fn lark(rules: &Rules) -> Result<String, String> {
    let mut names: Vec<&String> = rules.keys().collect();
    names.sort();
    let known = |name: &str| match names.binary_search_by(|n| n.as_str().cmp(name)) {
        Ok(_) if name == "root" => Ok("start".to_owned()),
        Ok(i) => Ok(format!("rule_{i}")),
        Err(_) => Err(format!("there is no rule {name}")),
    };
    let mut out = String::new();
    for name in &names {
        let body = lark_of(&rules[*name], &known)?;
        let _ = writeln!(out, "{}: {body}", known(name)?);
    }
    Ok(out)
}

fn lark_of(all: &[Vec<Item>], known: &impl Fn(&str) -> Result<String, String>) -> Result<String, String> {
    let sequence = |s: &Vec<Item>| -> Result<String, String> {
        let parts: Vec<String> = s.iter().map(|i| lark_of_item(i, known)).collect::<Result<_, _>>()?;
        Ok(if parts.is_empty() { "\"\"".into() } else { parts.join(" ") })
    };
    Ok(all.iter().map(sequence).collect::<Result<Vec<_>, _>>()?.join(" | "))
}

fn lark_of_item(item: &Item, known: &impl Fn(&str) -> Result<String, String>) -> Result<String, String> {
    Ok(match item {
        Item::Class(c) => format!("/{c}/"),
        Item::Literal(t) => serde_json::Value::from(t.as_str()).to_string(),
        Item::Rule(name) => known(name)?,
        Item::Group(all) => format!("({})", lark_of(all, known)?),
        Item::Repeated(inner, suffix) => format!("({}){suffix}", lark_of_item(inner, known)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regex(text: &str) -> regex::Regex {
        match convert(text).unwrap() {
            Converted::Regex(r) => regex::Regex::new(&format!("^{r}$")).unwrap(),
            Converted::Lark(l) => panic!("recursive: {l}"),
        }
    }

    #[test]
    fn grammars_without_recursion_are_expressions() {
        let date = "# a date\nroot ::= year \"-\" two \"-\" two ( \" \"\n  \"(\" [^)]+ \")\" )?\nyear ::= [0-9]{4}\ntwo ::= [0-9] [0-9]\n";
        let r = regex(date);
        assert!(r.is_match("2024-01-31") && r.is_match("2024-01-31 (a day)"));
        assert!(!r.is_match("2024-1-31") && !r.is_match("2024-01-31 ()"));
        let r = regex("root ::= \"a\\\"\\n\" | \"\\x41\" [\\]\\-z-] | .{2,3}");
        assert!(
            r.is_match("a\"\n")
                && r.is_match("A]")
                && r.is_match("A-")
                && r.is_match("xyz")
                && !r.is_match("x")
        );
    }

    #[test]
    fn recursion_becomes_lark() {
        let list = "root ::= item (\", \" item)*\nitem ::= [a-z] | \"(\" root \")\"";
        let Converted::Lark(l) = convert(list).unwrap() else { panic!("not recursive") };
        assert_eq!(l, "rule_0: /[\\u{61}-\\u{7a}]/ | \"(\" start \")\"\nstart: rule_0 ((\", \" rule_0))*\n");
    }

    #[test]
    fn mistakes_are_told() {
        for (text, words) in [
            ("", "no rule root"),
            ("root ::= other", "no rule other"),
            ("root ::= \"a", "too early"),
            ("root ::= [a", "too early"),
            ("root ::= []", "empty class"),
            ("root ::= (\"a\"", "not closed"),
            ("root ::= \"a\" )", "left over"),
            ("root = \"a\"", "line 1: a rule is"),
            ("root ::= \"a\"\nroot ::= \"b\"", "two rules"),
            ("root ::= \"a\"{x}", "repetition"),
            ("root ::= \"\\q\"", "escape"),
            ("root ::= <think>", "tokens"),
        ] {
            let e = convert(text).unwrap_err();
            assert!(e.contains(words), "{text:?}: {e}");
        }
        assert!(convert(&format!("root ::= {}", "(".repeat(100_000))).is_err());
        // Each rule doubles the one below it.
        let mut doubling = String::from("root ::= r0\n");
        (0..60).for_each(|i| doubling += &format!("r{i} ::= r{} r{}\n", i + 1, i + 1));
        doubling += "r60 ::= \"a\"\n";
        assert!(convert(&doubling).is_err());
    }
}
