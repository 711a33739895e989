//! Packs the PTX texts, so that the program carries a fifth of their bytes; `cuda/modules.rs` unpacks those that are asked for.

use miniz_oxide::deflate::compress_to_vec;
use std::path::Path;
use std::{env, fs};

/// Beyond it bytes hardly shrink, and build scripts are not optimised.
const LEVEL: u8 = 6;

fn main() {
    let texts = Path::new("src/cuda/ptx");
    println!("cargo::rerun-if-changed={}", texts.display());
    let out = env::var_os("OUT_DIR").expect("cargo sets it");
    for entry in fs::read_dir(texts).expect("the folder of PTX texts") {
        let path = entry.expect("one of its files").path();
        if path.extension().is_some_and(|e| e == "ptx") {
            let name = path.with_extension("z");
            let packed = compress_to_vec(&fs::read(&path).expect("a PTX text"), LEVEL);
            fs::write(Path::new(&out).join(name.file_name().expect("a file's name")), packed)
                .expect("room for it");
        }
    }
}
