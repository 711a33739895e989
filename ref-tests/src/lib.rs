//! Shared helpers of the reference tests: where fixtures and shared material lie, `.npy` files, how logits are compared.

pub mod gpu;
pub mod mirror;
pub mod quant_tensors;

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("ref-tests lies in the repository").into()
}

/// A file below `ref-tests/fixtures`, or below `RSINFER_FIXTURES` where test programs were taken elsewhere.
pub fn fixture(path: &str) -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    std::env::var_os("RSINFER_FIXTURES").map_or_else(here, PathBuf::from).join(path)
}

/// The shared material beside the repository, or `None`, said on stderr. In CI its absence is a failure.
pub fn shared(path: &str) -> Option<PathBuf> {
    let p = root().parent()?.join("shared").join(path);
    if p.exists() {
        return Some(p);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is not here, and CI needs it", p.display());
    eprintln!("skipped: ../shared is not here");
    None
}

/// A float32 `.npy` of two dimensions: (rows, columns, values), row-major.
pub fn read_npy(path: &Path) -> (usize, usize, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00", "{} is not a version 1 .npy", path.display());
    let header_len = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..10 + header_len]).expect("the header is ASCII");
    assert!(header.contains("'<f4'") && header.contains("'fortran_order': False"), "{header}");
    let shape = header.split("'shape': (").nth(1).and_then(|s| s.split(')').next()).expect("a shape");
    let dims: Vec<usize> = shape.split(',').filter_map(|d| d.trim().parse().ok()).collect();
    let [rows, cols] = dims[..] else { panic!("two dimensions expected: {shape}") };
    let data = &bytes[10 + header_len..];
    assert_eq!(data.len(), rows * cols * 4);
    (rows, cols, data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A JSON array of token ids.
pub fn read_tokens(path: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("an array of ids")
}

/// `log softmax` of a row, in f64.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|v| (f64::from(*v) - f64::from(max)).exp()).sum();
    row.iter().map(|v| f64::from(*v) - f64::from(max) - sum.ln()).collect()
}

/// KL(p || q) in nats, of two rows of logits.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Index of the largest value, the first of equals.
pub fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, v)| if *v > row[best] { i } else { best })
}

/// How two sets of logits differ.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Mean over rows of KL(reference || other).
    pub mean_kl: f64,
    /// The largest.
    pub max_kl: f64,
    /// Share of rows whose best token is the same.
    pub top1: f64,
}

/// Compares `other` with `reference`, both `[rows, vocab]`.
pub fn compare(reference: &[f32], other: &[f32], vocab: usize) -> Difference {
    assert_eq!(reference.len(), other.len());
    let rows = reference.len() / vocab;
    let mut d = Difference { mean_kl: 0.0, max_kl: 0.0, top1: 0.0 };
    for (p, q) in reference.chunks_exact(vocab).zip(other.chunks_exact(vocab)) {
        let k = kl(p, q);
        assert!(k.is_finite(), "logits are not finite");
        d.mean_kl += k / rows as f64;
        d.max_kl = d.max_kl.max(k);
        d.top1 += f64::from(u8::from(argmax(p) == argmax(q)));
    }
    d.top1 /= rows as f64;
    d
}
