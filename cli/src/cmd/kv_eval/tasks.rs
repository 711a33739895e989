//! What a policy is tried on: texts to read and questions to answer, as tokens. Made once, the same for every policy;
//! knows nothing of policies and sessions.

use super::corpus::{Story, Teller, Wording};
use crate::chat;
use anyhow::{Context, Result, bail};
use engine::gguf::File;
use engine::text::{ChatTemplate, EncodeOptions, Vocab};
use serde_json::{Map, json};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// A task as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskSpec {
    /// Perplexity of a text.
    Ppl(PathBuf),
    /// Questions about facts in stories.
    Recall,
    /// A number planted at depths.
    Passkey,
}

impl TaskSpec {
    /// `ppl:FILE`, `recall` or `passkey`.
    pub fn parse(s: &str) -> Result<Self, String> {
        match s.split_once(':') {
            Some(("ppl", file)) if !file.is_empty() => Ok(Self::Ppl(file.into())),
            None if s == "recall" => Ok(Self::Recall),
            None if s == "passkey" => Ok(Self::Passkey),
            _ => Err(format!("unknown task {s:?}: there are ppl:FILE, recall and passkey")),
        }
    }

    /// As in results and reports: `ppl:text.txt`, without the folders.
    pub fn name(&self) -> String {
        match self {
            Self::Ppl(p) => format!("ppl:{}", p.file_name().unwrap_or_default().to_string_lossy()),
            Self::Recall => "recall".into(),
            Self::Passkey => "passkey".into(),
        }
    }
}

/// How answers are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Judge {
    /// The answer is the expected one, word for word
    Exact,
    /// The answer contains the words asked for, upper and lower case alike
    Contains,
}

/// Sizes of the tasks.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub seed: u64,
    /// Questions of `recall`.
    pub questions: usize,
    /// Facts in a story.
    pub facts: usize,
    /// Other sentences in a story, taken in turns.
    pub fillers: Vec<usize>,
    /// Depths of `passkey` in percent.
    pub depths: Vec<usize>,
    /// Numbers asked for at each depth.
    pub passkeys: usize,
    /// Tokens of the text a number is planted in.
    pub passkey_length: usize,
    pub wording: Wording,
    /// Tokens of a sequence of `ppl`.
    pub ppl_length: usize,
    /// Sequences of `ppl`, at most.
    pub ppl_sequences: usize,
}

/// A stretch of positions, distances or depths that is scored on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub label: String,
    pub from: usize,
    pub to: usize,
}

/// A question about a text.
pub struct Item {
    /// The whole prompt.
    pub tokens: Vec<u32>,
    /// How many of them are text; the question follows.
    pub text: usize,
    pub bucket: usize,
    pub question: String,
    /// The whole answer, and the words any right answer contains.
    pub want: String,
    pub key: String,
}

/// What is done with the model.
pub enum Work {
    /// Texts whose every token is predicted; buckets are positions of equal number.
    Read(Vec<Vec<u32>>),
    /// Questions.
    Ask(Vec<Item>),
}

/// A task, ready to be run.
pub struct Task {
    pub name: String,
    pub work: Work,
    pub buckets: Vec<Bucket>,
    /// Hash of all that the model is given and judged by.
    pub hash: String,
}

impl Task {
    /// Tokens of the longest text or prompt.
    pub fn longest(&self) -> usize {
        match &self.work {
            Work::Read(s) => s.iter().map(Vec::len).max().unwrap_or(0),
            Work::Ask(items) => items.iter().map(|i| i.tokens.len()).max().unwrap_or(0),
        }
    }

    /// Sequences that a cell runs.
    pub fn sequences(&self) -> usize {
        match &self.work {
            Work::Read(s) => s.len(),
            Work::Ask(items) => items.len(),
        }
    }

    fn new(name: String, work: Work, buckets: Vec<Bucket>) -> Self {
        let mut h = Sha256::new();
        let mut add = |ids: &[u32]| {
            h.update((ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|t| h.update(t.to_le_bytes()));
        };
        match &work {
            Work::Read(sequences) => sequences.iter().for_each(|s| add(s)),
            Work::Ask(items) => {
                for i in items {
                    add(&i.tokens);
                    add(&[i.text as u32, i.bucket as u32]);
                    add(&i
                        .want
                        .bytes()
                        .chain(*b"\n")
                        .chain(i.key.bytes())
                        .map(u32::from)
                        .collect::<Vec<_>>());
                }
            }
        }
        let hash = h.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
        Self { name, work, buckets, hash }
    }
}

/// What of a model makes tokens of a text: it is read from the headers, before the model is loaded.
pub struct Words {
    vocab: Vocab,
    chat: ChatTemplate,
}

impl Words {
    pub fn of(file: &File) -> Result<Self> {
        let vocab = Vocab::from_metadata(file.metadata())?;
        let chat = ChatTemplate::from_metadata(file.metadata(), &vocab)?;
        Ok(Self { vocab, chat })
    }
}

/// Reads and tokenizes what a task needs.
pub fn prepare(words: &Words, spec: &TaskSpec, sizes: &Sizes) -> Result<Task> {
    match spec {
        TaskSpec::Ppl(path) => read(words, spec, &crate::text::read_prompt_file(path)?, sizes),
        TaskSpec::Recall => recall(words, sizes),
        TaskSpec::Passkey => passkey(words, sizes),
    }
}

/// Buckets in which `ppl` scores positions.
const PPL_BUCKETS: usize = 8;

fn read(words: &Words, spec: &TaskSpec, text: &str, sizes: &Sizes) -> Result<Task> {
    let vocab = &words.vocab;
    let ids = vocab.encode(text, EncodeOptions { add_special: false, parse_special: false });
    let bos = vocab.bos().filter(|_| vocab.adds_bos());
    let own = sizes.ppl_length - usize::from(bos.is_some());
    let sequences: Vec<Vec<u32>> = ids
        .chunks_exact(own)
        .take(sizes.ppl_sequences)
        .map(|c| bos.into_iter().chain(c.iter().copied()).collect())
        .collect();
    if sequences.is_empty() {
        bail!(
            "{} has {} tokens, one sequence takes {own}: shorten it with --ppl-length",
            spec.name(),
            ids.len()
        );
    }
    let edge = |i: usize| i * sizes.ppl_length / PPL_BUCKETS;
    let bucket =
        |i| Bucket { label: format!("{}-{}", edge(i), edge(i + 1) - 1), from: edge(i), to: edge(i + 1) };
    let buckets = (0..PPL_BUCKETS).map(bucket).collect();
    Ok(Task::new(spec.name(), Work::Read(sequences), buckets))
}

/// From stories to prompts.
struct Prompter<'m> {
    vocab: &'m Vocab,
    template: &'m ChatTemplate,
    /// No chat template: text and question as they are.
    raw: bool,
}

impl<'m> Prompter<'m> {
    fn new(words: &'m Words) -> Self {
        let (vocab, template) = (&words.vocab, &words.chat);
        // ChatML is of use only to a model that has its marks as tokens.
        let raw = template.is_default() && vocab.token_id("<|im_start|>").is_none();
        Self { vocab, template, raw }
    }

    fn tokens(&self, rendered: &str) -> Vec<u32> {
        match self.raw {
            true => self.vocab.encode(rendered, EncodeOptions { add_special: true, parse_special: true }),
            false => chat::tokens(self.vocab, rendered),
        }
    }

    /// The prompt that asks for fact `i` of the story, and the tokens between that fact and the question.
    fn item(&self, story: &Story, i: usize) -> Result<(Item, usize)> {
        let (at, fact) = &story.facts[i];
        let (text, fact_end) = story.text(*at);
        let question = &fact.question;
        let rendered = if self.raw {
            format!("{text}\n\nQuestion: {question}\nAnswer:")
        } else {
            let messages = json!([{"role": "user", "content": format!("{text} {question}")}]);
            chat::render(self.template, &messages, None, true, &Map::new())?
        };
        let start = rendered.find(&text).context("the chat template changes the text of a message")?;
        let tokens = self.tokens(&rendered);
        // A tokenizer may let a word take in what follows: tokens that the rest cannot change are common to both.
        let tokens_before = |end: usize| {
            let part = self.tokens(&rendered[..end]);
            part.iter().zip(&tokens).take_while(|(a, b)| a == b).count()
        };
        let (fact_end, text_end) = (tokens_before(start + fact_end), tokens_before(start + text.len()));
        let item = Item {
            tokens,
            text: text_end,
            bucket: 0,
            question: question.clone(),
            want: fact.answer.clone(),
            key: fact.key.clone(),
        };
        Ok((item, text_end.saturating_sub(fact_end)))
    }
}

fn recall(words: &Words, sizes: &Sizes) -> Result<Task> {
    let (prompter, mut teller) = (Prompter::new(words), Teller::new(sizes.seed));
    let mut found = Vec::new();
    for q in 0..sizes.questions {
        let story = teller.story(sizes.facts, sizes.fillers[q % sizes.fillers.len()]);
        let asked = teller.below(story.facts.len());
        found.push(prompter.item(&story, asked)?);
    }
    // 0-31, then doubling; only what occurs.
    let edge = |k: usize| if k == 0 { 0 } else { 16 << k };
    let rank = |d: usize| (0..).find(|&k| d < edge(k + 1)).unwrap_or(0);
    let mut ranks: Vec<usize> = found.iter().map(|f| rank(f.1)).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let label = |k: usize| format!("{}-{}", edge(k), edge(k + 1) - 1);
    let buckets = ranks.iter().map(|&k| Bucket { label: label(k), from: edge(k), to: edge(k + 1) }).collect();
    let place = |d| ranks.binary_search(&rank(d)).unwrap_or(0);
    let items = found.into_iter().map(|(item, d)| Item { bucket: place(d), ..item }).collect();
    Ok(Task::new("recall".into(), Work::Ask(items), buckets))
}

fn passkey(words: &Words, sizes: &Sizes) -> Result<Task> {
    // Numbers of their own: the tasks that are run together must not change each other.
    let (prompter, mut teller) = (Prompter::new(words), Teller::new(sizes.seed ^ 0x7061_7373));
    let options = EncodeOptions { add_special: false, parse_special: false };
    let size = |s: &str| words.vocab.encode(&format!(" {s}"), options).len();
    let mut items = Vec::new();
    for (bucket, &depth) in sizes.depths.iter().enumerate() {
        for _ in 0..sizes.passkeys {
            let story = teller.passkey(&sizes.wording, depth, sizes.passkey_length, size);
            items.push(Item { bucket, ..prompter.item(&story, 0)?.0 });
        }
    }
    let bucket = |&d: &usize| Bucket { label: format!("{d}%"), from: d, to: d };
    Ok(Task::new("passkey".into(), Work::Ask(items), sizes.depths.iter().map(bucket).collect()))
}

/// The answer in what a model said: what follows its thinking.
pub fn answer(said: &str) -> &str {
    said.rsplit("</think>").next().unwrap_or("").trim()
}

/// Whether an answer is right.
pub fn is_right(judge: Judge, item: &Item, answer: &str) -> bool {
    match judge {
        Judge::Exact => answer == item.want,
        Judge::Contains => contains_words(&answer.to_lowercase(), &item.key.to_lowercase()),
    }
}

/// Whether `key` stands in `text` with no letter or digit on either side.
fn contains_words(text: &str, key: &str) -> bool {
    let free = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
    text.match_indices(key)
        .any(|(i, m)| free(text[..i].chars().next_back()) && free(text[i + m.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo() -> Words {
        Words::of(&File::from_static("demo", crate::demo::bytes()).unwrap()).unwrap()
    }

    fn sizes() -> Sizes {
        Sizes {
            seed: 1,
            questions: 40,
            facts: 3,
            fillers: vec![2, 10, 20],
            depths: vec![0, 50, 100],
            passkeys: 3,
            passkey_length: 300,
            wording: Wording::default(),
            ppl_length: 64,
            ppl_sequences: 2,
        }
    }

    #[test]
    fn names() {
        assert_eq!(TaskSpec::parse("recall"), Ok(TaskSpec::Recall));
        assert_eq!(TaskSpec::parse("ppl:a/b.txt").unwrap().name(), "ppl:b.txt");
        for s in ["", "ppl", "ppl:", "recall:x", "needle"] {
            assert!(TaskSpec::parse(s).unwrap_err().contains("passkey"), "{s}");
        }
    }

    #[test]
    fn prompts_fall_into_text_and_question() {
        let words = demo();
        let task = prepare(&words, &TaskSpec::Recall, &sizes()).unwrap();
        let Work::Ask(items) = &task.work else { panic!("questions") };
        assert_eq!(items.len(), 40);
        let text = |ids: &[u32]| words.vocab.decode(ids, true);
        for i in items {
            assert!(!text(&i.tokens[..i.text]).contains(&i.question));
            assert!(text(&i.tokens[i.text..]).trim_start().starts_with(&i.question), "{}", text(&i.tokens));
            assert!(text(&i.tokens[..i.text]).contains(&i.key));
            assert_eq!(Some(i.tokens[0]), words.vocab.bos());
        }
        assert!(task.buckets.len() > 2 && task.longest() < 450, "{:?} {}", task.buckets, task.longest());
        assert_eq!(task.hash, prepare(&words, &TaskSpec::Recall, &sizes()).unwrap().hash);
        let other = Sizes { seed: 2, ..sizes() };
        assert_ne!(task.hash, prepare(&words, &TaskSpec::Recall, &other).unwrap().hash);
    }

    #[test]
    fn numbers_lie_deeper_and_deeper() {
        let words = demo();
        let task = prepare(&words, &TaskSpec::Passkey, &sizes()).unwrap();
        let Work::Ask(items) = &task.work else { panic!("questions") };
        assert_eq!((items.len(), task.buckets.len()), (9, 3));
        for i in items {
            let text = words.vocab.decode(&i.tokens[..i.text], true);
            let at = text.find(&i.key).unwrap() as f64 / text.len() as f64;
            let depth = task.buckets[i.bucket].from as f64 / 100.0;
            assert!((at - depth).abs() < 0.3, "{depth}: {at} of {text}");
            assert!((290..340).contains(&i.text), "{}", i.text);
        }
    }

    #[test]
    fn texts_are_cut_into_sequences() {
        let words = demo();
        let text = "The king spoke and the queen was silent. ".repeat(30);
        let task = read(&words, &TaskSpec::Ppl("x".into()), &text, &sizes()).unwrap();
        let Work::Read(s) = &task.work else { panic!("a text") };
        assert!(s.len() == 2 && s.iter().all(|s| s.len() == 64));
        assert_eq!(task.buckets.len(), 8);
        assert_eq!(task.buckets.last().unwrap().label, "56-63");
        let short = read(&words, &TaskSpec::Ppl("x".into()), "Too short.", &sizes()).err().unwrap();
        assert!(short.to_string().contains("--ppl-length"), "{short}");
    }

    #[test]
    fn judges() {
        let item = Item {
            tokens: Vec::new(),
            text: 0,
            bucket: 0,
            question: String::new(),
            want: "In the red box.".into(),
            key: "red box".into(),
        };
        assert_eq!(answer("I think.\n</think>\n\nIn the red box. "), "In the red box.");
        assert!(is_right(Judge::Exact, &item, "In the red box."));
        assert!(!is_right(Judge::Exact, &item, "in the red box."));
        for (said, right) in
            [("It is in the Red Box!", true), ("a red boxer", false), ("infrared box", false), ("", false)]
        {
            assert_eq!(is_right(Judge::Contains, &item, said), right, "{said}");
        }
    }
}
