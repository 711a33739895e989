//! PTX text to statements: comments away, words and operands apart. Knows the syntax; nothing of what instructions mean.

use crate::PtxError;

/// A variable: parameter, shared, local or global memory.
#[derive(Clone, Debug)]
pub struct Variable {
    pub name: String,
    pub align: usize,
    pub bytes: usize,
    /// `extern .shared` without a size: what the launch gives.
    pub dynamic: bool,
    pub space: String,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, special register, label or variable.
    Name(String),
    /// An integer or the bits of a float.
    Imm(u64),
    /// `[base + offset]`; a base that is a number counts as offset.
    Address(Option<String>, i64),
    /// `{a, b}`.
    Vector(Vec<Operand>),
    /// `a|b`, of setp and shfl.
    Pair(String, String),
}

/// A line of a body.
#[derive(Clone, Debug)]
pub enum Statement {
    Label(String),
    Registers { prefix: String, count: u32, ty: String },
    Variable(Variable),
    Instruction { guard: Option<(String, bool)>, op: Vec<String>, args: Vec<Operand> },
}

/// A kernel's text.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub params: Vec<Variable>,
    pub max_threads: Option<u32>,
    pub body: Vec<(u32, Statement)>,
}

/// A file's text.
#[derive(Clone, Debug, Default)]
pub struct File {
    pub version: String,
    pub target: String,
    pub variables: Vec<Variable>,
    pub entries: Vec<Entry>,
}

pub fn fail<T>(line: u32, what: impl Into<String>) -> Result<T, PtxError> {
    Err(PtxError::Parse { line, what: what.into() })
}

/// Words and single signs, each with its line.
fn tokens(text: &str) -> Result<Vec<(u32, String)>, PtxError> {
    let mut out = Vec::new();
    let (mut line, mut at, bytes) = (1u32, 0, text.as_bytes());
    let word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.');
    while at < bytes.len() {
        let c = bytes[at];
        let two = bytes.get(at..at + 2).unwrap_or(&[]);
        if c == b'\n' {
            line += 1;
            at += 1;
        } else if c.is_ascii_whitespace() {
            at += 1;
        } else if two == b"//" {
            while at < bytes.len() && bytes[at] != b'\n' {
                at += 1;
            }
        } else if two == b"/*" {
            let end = text[at..].find("*/").map(|n| at + n + 2);
            let Some(end) = end else { return fail(line, "comment without an end") };
            line += text[at..end].matches('\n').count() as u32;
            at = end;
        } else if two == b"::" {
            out.push((line, "::".into()));
            at += 2;
        } else if word(c) {
            let from = at;
            while at < bytes.len() && word(bytes[at]) {
                at += 1;
            }
            out.push((line, text[from..at].into()));
        } else if b"(){}[]<>,;:@!|+-=\"".contains(&c) {
            out.push((line, (c as char).to_string()));
            at += 1;
        } else {
            return fail(line, format!("unexpected character {:?}", c as char));
        }
    }
    Ok(out)
}

struct Reader {
    tokens: Vec<(u32, String)>,
    at: usize,
}

impl Reader {
    fn line(&self) -> u32 {
        self.tokens.get(self.at.min(self.tokens.len().saturating_sub(1))).map_or(0, |t| t.0)
    }
    fn peek(&self) -> &str {
        self.tokens.get(self.at).map_or("", |t| &t.1)
    }
    fn next(&mut self) -> Result<String, PtxError> {
        let Some(t) = self.tokens.get(self.at) else { return fail(self.line(), "the text ends too early") };
        self.at += 1;
        Ok(t.1.clone())
    }
    fn take(&mut self, what: &str) -> bool {
        let here = self.peek() == what;
        self.at += usize::from(here);
        here
    }
    fn expect(&mut self, what: &str) -> Result<(), PtxError> {
        let line = self.line();
        let got = self.next()?;
        if got == what { Ok(()) } else { fail(line, format!("{got:?} where {what:?} should be")) }
    }
    fn number(&mut self) -> Result<u64, PtxError> {
        let (line, negative) = (self.line(), self.take("-"));
        let word = self.next()?;
        match number(&word) {
            Some(n) => Ok(if negative { n.wrapping_neg() } else { n }),
            None => fail(line, format!("{word:?} is not a number")),
        }
    }

    /// `.align 4 .b8 name[256] = {..}`, after its address space.
    fn variable(&mut self, space: &str) -> Result<Variable, PtxError> {
        let (mut align, mut ty) = (None, String::new());
        while self.peek().starts_with('.') {
            match self.next()?.as_str() {
                ".align" => align = Some(self.number()? as usize),
                ".ptr" | ".global" => {}
                t => ty = t.to_string(),
            }
        }
        let Some(size) = bytes_of(&ty) else { return fail(self.line(), format!("unknown type {ty}")) };
        let name = self.next()?;
        let (mut count, mut dynamic) = (1, false);
        if self.take("[") {
            if self.take("]") {
                (count, dynamic) = (0, true);
            } else {
                count = self.number()? as usize;
                self.expect("]")?;
            }
        }
        // Initial values are read past: kernels that use a module's variables are refused.
        if self.take("=") {
            let list = self.take("{");
            loop {
                self.number()?;
                if !list || !self.take(",") {
                    break;
                }
            }
            if list {
                self.expect("}")?;
            }
        }
        Ok(Variable { name, align: align.unwrap_or(size), bytes: size * count, dynamic, space: space.into() })
    }

    fn operand(&mut self) -> Result<Operand, PtxError> {
        if self.take("[") {
            let (mut base, mut offset) = (None, 0i64);
            loop {
                let negative = self.take("-");
                let word = self.next()?;
                match number(&word) {
                    Some(n) => {
                        let n = n as i64;
                        offset = offset.wrapping_add(if negative { n.wrapping_neg() } else { n });
                    }
                    None => base = Some(word),
                }
                if !self.take("+") && self.peek() != "-" {
                    break;
                }
            }
            self.expect("]")?;
            return Ok(Operand::Address(base, offset));
        }
        if self.take("{") {
            let mut v = vec![self.operand()?];
            while self.take(",") {
                v.push(self.operand()?);
            }
            self.expect("}")?;
            return Ok(Operand::Vector(v));
        }
        if self.take("!") {
            return Ok(Operand::Name(format!("!{}", self.next()?)));
        }
        let negative = self.take("-");
        let word = self.next()?;
        if let Some(n) = number(&word) {
            return Ok(Operand::Imm(if negative { n.wrapping_neg() } else { n }));
        }
        if negative {
            return fail(self.line(), format!("-{word}"));
        }
        if self.take("|") {
            return Ok(Operand::Pair(word, self.next()?));
        }
        Ok(Operand::Name(word))
    }

    fn statement(&mut self, body: &mut Vec<(u32, Statement)>) -> Result<(), PtxError> {
        let line = self.line();
        let guard = if self.take("@") {
            let negate = self.take("!");
            Some((self.next()?, negate))
        } else {
            None
        };
        let word = self.next()?;
        if guard.is_none() && self.take(":") {
            body.push((line, Statement::Label(word)));
            return Ok(());
        }
        match word.as_str() {
            ".reg" => {
                let ty = self.next()?;
                loop {
                    let name = self.next()?;
                    let count = if self.take("<") {
                        let n = self.number()? as u32;
                        self.expect(">")?;
                        n
                    } else {
                        u32::MAX // one register of this very name
                    };
                    body.push((line, Statement::Registers { prefix: name, count, ty: ty.clone() }));
                    if !self.take(",") {
                        break;
                    }
                }
                return self.expect(";");
            }
            ".shared" | ".local" => {
                let v = self.variable(&word)?;
                body.push((line, Statement::Variable(v)));
                return self.expect(";");
            }
            ".pragma" | ".loc" => {
                while !self.take(";") {
                    self.next()?;
                }
                return Ok(());
            }
            _ => {}
        }
        let mut op: Vec<String> = word.split('.').map(Into::into).collect();
        while self.take("::") {
            // A modifier with a colon inside: `L2::128B`.
            let rest = self.next()?;
            let mut parts = rest.split('.');
            let last = op.last_mut().expect("a word");
            *last = format!("{last}::{}", parts.next().unwrap_or(""));
            op.extend(parts.map(Into::into));
        }
        let mut args = Vec::new();
        while !self.take(";") {
            args.push(self.operand()?);
            if !self.take(",") && self.peek() != ";" {
                return fail(self.line(), format!("{:?} after an operand", self.peek()));
            }
        }
        body.push((line, Statement::Instruction { guard, op, args }));
        Ok(())
    }

    fn entry(&mut self) -> Result<Entry, PtxError> {
        let name = self.next()?;
        let mut params = Vec::new();
        if self.take("(") {
            while !self.take(")") {
                self.expect(".param")?;
                params.push(self.variable(".param")?);
                self.take(",");
            }
        }
        let mut max_threads = None;
        while self.peek().starts_with('.') {
            match self.next()?.as_str() {
                ".maxntid" | ".reqntid" => {
                    let mut n = self.number()?;
                    while self.take(",") {
                        n *= self.number()?;
                    }
                    max_threads = Some(n as u32);
                }
                ".minnctapersm" | ".maxnreg" => {
                    self.number()?;
                }
                d => return fail(self.line(), format!("unknown directive {d}")),
            }
        }
        self.expect("{")?;
        let mut body = Vec::new();
        while !self.take("}") {
            self.statement(&mut body)?;
        }
        Ok(Entry { name, params, max_threads, body })
    }
}

/// A PTX number: decimal, hexadecimal, or the bits of a float (`0f`, `0d`).
fn number(word: &str) -> Option<u64> {
    if !word.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let word = word.strip_suffix('U').unwrap_or(word);
    match word.get(..2) {
        Some("0x" | "0X" | "0f" | "0F" | "0d" | "0D") => hex(&word[2..]),
        _ => word.parse().ok(),
    }
}

/// Bytes of a scalar type, `.b8` to `.f64`.
pub fn bytes_of(ty: &str) -> Option<usize> {
    Some(match ty.trim_start_matches('.') {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return None,
    })
}

/// The statements of a file.
pub fn parse(text: &str) -> Result<File, PtxError> {
    let mut r = Reader { tokens: tokens(text)?, at: 0 };
    let mut file = File::default();
    while r.at < r.tokens.len() {
        let line = r.line();
        match r.next()?.as_str() {
            ".version" => file.version = r.next()?,
            ".target" => {
                file.target = r.next()?;
                while r.take(",") {
                    r.next()?;
                }
            }
            ".address_size" => {
                if r.number()? != 64 {
                    return fail(line, "only 64-bit addresses");
                }
            }
            ".visible" | ".weak" | ".extern" => {}
            ".entry" => {
                let entry = r.entry()?;
                file.entries.push(entry);
            }
            space @ (".global" | ".const" | ".shared") => {
                let v = r.variable(space)?;
                r.expect(";")?;
                file.variables.push(v);
            }
            w => return fail(line, format!("unknown directive {w}")),
        }
    }
    Ok(file)
}
