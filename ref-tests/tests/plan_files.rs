//! Plans from less than a whole model: a header without data, some parts of a split file.

use benches::synth::{self, Geometry, Types};
use engine::gguf::{File, NewTensor, Value, Writer};
use engine::plan::{Access, Needs, PlanModel, PlanOptions, WeightFact};
use engine::{DType, LoadOptions, Model, SessionOptions};
use std::path::{Path, PathBuf};

fn options() -> PlanOptions {
    let session = SessionOptions { ctx: 2048, cache_k: DType::Q8_0, ..SessionOptions::default() };
    PlanOptions { session, parallel: 3, access: Access::Mapped, pinned: 0, threads: 4 }
}

/// Weights by name, and what there is besides.
fn planned(path: &Path) -> (Vec<WeightFact>, Needs, usize) {
    let m = PlanModel::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut weights = m.weights().to_vec();
    weights.sort_by(|a, b| a.name.cmp(&b.name));
    (weights, m.sizing(&options()).expect("possible options").needs, m.guessed())
}

fn types() -> Types {
    Types::from_name("Q4_K").expect("a type")
}

/// The file at `whole` in `count` parts beside it.
fn split(whole: &Path, count: usize) -> Vec<PathBuf> {
    let file = File::open(whole, Default::default()).expect("it opens");
    let all = file.tensors();
    let part = |i: usize| {
        let path = whole.with_file_name(format!("part-{:05}-of-{count:05}.gguf", i + 1));
        let some = &all[i * all.len() / count..(i + 1) * all.len() / count];
        let mut metadata = if i == 0 { file.metadata().clone() } else { Default::default() };
        metadata.insert("split.no", Value::U16(i as u16));
        metadata.insert("split.count", Value::U16(count as u16));
        metadata.insert("split.tensors.count", Value::I32(all.len() as i32));
        let new: Vec<NewTensor> = some
            .iter()
            .map(|t| NewTensor { name: t.name.clone(), dtype: t.dtype, dims: t.dims.clone() })
            .collect();
        let mut w = Writer::create(&path, &metadata, &new).expect("a file");
        some.iter().for_each(|t| w.write(&file.bytes(t)).expect("written"));
        w.finish().expect("written");
        path
    };
    (0..count).map(part).collect()
}

#[test]
fn a_header_alone_is_planned_as_the_whole_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (whole, header) = (folder.path().join("whole.gguf"), folder.path().join("header.gguf"));
    for name in ["deepseek-v3", "deepseek-v2-lite", "gemma-3-4b", "llama-3.2-1b"] {
        let g = Geometry { layers: 7, ..Geometry::named(name).expect("in the table").tiny() };
        synth::write(&g, types(), 1, &whole).expect("written");
        let bytes = synth::write_header(&g, types(), &header).expect("written");
        assert!(bytes < std::fs::metadata(&whole).unwrap().len() / 4);
        assert_eq!(planned(&whole), planned(&header), "{name}");
        // It can be planned, not run: one clear line.
        let e =
            Model::load(&header, &LoadOptions::default()).err().expect("there are no weights").to_string();
        assert!(!e.contains('\n') && e.contains("header.gguf"), "{e}");
    }
}

#[test]
fn parts_that_are_not_there_are_taken_to_be_like_those_that_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = folder.path().join("whole.gguf");
    for name in ["deepseek-v3", "llama-3.1-8b"] {
        let g = Geometry { layers: 12, ..Geometry::named(name).expect("in the table").tiny() };
        synth::write(&g, types(), 1, &whole).expect("written");
        let parts = split(&whole, 3);
        let (want, needs, guessed) = planned(&whole);
        assert_eq!(guessed, 0);
        // All parts, from any of them.
        assert_eq!(planned(&parts[0]), (want.clone(), needs.clone(), 0), "{name}");
        assert_eq!(planned(&parts[2]), (want.clone(), needs.clone(), 0), "{name}");
        std::fs::remove_file(&parts[1]).unwrap();
        let (got, got_needs, guessed) = planned(&parts[0]);
        let absent = want.len() - File::headers(&parts[0]).unwrap().tensors().len();
        assert_eq!((got.len(), guessed), (want.len(), absent), "{name}");
        // synth gives all layers the same types: nothing is off.
        assert_eq!((&got, &got_needs), (&want, &needs), "{name}");
        std::fs::remove_file(&parts[2]).unwrap();
        let (got, ..) = planned(&parts[0]);
        assert_eq!(got, want, "{name}");
        // Without the first part there is no metadata.
        std::fs::remove_file(&parts[0]).unwrap();
        assert!(PlanModel::open(&parts[0]).is_err());
    }
}
