//! Thinking apart from answer: the tags a reasoning model puts around its thoughts, found in streamed text.
//!
//! Knows nothing of templates but their text, and nothing of how either part is shown.

use super::Vocab;

/// The tags around thinking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinkTags {
    /// Before the thoughts. Many templates write it as the end of the prompt, so that the model does not.
    pub open: &'static str,
    /// Behind them.
    pub close: &'static str,
}

/// The tags known: DeepSeek, Qwen and most others; Mistral; a few early ones.
const KNOWN: [ThinkTags; 3] = [
    ThinkTags { open: "<think>", close: "</think>" },
    ThinkTags { open: "[THINK]", close: "[/THINK]" },
    ThinkTags { open: "<thinking>", close: "</thinking>" },
];

impl ThinkTags {
    /// The tags of which a template's source speaks.
    pub fn in_template(source: &str) -> Option<Self> {
        KNOWN.into_iter().find(|t| source.contains(t.close) || source.contains(t.open))
    }

    /// Whether a rendered prompt ends inside an open thought: its last tag is an opening one at the very end, but for
    /// white space.
    pub fn opened_by(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }

    /// The tokens of the tags, where they are tokens of their own. They are often control tokens: a
    /// [`super::StreamDecoder`] leaves them out unless told to show them.
    pub fn tokens(&self, vocab: &Vocab) -> Vec<u32> {
        [self.open, self.close].iter().filter_map(|t| vocab.token_id(t)).collect()
    }
}

/// A piece of what a model says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Thoughts.
    Thinking(String),
    /// The answer.
    Answer(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Nothing but white space so far: an opening tag may come.
    Start,
    /// Behind the opening tag; white space is left out until there is a thought.
    ThinkingStart,
    Thinking,
    /// Behind the closing tag; white space is left out until there is an answer.
    AnswerStart,
    Answer,
}

/// Takes streamed text apart. Only a tag at the very beginning opens a thought, and only the first closing tag ends it:
/// what follows is the answer, even if it speaks of tags. White space next to the tags is dropped.
#[derive(Clone, Debug)]
pub struct Splitter {
    tags: ThinkTags,
    at: At,
    held: String,
}

impl Splitter {
    /// `opened`: the prompt has opened the thought already ([`ThinkTags::opened_by`]).
    pub fn new(tags: ThinkTags, opened: bool) -> Self {
        Self { tags, at: if opened { At::ThinkingStart } else { At::Start }, held: String::new() }
    }

    /// Whether the text so far ends within a thought.
    pub fn is_thinking(&self) -> bool {
        matches!(self.at, At::ThinkingStart | At::Thinking)
    }

    /// Takes a piece of text; gives what is certain.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(false, &mut parts) {}
        parts
    }

    /// Ends the text: gives what was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        while self.step(true, &mut parts) {}
        parts
    }

    /// One change of state; whether there may be another.
    fn step(&mut self, end: bool, parts: &mut Vec<Part>) -> bool {
        match self.at {
            At::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(self.tags.open) {
                    self.held = rest.to_owned();
                    self.at = At::ThinkingStart;
                    return true;
                }
                // White space and the beginning of a tag wait for more.
                if !end && self.tags.open.starts_with(text) {
                    return false;
                }
                self.at = At::Answer;
                true
            }
            At::ThinkingStart | At::AnswerStart => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.at = if self.at == At::AnswerStart { At::Answer } else { At::Thinking };
                true
            }
            At::Thinking => {
                if let Some(at) = self.held.find(self.tags.close) {
                    let rest = self.held.split_off(at + self.tags.close.len());
                    let thought = self.held[..at].trim_end();
                    if !thought.is_empty() {
                        parts.push(Part::Thinking(thought.to_owned()));
                    }
                    self.held = rest;
                    self.at = At::AnswerStart;
                    return true;
                }
                let sure = if end { self.held.len() } else { self.sure() };
                let rest = self.held.split_off(sure);
                let thought = std::mem::replace(&mut self.held, rest);
                if !thought.is_empty() {
                    parts.push(Part::Thinking(thought));
                }
                false
            }
            At::Answer => {
                if !self.held.is_empty() {
                    parts.push(Part::Answer(std::mem::take(&mut self.held)));
                }
                false
            }
        }
    }

    /// How much of the held text is no part of a closing tag, nor of white space before one.
    fn sure(&self) -> usize {
        let (text, tag) = (&self.held, self.tags.close);
        let from = text.len().saturating_sub(tag.len() - 1);
        let tag_at = (from..text.len()).find(|&i| text.is_char_boundary(i) && tag.starts_with(&text[i..]));
        text[..tag_at.unwrap_or(text.len())].trim_end().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(opened: bool, pieces: &[&str]) -> (String, String) {
        let mut s = Splitter::new(KNOWN[0], opened);
        let mut parts: Vec<Part> = pieces.iter().flat_map(|p| s.push(p)).collect();
        parts.extend(s.finish());
        let (mut thinking, mut answer) = (String::new(), String::new());
        for p in parts {
            match p {
                Part::Thinking(t) => thinking += &t,
                Part::Answer(t) => answer += &t,
            }
        }
        (thinking, answer)
    }

    #[test]
    fn takes_thinking_and_answer_apart() {
        for (opened, text, thinking, answer) in [
            (false, "<think>\na b\n</think>\n\nc d", "a b", "c d"),
            (true, "a b\n</think>\n\nc </think> d", "a b", "c </think> d"),
            (true, "\n</think>c", "", "c"),
            (false, " plain <think> words", "", " plain <think> words"),
            (false, "<thin", "", "<thin"),
            (true, "cut off </th", "cut off </th", ""),
            (false, "", "", ""),
            (false, "<think></think>", "", ""),
        ] {
            assert_eq!(split(opened, &[text]), (thinking.into(), answer.into()), "{text:?}");
            let letters: Vec<String> = text.chars().map(String::from).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            assert_eq!(split(opened, &letters), (thinking.into(), answer.into()), "{text:?} by letters");
        }
    }

    #[test]
    fn knows_an_opened_prompt() {
        assert!(KNOWN[0].opened_by("<｜Assistant｜><think>\n"));
        assert!(!KNOWN[0].opened_by("<think>\n\n</think>\n\n"));
        assert_eq!(ThinkTags::in_template("{{ '</think>' }}"), Some(KNOWN[0]));
        assert_eq!(ThinkTags::in_template("plain"), None);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(words in prop::collection::vec("<think>|</think>|<|/|a|\n| |ж", 0..12), opened: bool) {
            let whole: String = words.concat();
            let pieces: Vec<&str> = words.iter().map(String::as_str).collect();
            prop_assert_eq!(split(opened, &pieces), split(opened, &[&whole]));
        }
    }
}
