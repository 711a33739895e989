//! Makes a smaller model of a GGUF file: llama-quantize's job as a library.
//!
//! Knows files and formats; nothing of architectures beyond the names that the mixes go by, and nothing of flags.

mod mix;
mod target;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use quant::{DType, QuantError};

use crate::gguf::{Access, File, GgufError, Metadata, MetadataError, NewTensor, TensorInfo, Value, Writer};

pub use mix::{Choice, choose};
pub use target::{TARGETS, Target, TargetInfo};

/// What to make, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file type.
    pub target: Target,
    /// Every matrix gets the target's own type (`--pure`).
    pub pure: bool,
    /// The type of `output.weight`, or of the token embedding where that is the output matrix too.
    pub output_tensor_type: Option<DType>,
    /// The type of `token_embd.weight`.
    pub token_embedding_type: Option<DType>,
    /// Leave `output.weight` as it is.
    pub leave_output_tensor: bool,
    /// Quantise again what is quantised already; without it that is an error, because errors add up.
    pub allow_requantize: bool,
    /// How much each column of each matrix matters: by tensor name, `dims[0]` weights for each matrix of the tensor
    /// (`dims[2]` of them), as llama-imatrix measures them.
    pub importance: Option<std::collections::HashMap<String, Vec<f32>>>,
    /// Number of threads; 0 for as many as the machine has cores.
    pub threads: usize,
}

impl Options {
    /// llama-quantize's defaults for a target.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            pure: false,
            output_tensor_type: None,
            token_embedding_type: None,
            leave_output_tensor: false,
            allow_requantize: false,
            importance: None,
            threads: 0,
        }
    }
}

/// What became of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Its dimensions, innermost first.
    pub dims: Vec<u64>,
    /// Its type in the input.
    pub from: DType,
    /// Its type in the output.
    pub to: DType,
    /// Whether the mix wanted another type, which the row length does not allow.
    pub fallback: bool,
    /// Bytes in the input.
    pub bytes_in: u64,
    /// Bytes in the output.
    pub bytes_out: u64,
    /// Root mean square of the differences to the input; 0 if copied or not done yet.
    pub rmse: f64,
}

/// What [`run`] has done.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// All tensors, in file order.
    pub tensors: Vec<TensorReport>,
    /// Bytes of the file written.
    pub file_bytes: u64,
}

impl Report {
    /// Bytes of all tensors in the input.
    pub fn bytes_in(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes_in).sum()
    }

    /// Bytes of all tensors in the output.
    pub fn bytes_out(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes_out).sum()
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(|t| t.dims.iter().product::<u64>()).sum()
    }

    /// Number of tensors that could not get the type the mix wanted.
    pub fn fallbacks(&self) -> usize {
        self.tensors.iter().filter(|t| t.fallback).count()
    }
}

/// How far [`run`] is: told when a tensor is begun and again whenever a piece of it is written.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Which tensor, from 0.
    pub index: usize,
    /// Of how many.
    pub count: usize,
    /// What is becoming of it.
    pub tensor: &'a TensorReport,
    /// Elements of it done.
    pub done: u64,
}

/// Why a file could not be quantised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// Writing failed.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A key that the mix goes by is missing or wrong.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// Reading the output's path failed.
    #[error("{}: {error}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// The output would replace the input.
    #[error("{}: is the input too; write to another file", path.display())]
    SameFile {
        /// The path.
        path: PathBuf,
    },
    /// Quantising twice without having been asked to.
    #[error(
        "tensor {tensor} is {from} already: quantising it again loses quality; start from an F32, F16 or BF16 file, or \
         insist with --allow-requantize"
    )]
    Requantize {
        /// The first such tensor.
        tensor: String,
        /// Its type.
        from: DType,
    },
    /// A type asked for that does not fit.
    #[error("tensor {tensor}: {error}")]
    Row {
        /// The tensor.
        tensor: String,
        /// Row length and type.
        error: QuantError,
    },
    /// A type that can be read, not written.
    #[error("this engine reads {dtype} but does not write it")]
    ReadOnly {
        /// The type.
        dtype: DType,
    },
    /// The input is damaged.
    #[error("tensor {tensor}: row {row} holds NaN or an infinity")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The row, from 0.
        row: u64,
    },
    /// Values beyond the reach of a type, whose scales are f16.
    #[error("tensor {tensor}: row {row} holds values too large for {dtype}")]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// The row, from 0.
        row: u64,
        /// The type it was to get.
        dtype: DType,
    },
    /// The importance weights are for another model.
    #[error("tensor {tensor}: {found} importance weights, expected {expected}")]
    Importance {
        /// The tensor.
        tensor: String,
        /// Number of weights given.
        found: usize,
        /// Number needed.
        expected: u64,
    },
}

/// Says what [`run`] would do, without reading any data (llama-quantize's `--dry-run`).
///
/// # Errors
/// As [`run`]'s, as far as they can be known from the header.
pub fn plan(file: &File, options: &Options) -> Result<Vec<TensorReport>, QuantizeError> {
    let choices = choose(file.metadata(), file.tensors(), options)?;
    let mut out = Vec::with_capacity(choices.len());
    for (t, choice) in file.tensors().iter().zip(choices) {
        let to = choice.dtype;
        if to != t.dtype && t.dtype.format().block_len > 1 && !options.allow_requantize {
            return Err(QuantizeError::Requantize { tensor: t.name.clone(), from: t.dtype });
        }
        if to != t.dtype && to.format().quantize.is_none() {
            return Err(QuantizeError::ReadOnly { dtype: to });
        }
        let row = to.row_bytes(t.row_len() as usize);
        let row = row.map_err(|error| QuantizeError::Row { tensor: t.name.clone(), error })?;
        out.push(TensorReport {
            name: t.name.clone(),
            dims: t.dims.clone(),
            from: t.dtype,
            to,
            fallback: choice.fallback,
            bytes_in: t.n_bytes,
            bytes_out: row as u64 * t.n_rows(),
            rmse: 0.0,
        });
    }
    Ok(out)
}

/// Quantises `file` into a new file at `out`. Parts of a split model are joined.
///
/// # Errors
/// See [`QuantizeError`]. On error no file is left behind, and an existing one is left as it was.
pub fn run(
    file: &File,
    out: &Path,
    options: &Options,
    mut progress: impl FnMut(Progress),
) -> Result<Report, QuantizeError> {
    let mut tensors = plan(file, options)?;
    refuse_input(file, out)?;
    let new: Vec<NewTensor> = tensors
        .iter()
        .map(|t| NewTensor { name: t.name.clone(), dtype: t.to, dims: t.dims.clone() })
        .collect();
    let mut writer = Writer::create(out, &new_metadata(file.metadata(), options.target), &new)?;
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    let count = tensors.len();
    for (index, (report, t)) in tensors.iter_mut().zip(file.tensors()).enumerate() {
        progress(Progress { index, count, tensor: report, done: 0 });
        file.advise(t, Access::Sequential);
        let data = file.bytes(t);
        if report.to == t.dtype {
            writer.write(&data)?;
        } else {
            let importance = importance_of(t, options)?;
            let mut square = 0.0;
            let mut done = 0;
            for window in windows(t) {
                let (bytes, error) = convert(t, &data, report.to, window, importance, threads)?;
                writer.write(&bytes)?;
                square += error;
                done += window.rows * t.row_len();
                progress(Progress { index, count, tensor: report, done });
            }
            report.rmse = (square / t.n_elements() as f64).sqrt();
        }
        progress(Progress { index, count, tensor: report, done: t.n_elements() });
    }
    let file_bytes = writer.finish()?;
    Ok(Report { tensors, file_bytes })
}

/// The metadata of the output: those of the input, joined, with the new file type.
fn new_metadata(input: &Metadata, target: Target) -> Metadata {
    let mut m = input.clone();
    for key in ["split.no", "split.count", "split.tensors.count"] {
        m.remove(key);
    }
    // Version 2: the only layout of blocks that files have had since May 2023.
    m.set("general.quantization_version", Value::U32(2));
    if let Some(id) = target.info().file_type {
        m.set("general.file_type", Value::U32(id));
    }
    m
}

/// The input is read while the output is written.
fn refuse_input(file: &File, out: &Path) -> Result<(), QuantizeError> {
    let Ok(real) = out.canonicalize() else { return Ok(()) };
    let same = file.part_paths().any(|p| p.canonicalize().is_ok_and(|p| p == real));
    if same { Err(QuantizeError::SameFile { path: out.into() }) } else { Ok(()) }
}

/// The weights for `t`; `None` if none are given for it.
fn importance_of<'a>(t: &TensorInfo, options: &'a Options) -> Result<Option<&'a [f32]>, QuantizeError> {
    let Some(weights) = options.importance.as_ref().and_then(|i| i.get(&t.name)) else { return Ok(None) };
    let expected = t.row_len() * t.dims.get(2).copied().unwrap_or(1);
    if weights.len() as u64 != expected {
        return Err(QuantizeError::Importance { tensor: t.name.clone(), found: weights.len(), expected });
    }
    Ok(Some(weights))
}

/// Consecutive rows, converted and written at once.
#[derive(Clone, Copy)]
struct Window {
    first: u64,
    rows: u64,
}

/// Elements converted before they are written: enough for many threads, little beside the model.
const WINDOW: u64 = 1 << 24;
/// Elements that a thread takes at a time.
const CHUNK: u64 = 1 << 16;

fn windows(t: &TensorInfo) -> impl Iterator<Item = Window> + use<> {
    let n = t.n_rows();
    let rows = (WINDOW / t.row_len()).clamp(1, n);
    (0..n.div_ceil(rows)).map(move |i| Window { first: i * rows, rows: rows.min(n - i * rows) })
}

/// Converts a window of `t`, whose data are `data`. Returns the packed rows and the sum of squared errors; the sum is
/// taken chunk by chunk in order, so that it does not depend on the threads.
fn convert(
    t: &TensorInfo,
    data: &[u8],
    to: DType,
    window: Window,
    importance: Option<&[f32]>,
    threads: usize,
) -> Result<(Vec<u8>, f64), QuantizeError> {
    let row_error = |error| QuantizeError::Row { tensor: t.name.clone(), error };
    let row_len = t.row_len() as usize;
    let row_in = t.dtype.row_bytes(row_len).map_err(row_error)?;
    let row_out = to.row_bytes(row_len).map_err(row_error)?;
    let mut out = vec![0; row_out * window.rows as usize];
    let chunk = (CHUNK / t.row_len()).clamp(1, window.rows) as usize;
    let chunks = (window.rows as usize).div_ceil(chunk);
    let mut results: Vec<Result<f64, QuantizeError>> = (0..chunks).map(|_| Ok(0.0)).collect();

    let work = Mutex::new(out.chunks_mut(chunk * row_out).zip(results.iter_mut()).enumerate());
    let worker = || {
        let mut scratch = Scratch { values: vec![0.0; chunk * row_len], back: vec![0.0; row_len] };
        loop {
            let next = work.lock().expect("no worker panics while it holds the lock").next();
            let Some((i, (dst, result))) = next else { break };
            let first = window.first + (i * chunk) as u64;
            let rows = dst.len() / row_out;
            let start = first as usize * row_in;
            let src = &data[start..start + rows * row_in];
            *result = scratch.rows(t, src, to, dst, first, importance);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(chunks) {
            scope.spawn(worker);
        }
        worker();
    });
    let square = results.into_iter().try_fold(0.0, |sum, r| r.map(|x| sum + x))?;
    Ok((out, square))
}

/// One thread's buffers.
struct Scratch {
    values: Vec<f32>,
    back: Vec<f32>,
}

impl Scratch {
    /// Converts whole rows, `first` being the number of the first one. Returns the sum of squared errors.
    fn rows(
        &mut self,
        t: &TensorInfo,
        src: &[u8],
        to: DType,
        dst: &mut [u8],
        first: u64,
        importance: Option<&[f32]>,
    ) -> Result<f64, QuantizeError> {
        let row_len = t.row_len() as usize;
        let rows = src.len() / (t.n_bytes / t.n_rows()) as usize;
        let values = &mut self.values[..rows * row_len];
        (t.dtype.format().dequantize)(src, values);
        let quantize = to.format().quantize.ok_or(QuantizeError::ReadOnly { dtype: to })?;
        let row_out = dst.len() / rows;
        let rows_per_matrix = t.dims[1];
        let mut square = 0.0;
        for (i, (values, dst)) in values.chunks_exact(row_len).zip(dst.chunks_exact_mut(row_out)).enumerate()
        {
            let row = first + i as u64;
            if !values.iter().all(|x| x.is_finite()) {
                return Err(QuantizeError::NotFinite { tensor: t.name.clone(), row });
            }
            let weights = importance.map(|all| {
                let matrix = (row / rows_per_matrix) as usize * row_len % all.len();
                &all[matrix..matrix + row_len]
            });
            quantize(values, dst, weights);
            (to.format().dequantize)(dst, &mut self.back);
            let (error, energy) = compare(values, &self.back);
            // A scale beyond f16's largest value comes back as infinity or as nonsense of the size of the input.
            if !error.is_finite() || (error > energy / 2.0 && values.iter().any(|x| x.abs() > 65504.0)) {
                return Err(QuantizeError::TooLarge { tensor: t.name.clone(), row, dtype: to });
            }
            square += error;
        }
        Ok(square)
    }
}

/// The sums of squares of the differences and of the values themselves.
fn compare(values: &[f32], back: &[f32]) -> (f64, f64) {
    let (mut error, mut energy) = (0.0, 0.0);
    for (x, y) in values.iter().zip(back) {
        let (x, y) = (f64::from(*x), f64::from(*y));
        error += (x - y) * (x - y);
        energy += x * x;
    }
    (error, energy)
}
