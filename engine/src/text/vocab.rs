//! A model's vocabulary: text to token ids and back.
//!
//! Built from the `tokenizer.ggml.*` keys of a GGUF file; where a key is absent, what llama.cpp assumes holds
//! (`llama-vocab.cpp`). Special tokens are cut out of the text first, then BPE or SentencePiece takes what lies between
//! them. Knows nothing of chat formats and streams.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};

use super::bpe::{self, Bpe};
use super::pretok::Pre;
use super::{TextError, spm};
use crate::gguf::{Array, Metadata};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const EOT: &str = "tokenizer.ggml.eot_token_id";
const EOM: &str = "tokenizer.ggml.eom_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const PADDING: &str = "tokenizer.ggml.padding_token_id";
const FIM_PAD: &str = "tokenizer.ggml.fim_pad_token_id";
const FIM_REP: &str = "tokenizer.ggml.fim_rep_token_id";
const FIM_SEP: &str = "tokenizer.ggml.fim_sep_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
const REMOVE_SPACE: &str = "tokenizer.ggml.remove_extra_whitespaces";

const MODELS: &str = "gpt2, llama";
const PRES: &str = "deepseek-llm, deepseek-coder, deepseek-v3, llama-bpe, qwen2, qwen35, gpt-2, tekken, falcon, \
                    smollm, default, and their aliases";

/// Bytes of one token's text, and of all special ones together: what is made of them cannot be refused memory. Real ones have
/// some hundreds, and some hundred thousands.
pub(super) const MOST_TEXT: usize = 64 << 10;
const MOST_SPECIAL: usize = 4 << 20;

/// U+2581, which SentencePiece writes for a space.
const SPACE_MARK: &str = "\u{2581}";

/// Names that mean the end of a turn, the likeliest first: the first present is taken where the file names none.
const EOT_NAMES: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
/// Names of tokens after which nothing is to be generated, beside those of [`EOT_NAMES`] and [`FILL_NAMES`].
const EOG_NAMES: [&str; 5] = ["<|eom_id|>", "</s>", "<eos>", "[EOS]", "<turn|>"];
/// Padding, repository and file separators of fill-in-the-middle models: they end a completion too.
const FILL_NAMES: [&str; 11] = [
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];
/// Fill-in-the-middle markers: control tokens whatever their type says.
const CONTROL_NAMES: [&str; 12] = [
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
];

/// The kinds of token in `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// 0: not said; decodes to nothing, as in llama.cpp.
    Undefined,
    /// 1: text.
    Normal,
    /// 2: stands for what cannot be written.
    Unknown,
    /// 3: a marker, never part of text.
    Control,
    /// 4: text kept whole, found before anything else.
    UserDefined,
    /// 5: in no text.
    Unused,
    /// 6: one byte, written `<0xXX>`.
    Byte,
}

/// How text is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add BOS and EOS where the vocabulary says so.
    pub add_special: bool,
    /// Read the names of control tokens in the text as these tokens. Off for text that is not trusted: a user could
    /// otherwise write the end of a turn. User-defined tokens are read either way.
    pub parse_special: bool,
}

struct Token {
    text: Arc<str>,
    score: f32,
    kind: TokenKind,
    /// Spaces after it are swallowed (Phi-3).
    rstrip: bool,
}

enum Method {
    Bpe {
        pre: Pre,
        bpe: Box<Bpe>,
    },
    /// `joined`: the characters that some token has right before a space mark. Before a mark behind any other character the
    /// text can be cut: no merge reaches across.
    Spm {
        byte_tokens: Box<[Option<u32>; 256]>,
        longest: usize,
        joined: HashSet<char>,
    },
}

/// Finds the special tokens of a kind in text; leftmost, of those the longest.
struct Finder {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

/// A vocabulary. Ids are `0..len()`.
pub struct Vocab {
    tokens: Vec<Token>,
    ids: HashMap<Arc<str>, u32>,
    method: Method,
    model: String,
    pre_name: Option<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
    /// Ascending.
    eog: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
    space_prefix: bool,
    remove_extra_spaces: bool,
    all_special: Option<Finder>,
    user_defined: Option<Finder>,
}

impl Vocab {
    /// Reads the vocabulary of a GGUF file.
    pub fn from_metadata(m: &Metadata) -> Result<Self, TextError> {
        let model = m.need(MODEL, m.str(MODEL))?;
        let spm = match model {
            "gpt2" => false,
            "llama" => true,
            _ => {
                return Err(TextError::Unsupported { key: MODEL, value: model.into(), supported: MODELS });
            }
        };
        let pre_name = m.str(PRE)?.filter(|p| !p.is_empty());
        // llama.cpp reads the name for BPE alone; SentencePiece files carry "default" or none.
        let pre = match pre_name {
            Some(name) if !spm => Pre::by_name(name).ok_or_else(|| TextError::Unsupported {
                key: PRE,
                value: name.into(),
                supported: PRES,
            })?,
            _ => Pre::by_name("default").expect("in the table"),
        };

        let mut tokens = read_tokens(m)?;
        let mut ids = HashMap::new();
        ids.try_reserve(tokens.len()).map_err(TextError::memory(tokens.len()))?;
        for (id, t) in (0u32..).zip(&tokens) {
            if let Some(other) = ids.insert(t.text.clone(), id) {
                let reason = format!("tokens {other} and {id} are both {:?}", t.text);
                return Err(TextError::invalid(TOKENS, reason));
            }
        }

        let special = |key: &'static str, default: Option<u32>| -> Result<Option<u32>, TextError> {
            match m.u32(key)? {
                Some(id) if (id as usize) < tokens.len() => Ok(Some(id)),
                Some(id) => {
                    let reason = format!("{id} is no token: the vocabulary has {}", tokens.len());
                    Err(TextError::invalid(key, reason))
                }
                None => Ok(default.filter(|&id| (id as usize) < tokens.len())),
            }
        };
        let by_default = |id: u32| spm.then_some(id);
        let bos = special(BOS, by_default(1))?;
        let eos = special(EOS, by_default(2))?;
        let unknown = special(UNKNOWN, by_default(0))?;
        let padding = special(PADDING, None)?;
        let eot = special(EOT, EOT_NAMES.iter().find_map(|n| ids.get(*n).copied()))?;
        let mut eog: Vec<u32> = [eos, eot, special(EOM, None)?].into_iter().flatten().collect();
        for key in [FIM_PAD, FIM_REP, FIM_SEP] {
            eog.extend(special(key, None)?);
        }
        for name in EOT_NAMES.iter().chain(&EOG_NAMES).chain(&FILL_NAMES) {
            eog.extend(ids.get(*name));
        }
        eog.sort_unstable();
        eog.dedup();
        // Files exist in which such tokens are marked as text; printed, they would end up in the answer.
        let named = EOT_NAMES.iter().chain(&EOG_NAMES).chain(&FILL_NAMES).chain(&CONTROL_NAMES);
        for id in named.filter_map(|n| ids.get(*n)) {
            tokens[*id as usize].kind = TokenKind::Control;
        }

        let add_bos = m.bool(ADD_BOS)?.unwrap_or(spm || pre.add_bos);
        let add_eos = m.bool(ADD_EOS)?.unwrap_or(false);
        for (add, id, add_key, id_key) in [(add_bos, bos, ADD_BOS, BOS), (add_eos, eos, ADD_EOS, EOS)] {
            if add && id.is_none() {
                return Err(TextError::invalid(add_key, format!("true, but the file has no {id_key}")));
            }
        }

        if m.str("general.name")?.is_some_and(is_phi3) {
            let keep = ["<unk>", "<s>", "<|endoftext|>"];
            for t in tokens.iter_mut().filter(|t| special_kind(t.kind) && !keep.contains(&&*t.text)) {
                t.rstrip = true;
            }
        }

        let method = if spm {
            let mut byte_tokens = Box::new([None; 256]);
            for (b, slot) in (0u8..=255).zip(byte_tokens.iter_mut()) {
                *slot = ids.get(format!("<0x{b:02X}>").as_str()).copied();
            }
            let longest = tokens.iter().map(|t| t.text.len()).max().unwrap_or(0);
            let mut joined = HashSet::new();
            for t in &tokens {
                let marks = t.text.match_indices(SPACE_MARK);
                joined.extend(marks.filter_map(|(at, _)| t.text[..at].chars().next_back()));
            }
            Method::Spm { byte_tokens, longest, joined }
        } else {
            let Some(merges) = m.strings(MERGES)? else {
                let reason =
                    format!("missing; a vocabulary with {MODEL} = \"gpt2\" cannot be used without merges");
                return Err(TextError::invalid(MERGES, reason));
            };
            let bpe = Bpe::new(merges, tokens.len() as u32, unknown, |s| ids.get(s).copied())?;
            Method::Bpe { pre, bpe: Box::new(bpe) }
        };
        let finder = |wanted: fn(TokenKind) -> bool| Finder::new(&tokens, wanted);
        let all_special = finder(special_kind)?;
        let user_defined = finder(|k| k == TokenKind::UserDefined)?;
        Ok(Self {
            method,
            model: model.to_owned(),
            pre_name: pre_name.map(str::to_owned),
            bos,
            eos,
            eot,
            unknown,
            padding,
            eog,
            add_bos,
            add_eos,
            space_prefix: m.bool(ADD_SPACE)?.unwrap_or(spm),
            remove_extra_spaces: m.bool(REMOVE_SPACE)?.unwrap_or(false),
            all_special,
            user_defined,
            tokens,
            ids,
        })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// `tokenizer.ggml.model`.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// `tokenizer.ggml.pre`; `None` if the file has none, in which case BPE text is cut by the rules "default", which are
    /// those of no particular model: the file should be converted anew.
    pub fn pre(&self) -> Option<&str> {
        self.pre_name.as_deref()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that ends a turn of a conversation, from the file or by its usual names.
    pub fn eot(&self) -> Option<u32> {
        self.eot
    }

    /// The token for what cannot be written.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// The padding token.
    pub fn padding(&self) -> Option<u32> {
        self.padding
    }

    /// Whether [`EncodeOptions::add_special`] puts BOS in front.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether [`EncodeOptions::add_special`] puts EOS at the end.
    pub fn adds_eos(&self) -> bool {
        self.add_eos
    }

    /// The token with exactly this text, as the file writes it.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// A token's text as the file writes it (bytes and spaces encoded).
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(|t| &*t.text)
    }

    /// A token's kind; control also where the file says otherwise of a token known to be a marker by its name.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.tokens.get(id as usize).map(|t| t.kind)
    }

    /// Whether the token is a marker: it is shown only when special tokens are asked for.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.kind(id), Some(TokenKind::Control | TokenKind::Unknown))
    }

    /// Whether generation ends with this token.
    pub fn is_eog(&self, id: u32) -> bool {
        self.eog.binary_search(&id).is_ok()
    }

    /// All tokens that end generation, ascending.
    pub fn eog_tokens(&self) -> &[u32] {
        &self.eog
    }

    /// The bytes a token stands for; of control, unknown and user-defined tokens their text. They need not be whole
    /// UTF-8 characters. `None` if there is no such token.
    pub fn bytes(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        let t = self.tokens.get(id as usize)?;
        Some(match t.kind {
            TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined => t.text.as_bytes().into(),
            TokenKind::Unused | TokenKind::Undefined => Cow::Borrowed(&[]),
            TokenKind::Byte => vec![byte_value(&t.text).expect("checked on reading")].into(),
            TokenKind::Normal => match self.method {
                Method::Spm { .. } if t.text.contains(SPACE_MARK) => {
                    t.text.replace(SPACE_MARK, " ").into_bytes().into()
                }
                Method::Spm { .. } => t.text.as_bytes().into(),
                // A token that is no encoded byte string can only have been meant literally.
                Method::Bpe { .. } => match t.text.chars().map(bpe::char_byte).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => bytes.into(),
                    None => t.text.as_bytes().into(),
                },
            },
        })
    }

    /// Text to ids. Linear in the text but for the heaps of long words (n log n).
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_special && self.add_bos {
            out.extend(self.bos);
        }
        let finder = if options.parse_special { &self.all_special } else { &self.user_defined };
        let mut scratch = bpe::Scratch::default();
        let mut after_special = true;
        let mut rest = text;
        if let Some(f) = finder {
            let mut from = 0;
            let mut strip = false;
            for found in f.automaton.find_iter(text) {
                let between = &text[from..found.start()];
                self.encode_plain(stripped(between, strip), after_special, &mut scratch, &mut out);
                let id = f.ids[found.pattern().as_usize()];
                out.push(id);
                strip = self.tokens[id as usize].rstrip;
                after_special = true;
                from = found.end();
            }
            rest = stripped(&text[from..], strip);
        }
        self.encode_plain(rest, after_special, &mut scratch, &mut out);
        if options.add_special && self.add_eos {
            out.extend(self.eos);
        }
        out
    }

    /// Encodes a rendered chat prompt: special tokens parsed, BOS added where the vocabulary wants it and the template has
    /// not written it already.
    pub fn encode_prompt(&self, prompt: &str) -> Vec<u32> {
        let mut ids = self.encode(prompt, EncodeOptions { add_special: false, parse_special: true });
        if let (true, Some(bos)) = (self.add_bos, self.bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    fn encode_plain(&self, text: &str, first: bool, scratch: &mut bpe::Scratch, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.method {
            Method::Bpe { pre, bpe } => {
                let mut encoded = String::new();
                pre.split(text, |word| {
                    if pre.ignore_merges {
                        encoded.clear();
                        encoded.extend(word.bytes().map(bpe::byte_char));
                        if let Some(&id) = self.ids.get(encoded.as_str()) {
                            out.push(id);
                            return;
                        }
                    }
                    bpe.encode_word(word.as_bytes(), scratch, out);
                });
            }
            Method::Spm { joined, .. } => {
                let mut marked = String::with_capacity(text.len() + text.len() / 2 + 3);
                if self.space_prefix && first {
                    marked.push_str(SPACE_MARK);
                }
                let text: Cow<str> =
                    if self.remove_extra_spaces { single_spaced(text).into() } else { text.into() };
                for (i, part) in text.split(' ').enumerate() {
                    if i > 0 {
                        marked.push_str(SPACE_MARK);
                    }
                    marked.push_str(part);
                }
                let mut from = 0;
                for (at, _) in marked.match_indices(SPACE_MARK) {
                    if marked[from..at].chars().next_back().is_some_and(|c| !joined.contains(&c)) {
                        spm::encode(self, &marked[from..at], out);
                        from = at;
                    }
                }
                spm::encode(self, &marked[from..], out);
            }
        }
    }

    /// Where the text has names of control tokens, which [`EncodeOptions::parse_special`] would read as these tokens.
    pub fn control_spans<'t>(&'t self, text: &'t str) -> impl Iterator<Item = std::ops::Range<usize>> + 't {
        let found =
            self.all_special.iter().flat_map(move |f| f.automaton.find_iter(text).map(move |m| (f, m)));
        found
            .filter(move |(f, m)| self.is_control(f.ids[m.pattern().as_usize()]))
            .map(|(_, m)| m.start()..m.end())
    }

    /// Ids to bytes; `special`: with the text of control tokens. The space that [`Self::encode`] puts before a text
    /// (SentencePiece) is taken off again. Ids that are no tokens stand for nothing.
    pub fn decode_bytes(&self, ids: &[u32], special: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        let mut first = true;
        for &id in ids {
            let control = self.is_control(id);
            if control && !special {
                continue;
            }
            let bytes = self.bytes(id).unwrap_or_default();
            let skip = usize::from(first && !control && self.space_prefix && bytes.starts_with(b" "));
            first &= control;
            out.extend_from_slice(&bytes[skip..]);
        }
        out
    }

    /// As [`Self::decode_bytes`]; what is not UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], special: bool) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids, special)).into_owned()
    }
}

impl spm::Pieces for Vocab {
    fn token(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }
    fn score(&self, id: u32) -> f32 {
        self.tokens[id as usize].score
    }
    fn byte(&self, byte: u8, out: &mut Vec<u32>) {
        let Method::Spm { byte_tokens, .. } = &self.method else { return };
        out.extend(byte_tokens[usize::from(byte)].or(self.unknown));
    }
    fn longest(&self) -> usize {
        if let Method::Spm { longest, .. } = self.method { longest } else { 0 }
    }
}

impl std::fmt::Debug for Vocab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (f.debug_struct("Vocab").field("model", &self.model).field("pre", &self.pre_name))
            .field("tokens", &self.tokens.len())
            .finish_non_exhaustive()
    }
}

impl Finder {
    fn new(tokens: &[Token], wanted: impl Fn(TokenKind) -> bool) -> Result<Option<Self>, TextError> {
        let ids: Vec<u32> = (0u32..).zip(tokens).filter(|(_, t)| wanted(t.kind)).map(|(id, _)| id).collect();
        if ids.is_empty() {
            return Ok(None);
        }
        let texts = ids.iter().map(|&id| tokens[id as usize].text.as_bytes());
        let bytes: usize = texts.clone().map(<[u8]>::len).sum();
        if bytes > MOST_SPECIAL {
            return Err(TextError::invalid(TYPES, format!("special tokens of {bytes} bytes together")));
        }
        let automaton = (AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts))
            .map_err(|e| TextError::invalid(TYPES, format!("too many special tokens: {e}")))?;
        Ok(Some(Self { automaton, ids }))
    }
}

fn special_kind(kind: TokenKind) -> bool {
    matches!(kind, TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown)
}

fn is_phi3(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}

fn stripped(text: &str, strip: bool) -> &str {
    if strip { text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']) } else { text }
}

/// SentencePiece's `remove_extra_whitespaces`: none at the ends, one at a time within.
fn single_spaced(text: &str) -> String {
    text.split(' ').filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The value of a token `<0xXX>`.
fn byte_value(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        u8::from_str_radix(hex, 16).ok()
    } else {
        None
    }
}

fn read_tokens(m: &Metadata) -> Result<Vec<Token>, TextError> {
    let texts = m.need(TOKENS, m.strings(TOKENS))?;
    // Ids above i32 would not fit the file formats' own id type.
    if texts.is_empty() || texts.len() > i32::MAX as usize {
        return Err(TextError::invalid(TOKENS, format!("{} tokens", texts.len())));
    }
    let check_len = |key, len: usize| match len == texts.len() {
        true => Ok(()),
        false => Err(TextError::invalid(key, format!("{len} entries for {} tokens", texts.len()))),
    };
    let scores = match m.array(SCORES)? {
        None => None,
        Some(Array::F32(s)) => {
            check_len(SCORES, s.len())?;
            if let Some(id) = s.iter().position(|x| x.is_nan()) {
                return Err(TextError::invalid(SCORES, format!("the score of token {id} is not a number")));
            }
            Some(s)
        }
        Some(a) => {
            let reason = format!("an array of {}, expected f32", a.element_name());
            return Err(TextError::invalid(SCORES, reason));
        }
    };
    let kinds = m.array(TYPES)?;
    let kind_of = |id: usize| match kinds {
        None => Some(1),
        Some(Array::I32(k)) => Some(i64::from(k[id])),
        Some(Array::U32(k)) => Some(i64::from(k[id])),
        Some(_) => None,
    };
    if let Some(k) = kinds {
        check_len(TYPES, k.len())?;
        if kind_of(0).is_none() {
            let reason = format!("an array of {}, expected i32", k.element_name());
            return Err(TextError::invalid(TYPES, reason));
        }
    }
    let read = |(id, text): (usize, &String)| {
        if text.len() > MOST_TEXT {
            return Err(TextError::invalid(TOKENS, format!("token {id} has {} bytes", text.len())));
        }
        let text = if text.is_empty() { format!("[EMPTY_{id}]").into() } else { Arc::from(text.as_str()) };
        let kind = match kind_of(id).unwrap_or(1) {
            0 => TokenKind::Undefined,
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 if byte_value(&text).is_some() => TokenKind::Byte,
            6 => {
                let reason = format!("token {id} is of kind byte, but its text is {text:?}, not <0xXX>");
                return Err(TextError::invalid(TYPES, reason));
            }
            other => return Err(TextError::invalid(TYPES, format!("token {id} is of unknown kind {other}"))),
        };
        // Adding zero makes -0 into 0: they are equal as scores.
        Ok(Token { text, score: scores.map_or(0.0, |s| s[id] + 0.0), kind, rstrip: false })
    };
    let mut tokens = Vec::new();
    tokens.try_reserve_exact(texts.len()).map_err(TextError::memory(texts.len()))?;
    for token in texts.iter().enumerate().map(read) {
        tokens.push(token?);
    }
    Ok(tokens)
}
