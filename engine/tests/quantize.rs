//! `quantize::run` as a whole: what it writes is what it was asked for, whatever the threads; what it refuses leaves
//! nothing behind. Which type a tensor gets is tested in ref-tests (quantize_mixes).

use std::path::{Path, PathBuf};

use engine::gguf::{ErrorKind, File, Metadata, NewTensor, OpenMode, TensorInfo, Value, encode};
use engine::quantize::{Options, QuantizeError, TARGETS, Target, plan, run};
use quant::DType;

/// Reproducible values around zero, a few large ones among them.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|i| next() * if i % 97 == 0 { 4.0 } else { 1.0 }).collect()
}

fn f32_bytes(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A model with 300 rows in one matrix (many chunks), experts, vectors, and a row of 96.
fn model(folder: &Path) -> PathBuf {
    let mut m = Metadata::default();
    m.set("general.architecture", Value::String("llama".into()));
    m.set("general.file_type", Value::U32(0));
    m.set("llama.block_count", Value::U32(1));
    m.set("llama.attention.head_count", Value::U32(8));
    let shapes: [(&str, &[u64]); 7] = [
        ("token_embd.weight", &[512, 300]),
        ("blk.0.attn_norm.weight", &[512]),
        ("blk.0.attn_q.weight", &[512, 7]),
        ("blk.0.attn_v.weight", &[512, 5]),
        ("blk.0.ffn_down.weight", &[96, 11]),
        ("blk.0.ffn_up_exps.weight", &[256, 3, 4]),
        ("output.weight", &[512, 300]),
    ];
    let made: Vec<_> = shapes
        .iter()
        .enumerate()
        .map(|(i, (name, dims))| {
            let t = NewTensor { name: (*name).into(), dtype: DType::F32, dims: dims.to_vec() };
            (t, f32_bytes(&values(dims.iter().product::<u64>() as usize, i as u64 + 1)))
        })
        .collect();
    let whole: Vec<_> = made.iter().map(|(t, d)| (t.clone(), d.as_slice())).collect();
    let path = folder.join("in.gguf");
    std::fs::write(&path, encode(&m, &whole).unwrap()).unwrap();
    path
}

fn open(path: &Path) -> File {
    File::open(path, OpenMode::Mmap).unwrap()
}

fn floats(file: &File, t: &TensorInfo) -> Vec<f32> {
    let mut out = vec![0.0; t.n_elements() as usize];
    (t.dtype.format().dequantize)(&file.bytes(t), &mut out);
    out
}

fn rmse(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

#[test]
fn every_target() {
    let folder = tempfile::tempdir().unwrap();
    let input = open(&model(folder.path()));
    for row in TARGETS {
        let out = folder.path().join(row.name);
        let options = Options::new(row.target);
        let planned = plan(&input, &options).unwrap();
        let report = run(&input, &out, &options, |_| {}).unwrap();
        let made = open(&out);
        assert_eq!(report.file_bytes, std::fs::metadata(&out).unwrap().len());
        assert_eq!(made.metadata().u32("general.quantization_version"), Ok(Some(2)));
        assert_eq!(made.metadata().u32("general.file_type"), Ok(Some(row.file_type.unwrap_or(0))));
        assert_eq!(report.bytes_in(), input.tensors().iter().map(|t| t.n_bytes).sum::<u64>());
        assert_eq!(report.bytes_out(), made.tensors().iter().map(|t| t.n_bytes).sum::<u64>());
        for (((a, b), r), p) in input.tensors().iter().zip(made.tensors()).zip(&report.tensors).zip(planned) {
            assert_eq!((&a.name, &a.dims, r.to, p.to), (&b.name, &b.dims, b.dtype, b.dtype));
            assert_eq!((r.from, r.bytes_out, p.bytes_out), (DType::F32, b.n_bytes, b.n_bytes));
            let (x, y) = (floats(&input, a), floats(&made, b));
            assert!(
                (rmse(&x, &y) - r.rmse).abs() <= 1e-6 * r.rmse,
                "{}: {} {}",
                a.name,
                rmse(&x, &y),
                r.rmse
            );
            // Values within 0.5 (some 2): even 2 bits are nearer than 0.15.
            assert!(r.rmse < 0.15, "{row}, {}: {}", a.name, r.rmse, row = row.name);
            assert_eq!(r.rmse == 0.0, b.dtype == DType::F32);
            assert_eq!(r.fallback, a.name.contains("ffn_down") && b.dtype != DType::F32 && is_k(row.target));
        }
    }
}

fn is_k(target: Target) -> bool {
    target.name().contains("_K")
}

#[test]
fn threads_do_not_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let input = open(&model(folder.path()));
    let mut files = Vec::new();
    let mut reports = Vec::new();
    for threads in [1, 2, 5] {
        let out = folder.path().join(format!("{threads}.gguf"));
        let options = Options { threads, ..Options::new(Target::Q4_K_M) };
        reports.push(run(&input, &out, &options, |_| {}).unwrap());
        files.push(std::fs::read(out).unwrap());
    }
    assert!(files[0] == files[1] && files[0] == files[2]);
    assert!(reports[0] == reports[1] && reports[0] == reports[2]);
}

#[test]
fn progress_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let input = open(&model(folder.path()));
    let mut told = Vec::new();
    run(&input, &folder.path().join("o"), &Options::new(Target::Q8_0), |p| told.push((p.index, p.done)))
        .unwrap();
    assert_eq!(told.first(), Some(&(0, 0)));
    assert_eq!(told.last(), Some(&(6, 512 * 300)));
    assert!(told.is_sorted());
}

#[test]
fn importance_is_used_per_expert() {
    let folder = tempfile::tempdir().unwrap();
    let input = open(&model(folder.path()));
    let name = "blk.0.ffn_up_exps.weight";
    let made = |weights: Option<Vec<f32>>| {
        let out = folder.path().join("o");
        let importance = weights.map(|w| [(name.to_string(), w)].into());
        run(&input, &out, &Options { importance, ..Options::new(Target::Q4_K_S) }, |_| {})?;
        let file = open(&out);
        Ok::<_, QuantizeError>(file.bytes(file.tensor(name).unwrap()).to_vec())
    };
    let plain = made(None).unwrap();
    // Only the last expert's weights differ from one another: only its rows may change against equal weights.
    let equal = made(Some(vec![1.0; 1024])).unwrap();
    let mut weights = vec![1.0; 1024];
    (768..1024).for_each(|i| weights[i] = if i % 32 == 5 { 1000.0 } else { 0.001 });
    let steered = made(Some(weights)).unwrap();
    let expert = plain.len() / 4;
    assert_eq!(steered[..3 * expert], equal[..3 * expert]);
    assert_ne!(steered[3 * expert..], equal[3 * expert..]);
    let e = made(Some(vec![1.0; 256])).unwrap_err();
    assert!(matches!(e, QuantizeError::Importance { found: 256, expected: 1024, .. }), "{e}");
}

#[test]
fn requantising_must_be_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let input = open(&model(folder.path()));
    let (q8, q4) = (folder.path().join("q8"), folder.path().join("q4"));
    run(&input, &q8, &Options::new(Target::Q8_0), |_| {}).unwrap();
    let q8 = open(&q8);
    let mut options = Options::new(Target::Q4_0);
    let e = run(&q8, &q4, &options, |_| {}).unwrap_err();
    assert!(matches!(&e, QuantizeError::Requantize { from: DType::Q8_0, .. }), "{e}");
    assert!(!q4.exists());
    options.allow_requantize = true;
    run(&q8, &q4, &options, |_| {}).unwrap();
    // To the same type nothing is lost.
    let again = folder.path().join("again");
    let report = run(&q8, &again, &Options::new(Target::Q8_0), |_| {}).unwrap();
    assert!(report.tensors.iter().all(|t| t.rmse == 0.0));
    assert_eq!(std::fs::read(&again).unwrap(), std::fs::read(q8.path()).unwrap());
}

#[test]
fn bad_values_are_named_and_leave_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut m = Metadata::default();
    m.set("general.architecture", Value::String("llama".into()));
    m.set("llama.block_count", Value::U32(1));
    let out = folder.path().join("out.gguf");
    let cases = [
        (f32::NAN, Target::Q8_0, true),
        (f32::INFINITY, Target::Q4_K_M, true),
        (1e38, Target::F16, false),
        (3e38, Target::Q8_0, false),
        (3e38, Target::Q4_K_M, false),
        (-3e38, Target::Q6_K, false),
    ];
    for (bad, target, damaged) in cases {
        let mut data = values(512, 1);
        data[300] = bad;
        let t = NewTensor { name: "blk.0.attn_q.weight".into(), dtype: DType::F32, dims: vec![256, 2] };
        let file = File::from_bytes("in", &encode(&m, &[(t, &f32_bytes(&data))]).unwrap()).unwrap();
        let e = run(&file, &out, &Options::new(target), |_| {}).unwrap_err();
        match e {
            QuantizeError::NotFinite { row: 1, .. } => assert!(damaged),
            QuantizeError::TooLarge { row: 1, .. } => assert!(!damaged),
            _ => panic!("{bad}: {e}"),
        }
        assert!(e.to_string().contains("blk.0.attn_q.weight"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn refusals() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let before = std::fs::read(&path).unwrap();
    let input = open(&path);
    let dotted = folder.path().join(".").join("in.gguf");
    let e = run(&input, &dotted, &Options::new(Target::Q8_0), |_| {}).unwrap_err();
    assert!(matches!(e, QuantizeError::SameFile { .. }), "{e}");
    assert!(std::fs::read(&path).unwrap() == before);
    let e = run(&input, folder.path(), &Options::new(Target::Q8_0), |_| {}).unwrap_err();
    assert!(matches!(&e, QuantizeError::Gguf(g) if matches!(g.kind(), ErrorKind::Directory)), "{e}");
    let out = folder.path().join("out");
    let odd = Options { output_tensor_type: Some(DType::MXFP4), ..Options::new(Target::Q8_0) };
    assert!(matches!(
        run(&input, &out, &odd, |_| {}).unwrap_err(),
        QuantizeError::ReadOnly { dtype: DType::MXFP4 }
    ));
    // Without the keys that a mix goes by there is no mix, but there is --pure.
    let t = NewTensor { name: "a.weight".into(), dtype: DType::F32, dims: vec![256, 2] };
    let bare = File::from_bytes("in", &encode(&Metadata::default(), &[(t, &[0; 2048])]).unwrap()).unwrap();
    let mut options = Options::new(Target::Q4_K_M);
    let e = run(&bare, &out, &options, |_| {}).unwrap_err();
    assert!(e.to_string().contains("general.architecture"), "{e}");
    options.pure = true;
    run(&bare, &out, &options, |_| {}).unwrap();
}

#[test]
fn split_models_are_joined() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..2u16 {
        let mut m = Metadata::default();
        if i == 0 {
            m.set("general.architecture", Value::String("llama".into()));
        }
        m.set("split.no", Value::U16(i));
        m.set("split.count", Value::U16(2));
        m.set("split.tensors.count", Value::I32(2));
        let t = NewTensor { name: format!("t{i}.weight"), dtype: DType::F32, dims: vec![32, 2] };
        let data = f32_bytes(&values(64, u64::from(i) + 1));
        let name = format!("m-{:05}-of-00002.gguf", i + 1);
        std::fs::write(folder.path().join(name), encode(&m, &[(t, &data)]).unwrap()).unwrap();
    }
    let input = open(&folder.path().join("m-00002-of-00002.gguf"));
    let out = folder.path().join("one.gguf");
    run(&input, &out, &Options::new(Target::Copy), |_| {}).unwrap();
    let joined = open(&out);
    assert_eq!(joined.n_parts(), 1);
    assert!(joined.metadata().iter().all(|(k, _)| !k.starts_with("split.")));
    for t in input.tensors() {
        assert_eq!(input.bytes(t)[..], joined.bytes(joined.tensor(&t.name).unwrap())[..]);
    }
    let e = run(&input, &folder.path().join("m-00001-of-00002.gguf"), &Options::new(Target::Copy), |_| {});
    assert!(matches!(e, Err(QuantizeError::SameFile { .. })));
}
