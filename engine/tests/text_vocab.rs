//! The real vocabularies under `../shared/vocab` against their test vectors, and what must hold of any vocabulary.
//!
//! Skipped, and said so, where the shared material is absent (a failure with CI=true).

use std::path::{Path, PathBuf};

use engine::gguf::{Array, File, Metadata, OpenMode, Value};
use engine::text::{EncodeOptions, StreamDecoder, TextError, Vocab};
use proptest::prelude::*;

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

/// The shared folder, or `None` after saying that the test is skipped.
fn shared() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    if dir.is_dir() {
        return Some(dir);
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "../shared is not here");
    println!("skipped: ../shared is not here");
    None
}

fn metadata(path: &Path) -> Metadata {
    File::open(path, OpenMode::Mmap).unwrap_or_else(|e| panic!("{}: {e}", path.display())).metadata().clone()
}

fn vocab(name: &str) -> Option<Vocab> {
    let path = shared()?.join(format!("vocab/ggml-vocab-{name}.gguf"));
    Some(Vocab::from_metadata(&metadata(&path)).unwrap())
}

const NAMES: [&str; 5] = ["deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "qwen2"];

/// The texts of an `.inp` file: separated by a line, the newline before it not part of the text.
fn texts(dir: &Path, name: &str) -> Vec<String> {
    let file = std::fs::read_to_string(dir.join(format!("vocab/ggml-vocab-{name}.gguf.inp"))).unwrap();
    let mut texts: Vec<String> = file.split("\n__ggml_vocab_test__\n").map(str::to_owned).collect();
    assert_eq!(texts.pop().as_deref(), Some(""), "the file ends with a separator");
    texts
}

#[test]
fn vectors_of_every_vocabulary() {
    let Some(dir) = shared() else { return };
    let found = std::fs::read_dir(dir.join("vocab")).unwrap();
    let gguf = found.filter(|f| f.as_ref().unwrap().path().extension().is_some_and(|e| e == "gguf")).count();
    assert_eq!(gguf, NAMES.len(), "a vocabulary without a test");
    for name in NAMES {
        let v = vocab(name).unwrap();
        let out = std::fs::read_to_string(dir.join(format!("vocab/ggml-vocab-{name}.gguf.out"))).unwrap();
        let ids: Vec<Vec<u32>> =
            out.lines().map(|l| l.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
        let texts = texts(&dir, name);
        assert_eq!(texts.len(), ids.len(), "{name}");
        for (text, want) in texts.iter().zip(&ids) {
            assert_eq!(&v.encode(text, PLAIN), want, "{name}: {text:?}");
            assert_eq!(&v.decode(want, false), text, "{name}");
        }
    }
}

#[test]
fn what_the_files_say_of_special_tokens() {
    let Some(spm) = vocab("llama-spm") else { return };
    let special = EncodeOptions { add_special: true, parse_special: true };
    assert_eq!((spm.bos(), spm.eos(), spm.unknown(), spm.len()), (Some(1), Some(2), Some(0), 32000));
    assert!(spm.adds_bos() && !spm.adds_eos() && spm.is_eog(2) && !spm.is_eog(1));
    // A space goes before text at the beginning and after a special token.
    assert_eq!(spm.encode("", special), [1]);
    assert_eq!(spm.encode("Hello", special), [1, 15043]);
    assert_eq!(spm.encode("Hello</s>Hello", special), [1, 15043, 2, 15043]);
    assert!(!spm.encode("</s>", PLAIN).contains(&2), "not parsed: plain text");
    assert_eq!(spm.decode(&[1, 15043, 2], false), "Hello");
    assert_eq!(spm.decode(&[1, 15043, 2], true), "<s>Hello</s>");

    let llama = vocab("llama-bpe").unwrap();
    assert!(llama.adds_bos(), "llama-bpe adds BOS where the file does not say");
    assert_eq!(llama.encode("a<|eot_id|>b", special), [128000, 64, 128009, 65]);
    assert!(llama.is_eog(128009) && llama.is_eog(128001) && llama.is_control(128009));
    assert_eq!(llama.eot(), Some(128009));
    assert_eq!(llama.token_id("<|eot_id|>"), Some(128009));

    let qwen = vocab("qwen2").unwrap();
    assert!(!qwen.adds_bos());
    let id = qwen.token_id("<|im_end|>").unwrap();
    assert!(qwen.is_eog(id));
    assert_eq!(qwen.encode("<|im_end|>\n", special), [id, 198]);
    assert_eq!(qwen.decode(&[id, 198], false), "\n");
    assert_eq!(qwen.bytes(999_999), None);

    let deepseek = vocab("deepseek-llm").unwrap();
    assert_eq!(deepseek.encode("x", special), [100000, 87]);
    assert!(deepseek.is_eog(100001));
}

#[test]
fn long_texts_without_spaces_take_no_quadratic_time() {
    for name in NAMES {
        let Some(v) = vocab(name) else { return };
        for unit in ["a", " ", "\n", "中", "1", "!", "ab\u{301}", "'"] {
            let text = unit.repeat((1 << 20) / unit.len());
            let t = std::time::Instant::now();
            let ids = v.encode(&text, PLAIN);
            assert!(t.elapsed().as_secs() < 20, "{name} {unit:?}: {:?}", t.elapsed());
            assert_eq!(v.decode(&ids, false), text, "{name} {unit:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn text_comes_back(text in "\\PC{0,40}|[ \\n\\t\\r']{0,20}|(\\p{L}|\\p{M}|\\p{N}|\\p{S}|\\s|[a-zA-Z0-9 .,']){0,60}") {
        for name in NAMES {
            let Some(v) = cached(name) else { return Ok(()) };
            let ids = v.encode(&text, PLAIN);
            prop_assert_eq!(v.decode(&ids, false), text.as_str(), "{}", name);
            let mut stream = StreamDecoder::new(v, false);
            let mut out = String::new();
            for id in ids {
                out += &stream.push(id);
            }
            out += &stream.finish();
            let prefixed = name == "llama-spm" && !text.is_empty();
            prop_assert_eq!(out, if prefixed { format!(" {text}") } else { text.clone() });
        }
    }

    #[test]
    fn any_ids_stream_as_they_decode(ids in prop::collection::vec(0u32..60000, 0..40)) {
        for name in NAMES {
            let Some(v) = cached(name) else { return Ok(()) };
            let mut stream = StreamDecoder::new(v, true);
            let mut out = String::new();
            let mut bytes = Vec::new();
            for &id in &ids {
                out += &stream.push(id);
                bytes.extend_from_slice(&v.bytes(id).unwrap_or_default());
            }
            out += &stream.finish();
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}

fn cached(name: &str) -> Option<&'static Vocab> {
    static ALL: std::sync::LazyLock<Vec<Option<Vocab>>> =
        std::sync::LazyLock::new(|| NAMES.iter().map(|n| vocab(n)).collect());
    ALL[NAMES.iter().position(|n| *n == name)?].as_ref()
}

/// A BPE vocabulary of the 256 bytes, two merges and two special tokens.
fn small_bpe() -> Metadata {
    let byte = |b: u8| match b {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
        0..=0x20 => char::from_u32(0x100 + u32::from(b)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(b) - 0x7f).unwrap(),
        0xad => '\u{143}',
    };
    let mut tokens: Vec<String> = (0..=255u8).map(|b| byte(b).to_string()).collect();
    tokens.extend(["he", "hel", "<|im_end|>", "<user>"].map(String::from));
    let mut types = vec![1; 258];
    types.extend([3, 4]);
    let mut m = Metadata::default();
    m.set("tokenizer.ggml.model", Value::String("gpt2".into()));
    m.set("tokenizer.ggml.pre", Value::String("gpt-2".into()));
    m.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    m.set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    m.set("tokenizer.ggml.merges", Value::Array(Array::String(vec!["h e".into(), "he l".into()])));
    m
}

#[test]
fn special_and_user_defined_tokens() {
    let v = Vocab::from_metadata(&small_bpe()).unwrap();
    let text = "hel<user><|im_end|>";
    let all = EncodeOptions { add_special: true, parse_special: true };
    assert_eq!(v.encode(text, all), [257, 259, 258]);
    assert_eq!(v.encode(text, PLAIN)[..2], [257, 259], "user-defined tokens always");
    assert_eq!(v.encode(text, PLAIN).len(), 2 + "<|im_end|>".len());
    assert_eq!(v.decode(&[257, 259, 258], false), "hel<user>");
    assert_eq!(v.decode(&[257, 259, 258], true), text);
    assert!(v.is_eog(258) && v.eot() == Some(258) && v.bos().is_none());
}

#[test]
fn errors_name_key_and_value() {
    let strings = |s: &[&str]| Value::Array(Array::String(s.iter().map(|s| s.to_string()).collect()));
    let text = |s: &str| Value::String(s.into());
    let cases: Vec<(&str, Option<Value>, &[&str])> = vec![
        ("tokenizer.ggml.model", None, &["tokenizer.ggml.model"]),
        ("tokenizer.ggml.model", Some(text("bert")), &["tokenizer.ggml.model", "bert", "gpt2"]),
        ("tokenizer.ggml.model", Some(Value::U32(1)), &["tokenizer.ggml.model"]),
        ("tokenizer.ggml.pre", Some(text("nonesuch")), &["tokenizer.ggml.pre", "nonesuch", "deepseek-v3"]),
        ("tokenizer.ggml.merges", None, &["tokenizer.ggml.merges", "missing"]),
        ("tokenizer.ggml.merges", Some(strings(&["ab"])), &["tokenizer.ggml.merges", "ab"]),
        ("tokenizer.ggml.tokens", None, &["tokenizer.ggml.tokens"]),
        ("tokenizer.ggml.tokens", Some(strings(&[])), &["tokenizer.ggml.tokens"]),
        ("tokenizer.ggml.token_type", Some(Value::Array(Array::I32(vec![1]))), &["token_type", "1", "260"]),
        ("tokenizer.ggml.token_type", Some(Value::Array(Array::I32(vec![9; 260]))), &["token_type", "9"]),
        (
            "tokenizer.ggml.token_type",
            Some(Value::Array(Array::I32(vec![6; 260]))),
            &["token_type", "<0xXX>"],
        ),
        ("tokenizer.ggml.token_type", Some(Value::Array(Array::F32(vec![1.0; 260]))), &["token_type", "f32"]),
        ("tokenizer.ggml.scores", Some(Value::Array(Array::F32(vec![1.0; 3]))), &["scores", "3", "260"]),
        ("tokenizer.ggml.scores", Some(Value::Array(Array::F32(vec![f32::NAN; 260]))), &["scores", "number"]),
        (
            "tokenizer.ggml.merges",
            Some(strings(&[&format!("x {}", "x".repeat(140_000))])),
            &["merges", "bytes"],
        ),
        ("tokenizer.ggml.bos_token_id", Some(Value::U32(260)), &["bos_token_id", "260"]),
        ("tokenizer.ggml.eos_token_id", Some(Value::I32(-1)), &["eos_token_id", "-1"]),
        ("tokenizer.ggml.add_bos_token", Some(Value::Bool(true)), &["add_bos_token", "bos_token_id"]),
        ("tokenizer.ggml.add_eos_token", Some(Value::U8(1)), &["add_eos_token"]),
    ];
    for (key, value, words) in cases {
        let mut m = small_bpe();
        match value {
            Some(v) => m.set(key, v),
            None => {
                m.remove(key);
            }
        }
        let e = Vocab::from_metadata(&m).map(|_| ()).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)) && !e.contains('\n'), "{key}: {e}");
    }
    // Special tokens of 6 MB together.
    let mut m = small_bpe();
    let many = (0..100).map(|i| format!("{i}{}", "x".repeat(60_000)));
    m.set("tokenizer.ggml.tokens", Value::Array(Array::String(many.collect())));
    m.set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![3; 100])));
    let e = Vocab::from_metadata(&m).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("special tokens of 6000190 bytes"), "{e}");
    let mut m = small_bpe();
    m.set("tokenizer.ggml.tokens", strings(&[&"x".repeat(70_000)]));
    m.remove("tokenizer.ggml.token_type");
    let e = Vocab::from_metadata(&m).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("tokenizer.ggml.tokens") && e.contains("70000 bytes"), "{e}");
    let mut m = small_bpe();
    let twice = vec!["a".to_string(); 2];
    m.set("tokenizer.ggml.tokens", Value::Array(Array::String(twice)));
    m.remove("tokenizer.ggml.token_type");
    let e = Vocab::from_metadata(&m).unwrap_err();
    assert!(matches!(e, TextError::Invalid { key: "tokenizer.ggml.tokens", .. }), "{e}");
}
