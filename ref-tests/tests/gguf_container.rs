//! The container against the `gguf` package: a file that package wrote is read as it was meant, and the writer makes the
//! same bytes of the same content. The fixture is made by gguf/container.py.

use std::path::{Path, PathBuf};

use engine::gguf::{Array, File, Metadata, NewTensor, OpenMode, Value, Writer, encode};
use quant::DType;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf/container.gguf")
}

fn metadata() -> Metadata {
    let mut m = Metadata::default();
    let mut add = |key: &str, value| assert!(m.insert(key, value));
    add("general.architecture", Value::String("llama".into()));
    add("a.u8", Value::U8(200));
    add("a.i8", Value::I8(-100));
    add("a.u16", Value::U16(60000));
    add("a.i16", Value::I16(-30000));
    add("a.u32", Value::U32(4_000_000_000));
    add("a.i32", Value::I32(-2_000_000_000));
    add("a.u64", Value::U64(u64::MAX));
    add("a.i64", Value::I64(i64::MIN));
    add("a.f32", Value::F32(0.1));
    add("a.f64", Value::F64(0.1));
    add("a.bool", Value::Bool(true));
    add("a.str", Value::String("Grüße, 世界\n".into()));
    add("b.str", Value::Array(Array::String(vec!["one".into(), "".into(), "drei".into()])));
    add("b.i32", Value::Array(Array::I32(vec![1, -2, 3])));
    add("b.f32", Value::Array(Array::F32(vec![0.5, -0.25])));
    add("b.bool", Value::Array(Array::Bool(vec![true, false])));
    add("b.nested", Value::Array(Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])])));
    add("general.alignment", Value::U32(64));
    m
}

fn tensors() -> Vec<(NewTensor, Vec<u8>)> {
    let t = |name: &str, dtype, dims: &[u64], data: Vec<u8>| {
        (NewTensor { name: name.into(), dtype, dims: dims.into() }, data)
    };
    let f32s = |n: u8, by: f32| (0..n).flat_map(|i| (f32::from(i) / by).to_le_bytes()).collect();
    let halves = (0..24).flat_map(|i| half_bits(i).to_le_bytes()).collect();
    vec![
        t("vector", DType::F32, &[5], f32s(5, 1.0)),
        t("matrix", DType::F32, &[4, 3], f32s(12, 8.0)),
        t("half", DType::F16, &[4, 3, 2], halves),
        t("quantised", DType::Q8_0, &[32, 2], (0..68u32).map(|i| (i * 7 % 64) as u8).collect()),
    ]
}

/// IEEE half of a small whole number.
fn half_bits(i: u16) -> u16 {
    if i == 0 {
        return 0;
    }
    let exponent = i.ilog2() as u16;
    (exponent + 15) << 10 | (i << (10 - exponent)) & 0x3ff
}

#[test]
fn reads_what_the_gguf_package_wrote() {
    for mode in [OpenMode::Mmap, OpenMode::Read] {
        let file = File::open(fixture(), mode).unwrap();
        assert_eq!(*file.metadata(), metadata());
        assert_eq!((file.version(), file.alignment(), file.n_parts()), (3, 64, 1));
        assert_eq!(file.tensors().len(), 4);
        for (found, (wanted, data)) in file.tensors().iter().zip(tensors()) {
            assert_eq!((&found.name, found.dtype, &found.dims), (&wanted.name, wanted.dtype, &wanted.dims));
            assert_eq!(file.bytes(found)[..], data[..], "{}", found.name);
            assert_eq!(file.tensor(&found.name), Some(found));
        }
        assert_eq!(file.tensor("none"), None);
    }
}

#[test]
fn writes_the_same_bytes() {
    let expected = std::fs::read(fixture()).unwrap();
    let tensors = tensors();
    let whole: Vec<_> = tensors.iter().map(|(t, d)| (t.clone(), d.as_slice())).collect();
    assert_eq!(encode(&metadata(), &whole).unwrap(), expected);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let infos: Vec<_> = tensors.iter().map(|(t, _)| t.clone()).collect();
    let mut w = Writer::create(&path, &metadata(), &infos).unwrap();
    for (_, data) in &tensors {
        // In pieces, as quantisation does.
        for piece in data.chunks(7) {
            w.write(piece).unwrap();
        }
    }
    assert!(!path.exists(), "the name appears with the last byte only");
    assert_eq!(w.finish().unwrap(), expected.len() as u64);
    assert_eq!(std::fs::read(&path).unwrap(), expected);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
