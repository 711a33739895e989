//! Files of `benches`' synth against programs that nobody here wrote: the `gguf` package opens them, and llama.cpp computes
//! the same logits from them. Skipped, saying so, where Python or its packages are not here; `RSINFER_PYTHON` names the one
//! to use.

use benches::synth::{self, GEOMETRIES, Geometry, Types, tensors};
use engine::{LoadOptions, Model, Session, SessionOptions};
use ref_tests::{kl, read_npy, root};
use std::path::Path;
use std::process::Command;

/// A Python that can import `package`.
fn python(package: &str) -> Option<String> {
    let python = std::env::var("RSINFER_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", &format!("import {package}, numpy")]).output();
    if found.is_ok_and(|o| o.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: {python} cannot import {package}");
    None
}

fn output(python: &str, script: &str, args: &[&str]) -> String {
    let out =
        Command::new(python).arg(root().join("ref-tests").join(script)).args(args).output().expect("it runs");
    assert!(out.status.success(), "{script} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// llama.cpp tells V2-Lite by its number of layers: that one keeps them all.
fn small(g: Geometry) -> Geometry {
    let layers = if g.name == "deepseek-v2-lite" { g.layers } else { 5 };
    Geometry { layers, ..g.tiny() }
}

fn write(g: &Geometry, types: &str, folder: &Path) -> String {
    let path = folder.join("model.gguf");
    synth::write(g, Types::from_name(types).expect("a type"), 1, &path).expect("written");
    path.to_str().expect("text").to_owned()
}

#[test]
fn the_gguf_package_opens_every_type() {
    let Some(python) = python("gguf") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let g = Geometry { layers: 2, ..Geometry::named("deepseek-v3").expect("in the table").tiny() };
    let g = Geometry { experts: g.experts.map(|e| synth::Experts { dense_layers: 1, ..e }), ..g };
    for types in ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K_M", "Q6_K", "IQ4_XS", "MXFP4"]
    {
        let path = write(&g, types, folder.path());
        let said: serde_json::Value =
            serde_json::from_str(&output(&python, "gguf/describe.py", &[&path])).expect("JSON");
        let file = engine::gguf::File::open(&path, Default::default()).expect("it opens");
        let found = said["tensors"].as_array().expect("a list");
        assert_eq!(found.len(), file.tensors().len());
        assert_eq!(said["keys"].as_array().expect("a list").len(), file.metadata().len());
        for ((there, here), drawn) in found.iter().zip(file.tensors()).zip(tensors(&g)) {
            assert_eq!((there["name"].as_str(), &drawn.name), (Some(&*here.name), &here.name));
            let kind = there["type"].as_str().expect("text");
            assert!(kind.eq_ignore_ascii_case(here.dtype.name()), "{}: {kind}, {}", here.name, here.dtype);
            let dims: Vec<u64> = serde_json::from_value(there["dims"].clone()).expect("numbers");
            assert_eq!(dims, here.dims, "{}", here.name);
            assert_eq!(there["finite"].as_bool(), Some(true), "{types}: {}", here.name);
            if here.n_elements() > 10_000 {
                let deviation = there["deviation"].as_f64().expect("a number");
                let ratio = deviation / f64::from(drawn.deviation);
                assert!((0.9..1.1).contains(&ratio), "{types}: {} spreads by {deviation}", here.name);
            }
        }
    }
}

/// The median row, since the smallest rounding may send a token of a mixture to another expert, and all rows after it see that.
/// Both round activations to int8, each in its own way: on the reference models with these types that costs up to 3e-3 nats
/// from exact arithmetic (docs/numerics.md). Float files show a wrong shape or key far more sharply,
/// and are all that is compared of mixtures: rounded activations send tokens of nearly every row elsewhere.
#[test]
fn llama_cpp_computes_the_same_logits() {
    let Some(python) = python("llama_cpp") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let ids: Vec<u32> = (0..48).map(|i| 11 * i % 900 + 3).collect();
    let (tokens, npy) = (folder.path().join("ids.json"), folder.path().join("out.npy"));
    std::fs::write(&tokens, serde_json::to_string(&ids).expect("JSON")).expect("written");
    let (tokens, npy) = (tokens.to_str().expect("text"), npy.to_str().expect("text"));
    for g in GEOMETRIES {
        for (types, bar) in [("F32", 1e-6), ("Q4_K", 1e-2)] {
            if types == "Q4_K" && g.experts.is_some() {
                continue;
            }
            let path = write(&small(g), types, folder.path());
            let args = ["logits", &path, "--tokens-file", tokens, "--out", npy, "--cache", "f32"];
            output(&python, "llama_cpp/compare.py", &args);
            let (rows, vocab, theirs) = read_npy(Path::new(npy));
            assert_eq!((rows, vocab), (ids.len(), 1000));
            let model = Model::load(path.as_ref(), &LoadOptions { threads: 2, ..Default::default() })
                .expect("it loads");
            let f32 = engine::DType::F32;
            let o = SessionOptions { ctx: 64, batch: 64, cache_k: f32, cache_v: f32, ..Default::default() };
            let mut ours = Vec::new();
            let mut session = Session::new(&model, &o).expect("it opens");
            let all = session.eval_all(&ids, |_, row| {
                ours.extend_from_slice(row);
                Ok::<_, engine::EngineError>(())
            });
            all.expect("it runs");
            let rows = theirs.chunks_exact(vocab).zip(ours.chunks_exact(vocab));
            let mut distances: Vec<f64> = rows.map(|(p, q)| kl(p, q)).collect();
            distances.sort_by(f64::total_cmp);
            let (median, worst) = (distances[ids.len() / 2], distances[ids.len() - 1]);
            println!("{} {types}: KL of the median row {median:.1e}, of the worst {worst:.1e}", g.name);
            assert!(median < bar, "{} {types}: median KL {median:e}", g.name);
        }
    }
}
