//! Embeddings of the tiny reference models against transformers' last hidden states (made by models/embeddings.py).

use engine::gguf::{Metadata, Value};
use engine::{LoadOptions, Model, Pooling, embed};
use ref_tests::{fixture, read_tokens};

/// 1 - cosine of the angle. The cache is f16, which turns a vector by about 1e-7 of this.
const FAR: f64 = 1e-5;

fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    1.0 - a.iter().zip(b).map(|(x, y)| f64::from(*x) * y).sum::<f64>()
}

#[test]
fn embeddings_are_those_of_transformers() {
    let mut seen = 0;
    for entry in std::fs::read_dir(fixture("")).expect("fixtures") {
        let dir = entry.expect("an entry").path();
        let Ok(text) = std::fs::read(dir.join("embeddings.json")) else { continue };
        let want: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let model =
            Model::load(&dir.join("model.gguf"), &LoadOptions { threads: 2, ..Default::default() }).unwrap();
        let tokens = read_tokens(&dir.join("tokens.json"));
        for (pooling, name) in [(Pooling::Mean, "mean"), (Pooling::Last, "last")] {
            let want: Vec<f64> = want[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let got = embed(&model, &tokens, pooling).unwrap();
            let length: f64 = got.iter().map(|x| f64::from(*x).powi(2)).sum();
            assert!((length - 1.0).abs() < 1e-6, "{}: length {length}", dir.display());
            let d = distance(&got, &want);
            println!("{} {name}: {d:.1e}", dir.display());
            assert!(d < FAR, "{} {name}: {d:e}", dir.display());
        }
        let first = embed(&model, &tokens, Pooling::First).unwrap();
        let alone = embed(&model, &tokens[..1], Pooling::Last).unwrap();
        assert!(distance(&first, &alone.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()) < FAR);
        assert!(embed(&model, &[], Pooling::Last).is_err());
        assert!(embed(&model, &[u32::MAX], Pooling::Last).is_err());
        seen += 1;
    }
    assert!(seen >= 8, "fixtures are missing");
}

#[test]
fn the_file_says_how_to_pool() {
    let of = |kind: Option<u32>| {
        let mut m = Metadata::default();
        m.insert("general.architecture", Value::String("qwen3".into()));
        if let Some(kind) = kind {
            m.insert("qwen3.pooling_type", Value::U32(kind));
        }
        Pooling::of(&m).ok()
    };
    let want = [Some(Pooling::Last), Some(Pooling::Mean), Some(Pooling::First), Some(Pooling::Last), None];
    assert_eq!([Some(0), Some(1), Some(2), Some(3), Some(4)].map(of), want);
    assert_eq!(of(None), Some(Pooling::Last));
}
