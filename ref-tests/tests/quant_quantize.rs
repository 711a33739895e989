//! Quantise is no worse than llama.cpp's quantisers: compares with the figures that quant/make_quantize.py took from them.
//! Must not know how a format is laid out or how it searches.
//!
//! `cargo test -p rsinfer-ref-tests --test quant_quantize -- --nocapture` prints the table of docs/numerics.md.

use quant::{DType, Format};
use ref_tests::quant_tensors::{importance, tensors};

/// Ours over theirs, at most.
const RATIO: f64 = 1.02;
/// Errors below this share of the tensor's RMS are f32 rounding on either side.
const ROUNDING: f64 = 1e-7;

fn error(f: &Format, x: &[f32], importance: Option<&[f32]>) -> f64 {
    let mut packed = vec![0; f.dtype.row_bytes(x.len()).unwrap()];
    (f.quantize.unwrap())(x, &mut packed, importance);
    let mut y = vec![0.0; x.len()];
    (f.dequantize)(&packed, &mut y);
    let (mut sum, mut weights) = (0.0, 0.0);
    for (i, (x, y)) in x.iter().zip(&y).enumerate() {
        let w = importance.map_or(1.0, |w| f64::from(w[i]));
        sum += w * (f64::from(*y) - f64::from(*x)).powi(2);
        weights += w;
    }
    (sum / weights).sqrt()
}

#[test]
fn no_worse_than_llama_cpp() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/quant/fixtures/llama_cpp_rmse.tsv");
    let table = std::fs::read_to_string(path).unwrap();
    let (tensors, weights) = (tensors(), importance());
    let mut worse = Vec::new();
    let mut rows = 0;
    println!("| type | tensor | llama.cpp | ours | ratio | llama.cpp, importance | ours | ratio |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for line in table.lines().filter(|l| !l.starts_with('#')) {
        let [name, tensor, plain, aware] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        let f = DType::from_name(name).unwrap().format();
        let x = &tensors.iter().find(|t| t.0 == tensor).unwrap().1;
        let rms = (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
        print!("| {} | {tensor} |", f.name);
        for (theirs, importance) in [(plain, None), (aware, Some(&weights[..]))] {
            let theirs: f64 = theirs.parse().unwrap();
            let ours = error(f, x, importance);
            print!(" {theirs:.3e} | {ours:.3e} | {:.3} |", ours / theirs);
            // Where llama.cpp overflows, finite is all that is asked for; F16 and BF16 convert as IEEE 754 says.
            let good =
                if theirs.is_finite() { ours <= RATIO * theirs + ROUNDING * rms } else { ours.is_finite() };
            if !good && f.block_len > 1 {
                worse.push(format!("{name}, {tensor}: {ours:e}, llama.cpp {theirs:e}"));
            }
        }
        println!();
        rows += 1;
    }
    assert_eq!(rows, 13 * tensors.len());
    assert!(worse.is_empty(), "worse than llama.cpp:\n{}", worse.join("\n"));
}
