//! Tensors of a file as weights on their devices: shapes checked against the configuration, every tensor accounted for.

use crate::EngineError;
use crate::gguf::{File, TensorInfo};
use crate::pager::Pager;
use crate::stages::Devices;
use kernels::{KernelError, Vector, Weight};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Hands out the tensors of a file by name and shape. Shapes are `[count, rows (out), cols (in)]`: GGUF's, reversed.
pub struct Loader<'a> {
    file: &'a File,
    on: &'a Devices,
    pager: Arc<Pager>,
    taken: RefCell<HashSet<String>>,
    /// Tensors that must be in parts of the model that are not there, as they probably are.
    guessed: RefCell<HashMap<String, TensorInfo>>,
    /// Bytes of each tensor on a GPU.
    on_gpu: RefCell<HashMap<String, u64>>,
}

/// What a loader saw.
pub struct Seen {
    /// Tensors of parts that are not there.
    pub guessed: Vec<TensorInfo>,
    /// Bytes of each tensor on a GPU; those that are not listed are never copied there.
    pub on_gpu: HashMap<String, u64>,
}

impl<'a> Loader<'a> {
    /// A loader of `file` for these devices.
    pub fn new(file: &'a File, on: &'a Devices, pager: Arc<Pager>) -> Self {
        Self {
            file,
            on,
            pager,
            taken: RefCell::default(),
            guessed: RefCell::default(),
            on_gpu: RefCell::default(),
        }
    }

    /// What a forward pass tells where it is.
    pub fn pager(&self) -> Arc<Pager> {
        self.pager.clone()
    }

    /// Whether the file has this tensor.
    pub fn has(&self, name: &str) -> bool {
        // Of parts that are not there: what some layer has, others have; large models have an output matrix of their own.
        let elsewhere = || name == "output.weight" || self.twin(name).is_some();
        self.file.tensor(name).is_some() || (self.file.missing_parts() > 0 && elsewhere())
    }

    /// The tensor of the same name in another layer.
    fn twin(&self, name: &str) -> Option<&'a TensorInfo> {
        let kind = |n: &str| n.strip_prefix("blk.").and_then(|n| n.split_once('.')).map(|n| n.1.to_owned());
        let wanted = kind(name)?;
        self.file.tensors().iter().rev().find(|t| kind(&t.name).as_ref() == Some(&wanted))
    }

    /// The tensor `name` of the dimensions `dims`; where parts of the model are missing, what it probably is.
    fn info(&self, name: &str, dims: &[u64]) -> Result<TensorInfo, EngineError> {
        let missing = || EngineError::MissingTensor(name.into());
        if let Some(t) = self.file.tensor(name) {
            return Ok(t.clone());
        }
        if self.file.missing_parts() == 0 {
            return Err(missing());
        }
        let largest = || self.file.tensors().iter().max_by_key(|t| t.n_bytes).map(|t| t.dtype);
        let dtype = match (self.twin(name), dims.len()) {
            (Some(t), _) => t.dtype,
            (None, 1) => quant::DType::F32,
            (None, _) => largest().ok_or_else(missing)?,
        };
        let row = dtype.row_bytes(dims[0] as usize).map_err(|_| missing())? as u64;
        let n_bytes = row * dims[1..].iter().product::<u64>();
        let t = TensorInfo { name: name.into(), dtype, dims: dims.into(), n_bytes, part: 0, offset: 0 };
        self.guessed.borrow_mut().insert(name.into(), t.clone());
        Ok(t)
    }

    /// Rows of a two-dimensional tensor, before its shape is known (the vocabulary's size).
    pub fn rows(&self, name: &str) -> Result<usize, EngineError> {
        let t = self.file.tensor(name).ok_or_else(|| EngineError::MissingTensor(name.into()))?;
        let rows = t.dims.get(1).copied().unwrap_or(1);
        usize::try_from(rows).ok().filter(|n| *n <= i32::MAX as usize).ok_or_else(|| {
            EngineError::Unsupported(format!("tensor {name} has {rows} rows: token ids are 32-bit integers"))
        })
    }

    fn load(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        let t = self.info(name, &[cols as u64, rows as u64, count as u64])?;
        let mut want = vec![cols as u64, rows as u64, count as u64];
        let mut dims = t.dims.clone();
        for d in [&mut want, &mut dims] {
            while d.len() > 1 && d.last() == Some(&1) {
                d.pop();
            }
        }
        if want != dims {
            return Err(EngineError::TensorShape {
                name: name.into(),
                found: t.dims.clone(),
                expected: want,
            });
        }
        self.taken.borrow_mut().insert(name.into());
        let weight = match self.file.has_data() {
            true => Weight::host(t.dtype, count, rows, cols, self.file.bytes(&t))?,
            false => Weight::unbacked(t.dtype, count, rows, cols)?,
        };
        self.on_gpu.borrow_mut().insert(name.into(), kernels::cuda::weight_bytes(&weight) as u64);
        Ok(weight)
    }

    /// A matrix `[rows, cols]`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.stack(name, 1, rows, cols)
    }

    /// A stack of matrices `[count][rows, cols]` (experts, heads).
    pub fn stack(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.upload(name, self.load(name, count, rows, cols)?)
    }

    /// A table `[rows, cols]` of which single rows are read: it stays on the host.
    pub fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.load(name, 1, rows, cols)
    }

    /// A host weight on the device of the tensor `name`.
    pub fn upload(&self, name: &str, host: Weight) -> Result<Weight, EngineError> {
        Ok(match self.on.of(name) {
            Some(device) => device.upload(host)?,
            None => host,
        })
    }

    /// A vector, widened to f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vector, EngineError> {
        let host = Vector::new(self.read(name, len)?);
        self.on_gpu.borrow_mut().insert(name.into(), 4 * len as u64);
        Ok(match self.on.of(name) {
            Some(device) => device.upload_vector(host)?,
            None => host,
        })
    }

    /// A vector's values on the host; without data ones, which every check lets through.
    pub fn values(&self, name: &str, len: usize) -> Result<Vec<f32>, EngineError> {
        let mut values = self.read(name, len)?;
        if !self.file.has_data() {
            values.fill(1.0);
        }
        Ok(values)
    }

    /// A vector's values; without data zeros, which take no memory until they are written.
    fn read(&self, name: &str, len: usize) -> Result<Vec<f32>, EngineError> {
        let t = self.info(name, &[len as u64])?;
        if t.dims != [len as u64] {
            let expected = vec![len as u64];
            return Err(EngineError::TensorShape { name: name.into(), found: t.dims.clone(), expected });
        }
        self.taken.borrow_mut().insert(name.into());
        let fail = |()| KernelError::Memory { what: "weights", bytes: len.saturating_mul(4) };
        let mut values = bytemuck::allocation::try_zeroed_vec(len).map_err(fail)?;
        if self.file.has_data() {
            (t.dtype.format().dequantize)(&self.file.bytes(&t), &mut values);
        }
        Ok(values)
    }

    /// A vector, if the file has it.
    pub fn opt_vector(&self, name: &str, len: usize) -> Result<Option<Vector>, EngineError> {
        if self.has(name) { self.vector(name, len).map(Some) } else { Ok(None) }
    }

    /// Marks a tensor as known though unused.
    pub fn ignore(&self, name: &str) {
        self.taken.borrow_mut().insert(name.into());
    }

    /// Refuses the model if the file has a tensor that nothing took.
    pub fn finish(self) -> Result<Seen, EngineError> {
        let taken = self.taken.into_inner();
        match self.file.tensors().iter().find(|t| !taken.contains(&t.name)) {
            None => Ok(Seen {
                guessed: self.guessed.into_inner().into_values().collect(),
                on_gpu: self.on_gpu.into_inner(),
            }),
            Some(t) => Err(EngineError::Unsupported(format!(
                "tensor {} is not one this engine implements for this architecture",
                t.name
            ))),
        }
    }
}
