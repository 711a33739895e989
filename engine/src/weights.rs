//! Tensors of a file as weights on a device: shapes checked against the configuration, every tensor accounted for.

use crate::EngineError;
use crate::gguf::File;
use kernels::{Device, Vector, Weight};
use std::cell::RefCell;
use std::collections::HashSet;

/// Hands out the tensors of a file by name and shape. Shapes are `[count, rows (out), cols (in)]`: GGUF's, reversed.
pub struct Loader<'a> {
    file: &'a File,
    device: &'a Device,
    taken: RefCell<HashSet<String>>,
}

impl<'a> Loader<'a> {
    /// A loader of `file` for `device`.
    pub fn new(file: &'a File, device: &'a Device) -> Self {
        Self { file, device, taken: RefCell::default() }
    }

    /// Whether the file has this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// Rows of a two-dimensional tensor, before its shape is known (the vocabulary's size).
    pub fn rows(&self, name: &str) -> Result<usize, EngineError> {
        let t = self.file.tensor(name).ok_or_else(|| EngineError::MissingTensor(name.into()))?;
        Ok(t.dims.get(1).copied().unwrap_or(1) as usize)
    }

    fn load(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        let t = self.file.tensor(name).ok_or_else(|| EngineError::MissingTensor(name.into()))?;
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
        let host = Weight::host(t.dtype, count, rows, cols, self.file.bytes(t))?;
        Ok(self.device.upload(host)?)
    }

    /// A matrix `[rows, cols]`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.load(name, 1, rows, cols)
    }

    /// A stack of matrices `[count][rows, cols]` (experts, heads).
    pub fn stack(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.load(name, count, rows, cols)
    }

    /// The same as one matrix `[count * rows, cols]`, of which rows can be taken.
    pub fn stacked(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.load(name, count, rows, cols)?;
        let t = self.file.tensor(name).ok_or_else(|| EngineError::MissingTensor(name.into()))?;
        Ok(self.device.upload(Weight::host(t.dtype, 1, count * rows, cols, self.file.bytes(t))?)?)
    }

    /// A vector, widened to f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vector, EngineError> {
        Ok(Vector::new(self.values(name, len)?))
    }

    /// A vector's values on the host.
    pub fn values(&self, name: &str, len: usize) -> Result<Vec<f32>, EngineError> {
        let t = self.file.tensor(name).ok_or_else(|| EngineError::MissingTensor(name.into()))?;
        if t.dims != [len as u64] {
            let expected = vec![len as u64];
            return Err(EngineError::TensorShape { name: name.into(), found: t.dims.clone(), expected });
        }
        self.taken.borrow_mut().insert(name.into());
        let mut values = vec![0.0; len];
        (t.dtype.format().dequantize)(&self.file.bytes(t), &mut values);
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
    pub fn finish(self) -> Result<(), EngineError> {
        let taken = self.taken.into_inner();
        match self.file.tensors().iter().find(|t| !taken.contains(&t.name)) {
            None => Ok(()),
            Some(t) => Err(EngineError::Unsupported(format!(
                "tensor {} is not one this engine implements for this architecture",
                t.name
            ))),
        }
    }
}
