//! `--device` where there is no GPU: one clear line, or the CPU.

mod common;
use common::{error, rsinfer, run};
use std::path::Path;
use std::process::Output;

/// A folder whose libcuda is none: no machine that the tests run on has a usable driver then.
fn without_driver() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["libcuda.so.1", "nvcuda.dll"] {
        std::fs::write(folder.path().join(name), "no library").expect("a file");
    }
    folder
}

/// The program with the interpreter in the place of NVIDIA's driver; `fault` is what it is asked to do wrong. `None` where the stand-in
/// was not built (it is an example of `rsinfer-kernels`, which `cargo test --workspace` builds).
fn with_driver(fault: &str, args: &[&str]) -> Option<Output> {
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
    let mut c = rsinfer();
    c.args(args).env("LD_LIBRARY_PATH", folder.path()).env("RSINFER_TEST_DRIVER", fault);
    Some(c.output().expect("the binary runs"))
}

const RUN: [&str; 11] =
    ["run", "demo", "--raw", "-p", "Once upon", "-n", "3", "--temp", "0", "--device", "cuda:0"];

#[test]
fn a_gpu_answers_as_the_cpu_does() {
    let Some(o) = with_driver("", &RUN) else { return };
    let text = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.success(), "{text}");
    assert_eq!(o.stdout, run(&RUN[..9]).stdout, "{text}");
    let Some(o) = with_driver("", &["run", "demo", "--raw", "-p", "Once", "-n", "1", "--device", "auto"])
    else {
        return;
    };
    let text = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.success() && text.contains("cuda:0 (interpreted GPU"), "{text}");
}

#[test]
fn what_a_driver_refuses_is_one_line() {
    for (fault, parts) in [
        ("old", ["CUDA 11.8, 12.1 is needed", "update it"]),
        ("none", ["0 here", "--device cpu"]),
        ("pre-turing", ["capability 7.0", "--device cpu"]),
        ("small", ["out of GPU memory", "smaller context"]),
        ("refuses", ["refuses the kernels", "update it"]),
        ("lost", ["the GPU was lost (cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS", "restart"]),
    ] {
        let Some(o) = with_driver(fault, &RUN) else { return };
        let text = String::from_utf8_lossy(&o.stderr);
        assert_eq!(o.status.code(), Some(1), "{fault}: {text}");
        let last: Vec<&str> = text.lines().filter(|l| !l.starts_with("note: ")).collect();
        assert!(last.len() == 1 && last[0].starts_with("error: "), "{fault}: {text}");
        assert!(parts.iter().all(|p| last[0].contains(p)), "{fault}: {text}");
        let mut auto = RUN;
        auto[10] = "auto";
        // What shows only later cannot be foreseen.
        if fault != "lost" {
            let Some(o) = with_driver(fault, &auto) else { return };
            let text = String::from_utf8_lossy(&o.stderr);
            assert!(o.status.success() && text.contains("--device auto: the CPU; "), "{fault}: {text}");
        }
    }
}

fn stderr(args: &[&str]) -> (Option<i32>, String) {
    let folder = without_driver();
    let o = rsinfer().args(args).env("LD_LIBRARY_PATH", folder.path()).output().expect("the binary runs");
    (o.status.code(), String::from_utf8(o.stderr).expect("UTF-8"))
}

#[test]
fn a_gpu_that_is_not_there_is_one_line_that_says_what_to_do() {
    for command in [
        &["run", "demo", "--device", "cuda:0", "-p", "Hello", "-n", "4"][..],
        &["bench", "demo", "--device", "cuda:3", "-p", "4", "-n", "0"],
    ] {
        let (code, text) = stderr(command);
        assert_eq!(code, Some(1), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 1 && lines[0].starts_with("error: "), "{text}");
        assert!(lines[0].contains("no NVIDIA driver") && lines[0].contains("--device cpu"), "{text}");
    }
}

#[test]
fn auto_takes_the_cpu_and_says_so() {
    let (code, text) = stderr(&["run", "demo", "--device", "auto", "-p", "Hello", "-n", "4", "--temp", "0"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("note: --device auto: the CPU; no NVIDIA driver"), "{text}");
    let (code, text) = stderr(&["run", "demo", "-p", "Hello", "-n", "4"]);
    assert!(code == Some(0) && !text.contains("--device"), "{text}");
}

#[test]
fn unknown_devices_and_splits_are_refused() {
    let o = run(&["run", "demo", "--device", "gpu9", "-p", "x"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&o.stderr).contains("cuda:0"));
    assert!(error(&["run", "demo", "-ngl", "1", "-p", "x"]).contains("--device cuda:0"));
}
