//! The house rules that a machine can check (docs/architecture.md).

use ref_tests::root;
use std::path::{Path, PathBuf};

/// Lines a file may have, tests not counted.
const MOST_LINES: usize = 800;

fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') && name != "corpus" {
                walk(&path, out);
            }
        } else {
            out.push(path);
        }
    }
}

/// Path from the root and text of every file with this ending.
fn files(ending: &str) -> Vec<(String, String)> {
    let mut paths = Vec::new();
    walk(&root(), &mut paths);
    paths.retain(|p| p.extension().is_some_and(|e| e == ending));
    let text = |p: &PathBuf| std::fs::read_to_string(p).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
    let name = |p: &PathBuf| p.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
    paths.iter().map(|p| (name(p), text(p))).collect()
}

/// A source without its comments, and without the unit tests at its end.
fn code(text: &str) -> String {
    let body = text.split("#[cfg(test)]\nmod ").next().unwrap_or(text);
    body.lines().map(|l| l.split("//").next().unwrap_or(l)).collect::<Vec<_>>().join("\n")
}

fn fail_on(rule: &str, offenders: Vec<String>) {
    assert!(offenders.is_empty(), "{rule}:\n  {}", offenders.join("\n  "));
}

#[test]
fn every_source_file_says_what_it_is() {
    let rust =
        files("rs").into_iter().filter(|(_, t)| !t.starts_with("//!") && !t.starts_with("#![no_main]"));
    fail_on("a file must open with //!", rust.map(|f| f.0).collect());
    let python = files("py").into_iter().filter(|(_, t)| {
        let first = t.lines().find(|l| !l.starts_with('#') && !l.is_empty()).unwrap_or("");
        !first.starts_with("\"\"\"")
    });
    fail_on("a Python file must open with a docstring", python.map(|f| f.0).collect());
}

#[test]
fn files_stay_readable() {
    let long =
        files("rs").into_iter().filter(|(name, _)| !name.contains("/tests/")).filter_map(|(name, text)| {
            let lines = text.split("#[cfg(test)]\nmod ").next().unwrap_or("").lines().count();
            (lines > MOST_LINES).then(|| format!("{name}: {lines} lines"))
        });
    fail_on("at most 800 lines without tests", long.collect());
}

#[test]
fn unsafe_stays_where_it_is_explained() {
    let offenders = files("rs").into_iter().filter(|(name, text)| {
        let allowed = name.starts_with("kernels/")
            || name == "engine/src/gguf/mmap.rs"
            || name.starts_with("ref-tests/");
        !allowed && code(text).split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe")
    });
    fail_on("unsafe belongs into kernels/ and engine/src/gguf/mmap.rs", offenders.map(|f| f.0).collect());
}

#[test]
fn layers_point_one_way() {
    let mut offenders = Vec::new();
    for (name, text) in files("rs") {
        let code = code(&text);
        let uses = |what: &str| code.contains(what);
        let krate = name.split('/').next().unwrap_or("");
        let bad: &[&str] = match krate {
            "quant" => &["kernels::", "engine::", "std::arch", "std::thread", "std::fs"],
            "kernels" => &["engine::"],
            "engine" => &["cudarc", "std::arch", "core::arch", "clap::"],
            "cli" => &["kernels::", "quant::", "std::arch"],
            _ => &[],
        };
        offenders.extend(bad.iter().filter(|b| uses(b)).map(|b| format!("{name} uses {b}")));
    }
    fail_on("quant <- kernels <- engine <- cli", offenders);
}

#[test]
fn builds_run_on_any_machine_of_the_target() {
    let mut offenders = Vec::new();
    let flag = concat!("target-cpu", "=native");
    for ending in ["toml", "rs", "sh", "md", "py"] {
        offenders.extend(files(ending).into_iter().filter(|(_, t)| t.contains(flag)).map(|f| f.0));
    }
    offenders.retain(|n| !n.starts_with("docs/") && n != "CHANGELOG.md");
    fail_on("instruction sets are chosen at run time", offenders);
}

#[test]
fn the_top_level_is_the_agreed_one() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "engine",
        "kernels",
        "quant",
        "cli",
        "ref-tests",
        "benches",
        "docs",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "rustfmt.toml",
        "clippy.toml",
        "deny.toml",
        "target",
    ];
    let entries = std::fs::read_dir(root())
        .expect("the root")
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    let other = entries.filter(|n| !n.starts_with('.') && !allowed.contains(&n.as_str()));
    fail_on("the top level is fixed (docs/architecture.md)", other.collect());
}
