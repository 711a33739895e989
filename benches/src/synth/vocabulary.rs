//! The smallest byte-level BPE vocabulary that llama.cpp and this engine load and that can write any text: two control
//! tokens, 256 bytes, one merge, and fillers. Knows nothing of models.

/// The arrays of `tokenizer.ggml.*`.
pub struct Vocabulary {
    /// Texts by id: `<s>`, `</s>`, the bytes, the merge, fillers.
    pub tokens: Vec<String>,
    /// 3 for control tokens, 1 for text.
    pub types: Vec<i32>,
    /// Merges.
    pub merges: Vec<String>,
}

/// GPT-2's character for a byte: itself where it is printable, counted on from U+0100 where it is not.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut next = 0x100;
    (0..=255u8).map(move |b| match b {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("below U+0200")
        }
    })
}

/// `n` tokens; at least 259.
pub fn tokens(n: usize) -> Vocabulary {
    let mut tokens = vec!["<s>".to_owned(), "</s>".to_owned()];
    tokens.extend(byte_characters().map(String::from));
    tokens.push("th".into());
    let fillers = n.saturating_sub(tokens.len());
    // A space in front, so that a generated text is words.
    tokens.extend((0..fillers).map(|i| format!("\u{120}{i}")));
    let types = (0..tokens.len()).map(|i| if i < 2 { 3 } else { 1 }).collect();
    Vocabulary { tokens, types, merges: vec!["t h".into()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_once_and_no_token_twice() {
        let v = tokens(1000);
        assert_eq!((v.tokens.len(), v.types.len()), (1000, 1000));
        let distinct: std::collections::HashSet<_> = v.tokens.iter().collect();
        assert_eq!(distinct.len(), 1000);
        assert_eq!(byte_characters().collect::<Vec<_>>()[usize::from(b' ')], '\u{120}');
        assert_eq!(byte_characters().last(), Some('\u{ff}'));
    }
}
