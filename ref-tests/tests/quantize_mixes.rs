//! Holds the type that each tensor gets against llama.cpp's choice, model by model and file type by file type.
//! The fixture is made by quantize/mixes.py.

use std::path::Path;

use engine::gguf::{Metadata, TensorInfo, Value};
use engine::quantize::{Options, TARGETS, Target, choose};
use quant::DType;
use serde_json::Value as Json;

fn fixture() -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantize/mixes.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn metadata(kind: &Json) -> Metadata {
    let mut m = Metadata::default();
    for (key, value) in kind["metadata"].as_object().unwrap() {
        let value = match value {
            Json::String(s) => Value::String(s.clone()),
            Json::Number(n) if n.is_u64() => Value::U32(n.as_u64().unwrap() as u32),
            Json::Number(n) => Value::F32(n.as_f64().unwrap() as f32),
            other => panic!("{key}: {other}"),
        };
        m.set(key, value);
    }
    m
}

fn tensors(kind: &Json) -> Vec<TensorInfo> {
    let list = kind["tensors"].as_array().unwrap();
    let info = |t: &Json| TensorInfo {
        name: t[0].as_str().unwrap().into(),
        dtype: DType::F32,
        dims: t[1].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect(),
        n_bytes: 0,
        part: 0,
        offset: 0,
    };
    list.iter().map(info).collect()
}

/// The options that a case's name stands for, such as "Q4_K_M pure".
fn options(case: &str, tensors: &[TensorInfo]) -> Options {
    let (target, flag) = case.split_once(' ').unwrap_or((case, ""));
    let mut o = Options::new(Target::from_name(target).unwrap());
    match flag {
        "" => {}
        "pure" => o.pure = true,
        "output" => o.output_tensor_type = Some(DType::Q5_K),
        "embedding" => o.token_embedding_type = Some(DType::Q8_0),
        "leave" => o.leave_output_tensor = true,
        "importance" => o.importance = Some(tensors.iter().map(|t| (t.name.clone(), Vec::new())).collect()),
        other => panic!("{other}"),
    }
    o
}

#[test]
fn every_tensor_gets_the_type_that_llama_cpp_gives_it() {
    let fixture = fixture();
    let letters = fixture["letters"].as_object().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let (mut cases, mut wrong) = (0, Vec::new());
    for (name, kind) in fixture["kinds"].as_object().unwrap() {
        let (metadata, tensors) = (metadata(kind), tensors(kind));
        for (case, expected) in kind["cases"].as_object().unwrap() {
            let chosen = choose(&metadata, &tensors, &options(case, &tensors)).unwrap();
            assert_eq!(chosen.len(), expected.as_str().unwrap().len());
            for ((t, choice), letter) in tensors.iter().zip(chosen).zip(expected.as_str().unwrap().chars()) {
                let (expected, _) =
                    letters.iter().find(|(_, l)| l.as_str().unwrap().starts_with(letter)).unwrap();
                if DType::from_name(expected) != Some(choice.dtype) {
                    wrong.push(format!("{name}, {case}, {}: {} instead of {expected}", t.name, choice.dtype));
                }
            }
            cases += 1;
            seen.insert(case.clone());
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(40)].join("\n"));
    assert!(cases >= 17 * 20, "only {cases} cases in the fixture");
    for row in TARGETS.iter().filter(|r| r.dtype.is_some()) {
        assert!(seen.contains(row.name), "{} is not in the fixture", row.name);
    }
}
