//! `gpu` with the PTX interpreter in the place of NVIDIA's driver (`kernels/examples/interpreted_driver.rs`): what is right passes, and whatever a
//! kernel does wrong ends in an exit status and a line that names it, while the others go on.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What cargo built beside the program; `None`, said on stderr, where only this test was asked for.
fn built(name: &str) -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_BIN_EXE_gpu"));
    let found = match name {
        "driver" => {
            Some(here.with_file_name("examples").join("libinterpreted_driver.so")).filter(|p| p.exists())
        }
        _ => {
            let entries = std::fs::read_dir(here.with_file_name("deps")).expect("cargo's folder");
            let mut names = entries.filter_map(|e| Some(e.ok()?.path()));
            names.find(|p| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with(name)))
        }
    };
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none() || !cfg!(target_os = "linux"), "{name} is missing");
        eprintln!("skipped: {name} is missing; cargo test --workspace makes it");
    }
    found
}

/// The program; `fault` is what the driver is asked to do wrong. Returns what was printed besides.
fn gpu(fault: &str, args: &[&str]) -> Option<(Output, String)> {
    built("cuda_kernels-")?;
    built("cuda_backend-")?;
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::copy(built("driver")?, folder.path().join("libcuda.so.1")).expect("a copy");
    let mut c = Command::new(env!("CARGO_BIN_EXE_gpu"));
    c.args(args)
        .args(["--threads", "2"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("RSINFER_TEST_DRIVER", fault);
    let o = c.output().expect("it runs");
    let text = format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
    Some((o, text))
}

#[test]
fn what_is_right_passes() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("all.json");
    let args = ["check", "--only", "rows_are_gathered", "--json", json.to_str().expect("UTF-8")];
    let Some((o, text)) = gpu("", &args) else { return };
    assert_eq!(o.status.code(), Some(0), "{text}");
    assert!(
        text.contains("0 failed") && text.contains("0 of them wrong") && text.contains("nothing was wrong"),
        "{text}"
    );
    let all: serde_json::Value = serde_json::from_slice(&std::fs::read(json).expect("a file")).expect("JSON");
    assert_eq!(all["wrong"], false);
    assert!(all["checked"]["kernels"]["rows.gather"]["launches"].as_u64().is_some_and(|n| n > 0), "{text}");
}

/// A wrong sum, a lost GPU, a launch without end: each is told with its shape, and the same test's other kernels still run.
#[test]
fn a_kernel_that_is_wrong_is_named() {
    for (fault, part) in [
        ("wrong:gather", "words of allocation #"),
        ("faults:gather", "the GPU was lost"),
        ("hangs:gather", "did not end, and was stopped"),
    ] {
        let args = ["check", "--only", "rows_are_gathered", "--patience", "0.5"];
        let Some((o, text)) = gpu(fault, &args) else { return };
        assert_eq!(o.status.code(), Some(1), "{fault}: {text}");
        assert!(text.contains("WRONG rows.gather: ") && text.contains(part), "{fault}: {text}");
        assert!(
            text.contains(" x 256 threads, shared 0, (#1+0") && text.contains("; WRONG"),
            "{fault}: {text}"
        );
        assert!(text.contains("1 tests passed, 0 failed; 2 kernels in"), "{fault}: {text}");
    }
}

/// A model's wrong answer is traced to the kernel that made it.
#[test]
fn a_wrong_answer_is_traced() {
    let Some((o, text)) = gpu("wrong:rms_norm", &["check", "--only", "saved_sequences_go_on"]) else {
        return;
    };
    assert_eq!(o.status.code(), Some(1), "{text}");
    assert!(text.contains("FAILED cuda_backend models::saved_sequences_go_on\n"), "{text}");
    assert!(text.contains("WRONG rows.rms_norm: ") && text.contains("go_on, launch by launch]"), "{text}");
}

#[test]
fn timings_end_in_a_table() {
    let parts = ["time", "--toy", "--parts", "mla,attention,llama-3.1-8b q4"];
    let Some((o, text)) = gpu("", &parts) else { return };
    assert_eq!(o.status.code(), Some(0), "{text}");
    for part in [
        "| bytes copied",
        "| mma.sync on int8",
        "| **MLA decoding, 128 heads, f16** |",
        "| **Llama-3.1-8B Q4_K** |",
        "| decoding at 70 |",
        ">= 75% of the bandwidth: ",
        ">= 250 TFLOP/s: ",
        ">= 6 times one: ",
        ", each launch waited for** |",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // One part that fails is a row, and the others are measured even so.
    let Some((o, text)) = gpu("faults:round_rows", &parts[..4]) else { return };
    assert_eq!(o.status.code(), Some(1), "{text}");
    assert!(
        text.contains("| FAILED |") && text.contains("ILLEGAL_ADDRESS") && text.contains("| prompt, f16"),
        "{text}"
    );
}

#[test]
fn without_a_gpu_it_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("libcuda.so.1"), "no library").expect("a file");
    let o = Command::new(env!("CARGO_BIN_EXE_gpu"))
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(2), "{text}");
    assert!(text.starts_with("error: no NVIDIA driver") && text.lines().count() == 1, "{text}");
}
