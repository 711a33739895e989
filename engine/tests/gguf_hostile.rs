//! Files that are broken or malicious: each kind of damage is its own typed error, in one line, naming what is wrong.

use std::path::Path;

use engine::gguf::{
    Array, ErrorKind, File, GgufError, Metadata, NewTensor, OpenMode, Value, Writer, encode, type_id_name,
};
use quant::DType;

/// A file put together byte by byte, so that any field can be wrong.
#[derive(Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn header(version: u32, tensors: u64, keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(keys)
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn bytes(mut self, v: &[u8]) -> Self {
        self.0.extend(v);
        self
    }
    fn string(self, s: &str) -> Self {
        self.u64(s.len() as u64).bytes(s.as_bytes())
    }
    fn tensor(mut self, name: &str, dims: &[u64], id: u32, offset: u64) -> Self {
        self = self.string(name).u32(dims.len() as u32);
        self.0.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        self.u32(id).u64(offset)
    }
    /// Pads to the default alignment and adds `n` bytes of data.
    fn data(mut self, n: usize) -> Self {
        let end = self.0.len().next_multiple_of(32) + n;
        self.0.resize(end, 0);
        self
    }
    fn open(&self) -> Result<File, GgufError> {
        File::from_bytes("x.gguf", &self.0)
    }
    /// The error, after a look at its message: one line, and the path once.
    fn error(&self) -> GgufError {
        let e = self.open().unwrap_err();
        let text = e.to_string();
        assert!(text.starts_with("x.gguf: ") && text.matches("x.gguf").count() == 1, "{text}");
        assert!(!text.contains('\n') && !text.contains('\u{1b}') && text.len() < 400, "{text}");
        e
    }
}

macro_rules! assert_kind {
    ($raw:expr, $pattern:pat $(if $guard:expr)?) => {{
        let e = $raw.error();
        assert!(matches!(e.kind(), $pattern $(if $guard)?), "{e}\n{:?}", e.kind());
    }};
}

fn one(dims: &[u64], id: u32, offset: u64) -> Raw {
    Raw::header(3, 1, 0).tensor("t", dims, id, offset)
}

#[test]
fn not_a_gguf() {
    use ErrorKind::*;
    assert_kind!(Raw::default(), Empty);
    assert_kind!(Raw::default().bytes(b"G"), NotGguf { .. });
    assert_kind!(Raw::default().bytes(b"Once upon a time\n"), NotGguf { found } if found.contains("Once upon"));
    assert_kind!(Raw::default().bytes(b"\x1b[2J\nboo"), NotGguf { .. });
    assert_kind!(Raw::default().u64(100).bytes(b"{\"a\":{}}"), NotGguf { found } if found.contains("safetensors"));
    assert_kind!(Raw::default().bytes(b"PK\x03\x04...."), NotGguf { found } if found.contains("zip"));
    assert_kind!(Raw::default().bytes(b"tjgg...."), NotGguf { found } if found.contains("before GGUF"));
    assert_kind!(Raw::default().bytes(b"GGUF"), Truncated { .. });
    assert_kind!(Raw::header(1, 0, 0), Version { version: 1 });
    assert_kind!(Raw::header(4, 0, 0), Version { version: 4 });
    assert_kind!(Raw::header(3u32.swap_bytes(), 0, 0), BigEndian);
    assert!(Raw::header(2, 0, 0).open().is_ok());
    assert!(Raw::header(3, 0, 0).open().is_ok());
}

#[test]
fn counts_and_lengths() {
    use ErrorKind::*;
    let keyed = |n| Raw::header(3, 0, n);
    for count in [1, 1 << 32, u64::MAX] {
        assert_kind!(Raw::header(3, count, 0), Count { what, .. } if what.contains("tensors"));
        assert_kind!(keyed(count), Count { what, .. } if what.contains("keys"));
        // A giant name, a giant string, giant arrays.
        assert_kind!(keyed(1).u64(count.max(1000)).data(64), Count { .. } | Truncated { .. });
        let key = || keyed(1).string("k");
        assert_kind!(key().u32(8).u64(count.max(1000)).data(64), Count { what, .. } if what.contains('k'));
        for element in [0, 7, 8, 9, 12] {
            assert_kind!(key().u32(9).u32(element).u64(count.max(1000)).data(64), Count { what, .. } if what.contains('k'));
        }
    }
    assert_kind!(keyed(1).string("k").u32(4).bytes(&[1, 2]), Truncated { what } if what.contains('k'));
    let long = "k".repeat(65536);
    assert_kind!(keyed(1).string(&long).u32(0).bytes(&[1]), NameLength { len: 65536, .. });
    assert!(keyed(1).string(&long[1..]).u32(0).bytes(&[1]).open().is_ok());
    assert_kind!(Raw::header(3, 1, 0).tensor(&long, &[1], 0, 0).data(4), NameLength { what, .. } if what.contains("tensor"));
}

#[test]
fn values() {
    use ErrorKind::*;
    let key = |k: &str| Raw::header(3, 0, 1).string(k);
    assert_kind!(key("k").u32(13).u64(0), ValueType { id: 13, .. });
    assert_kind!(key("k").u32(9).u32(99).u64(0), ValueType { id: 99, .. });
    assert_kind!(key("k").u32(7).bytes(&[2]), Bool { found: 2, .. });
    assert_kind!(key("k").u32(9).u32(7).u64(3).bytes(&[0, 1, 255]), Bool { found: 255, .. });
    assert_kind!(key("k").u32(8).u64(2).bytes(&[0xff, 0xfe]), Utf8 { .. });
    assert_kind!(Raw::header(3, 0, 1).u64(1).bytes(&[0xff]).u32(0).bytes(&[0]).data(9), Utf8 { .. });
    // A key that would forge a second line or drive the terminal.
    let forged = "a\n\u{1b}[31m".repeat(99);
    assert_kind!(key(&forged).u32(13).u64(0), ValueType { key, .. } if key.chars().count() < 400);
    let twice = Raw::header(3, 0, 2).string("k").u32(0).bytes(&[1]).string("k").u32(0).bytes(&[2]);
    assert_kind!(twice, DuplicateKey { key } if key == "k");
}

#[test]
fn nesting() {
    let nested = |depth: usize| {
        let mut raw = Raw::header(3, 0, 1).string("k").u32(9);
        for _ in 0..depth {
            raw = raw.u32(9).u64(1);
        }
        raw.u32(4).u64(1).u32(7)
    };
    assert!(nested(1).open().is_ok());
    assert!(nested(7).open().is_ok());
    for depth in [8, 100, 100_000] {
        assert_kind!(nested(depth), ErrorKind::Nesting { limit: 8, .. });
    }
}

#[test]
fn alignment() {
    let with = |v: u32| Raw::header(3, 0, 1).string("general.alignment").u32(4).u32(v).data(0);
    for bad in [0, 1, 4, 24, 33, u32::MAX] {
        assert_kind!(with(bad), ErrorKind::Alignment { .. });
    }
    for good in [8, 32, 64, 4096, 1 << 31] {
        assert_eq!(with(good).open().unwrap().alignment(), u64::from(good));
    }
    let text = Raw::header(3, 0, 1).string("general.alignment").u32(8).string("32");
    assert_kind!(text, ErrorKind::Metadata(_));
    let negative = Raw::header(3, 0, 1).string("general.alignment").u32(5).u32(-32i32 as u32);
    assert_kind!(negative, ErrorKind::Metadata(_));
}

#[test]
fn tensor_shapes_and_types() {
    use ErrorKind::*;
    assert_kind!(one(&[], 0, 0).data(64), Dimensions { count: 0, .. });
    assert_kind!(one(&[1; 5], 0, 0).data(64), Dimensions { count: 5, .. });
    assert_kind!(Raw::header(3, 1, 0).string("t").u32(u32::MAX).data(64), Dimensions { .. });
    assert_kind!(one(&[0], 0, 0).data(64), ZeroDimension { .. });
    assert_kind!(one(&[4, 0, 4], 0, 0).data(64), ZeroDimension { .. });
    for huge in [&[u64::MAX][..], &[1 << 32, 1 << 32], &[1 << 20; 4], &[1 << 60], &[u64::MAX; 4]] {
        assert_kind!(one(huge, 0, 0).data(64), TensorSize { .. });
    }
    assert_kind!(one(&[33], 8, 0).data(64), Row { .. });
    assert_kind!(one(&[32, 8], 12, 0).data(640), Row { .. });
    assert!(one(&[256, 1], 12, 0).data(144).open().is_ok());
    for id in (0..50).chain([100, u32::MAX]) {
        if DType::from_id(id).is_none() {
            assert_kind!(one(&[256], id, 0).data(4096), TensorType { tensor, id: found } if tensor == "t" && *found == id);
        }
    }
    let text = |id| one(&[256], id, 0).error().to_string();
    assert_eq!(text(16), "x.gguf: tensor t has type IQ2_XXS (id 16), which is not supported");
    assert!(text(4).contains("Q4_2, which ggml has removed"));
    assert!(text(77).contains("id 77 (unknown)"));
    assert_eq!(type_id_name(0), Some("f32"));
}

#[test]
fn tensor_places() {
    use ErrorKind::*;
    assert_kind!(one(&[8], 0, 8).data(64), Misaligned { offset: 8, alignment: 32, .. });
    assert!(one(&[8], 0, 0).data(32).open().is_ok());
    assert_kind!(one(&[8], 0, 0).data(31), OutOfFile { .. });
    assert_kind!(one(&[8], 0, 0), OutOfFile { .. });
    assert_kind!(one(&[8], 0, 32).data(63), OutOfFile { .. });
    for offset in [1 << 40, u64::MAX - 31, 1 << 63] {
        assert_kind!(one(&[8], 0, offset).data(64), OutOfFile { .. });
    }
    let two = |a: u64, b: u64| {
        Raw::header(3, 2, 0).tensor("a", &[16], 0, a).tensor("b", &[8], 0, b).data(128).error()
    };
    for (a, b) in [(0, 0), (0, 32), (32, 32), (32, 64)] {
        let e = two(a, b);
        assert!(matches!(e.kind(), Overlap { .. }), "{e}");
    }
    let apart = Raw::header(3, 2, 0).tensor("a", &[16], 0, 64).tensor("b", &[8], 0, 32).data(128);
    assert_eq!(apart.open().unwrap().bytes(&apart.open().unwrap().tensors()[1]).len(), 32);
    let same = Raw::header(3, 2, 0).tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64);
    assert_kind!(same, DuplicateTensor { tensor } if tensor == "a");
}

#[test]
fn every_truncation_is_an_error() {
    let whole = small();
    assert!(File::from_bytes("x", &whole).is_ok());
    // The last bytes are padding, which may be missing.
    let end = whole.len() - 8;
    for n in 0..end {
        assert!(File::from_bytes("x", &whole[..n]).is_err(), "{n} of {end}");
    }
    for n in end..whole.len() {
        assert!(File::from_bytes("x", &whole[..n]).is_ok(), "{n} of {end}");
    }
}

/// A small whole file.
fn small() -> Vec<u8> {
    let mut m = Metadata::default();
    m.set("general.architecture", Value::String("llama".into()));
    m.set("list", Value::Array(Array::String(vec!["a".into(), "b".into()])));
    m.set("nested", Value::Array(Array::Array(vec![Array::F64(vec![1.0]), Array::U8(vec![])])));
    let t = |name: &str, dims: &[u64]| NewTensor { name: name.into(), dtype: DType::F32, dims: dims.into() };
    encode(&m, &[(t("a", &[3, 2]), &[1; 24]), (t("b", &[2]), &[2; 8]), (t("c", &[2, 3]), &[3; 24])]).unwrap()
}

#[test]
fn paths() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for mode in [OpenMode::Mmap, OpenMode::Read] {
        let kind = |path: &Path| {
            let e = File::open(path, mode).unwrap_err();
            let text = e.to_string();
            assert_eq!(text.matches(&*path.to_string_lossy()).count(), 1, "{text}");
            assert!(!text.contains('\n'));
            text
        };
        assert!(kind(&at("none.gguf")).contains("No such file"));
        assert!(kind(folder.path()).contains("directory"));
        std::fs::write(at("empty.gguf"), b"").unwrap();
        assert!(kind(&at("empty.gguf")).contains("empty"));
        std::fs::write(at("text.gguf"), b"hello").unwrap();
        assert!(kind(&at("text.gguf")).contains("hello"));
        #[cfg(unix)]
        assert!(kind(Path::new("/dev/null")).contains("not a regular file"));
    }
}

/// Writes `small()` as parts; `keys` may spoil the split keys of a part.
fn write_parts(folder: &Path, keys: impl Fn(u64, &mut Metadata)) {
    for i in 0..3u64 {
        let mut m = Metadata::default();
        if i == 0 {
            m.set("general.architecture", Value::String("llama".into()));
        }
        m.set("split.no", Value::U16(i as u16));
        m.set("split.count", Value::U16(3));
        m.set("split.tensors.count", Value::I32(3));
        keys(i, &mut m);
        let t = NewTensor { name: format!("t{i}"), dtype: DType::F32, dims: vec![2, 2] };
        let name = format!("m-{:05}-of-00003.gguf", i + 1);
        std::fs::write(folder.join(name), encode(&m, &[(t, &[i as u8; 16])]).unwrap()).unwrap();
    }
}

#[test]
fn split_files() {
    let folder = tempfile::tempdir().unwrap();
    let part = |i: u64| folder.path().join(format!("m-{i:05}-of-00003.gguf"));
    write_parts(folder.path(), |_, _| {});
    for i in 1..=3 {
        for mode in [OpenMode::Mmap, OpenMode::Read] {
            let file = File::open(part(i), mode).unwrap();
            assert_eq!(file.n_parts(), 3);
            assert_eq!(file.path(), part(i));
            assert_eq!(file.metadata().str("general.architecture"), Ok(Some("llama")));
            for (n, t) in file.tensors().iter().enumerate() {
                assert_eq!((t.name.as_str(), t.part), (format!("t{n}").as_str(), n));
                assert_eq!(file.bytes(t)[..], [n as u8; 16]);
            }
        }
    }
    let error = |i: u64| File::open(part(i), OpenMode::Mmap).unwrap_err();

    // A renamed part cannot lead to the others; one taken for another is found out.
    let odd = folder.path().join("odd.gguf");
    std::fs::copy(part(1), &odd).unwrap();
    let e = File::open(&odd, OpenMode::Mmap).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::SplitName { count: 3 }), "{e}");
    std::fs::copy(part(1), part(2)).unwrap();
    assert!(matches!(error(1).kind(), ErrorKind::Split { key: "split.no", expected: 1, .. }), "{}", error(1));
    assert_eq!(error(1).path(), part(2));

    std::fs::remove_file(part(2)).unwrap();
    for i in [1, 3] {
        let e = error(i);
        assert!(matches!(e.kind(), ErrorKind::SplitMissing { number: 2, count: 3 }), "{e}");
        assert_eq!(e.path(), part(2));
    }

    write_parts(folder.path(), |i, m| {
        if i == 2 {
            m.set("split.count", Value::U16(4));
        }
    });
    assert!(matches!(error(1).kind(), ErrorKind::Split { key: "split.count", .. }), "{}", error(1));
    write_parts(folder.path(), |_, m| m.set("split.tensors.count", Value::I32(4)));
    assert!(matches!(error(1).kind(), ErrorKind::Split { key: "split.tensors.count", .. }), "{}", error(1));
    write_parts(folder.path(), |_, m| drop(m.remove("split.no")));
    assert!(error(1).to_string().contains("split.no is absent"), "{}", error(1));
    write_parts(folder.path(), |_, m| m.set("split.count", Value::String("3".into())));
    assert!(matches!(error(1).kind(), ErrorKind::Metadata(_)), "{}", error(1));
    // The same tensor in two parts.
    write_parts(folder.path(), |_, _| {});
    let t = NewTensor { name: "t0".into(), dtype: DType::F32, dims: vec![1] };
    let mut m = Metadata::default();
    m.set("split.no", Value::U16(2));
    m.set("split.count", Value::U16(3));
    std::fs::write(part(3), encode(&m, &[(t, &[0; 4])]).unwrap()).unwrap();
    assert!(matches!(error(1).kind(), ErrorKind::DuplicateTensor { .. }), "{}", error(1));
    assert_eq!(error(1).path(), part(3));
}

#[test]
fn static_files_are_aligned() {
    let whole: &'static [u8] = small().leak();
    let shifted: &'static [u8] = [&[0], whole].concat().leak();
    for bytes in [whole, &shifted[1..]] {
        let file = File::from_static("demo", bytes).unwrap();
        assert_eq!(file.path(), Path::new("demo"));
        for t in file.tensors() {
            assert!(file.bytes(t).as_ptr().addr().is_multiple_of(32));
        }
        let kept = file.bytes(&file.tensors()[2]);
        drop(file);
        assert_eq!(kept[..], [3; 24]);
    }
}

#[test]
fn writer_refuses_and_cleans_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let m = Metadata::default();
    let t = |name: &str, dims: &[u64]| NewTensor { name: name.into(), dtype: DType::F32, dims: dims.into() };
    let left = || std::fs::read_dir(folder.path()).unwrap().count();
    let bad = |tensors: &[NewTensor]| Writer::create(&path, &m, tensors).map(drop).unwrap_err().to_string();
    assert!(bad(&[t("a", &[0])]).contains("dimension of zero"));
    assert!(bad(&[t("a", &[1]), t("a", &[1])]).contains("occurs twice"));
    assert!(Writer::create(folder.path(), &m, &[]).is_err());
    assert!(Writer::create(folder.path().join("no/such/folder.gguf"), &m, &[]).is_err());
    #[cfg(unix)]
    assert!(matches!(Writer::create("/dev/null", &m, &[]).err().unwrap().kind(), ErrorKind::NotRegular));
    assert_eq!(left(), 0);

    std::fs::write(&path, b"before").unwrap();
    let mut w = Writer::create(&path, &m, &[t("a", &[2])]).unwrap();
    w.write(&[0; 4]).unwrap();
    assert_eq!(left(), 2);
    assert!(matches!(
        w.write(&[0; 5]).unwrap_err().kind(),
        ErrorKind::WriteSize { found: 9, expected: 8, .. }
    ));
    assert!(matches!(w.finish().unwrap_err().kind(), ErrorKind::WriteSize { found: 4, expected: 8, .. }));
    assert_eq!((left(), std::fs::read(&path).unwrap().as_slice()), (1, &b"before"[..]));

    let mut w = Writer::create(&path, &m, &[]).unwrap();
    assert!(w.write(&[0]).is_err());
    w.finish().unwrap();
    assert!(File::open(&path, OpenMode::Mmap).unwrap().tensors().is_empty());
    assert_eq!(left(), 1);
}
