//! Files of `synth` load, and their logits are those of a working model: finite, spread, different for different tokens.

use benches::synth::{self, GEOMETRIES, Geometry, Types};
use engine::{LoadOptions, Model, Session, SessionOptions};
use std::path::Path;

fn small(name: &str) -> Geometry {
    let g = Geometry::named(name).expect("in the table").tiny();
    Geometry { layers: g.layers.min(5), ..g }
}

/// Logits after each of a few tokens.
fn logits(path: &Path) -> Vec<Vec<f32>> {
    let model = Model::load(path, &LoadOptions { threads: 2, ..Default::default() }).expect("it loads");
    let mut session =
        Session::new(&model, &SessionOptions { ctx: 64, ..Default::default() }).expect("it opens");
    let mut rows = Vec::new();
    let tokens: Vec<u32> = (0..40).map(|i| 7 * i % 900 + 3).collect();
    session
        .eval_all(&tokens, |_, row| {
            rows.push(row.to_vec());
            Ok::<_, engine::EngineError>(())
        })
        .expect("it runs");
    rows
}

fn check(what: &str, rows: &[Vec<f32>]) {
    for row in rows {
        let n = row.len() as f64;
        let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let deviation = (row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!(row.iter().all(|v| v.is_finite()), "{what}: logits are not finite");
        assert!((0.3..3.0).contains(&deviation), "{what}: logits spread by {deviation}");
        assert!(mean.abs() < 0.5, "{what}: logits lie around {mean}");
    }
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let distinct: std::collections::HashSet<_> = rows.iter().map(|r| best(r)).collect();
    assert!(distinct.len() > 5, "{what}: {} tokens have only {} best ones", rows.len(), distinct.len());
}

#[test]
fn every_geometry_gives_sane_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    for g in GEOMETRIES {
        let path = folder.path().join(format!("{}.gguf", g.name));
        synth::write(&small(g.name), Types::from_name("Q4_K").expect("a type"), 1, &path).expect("written");
        check(g.name, &logits(&path));
    }
}

#[test]
fn every_type_gives_sane_logits() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in quant::FORMATS.iter().map(|f| f.name).chain(["Q2_K_S", "Q3_K_L", "Q4_K_M"]) {
        let Some(types) = Types::from_name(name) else { continue };
        let path = folder.path().join(format!("{name}.gguf"));
        synth::write(&small("deepseek-v3"), types, 1, &path).expect("written");
        check(name, &logits(&path));
    }
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = |seed: u64| {
        let path = folder.path().join("model.gguf");
        synth::write(&small("qwen3-0.6b"), Types::from_name("Q5_K_M").expect("a type"), seed, &path)
            .expect("written");
        std::fs::read(&path).expect("readable")
    };
    assert!(bytes(1) == bytes(1));
    assert!(bytes(1) != bytes(2));
}
