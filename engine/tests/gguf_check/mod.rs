//! What must hold for any bytes at all, shared by the tests and by the fuzz target (ref-tests/fuzz): opening them ends in
//! a file all of whose promises hold, or in an error of one line.

use engine::gguf::{File, Metadata, OpenMode, Summary};
use engine::quantize::{Options, Target, choose};

/// Opens `bytes` as a file; panics if a promise is broken. Says whether they are a file.
pub fn check(bytes: &[u8]) -> bool {
    let file = match File::from_bytes("x", bytes) {
        Ok(file) => file,
        Err(e) => {
            let text = e.to_string();
            assert!(!text.contains(['\n', '\r', '\u{1b}']), "{text:?}");
            assert!(text.starts_with("x: ") && text.len() < 1000, "{text:?}");
            return false;
        }
    };
    let mut ranges = Vec::new();
    for t in file.tensors() {
        let data = file.bytes(t);
        assert_eq!(data.len() as u64, t.n_bytes);
        assert_eq!(data.len(), t.dtype.row_bytes(t.row_len() as usize).unwrap() * t.n_rows() as usize);
        assert_eq!(t.n_elements(), t.row_len() * t.n_rows());
        assert!(data.as_ptr().addr().is_multiple_of(8));
        assert_eq!(file.tensor(&t.name), Some(t));
        // Every byte can be read.
        std::hint::black_box(data.iter().fold(0u8, |a, b| a ^ b));
        ranges.push((t.offset, t.offset + t.n_bytes));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0), "overlap");
    assert!(ranges.iter().all(|r| r.1 <= bytes.len() as u64), "outside");
    typed(file.metadata());
    let _ = Summary::of(&file).map(|s| s.bits_per_weight());
    let mut options = Options::new(Target::Q4_K_M);
    let _ = choose(file.metadata(), file.tensors(), &options);
    options.pure = true;
    let _ = choose(file.metadata(), file.tensors(), &options);
    true
}

/// Every getter on every key, and every way to print a value.
fn typed(m: &Metadata) {
    for (key, value) in m.iter() {
        let errors = [
            m.u32(key).err(),
            m.u64(key).err(),
            m.f32(key).err(),
            m.bool(key).err(),
            m.str(key).err(),
            m.array(key).err(),
            m.strings(key).err(),
        ];
        assert!(errors.iter().any(Option::is_none) || value.as_int().is_some(), "no getter fits {key}");
        assert!(!value.brief(4, 40).contains('\n'));
        std::hint::black_box(value.to_json());
    }
}

/// Mapping a file and reading it must tell the same of it. Says whether it is a file.
#[allow(dead_code)]
pub fn check_path(path: &std::path::Path) -> bool {
    let mapped = File::open(path, OpenMode::Mmap);
    let read = File::open(path, OpenMode::Read);
    match (mapped, read) {
        (Ok(a), Ok(b)) => {
            assert_eq!(a.tensors(), b.tensors());
            assert!(a.tensors().iter().all(|t| a.bytes(t)[..] == b.bytes(t)[..]));
            true
        }
        (Err(a), Err(b)) => {
            assert_eq!(a.to_string(), b.to_string());
            false
        }
        (a, b) => panic!("mapped and read differ: {:?} {:?}", a.err(), b.err()),
    }
}
