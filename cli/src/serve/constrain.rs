//! Output held to a JSON schema, a regular expression or a grammar: `llguidance` masks the tokens that cannot come next.
//!
//! A model that thinks first does so freely: the constraint begins behind its closing tag. Knows nothing of HTTP.

use super::gbnf::{self, Converted};
use engine::SampleError;
use engine::text::thinking::ThinkTags;
use engine::text::{TokenKind, Vocab};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::Arc;

pub use engine::Constraint;

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// Any JSON object.
    Json,
    /// JSON of this schema.
    Schema(Value),
    /// A regular expression, in the syntax of Rust's `regex`, for the whole answer.
    Regex(String),
    /// A context-free grammar in llguidance's dialect of Lark.
    Lark(String),
    /// A context-free grammar in llama.cpp's notation.
    Gbnf(String),
}

/// A format that cannot be: not valid, not supported, or such that no text has it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("format: {0}")]
pub struct FormatError(pub String);

/// What the grammars of one vocabulary share. Making it takes a pass over the vocabulary: once per model.
pub struct Grammars {
    factory: ParserFactory,
    words: Arc<Words>,
}

struct Words {
    bytes: Vec<Vec<u8>>,
    eog: Vec<u32>,
    /// Tokens of white space alone.
    blank: Vec<u32>,
    open: Vec<(&'static str, u32)>,
}

/// Where in the answer the constraint begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With the first token.
    Now,
    /// Behind a thought: one that the prompt has opened, or (`opened` false) that the model may open.
    AfterThinking { tags: ThinkTags, opened: bool },
}

/// Tokens longer than this are never offered: the library's trie has no room for them.
const LONGEST_TOKEN: usize = 1000;

impl Grammars {
    /// For the tokens of `vocab`.
    ///
    /// # Errors
    /// A vocabulary that the library cannot take.
    pub fn new(vocab: &Vocab) -> Result<Self, FormatError> {
        let n = vocab.len() as u32;
        let bytes: Vec<Vec<u8>> = (0..n).map(|id| vocab.bytes(id).unwrap_or_default().into_owned()).collect();
        let word = |(id, bytes): (u32, &Vec<u8>)| match vocab.kind(id) {
            Some(TokenKind::Control | TokenKind::Unknown) => Vec::new(),
            _ if bytes.len() > LONGEST_TOKEN || bytes.starts_with(&[TokTrie::SPECIAL_TOKEN_MARKER]) => {
                Vec::new()
            }
            _ => bytes.clone(),
        };
        let mut words: Vec<Vec<u8>> = (0..n).zip(&bytes).map(word).collect();
        let mut eog = vocab.eog_tokens().to_vec();
        if eog.is_empty() {
            // The library needs one; no logit belongs to this one.
            eog.push(n);
            words.push(Vec::new());
        }
        let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eog[0]), &words);
        trie = trie.with_eos_tokens(&eog);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| FormatError(one_line(&e)))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        let blank = (0..n).filter(|&id| !bytes[id as usize].is_empty() && is_blank(&bytes[id as usize]));
        let blank = blank.collect();
        let open = ["<think>", "[THINK]", "<thinking>"];
        let open = open.into_iter().filter_map(|t| Some((t, vocab.token_id(t)?))).collect();
        Ok(Self { factory, words: Arc::new(Words { bytes, eog, blank, open }) })
    }

    /// A constraint for one answer.
    ///
    /// # Errors
    /// A format that is not valid, not supported, too large, or that no text can have.
    pub fn constraint(&self, format: &Format, begin: Begin) -> Result<Box<dyn Constraint>, FormatError> {
        let grammar = match format {
            Format::Json => json_schema(json!({"type": "object"})),
            Format::Schema(s) => json_schema(s.clone()),
            Format::Regex(r) => TopLevelGrammar::from_regex(r),
            Format::Lark(g) => TopLevelGrammar::from_lark(g.clone()),
            Format::Gbnf(g) => match gbnf::convert(g).map_err(|e| FormatError(format!("grammar: {e}")))? {
                Converted::Regex(r) => TopLevelGrammar::from_regex(&r),
                Converted::Lark(l) => TopLevelGrammar::from_lark(l),
            },
        };
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(e) = matcher.get_error() {
            return Err(FormatError(one_line(&e)));
        }
        let words = self.words.clone();
        let at = match begin {
            Begin::Now => At::Answer,
            Begin::AfterThinking { tags, opened: true } => At::Thinking { tags, said: Vec::new() },
            Begin::AfterThinking { tags, opened: false } => match words.opening(tags) {
                Some(open) => At::Start { tags, open },
                None => At::Answer,
            },
        };
        Ok(Box::new(Held { matcher, words, at }))
    }
}

/// White space is bounded as llama.cpp bounds it (a weak model would otherwise write nothing else), and `oneOf` is read as
/// `anyOf`, unless the schema has llguidance's own options.
fn json_schema(mut schema: Value) -> TopLevelGrammar {
    if let Some(map) = schema.as_object_mut() {
        map.entry("x-guidance")
            .or_insert_with(|| json!({"whitespace_pattern": " |\n{1,2}[ \t]{0,20}", "coerce_one_of": true}));
    }
    TopLevelGrammar::from_json_schema(schema)
}

impl Words {
    fn opening(&self, tags: ThinkTags) -> Option<u32> {
        self.open.iter().find(|(text, _)| *text == tags.open).map(|(_, id)| *id)
    }
}

enum At {
    /// The model may open a thought with this token, or answer.
    Start {
        tags: ThinkTags,
        open: u32,
    },
    /// The last bytes of a thought, as many as may be the beginning of the closing tag.
    Thinking {
        tags: ThinkTags,
        said: Vec<u8>,
    },
    /// Right behind the thought, where models write a line break before they answer.
    Behind,
    Answer,
}

struct Held {
    matcher: Matcher,
    words: Arc<Words>,
    at: At,
}

impl Held {
    fn mask_answer(&mut self, logits: &mut [f32]) -> Result<(), SampleError> {
        let allowed =
            self.matcher.compute_mask_or_eos().map_err(|e| SampleError::Constraint(one_line(&e)))?;
        ban_others(&allowed, logits);
        Ok(())
    }

    /// As [`Held::mask_answer`], with these tokens let through as well.
    fn mask_answer_or(&mut self, also: &[u32], logits: &mut [f32]) -> Result<(), SampleError> {
        let kept: Vec<_> = also.iter().map(|&id| logits.get(id as usize).copied()).collect();
        self.mask_answer(logits)?;
        for (&id, kept) in also.iter().zip(kept) {
            if let (Some(kept), Some(l)) = (kept, logits.get_mut(id as usize)) {
                *l = kept;
            }
        }
        Ok(())
    }
}

impl Constraint for Held {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), SampleError> {
        match &self.at {
            At::Answer => self.mask_answer(logits),
            At::Start { open, .. } => {
                let open = *open;
                self.mask_answer_or(&[open], logits)
            }
            At::Behind => {
                let words = self.words.clone();
                self.mask_answer_or(&words.blank, logits)
            }
            At::Thinking { tags, said } => {
                for &id in &self.words.eog {
                    logits.get_mut(id as usize).into_iter().for_each(|l| *l = f32::NEG_INFINITY);
                }
                if !said.is_empty() {
                    // A token that ends the tag and begins the answer would escape the constraint.
                    for (bytes, l) in self.words.bytes.iter().zip(logits) {
                        if behind(said, bytes, tags.close).is_some_and(|rest| !is_blank(rest)) {
                            *l = f32::NEG_INFINITY;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), SampleError> {
        match &mut self.at {
            At::Start { tags, open } if *open == token => {
                self.at = At::Thinking { tags: *tags, said: Vec::new() };
                Ok(())
            }
            At::Thinking { tags, said } => {
                let bytes = self.words.bytes.get(token as usize).map_or(&[][..], Vec::as_slice);
                match behind(said, bytes, tags.close).map(is_blank) {
                    Some(true) => self.at = At::Behind,
                    Some(false) => {
                        let why = format!("one token ends {} and begins the answer", tags.close);
                        return Err(SampleError::Constraint(why));
                    }
                    None => {
                        said.extend_from_slice(bytes);
                        let begins = |at: &usize| tags.close.as_bytes().starts_with(&said[*at..]);
                        let from = said.len().saturating_sub(tags.close.len() - 1);
                        let keep = (from..said.len()).find(begins).unwrap_or(said.len());
                        said.drain(..keep);
                    }
                }
                Ok(())
            }
            At::Behind if self.words.blank.binary_search(&token).is_ok() => {
                self.at = At::Answer;
                Ok(())
            }
            _ => {
                self.at = At::Answer;
                self.matcher.consume_token(token).map_err(|e| SampleError::Constraint(one_line(&e)))
            }
        }
    }

    fn is_done(&self) -> bool {
        matches!(self.at, At::Answer) && self.matcher.is_stopped()
    }
}

/// What comes behind `tag` in `said` followed by `bytes`, if the tag ends within `bytes`.
fn behind<'b>(said: &[u8], bytes: &'b [u8], tag: &str) -> Option<&'b [u8]> {
    let tag = tag.as_bytes();
    // `said` is a proper beginning of the tag, but a shorter beginning may be what goes on.
    let split = (0..=said.len()).filter(|&at| tag.starts_with(&said[at..]));
    split.filter_map(|at| bytes.strip_prefix(&tag[said.len() - at..])).next().or_else(|| {
        let at = bytes.windows(tag.len()).position(|w| w == tag)?;
        Some(&bytes[at + tag.len()..])
    })
}

fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(u8::is_ascii_whitespace)
}

/// Minus infinity for every token that is not in the set.
fn ban_others(allowed: &SimpleVob, logits: &mut [f32]) {
    let (sets, n) = (allowed.as_slice(), logits.len());
    for (chunk, set) in logits.chunks_mut(32).zip(sets) {
        match *set {
            u32::MAX => {}
            0 => chunk.fill(f32::NEG_INFINITY),
            set => {
                let outside = chunk.iter_mut().enumerate().filter(|(i, _)| set >> i & 1 == 0);
                outside.for_each(|(_, l)| *l = f32::NEG_INFINITY);
            }
        }
    }
    logits[n.min(sets.len() * 32)..].fill(f32::NEG_INFINITY);
}

fn one_line(e: &impl ToString) -> String {
    crate::output::one_line(&e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::gguf::File;

    const TAGS: ThinkTags = ThinkTags { open: "<think>", close: "</think>" };

    fn demo() -> Vocab {
        let file = File::from_static("demo", crate::demo::bytes()).unwrap();
        Vocab::from_metadata(file.metadata()).unwrap()
    }

    fn plain(vocab: &Vocab, text: &str) -> Vec<u32> {
        vocab.encode(text, engine::text::EncodeOptions { add_special: false, parse_special: false })
    }

    /// Whether the constraint lets `text` through and may end (or must) behind it.
    fn takes(vocab: &Vocab, c: &mut dyn Constraint, text: &str) -> bool {
        for id in plain(vocab, text) {
            let mut logits = vec![0.0; vocab.len()];
            c.mask(&mut logits).unwrap();
            if logits[id as usize] != 0.0 {
                return false;
            }
            c.accept(id).unwrap();
        }
        let mut logits = vec![0.0; vocab.len()];
        c.is_done() || {
            c.mask(&mut logits).unwrap();
            vocab.eog_tokens().iter().any(|&id| logits[id as usize] == 0.0)
        }
    }

    #[test]
    fn formats_let_through_what_they_describe() {
        let vocab = demo();
        let g = Grammars::new(&vocab).unwrap();
        let schema = json!({
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
            "required": ["name", "age"],
            "additionalProperties": false,
        });
        let schema = Format::Schema(schema);
        let lark = Format::Lark("start: \"yes\" | \"no\" (\" \" WORD)+\nWORD: /[a-z]+/".into());
        let nested = "root ::= \"[\" (item (\",\" item)*)? \"]\"\nitem ::= [a-z]+ | root";
        let nested = Format::Gbnf(nested.into());
        for (format, text, want) in [
            (&Format::Json, r#"{"a": [1, null, "x\n"]}"#, true),
            (&Format::Json, r#"[1]"#, false),
            (&Format::Json, r#"{"a": 1"#, false),
            (&schema, r#"{"name": "Lily", "age": 7}"#, true),
            (&schema, r#"{"name": "Lily", "age": -7}"#, false),
            (&schema, r#"{"name": "Lily"}"#, false),
            (&Format::Regex("[a-c]{2,3}".into()), "abc", true),
            (&Format::Regex("[a-c]{2,3}".into()), "a", false),
            (&Format::Regex("[a-c]{2,3}".into()), "abd", false),
            (&lark, "no more words", true),
            (&lark, "yes more", false),
            (&Format::Gbnf("root ::= [0-9]{2} \"/\" (\"a\" | \"b\")+".into()), "42/ab", true),
            (&Format::Gbnf("root ::= [0-9]{2} \"/\" (\"a\" | \"b\")+".into()), "4/ab", false),
            (&nested, "[a,[b,c],[]]", true),
            (&nested, "[a,[b,c]", false),
        ] {
            let mut c = g.constraint(format, Begin::Now).unwrap();
            assert_eq!(takes(&vocab, &mut *c, text), want, "{format:?} {text}");
        }
    }

    /// Writes `text` in whatever tokens the constraint lets through; whether that was possible.
    fn writes(vocab: &Vocab, c: &mut dyn Constraint, text: &str) -> bool {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let mut logits = vec![0.0; vocab.len()];
            c.mask(&mut logits).unwrap();
            let fits = |id: &u32| {
                logits[*id as usize] == 0.0
                    && !vocab.is_control(*id)
                    && vocab.bytes(*id).is_some_and(|b| !b.is_empty() && rest.starts_with(&b))
            };
            let longest = |id: &u32| vocab.bytes(*id).map_or(0, |b| b.len());
            let Some(id) = (0..vocab.len() as u32).filter(fits).max_by_key(longest) else { return false };
            rest = &rest[longest(&id)..];
            c.accept(id).unwrap();
        }
        c.is_done()
    }

    #[test]
    fn every_kind_of_vocabulary_serves() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/vocab");
        if !folder.is_dir() {
            println!("skipped: ../shared is not here");
            return;
        }
        for name in ["deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "qwen2"] {
            let path = folder.join(format!("ggml-vocab-{name}.gguf"));
            let file = File::open(&path, engine::gguf::OpenMode::Mmap).unwrap();
            let vocab = Vocab::from_metadata(file.metadata()).unwrap();
            let g = Grammars::new(&vocab).unwrap();
            let mut c = g.constraint(&Format::Json, Begin::Now).unwrap();
            assert!(
                writes(&vocab, &mut *c, "{\"a b\": [1.5e3, \"\u{436}\u{1F600}\"], \"c\": null}"),
                "{name}"
            );
            let mut c = g.constraint(&Format::Json, Begin::Now).unwrap();
            assert!(!writes(&vocab, &mut *c, "{\"a\": 1,}"), "{name}");
        }
    }

    #[test]
    fn formats_that_cannot_be_are_refused() {
        let g = Grammars::new(&demo()).unwrap();
        for (format, word) in [
            (Format::Schema(json!({"type": "nonsense"})), "nonsense"),
            (Format::Schema(json!({"type": "integer", "minimum": 5, "maximum": 1})), "minimum"),
            (Format::Schema(json!(false)), "nsatisfiable"),
            (Format::Schema(json!({"$ref": "http://example.com/schema"})), "example.com"),
            (Format::Regex("[a-".into()), "regex"),
            (Format::Lark("start: nothing".into()), "nothing"),
            (Format::Gbnf("root ::= other".into()), "no rule other"),
        ] {
            let Err(FormatError(e)) = g.constraint(&format, Begin::Now) else {
                panic!("{format:?} is taken")
            };
            assert!(e.contains(word) && !e.contains('\n'), "{format:?}: {e}");
        }
    }

    #[test]
    fn the_constraint_begins_behind_the_thought() {
        let vocab = demo();
        let g = Grammars::new(&vocab).unwrap();
        let begin = Begin::AfterThinking { tags: TAGS, opened: true };
        for (text, want) in [
            ("Let me see { </thin \n</think>\n{\"a\": 1}", true),
            ("<</think>{}", true),
            ("Let me see", false),
            ("so</think>Well", false),
        ] {
            // Letter by letter, so that the tag comes in pieces.
            let mut c = g.constraint(&Format::Json, begin).unwrap();
            let mut open = true;
            for ch in text.chars() {
                let ids = plain(&vocab, &ch.to_string());
                open = open
                    && ids.iter().all(|&id| {
                        let mut logits = vec![0.0; vocab.len()];
                        c.mask(&mut logits).unwrap();
                        logits[id as usize] == 0.0 && c.accept(id).is_ok()
                    });
            }
            assert_eq!(open && takes(&vocab, &mut *c, ""), want, "{text:?}");
        }
    }

    #[test]
    fn the_end_of_a_tag_is_found() {
        for (said, bytes, want) in [
            ("</thi", "nk>", Some("")),
            ("</thi", "nk>{", Some("{")),
            ("", "a</think> ", Some(" ")),
            ("<", "</think>x", Some("x")),
            ("</", "thin", None),
            ("", "think>", None),
        ] {
            assert_eq!(
                behind(said.as_bytes(), bytes.as_bytes(), "</think>"),
                want.map(str::as_bytes),
                "{said} {bytes}"
            );
        }
    }

    /// What a mask costs: `cargo test --release -p rsinfer mask_costs -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn mask_costs() {
        let schema = json!({"type": "object", "properties": {
            "name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}},
            "kind": {"enum": ["person", "place", "thing"]}}, "required": ["name", "age", "tags", "kind"]});
        let text = r#"{"name": "Lily of the valley, called \"May bells\"", "age": 42, "tags": ["white", "spring flower", "poisonous"], "kind": "thing"}"#;
        for file in ["deepseek-llm", "qwen2"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
                .join(format!("../../shared/vocab/ggml-vocab-{file}.gguf"));
            let file = File::open(&path, engine::gguf::OpenMode::Mmap).expect("../shared is here");
            let vocab = Vocab::from_metadata(file.metadata()).unwrap();
            let start = std::time::Instant::now();
            let g = Grammars::new(&vocab).unwrap();
            let made = start.elapsed();
            let ids = plain(&vocab, text);
            for (name, format) in [("json", &Format::Json), ("schema", &Format::Schema(schema.clone()))] {
                let start = std::time::Instant::now();
                let mut c = g.constraint(format, Begin::Now).unwrap();
                let compiled = start.elapsed();
                let mut times = Vec::new();
                let mut logits = vec![0.0; vocab.len()];
                for &id in &ids {
                    logits.fill(0.0);
                    let start = std::time::Instant::now();
                    c.mask(&mut logits).unwrap();
                    c.accept(id).unwrap();
                    times.push(start.elapsed());
                }
                times.sort();
                let mean = times.iter().sum::<std::time::Duration>() / times.len() as u32;
                println!(
                    "{} tokens, grammars {made:?}, {name}: compiled {compiled:?}, {} masks: mean {mean:?}, median {:?}, most {:?}",
                    vocab.len(),
                    times.len(),
                    times[times.len() / 2],
                    times[times.len() - 1]
                );
            }
        }
    }
}
