//! The committed PTX is what its MANIFEST says, and so are the sources it was compiled from. Compiling them again needs Python and
//! the pinned compiler (`kernels/src/cuda/build.py --check`); this does not.

use kernels::cuda::modules::{MANIFEST, all, text_for};
use ref_tests::root;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn names(folder: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(root().join("kernels/src/cuda").join(folder)).unwrap();
    entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn sources_and_ptx_have_the_hashes_of_the_manifest() {
    let (mut sources, mut texts) = (BTreeSet::new(), BTreeSet::new());
    for line in MANIFEST.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["source", hash, name] => {
                let bytes = std::fs::read(root().join("kernels/src/cuda/src").join(name)).unwrap();
                assert_eq!(sha(&bytes), hash, "{name} changed: run kernels/src/cuda/build.py");
                sources.insert(name.to_owned());
            }
            ["ptx", hash, name, source, _, _] => {
                let module = all().find(|m| format!("{}.ptx", m.name) == name);
                let module = module.unwrap_or_else(|| panic!("{name} is missing in modules.rs"));
                assert_eq!(sha(module.text.as_bytes()), hash, "{name} was changed by hand");
                assert!(sources.contains(source), "{name} is made of {source}");
                texts.insert(name.to_owned());
            }
            _ => assert!(["#", "compiler", "assembler", "options"].contains(&words[0]), "{line}"),
        }
    }
    assert_eq!(sources, names("src"));
    assert_eq!(texts, names("ptx"));
    assert_eq!(texts.len(), all().len());
}

/// The lowest that does the job: `.version` decides which drivers take the text, `.target` which GPUs.
#[test]
fn versions_and_targets_are_the_lowest() {
    for m in all() {
        let module = ptx::Module::parse(m.text).unwrap_or_else(|e| panic!("{}: {e}", m.name));
        let target = format!("sm_{}", m.target());
        assert_eq!((module.version.as_str(), module.target.as_str()), ("8.1", target.as_str()), "{}", m.name);
        assert!(!module.kernels().is_empty());
    }
}

/// Modules that Turing has no text of, by their beginnings: others serve it.
const NEWER_ALONE: [&str; 5] = ["mla_f16", "mla_small_f16", "matmul_half_", "prompt_half", "attend_half"];

/// A module's newer text is taken by newer GPUs alone, and replaces one that all take.
#[test]
fn every_gpu_has_a_text_of_every_module() {
    for m in all() {
        let base = m.name.strip_suffix(&format!("_sm{}", m.target())).unwrap_or(m.name);
        let newer = NEWER_ALONE.iter().any(|n| base.starts_with(n));
        assert_eq!(text_for(base, 75).is_none(), newer, "{base}");
        for sm in [75, 80, 90, 120].into_iter().filter(|sm| *sm > 75 || !newer) {
            let text = text_for(base, sm).unwrap_or_else(|| panic!("{base} for sm_{sm}"));
            assert!(text.target() <= sm && text.name.starts_with(base));
        }
        assert_eq!(text_for(base, m.target()).unwrap().name, m.name);
    }
}

/// Kernels that may begin while those before run wait for them; no other has anything to do with that.
#[test]
fn kernels_that_overlap_wait() {
    for m in all() {
        for entry in m.text.split(".entry ").skip(1) {
            let says =
                ["griddepcontrol.launch_dependents;", "griddepcontrol.wait;"].map(|i| entry.contains(i));
            assert_eq!(says, [m.overlaps(); 2], "{}: {}", m.name, entry.lines().next().unwrap_or(""));
        }
    }
}

/// No kernel keeps registers in memory on any target; every kernel is in the table.
#[test]
fn resources_are_recorded_and_nothing_spills() {
    let table = std::fs::read_to_string(root().join("kernels/src/cuda/RESOURCES.md")).unwrap();
    for m in all() {
        for k in ptx::Module::parse(m.text).unwrap().kernels() {
            let row = format!("| {} | {} |", m.name, k.name());
            let row = table.lines().find(|l| l.starts_with(&row));
            let row = row.unwrap_or_else(|| panic!("{} of {} is not in RESOURCES.md", k.name(), m.name));
            assert!(row.ends_with("| 0 |"), "spills: {row}");
        }
    }
}
