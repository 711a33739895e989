//! So many files can be mapped at a time as are watched over (a file of its own: the table is the process's).

use engine::gguf::{ErrorKind, File, OpenMode};
use ref_tests::root;

#[test]
fn more_maps_than_are_watched_over_are_an_error() {
    let path = root().join("ref-tests/demo-model/demo-q8_0.gguf");
    let mut open = Vec::new();
    let error = loop {
        match File::open(&path, OpenMode::Mmap) {
            Ok(file) => open.push(file),
            Err(e) => break e,
        }
        assert!(open.len() < 2000, "no end");
    };
    assert!(matches!(error.kind(), ErrorKind::TooManyMaps { most } if *most == open.len()), "{error}");
    assert!(error.to_string().contains("--no-mmap"), "{error}");
    // Reading takes no place, and one given back is free again.
    assert!(File::open(&path, OpenMode::Read).is_ok());
    open.pop();
    assert!(File::open(&path, OpenMode::Mmap).is_ok());
}
