//! Writes GGUF version 3. Tensors are streamed one after the other, so that a file of any size passes through little
//! memory; the file appears under its name only when it is whole. Knows nothing of quantisation.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use quant::DType;

use super::cursor::{ARRAY, STRING};
use super::error::{ErrorKind, GgufError, shown};
use super::header::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT, check_alignment, tensor_bytes};
use super::value::{Array, Metadata, Value};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// The type of its data.
    pub dtype: DType,
    /// 1 to 4 dimensions, innermost first.
    pub dims: Vec<u64>,
}

/// Header and layout of a file to be.
struct Plan {
    header: Vec<u8>,
    alignment: u64,
    /// Name and bytes of each tensor.
    tensors: Vec<(String, u64)>,
}

/// A GGUF file in the making. Dropped before [`Writer::finish`] it leaves nothing behind.
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    /// `None` once finished.
    out: Option<BufWriter<fs::File>>,
    plan: Plan,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    written: u64,
    position: u64,
}

impl Writer {
    /// Starts a file: writes the header for `tensors`, whose data must follow in this order. The alignment is the
    /// metadata's `general.alignment`, or 32.
    ///
    /// # Errors
    /// The path cannot be written; a shape, a type or the alignment is impossible; a name occurs twice.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &Metadata,
        tensors: &[NewTensor],
    ) -> Result<Self, GgufError> {
        let fail = |e: ErrorKind| GgufError::new(path.as_ref(), e);
        let plan = plan(metadata, tensors).map_err(fail)?;
        let path = target(path.as_ref()).map_err(fail)?;
        let partial = partial_name(&path);
        let file = fs::File::create_new(&partial).map_err(|e| fail(e.into()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let result = out.write_all(&plan.header);
        let position = plan.header.len() as u64;
        let writer = Self { path, partial, out: Some(out), plan, current: 0, written: 0, position };
        result.map_err(|e| writer.fail(e))?;
        Ok(writer)
    }

    /// Appends data of the next tensors, in pieces of any size; a piece must not reach into the next tensor.
    ///
    /// # Errors
    /// The disk's, or more data than the tensor has room for.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let Some((name, expected)) = self.plan.tensors.get(self.current) else {
            return Err(self.fail(wrong_size("(behind the last tensor)", bytes.len() as u64, 0)));
        };
        let expected = *expected;
        let written = self.written + bytes.len() as u64;
        if written > expected {
            return Err(self.fail(wrong_size(name, written, expected)));
        }
        self.put(bytes)?;
        self.written = written;
        if written == expected {
            self.pad()?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Closes the file and gives it its name. Returns its length in bytes.
    ///
    /// # Errors
    /// The disk's, or data are missing.
    pub fn finish(self) -> Result<u64, GgufError> {
        if let Some((name, expected)) = self.plan.tensors.get(self.current) {
            return Err(self.fail(wrong_size(name, self.written, *expected)));
        }
        self.close()
    }

    /// Closes the file without any tensor's data: enough for [`super::File::headers`], and for planning. Returns its length.
    ///
    /// # Errors
    /// The disk's, or data were written already.
    pub fn finish_header(self) -> Result<u64, GgufError> {
        if self.position > self.plan.header.len() as u64 {
            return Err(self.fail(wrong_size(
                "(a header alone)",
                self.position,
                self.plan.header.len() as u64,
            )));
        }
        self.close()
    }

    fn close(mut self) -> Result<u64, GgufError> {
        let out = self.out.take().expect("finish is called once");
        let done = out.into_inner().map_err(|e| e.into_error()).and_then(|file| {
            file.sync_all()?;
            drop(file);
            fs::rename(&self.partial, &self.path)
        });
        if let Err(e) = done {
            let _ = fs::remove_file(&self.partial);
            return Err(self.fail(e));
        }
        Ok(self.position)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let out = self.out.as_mut().expect("present until finish");
        match out.write_all(bytes) {
            Ok(()) => {
                self.position += bytes.len() as u64;
                Ok(())
            }
            Err(e) => Err(self.fail(e)),
        }
    }

    fn pad(&mut self) -> Result<(), GgufError> {
        let mut left = self.position.next_multiple_of(self.plan.alignment) - self.position;
        while left > 0 {
            let n = left.min(4096);
            self.put(&[0; 4096][..n as usize])?;
            left -= n;
        }
        Ok(())
    }

    fn fail(&self, e: impl Into<ErrorKind>) -> GgufError {
        GgufError::new(&self.path, e)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.out.take().is_some() {
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// A whole small file in memory.
///
/// # Errors
/// As [`Writer`]'s, without the disk's.
pub fn encode(metadata: &Metadata, tensors: &[(NewTensor, &[u8])]) -> Result<Vec<u8>, ErrorKind> {
    let infos: Vec<NewTensor> = tensors.iter().map(|(t, _)| t.clone()).collect();
    let plan = plan(metadata, &infos)?;
    let mut out = plan.header;
    for ((_, data), (name, expected)) in tensors.iter().zip(&plan.tensors) {
        if data.len() as u64 != *expected {
            return Err(wrong_size(name, data.len() as u64, *expected));
        }
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(plan.alignment as usize), 0);
    }
    Ok(out)
}

fn wrong_size(name: &str, found: u64, expected: u64) -> ErrorKind {
    ErrorKind::WriteSize { tensor: shown(name), found, expected }
}

/// Where the file will really lie: behind links, and never in place of a device or a folder.
fn target(path: &Path) -> Result<PathBuf, ErrorKind> {
    match fs::metadata(path) {
        Ok(m) if m.is_dir() => Err(ErrorKind::Directory),
        Ok(m) if !m.is_file() => Err(ErrorKind::NotRegular),
        Ok(m) if m.permissions().readonly() => {
            Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied).into())
        }
        Ok(_) => Ok(fs::canonicalize(path)?),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && path.file_name().is_some() => Ok(path.into()),
        Err(e) => Err(e.into()),
    }
}

/// A name in the same folder (a rename must not cross file systems) that no other writer uses.
fn partial_name(path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}-{}.partial", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    path.with_file_name(name)
}

fn plan(metadata: &Metadata, tensors: &[NewTensor]) -> Result<Plan, ErrorKind> {
    let alignment = metadata.u64(KEY_ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
    check_alignment(alignment)?;
    let mut h = b"GGUF".to_vec();
    h.extend(3u32.to_le_bytes());
    h.extend((tensors.len() as u64).to_le_bytes());
    h.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut h, key);
        put_value(&mut h, value);
    }
    let mut offset = 0u64;
    let mut sizes = Vec::with_capacity(tensors.len());
    let mut names = HashSet::new();
    for t in tensors {
        let n_bytes = tensor_bytes(&t.name, t.dtype, &t.dims)?;
        if !names.insert(&t.name) {
            return Err(ErrorKind::DuplicateTensor { tensor: shown(&t.name) });
        }
        put_string(&mut h, &t.name);
        h.extend((t.dims.len() as u32).to_le_bytes());
        t.dims.iter().for_each(|d| h.extend(d.to_le_bytes()));
        h.extend(t.dtype.id().to_le_bytes());
        h.extend(offset.to_le_bytes());
        offset = offset
            .checked_add(n_bytes)
            .and_then(|o| o.checked_next_multiple_of(alignment))
            .ok_or_else(|| ErrorKind::TensorSize { tensor: shown(&t.name), dims: t.dims.clone() })?;
        sizes.push((t.name.clone(), n_bytes));
    }
    // Readers look for data at the next multiple even where there are none.
    h.resize(h.len().next_multiple_of(alignment as usize), 0);
    Ok(Plan { header: h, alignment, tensors: sizes })
}

fn put_string(h: &mut Vec<u8>, s: &str) {
    h.extend((s.len() as u64).to_le_bytes());
    h.extend(s.as_bytes());
}

/// The type id, then the value.
fn put_value(h: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($id:expr, $v:expr) => {{
            h.extend(u32::to_le_bytes($id));
            h.extend($v.to_le_bytes());
        }};
    }
    match value {
        Value::U8(v) => number!(0, v),
        Value::I8(v) => number!(1, v),
        Value::U16(v) => number!(2, v),
        Value::I16(v) => number!(3, v),
        Value::U32(v) => number!(4, v),
        Value::I32(v) => number!(5, v),
        Value::F32(v) => number!(6, v),
        Value::Bool(v) => number!(7, u8::from(*v)),
        Value::String(v) => {
            h.extend(STRING.to_le_bytes());
            put_string(h, v);
        }
        Value::Array(v) => {
            h.extend(ARRAY.to_le_bytes());
            put_array(h, v);
        }
        Value::U64(v) => number!(10, v),
        Value::I64(v) => number!(11, v),
        Value::F64(v) => number!(12, v),
    }
}

/// The elements' type id, their number, the elements.
fn put_array(h: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($id:expr, $v:expr) => {{
            h.extend(u32::to_le_bytes($id));
            h.extend(($v.len() as u64).to_le_bytes());
            $v.iter().for_each(|x| h.extend(x.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(v) => numbers!(0, v),
        Array::I8(v) => numbers!(1, v),
        Array::U16(v) => numbers!(2, v),
        Array::I16(v) => numbers!(3, v),
        Array::U32(v) => numbers!(4, v),
        Array::I32(v) => numbers!(5, v),
        Array::F32(v) => numbers!(6, v),
        Array::Bool(v) => numbers!(7, v.iter().map(|&b| u8::from(b)).collect::<Vec<_>>()),
        Array::String(v) => {
            h.extend(STRING.to_le_bytes());
            h.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|s| put_string(h, s));
        }
        Array::Array(v) => {
            h.extend(ARRAY.to_le_bytes());
            h.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|a| put_array(h, a));
        }
        Array::U64(v) => numbers!(10, v),
        Array::I64(v) => numbers!(11, v),
        Array::F64(v) => numbers!(12, v),
    }
}
