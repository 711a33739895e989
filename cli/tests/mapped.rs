//! Mapped files: what happens when somebody touches them while they are in use, and the options that keep them in memory.

mod common;

use common::{error, rsinfer, run};
use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// The demo model as a file.
fn model(dir: &Path) -> PathBuf {
    let path = dir.join("model.gguf");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ref-tests/demo-model/demo-q8_0.gguf");
    fs::copy(demo, &path).expect("the demo model");
    path
}

/// A run without end on the file, when its first words are out.
fn running(path: &Path) -> Child {
    let mut child = rsinfer()
        .args(["run", path.to_str().unwrap(), "--raw", "-p", "Once upon", "-s", "1", "--ignore-eos"])
        .args(["--kv", "sinks:4+window:60", "-c", "64", "-n", "100000000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut words = [0; 64];
    child.stdout.as_mut().unwrap().read_exact(&mut words).expect("it speaks");
    child
}

/// Its one line of error.
fn ending(mut child: Child) -> String {
    // Someone has to read what it still says.
    let mut out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
    let start = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    reader.join().unwrap().unwrap();
    let out = child.wait_with_output().unwrap();
    let err = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{err}");
    let errors: Vec<&str> = err.lines().filter(|l| !l.starts_with("note: ")).collect();
    assert_eq!(errors.len(), 1, "{err}");
    errors[0].to_owned()
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_cut_off_while_it_is_used_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path());
    for keep in [100_000, 0] {
        fs::remove_file(&path).unwrap();
        model(dir.path());
        let child = running(&path);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(keep).unwrap();
        let e = ending(child);
        assert!(e.contains("model.gguf: was truncated while it was in use"), "{e}");
    }
}

#[test]
#[cfg(unix)]
fn a_file_written_to_is_an_error_and_a_replaced_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path());
    let child = running(&path);
    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::End(-4)).unwrap();
    file.write_all(&[0; 4]).unwrap();
    let e = ending(child);
    assert!(e.contains("model.gguf: was written to while it was in use"), "{e}");

    fs::remove_file(&path).unwrap();
    model(dir.path());
    let mut child = running(&path);
    let other = dir.path().join("other");
    fs::write(&other, b"something else").unwrap();
    fs::rename(&other, &path).unwrap();
    let mut more = [0; 4096];
    child.stdout.as_mut().unwrap().read_exact(&mut more).expect("it goes on speaking");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn options_that_keep_weights_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path());
    let path = path.to_str().unwrap();
    let say = |more: &[&str]| {
        let fixed = ["run", path, "--raw", "-p", "Once upon", "-s", "1", "-n", "20", "--verbose"];
        let o = run(&[&fixed, more].concat());
        let err = String::from_utf8(o.stderr).unwrap();
        (o.status.success(), String::from_utf8(o.stdout).unwrap(), err)
    };
    let (ok, text, err) = say(&[]);
    assert!(ok, "{err}");
    for line in ["kv cache:", "experts:"] {
        assert!(err.contains(line), "{err}");
    }
    assert!(
        !cfg!(target_os = "linux") || (err.contains(" mapped, ") && err.contains("page faults:")),
        "{err}"
    );
    for more in [
        &["--no-mmap"][..],
        &["--pin-experts", "1MiB"],
        &["--numa", "distribute"],
        &["--numa", "isolate"],
        &["--numa", "numactl"],
    ] {
        let (ok, same, err) = say(more);
        assert!(ok && same == text, "{more:?}: {err}");
    }
    // Whether the file may be locked is the system's to say.
    let (ok, same, err) = say(&["--mlock"]);
    assert!(if ok { same == text } else { err.contains("cannot be locked in memory") }, "{err}");
    let plan = |more: &[&str]| run(&[&["plan", path, "--memory", "64MiB"], more].concat());
    let shown = |o: std::process::Output| String::from_utf8(o.stdout).unwrap();
    assert!(shown(plan(&["--mlock"])).contains("must stay"));
    assert!(shown(plan(&["--pin-experts", "64K"])).contains("must stay"));
    assert!(!shown(plan(&[])).contains("must stay"));
    let e = error(&["run", path, "-p", "x", "--mlock", "-c", "100000000"]);
    assert!(e.contains("-c"), "{e}");
}
