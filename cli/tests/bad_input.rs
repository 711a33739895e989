//! Bad input: each a clear one-line error that names the thing, and exit status 1.

mod common;
use common::{error, shared, stdout, write};

fn gguf(pairs: &[(&str, engine::gguf::Value)]) -> Vec<u8> {
    let mut m = engine::gguf::Metadata::default();
    for (k, v) in pairs {
        m.insert(*k, v.clone());
    }
    engine::gguf::encode(&m, &[]).expect("a file")
}

fn says(e: &str, words: &[&str]) {
    for w in words {
        assert!(e.contains(w), "{w:?} is not in {e:?}");
    }
}

#[test]
fn files_that_are_no_models() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let text = write(d, "text.gguf", "this is no model at all, but it is long enough to be one");
    let empty = write(d, "empty.gguf", "");
    let arch = write(
        d,
        "arch.gguf",
        gguf(&[("general.architecture", engine::gguf::Value::String("mamba\nx".into()))]),
    );
    let cut = {
        stdout(&["quantize", "--allow-requantize", "demo", d.join("whole.gguf").to_str().unwrap(), "COPY"]);
        let whole = std::fs::read(d.join("whole.gguf")).unwrap();
        write(d, "cut.gguf", &whole[..whole.len() / 2])
    };
    for command in
        [&["run", "-p", "x", "-m"][..], &["inspect", "-m"], &["bench", "-m"], &["tokenize", "-p", "x", "-m"]]
    {
        let with = |path: &str| error(&[command, &[path]].concat());
        says(&with("/no/such/file.gguf"), &["/no/such/file.gguf", "No such file"]);
        says(&with(d.to_str().unwrap()), &["directory"]);
        says(&with(&text), &["text.gguf"]);
        says(&with(&empty), &["empty.gguf"]);
        says(&with(&cut), &["cut.gguf"]);
    }
    says(&error(&["run", &arch, "-p", "x"]), &["arch.gguf", "mamba"]);
}

#[test]
fn vocabularies_without_merges() {
    use engine::gguf::{Array, Value};
    let dir = tempfile::tempdir().unwrap();
    let file = gguf(&[
        ("general.architecture", Value::String("llama".into())),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("llama-bpe".into())),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(vec!["a".into(), "b".into()]))),
        ("tokenizer.ggml.bos_token_id", Value::U32(0)),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![1, 1]))),
    ]);
    let path = write(dir.path(), "v.gguf", file);
    says(&error(&["tokenize", &path, "-p", "ab"]), &["v.gguf", "merges"]);
}

#[test]
fn prompts_and_ids_that_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let long = write(d, "long.txt", "word and another word ".repeat(100));
    says(&error(&["run", "demo", "-f", &long, "-c", "64"]), &["64", "-c"]);
    let out = d.join("o.npy");
    let out = out.to_str().unwrap();
    for (ids, words) in [
        ("[1, 2048]", &["2048", "out of range"][..]),
        ("[1, -1]", &["ids.json"]),
        ("[1.5]", &["ids.json"]),
        ("{}", &["ids.json"]),
        ("[]", &["no token ids"]),
        ("[1", &["not JSON"]),
    ] {
        let file = write(d, "ids.json", ids);
        says(&error(&["logits", "demo", "--tokens-file", &file, "--out", out]), words);
        assert!(!d.join("o.npy").exists());
    }
    assert_eq!(std::fs::read_dir(d).unwrap().count(), 2, "something was left behind");
}

#[test]
fn outputs_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let ids = write(dir.path(), "ids.json", "[1]");
    let d = dir.path().to_str().unwrap();
    for out in ["/no/such/folder/o.npy", d] {
        says(&error(&["logits", "demo", "--tokens-file", &ids, "--out", out]), &["cannot write", out]);
        says(&error(&["quantize", "--allow-requantize", "demo", out, "Q4_0"]), &[out]);
    }
    let text = write(dir.path(), "t", "some words to measure ".repeat(200));
    let e =
        error(&["perplexity", "demo", "-c", "64", "-f", &text, "--kl-divergence-base", "/no/such/folder/b"]);
    says(&e, &["cannot write", "/no/such/folder/b"]);
}

#[test]
fn options_out_of_range() {
    for (args, word) in [
        (&["--temp", "-1"][..], "temperature"),
        (&["--top-p", "1.5"], "top_p"),
        (&["--min-p", "nan"], "min_p"),
        (&["--repeat-penalty", "0"], "repeat_penalty"),
        (&["-l", "99999+1"], "99999"),
        (&["--chat-template-file", "/no/such.jinja"], "/no/such.jinja"),
        (&["-ctk", "q2_K"], "q2_K"),
    ] {
        says(&error(&[&["run", "demo", "-p", "x", "-n", "2"], args].concat()), &[word]);
    }
    says(&error(&["run", "demo"]), &["no prompt"]);
}

#[test]
fn text_that_is_not_utf8() {
    let dir = tempfile::tempdir().unwrap();
    let f = write(dir.path(), "bad.txt", b"abc\xff");
    says(&error(&["tokenize", "demo", "-f", &f]), &["bad.txt", "UTF-8"]);
}

#[test]
fn vocabulary_files_are_no_models() {
    let Some(v) = shared("vocab/ggml-vocab-qwen2.gguf") else { return };
    error(&["run", v.to_str().unwrap(), "-p", "x"]);
}
