//! The demo model's tokenizer (deepseek-v3 rules) against Hugging Face `tokenizers` (ref-tests/text/demo_reference.py).

use std::path::Path;

use engine::gguf::{File, OpenMode};
use engine::text::{ChatTemplate, EncodeOptions, RenderOptions, StreamDecoder, Vocab};

#[test]
fn ids_of_hugging_face() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests");
    let file = File::open(dir.join("demo-model/demo-q8_0.gguf"), OpenMode::Mmap).unwrap();
    let v = Vocab::from_metadata(file.metadata()).unwrap();
    let rows = std::fs::read(dir.join("text/demo_reference.json")).unwrap();
    let rows: Vec<(String, Vec<u32>)> = serde_json::from_slice(&rows).unwrap();
    assert!(rows.len() > 400);
    for (text, want) in rows {
        let ids = v.encode(&text, EncodeOptions { add_special: false, parse_special: true });
        assert_eq!(ids, want, "{text:?}");
        assert_eq!(v.decode(&ids, true), text);
    }
}

#[test]
fn a_chat_prompt_becomes_ids_and_thinking_is_seen() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/demo-model/demo-q8_0.gguf");
    let file = File::open(path, OpenMode::Mmap).unwrap();
    let v = Vocab::from_metadata(file.metadata()).unwrap();
    let t = ChatTemplate::from_metadata(file.metadata(), &v).unwrap();
    let messages = serde_json::json!([{"role": "user", "content": "Hi"}]);
    let prompt = t
        .render(&RenderOptions {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            kwargs: serde_json::Map::new(),
        })
        .unwrap();
    assert_eq!(prompt, "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n");
    let ids = v.encode_prompt(&prompt);
    assert_eq!(ids.iter().filter(|&&id| Some(id) == v.bos()).count(), 1, "BOS is not doubled");
    assert_eq!(v.decode(&ids, true), prompt);
    let tags = t.think_tags().unwrap();
    assert!(tags.opened_by(&prompt));
    let close = v.token_id("</think>").unwrap();
    assert_eq!(StreamDecoder::new(&v, false).showing(tags.tokens(&v)).push(close), "</think>");
    let eos = v.eos().unwrap();
    assert_eq!(StreamDecoder::new(&v, false).push(eos), "", "control tokens are left out");
    assert_eq!(StreamDecoder::new(&v, false).showing([eos]).push(eos), v.token_text(eos).unwrap());
}
