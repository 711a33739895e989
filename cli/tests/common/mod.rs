//! Shared by the command-line tests: running the binary, small files to run it on.
#![allow(dead_code)]

pub mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The binary, without a terminal and without history.
pub fn rsinfer() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_rsinfer"));
    c.stdin(Stdio::null()).env("HOME", "/nonexistent").env_remove("XDG_STATE_HOME");
    for name in ["RSINFER_MODELS", "OLLAMA_MODELS", "OLLAMA_HOST", "XDG_DATA_HOME"] {
        c.env_remove(name);
    }
    c
}

/// A folder whose libcuda is none: no machine that the tests run on has a usable driver then.
pub fn without_driver() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["libcuda.so.1", "nvcuda.dll"] {
        std::fs::write(folder.path().join(name), "no library").expect("a file");
    }
    folder
}

/// The program with the interpreter in the place of NVIDIA's driver; `fault` is what it is asked to do wrong. `None` where the stand-in
/// was not built (it is an example of `rsinfer-kernels`, which `cargo test --workspace` builds).
pub fn with_driver(fault: &str, args: &[&str]) -> Option<Output> {
    let folder = driver()?;
    let mut c = rsinfer();
    c.args(args).env("LD_LIBRARY_PATH", folder.path()).env("RSINFER_TEST_DRIVER", fault);
    Some(c.output().expect("the binary runs"))
}

/// The stand-in, in a folder under the name of NVIDIA's library.
pub fn driver() -> Option<tempfile::TempDir> {
    let built = Path::new(env!("CARGO_BIN_EXE_rsinfer")).with_file_name("examples");
    let library = built.join("libinterpreted_driver.so");
    if !library.exists() {
        assert!(
            std::env::var_os("CI").is_none() || !cfg!(target_os = "linux"),
            "{} is missing",
            library.display()
        );
        eprintln!(
            "skipped: cargo build -p rsinfer-kernels --example interpreted_driver makes what this needs"
        );
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::copy(library, folder.path().join("libcuda.so.1")).expect("a copy");
    Some(folder)
}

pub fn run(args: &[&str]) -> Output {
    rsinfer().args(args).output().expect("the binary runs")
}

/// stdout of a command that must succeed.
pub fn stdout(args: &[&str]) -> String {
    let o = run(args);
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).expect("UTF-8")
}

/// The one line of a command that must fail with status 1, without anything on stdout.
pub fn error(args: &[&str]) -> String {
    let o = run(args);
    let err = String::from_utf8(o.stderr).expect("UTF-8");
    assert_eq!(o.status.code(), Some(1), "{args:?}: {err}");
    assert!(o.stdout.is_empty(), "{args:?} printed {:?}", String::from_utf8_lossy(&o.stdout));
    let lines: Vec<&str> = err.lines().filter(|l| !l.starts_with("note: ")).collect();
    assert!(lines.len() == 1 && lines[0].starts_with("error: "), "{args:?}: not one clear line: {err}");
    lines[0].to_owned()
}

/// A file of the shared material, or `None` (said, and a failure in CI) where it is absent.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "../shared is not here");
    println!("skipped: ../shared is not here");
    None
}

/// Writes a file and gives its name.
pub fn write(dir: &Path, name: &str, text: impl AsRef<[u8]>) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("a temporary file");
    path.to_str().expect("UTF-8").to_owned()
}
