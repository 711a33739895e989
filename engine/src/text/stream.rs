//! Text as it is generated: whole characters out of tokens, and the search for stop strings.
//!
//! Knows nothing of models; the pieces come from whoever samples.

use super::Vocab;

/// Turns tokens, one at a time, into text of whole UTF-8 characters. What it gives, put together, is the lossy decoding of
/// all bytes at once: bytes that can become no character are U+FFFD.
#[derive(Clone, Debug)]
pub struct StreamDecoder<'v> {
    vocab: &'v Vocab,
    special: bool,
    shown: Vec<u32>,
    pending: Vec<u8>,
}

impl<'v> StreamDecoder<'v> {
    /// `special`: control tokens appear as their text instead of not at all.
    pub fn new(vocab: &'v Vocab, special: bool) -> Self {
        Self { vocab, special, shown: Vec::new(), pending: Vec::new() }
    }

    /// Shows these control tokens even so (the tags around thinking, say).
    pub fn showing(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.shown.extend(ids);
        self
    }

    /// The text that has become complete with this token; often empty within a character of several tokens.
    pub fn push(&mut self, id: u32) -> String {
        if !self.special && self.vocab.is_control(id) && !self.shown.contains(&id) {
            return String::new();
        }
        let bytes = self.vocab.bytes(id).unwrap_or_default();
        self.push_bytes(&bytes)
    }

    /// As [`Self::push`] for bytes from elsewhere.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::new();
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            if incomplete(chunk.invalid())
                && kept + chunk.valid().len() + chunk.invalid().len() == self.pending.len()
            {
                kept += chunk.valid().len();
                break;
            }
            if !chunk.invalid().is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            kept += chunk.valid().len() + chunk.invalid().len();
        }
        self.pending.drain(..kept);
        out
    }

    /// Ends the text: U+FFFD if a character was left half done.
    pub fn finish(&mut self) -> String {
        let out = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        out
    }
}

/// Whether these bytes, which are no character, could become one with more bytes.
fn incomplete(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && std::str::from_utf8(bytes).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
}

/// What may be shown after a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Text that can be part of no stop string any more.
    pub text: String,
    /// The index of the stop string found; the text ends before it, and nothing more will come.
    pub stopped: Option<usize>,
}

/// Looks for stop strings in streamed text, also where they are spread over several pieces.
#[derive(Clone, Debug, Default)]
pub struct StopScanner {
    stops: Vec<String>,
    held: String,
    stopped: Option<usize>,
}

impl StopScanner {
    /// Empty stop strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { stops: stops.into_iter().map(Into::into).collect(), held: String::new(), stopped: None }
    }

    /// Takes a piece of text. The stop string that begins first counts, of several at one place the longest. An end that
    /// may be the beginning of a stop string is held back.
    pub fn push(&mut self, text: &str) -> Scanned {
        if self.stopped.is_some() {
            return Scanned { text: String::new(), stopped: self.stopped };
        }
        self.held.push_str(text);
        let stops = || self.stops.iter().enumerate().filter(|(_, s)| !s.is_empty());
        let found = stops()
            .filter_map(|(i, s)| Some((self.held.find(s.as_str())?, std::cmp::Reverse(s.len()), i)))
            .min();
        let wait = stops().filter_map(|(_, s)| partial(&self.held, s)).min();
        if let Some((at, _, which)) = found {
            // A longer stop string that began earlier and is still incomplete would win.
            if wait.is_none_or(|w| w >= at) {
                self.stopped = Some(which);
                self.held.truncate(at);
                return Scanned { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        let rest = self.held.split_off(wait.unwrap_or(self.held.len()));
        Scanned { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// Ends the text: what was held back, unless it holds a stop string after all.
    pub fn finish(&mut self) -> Scanned {
        if self.stopped.is_none() {
            let found = (self.stops.iter().enumerate().filter(|(_, s)| !s.is_empty()))
                .filter_map(|(i, s)| Some((self.held.find(s.as_str())?, std::cmp::Reverse(s.len()), i)))
                .min();
            if let Some((at, _, which)) = found {
                self.held.truncate(at);
                self.stopped = Some(which);
            }
        }
        Scanned { text: std::mem::take(&mut self.held), stopped: self.stopped }
    }
}

/// Where the longest proper beginning of `stop` that ends `text` begins.
fn partial(text: &str, stop: &str) -> Option<usize> {
    let from = text.len().saturating_sub(stop.len().saturating_sub(1));
    (from..text.len()).find(|&i| text.is_char_boundary(i) && stop.starts_with(&text[i..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scan(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut s = StopScanner::new(stops.iter().copied());
        let mut out = String::new();
        for p in pieces {
            let r = s.push(p);
            out += &r.text;
            if r.stopped.is_some() {
                return (out, r.stopped);
            }
        }
        let r = s.finish();
        (out + &r.text, r.stopped)
    }

    #[test]
    fn finds_stop_strings_over_pieces() {
        assert_eq!(scan(&["###"], &["ab#", "#", "# c"]), ("ab".into(), Some(0)));
        assert_eq!(scan(&["###"], &["ab#", "#", "c"]), ("ab##c".into(), None));
        assert_eq!(scan(&["b", "abc"], &["xab"]), ("xa".into(), Some(0)));
        assert_eq!(scan(&["b", "abc"], &["xa", "bc"]), ("x".into(), Some(1)));
        assert_eq!(scan(&["", "ж"], &["aжb"]), ("a".into(), Some(1)));
        assert_eq!(scan(&["ab"], &["a"]), ("a".into(), None));
        assert_eq!(scan(&[], &["a", "b"]), ("ab".into(), None));
    }

    #[test]
    fn holds_back_no_more_than_it_must() {
        let mut s = StopScanner::new(["</s>"]);
        assert_eq!(s.push("hi <").text, "hi ");
        assert_eq!(s.push("/").text, "");
        assert_eq!(s.push("b").text, "</b");
    }

    proptest! {
        #[test]
        fn same_as_searching_the_whole(text in "[ab]{0,24}", stop in "[ab]{1,4}", cuts in prop::collection::vec(1usize..4, 24)) {
            let mut pieces = Vec::new();
            let mut rest = text.as_str();
            for c in cuts {
                let (a, b) = rest.split_at(c.min(rest.len()));
                pieces.push(a);
                rest = b;
            }
            let want = match text.find(&stop) { Some(i) => (text[..i].to_owned(), Some(0)), None => (text.clone(), None) };
            prop_assert_eq!(scan(&[&stop], &pieces), want);
        }
    }
}
