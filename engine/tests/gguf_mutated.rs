//! Random damage to real headers, and the fuzz corpus replayed: no input may break the reader's promises
//! (gguf_check). The corpus is made here too: `RSINFER_WRITE_CORPUS=1 cargo test -p rsinfer-engine --test gguf_mutated`.

mod gguf_check;

use std::path::{Path, PathBuf};

use engine::gguf::{Array, Metadata, NewTensor, Value, encode};
use gguf_check::{check, check_path};
use proptest::prelude::*;
use quant::DType;

/// Whole, small files of every kind, by name: the seeds of the fuzzer.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let t = |name: &str, dtype: DType, dims: &[u64]| {
        let bytes = dtype.row_bytes(dims[0] as usize).unwrap() * dims[1..].iter().product::<u64>() as usize;
        (NewTensor { name: name.into(), dtype, dims: dims.into() }, vec![0; bytes])
    };
    let file = |m: &Metadata, tensors: &[(NewTensor, Vec<u8>)]| {
        encode(m, &tensors.iter().map(|(t, d)| (t.clone(), d.as_slice())).collect::<Vec<_>>()).unwrap()
    };
    let empty = file(&Metadata::default(), &[]);

    let mut m = Metadata::default();
    m.set("u8", Value::U8(1));
    m.set("i8", Value::I8(-1));
    m.set("u16", Value::U16(1));
    m.set("i16", Value::I16(-1));
    m.set("u32", Value::U32(1));
    m.set("i32", Value::I32(-1));
    m.set("u64", Value::U64(1));
    m.set("i64", Value::I64(-1));
    m.set("f32", Value::F32(1.5));
    m.set("f64", Value::F64(1.5));
    m.set("bool", Value::Bool(true));
    m.set("str", Value::String("ä".into()));
    m.set("strs", Value::Array(Array::String(vec!["a".into(), String::new()])));
    m.set("nested", Value::Array(Array::Array(vec![Array::Array(vec![Array::Bool(vec![true, false])])])));
    m.set("numbers", Value::Array(Array::F64(vec![1.0, f64::NAN])));
    let values = file(&m, &[]);

    let mut m = Metadata::default();
    m.set("general.architecture", Value::String("llama".into()));
    m.set("general.alignment", Value::U32(64));
    m.set("general.file_type", Value::U32(15));
    m.set("llama.block_count", Value::U32(2));
    m.set("llama.expert_count", Value::U32(8));
    m.set("llama.attention.head_count", Value::U32(4));
    m.set("llama.attention.head_count_kv", Value::Array(Array::I32(vec![1, 1])));
    let model = file(
        &m,
        &[
            t("token_embd.weight", DType::F32, &[8, 2]),
            t("blk.0.attn_v.weight", DType::Q8_0, &[32, 2]),
            t("blk.1.attn_v.weight", DType::F16, &[8, 2]),
            t("blk.1.ffn_down_exps.weight", DType::Q4_0, &[32, 1, 2, 1]),
            t("output.weight", DType::Q6_K, &[256, 1]),
        ],
    );

    let mut m = Metadata::default();
    m.set("split.no", Value::U16(0));
    m.set("split.count", Value::U16(2));
    m.set("split.tensors.count", Value::I32(2));
    let split = file(&m, &[t("a", DType::F32, &[1])]);
    let mut version2 = model.clone();
    version2[4] = 2;
    vec![("empty", empty), ("values", values), ("model", model), ("split", split), ("version2", version2)]
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/fuzz/corpus/gguf_open")
}

#[test]
fn corpus_holds_the_seeds_and_replays() {
    for (name, bytes) in seeds() {
        let path = corpus().join(name);
        if std::env::var_os("RSINFER_WRITE_CORPUS").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "{name}: made by an older version of this test?");
        assert_eq!(check(&bytes), name != "split", "{name}");
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(corpus()).unwrap() {
        let path = entry.unwrap().path();
        check(&std::fs::read(&path).unwrap());
        check_path(&path);
        replayed += 1;
    }
    assert!(replayed >= seeds().len());
}

/// One piece of damage.
#[derive(Clone, Debug)]
enum Damage {
    Byte(prop::sample::Index, u8),
    /// A number that is an extreme of some width, at any place.
    Number(prop::sample::Index, u64),
    Truncate(prop::sample::Index),
    Remove(prop::sample::Index, usize),
    /// Copies a range elsewhere: makes duplicates and overlaps.
    Copy(prop::sample::Index, prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    use prop::sample::Index;
    let extreme = prop_oneof![
        Just(0u64),
        Just(1),
        Just(31),
        Just(u64::MAX),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(1 << 32),
        0..64u64,
        any::<u64>(),
    ];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(i, b)| Damage::Byte(i, b)),
        (any::<Index>(), extreme).prop_map(|(i, n)| Damage::Number(i, n)),
        any::<Index>().prop_map(Damage::Truncate),
        (any::<Index>(), 1..40usize).prop_map(|(i, n)| Damage::Remove(i, n)),
        (any::<Index>(), any::<Index>(), 1..80usize).prop_map(|(a, b, n)| Damage::Copy(a, b, n)),
    ]
}

/// Spoils the first `header` bytes of `file`.
fn spoil(file: &mut Vec<u8>, header: usize, damage: &[Damage]) {
    for d in damage {
        let len = header.min(file.len());
        if len == 0 {
            return;
        }
        match d {
            Damage::Byte(i, b) => file[i.index(len)] = *b,
            Damage::Number(i, n) => {
                let at = i.index(len);
                let end = (at + 8).min(file.len());
                file[at..end].copy_from_slice(&n.to_le_bytes()[..end - at]);
            }
            Damage::Truncate(i) => file.truncate(i.index(len)),
            Damage::Remove(i, n) => {
                let at = i.index(len);
                file.drain(at..(at + n).min(len));
            }
            Damage::Copy(a, b, n) => {
                let (from, to) = (a.index(len), b.index(len));
                let n = (*n).min(len - from).min(len - to);
                file.copy_within(from..from + n, to);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_small_files(seed in 0..5usize, damage in prop::collection::vec(damage(), 1..6)) {
        let mut file = seeds().swap_remove(seed).1;
        let len = file.len();
        spoil(&mut file, len, &damage);
        check(&file);
    }

    #[test]
    fn noise(start in prop::sample::select(vec![&b""[..], b"GGUF", b"GGUF\x03\0\0\0"]), rest in prop::collection::vec(any::<u8>(), 0..300)) {
        check(&[start, &rest].concat());
    }
}

proptest! {
    // Each case copies megabytes.
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_real_files(which in 0..3usize, damage in prop::collection::vec(damage(), 1..4)) {
        let Some(files) = real_files() else { return Ok(()) };
        let mut file = files[which].clone();
        spoil(&mut file, 4096, &damage);
        check(&file);
    }
}

/// A model and two vocabularies of the shared material, read once.
fn real_files() -> Option<&'static [Vec<u8>]> {
    static FILES: std::sync::OnceLock<Option<Vec<Vec<u8>>>> = std::sync::OnceLock::new();
    let read = || {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
        if !shared.is_dir() {
            assert!(std::env::var_os("CI").is_none(), "../shared is not here");
            println!("skipped: ../shared is not here");
            return None;
        }
        let names =
            ["models/stories260K.gguf", "vocab/ggml-vocab-llama-spm.gguf", "vocab/ggml-vocab-gpt-2.gguf"];
        Some(names.iter().map(|n| std::fs::read(shared.join(n)).unwrap()).collect())
    };
    FILES.get_or_init(read).as_deref()
}
