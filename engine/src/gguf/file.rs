//! A GGUF model on disk or in memory, all its parts: metadata, tensor list, and each tensor's bytes.
//! Knows nothing of what the tensors are for.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytemuck::Zeroable;
use kernels::HostBytes;

use super::cursor::no_room;
use super::error::{ErrorKind, GgufError, shown};
use super::header::{self, Header};
pub use super::mmap::Access;
use super::mmap::{Damage, MOST_MAPS, Map};
use super::progress::Progress;
use super::split::{self, SplitName};
use super::tensor::TensorInfo;
use super::value::Metadata;

/// How the bytes get into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OpenMode {
    /// Map the file: pages are read on first use and shared between processes.
    #[default]
    Mmap,
    /// Read the whole file into memory at once (`--no-mmap`).
    Read,
}

/// An open model. Cheap handles to its bytes ([`File::bytes`]) outlive it.
pub struct File {
    path: PathBuf,
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    parts: Vec<Part>,
    /// Only headers were read.
    headers: bool,
    /// Parts of a split model that were not found; only where headers alone are read.
    missing: u64,
}

/// The bytes of one part.
struct Part {
    path: PathBuf,
    bytes: HostBytes,
    /// The same memory as `bytes`, if it is a map.
    map: Option<Arc<Map>>,
}

impl File {
    /// Opens a model: a file, or any part of a split one (`x-00002-of-00003.gguf`), whose other parts are found beside it.
    ///
    /// # Errors
    /// Whatever is wrong with the file or one of its parts; see [`ErrorKind`].
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> Result<Self, GgufError> {
        Self::open_with(path.as_ref(), mode, &Progress::default())
    }

    /// The same; `progress` is told of the bytes read into memory.
    ///
    /// # Errors
    /// As [`File::open`], and [`ErrorKind::Stopped`].
    pub fn open_with(path: &Path, mode: OpenMode, progress: &Progress) -> Result<Self, GgufError> {
        Self::open_parts(path, Some(mode), progress)
    }

    /// Reads headers only: the tensors' data need not be there, nor the other parts of a split model
    /// ([`File::missing_parts`]). There are no [`File::bytes`].
    ///
    /// # Errors
    /// As [`File::open`], about headers.
    pub fn headers(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        Self::open_parts(path.as_ref(), None, &Progress::default())
    }

    /// `mode`: how the data are read; `None`: not at all.
    fn open_parts(path: &Path, mode: Option<OpenMode>, progress: &Progress) -> Result<Self, GgufError> {
        let (header, part) = load(path, mode, progress)?;
        let count = split::count(&header).map_err(|e| GgufError::new(path, e))?;
        if count == 1 {
            return Ok(Self { headers: mode.is_none(), ..Self::join(path.into(), vec![(header, part)])? });
        }
        let name = SplitName::of(path)
            .filter(|n| n.count == count)
            .ok_or_else(|| GgufError::new(path, ErrorKind::SplitName { count }))?;
        split::check(&header, name.index, count).map_err(|e| GgufError::new(path, e))?;
        let mut given = Some((header, part));
        let (mut parts, mut absent) = (Vec::new(), 0);
        for i in 0..count {
            let part_path = name.part(i);
            let (header, part) = match given.take_if(|_| i == name.index) {
                Some(already) => already,
                None => match load(&part_path, mode, progress).map_err(|e| missing(e, i, count)) {
                    Err(e)
                        if mode.is_none() && i > 0 && matches!(e.kind(), ErrorKind::SplitMissing { .. }) =>
                    {
                        absent += 1;
                        continue;
                    }
                    other => other?,
                },
            };
            split::check(&header, i, count).map_err(|e| GgufError::new(&part_path, e))?;
            parts.push((header, part));
        }
        let total = parts.iter().map(|(h, _)| h.tensors.len() as u64).sum();
        let (first, part) = &parts[0];
        if absent == 0 {
            split::expect(first, split::KEY_TENSORS, total).map_err(|e| GgufError::new(&part.path, e))?;
        }
        Ok(Self { headers: mode.is_none(), missing: absent, ..Self::join(path.into(), parts)? })
    }

    /// Reads a file embedded in the program. `name` stands for the path in messages. The bytes are used where they are if
    /// they are aligned to 64 bytes, and copied otherwise.
    ///
    /// # Errors
    /// As [`File::open`]; parts of a split model are refused.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, GgufError> {
        if bytes.as_ptr().addr().is_multiple_of(size_of::<Line>()) {
            let bytes = HostBytes::new(Arc::new(bytes), 0..bytes.len()).expect("all of it");
            return Self::from_host_bytes(name, bytes);
        }
        Self::from_bytes(name, bytes)
    }

    /// Reads a file from a copy of `bytes`. `name` stands for the path in messages.
    ///
    /// # Errors
    /// As [`File::from_static`].
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self, GgufError> {
        let mut buffer = Buffer::new(bytes.len() as u64).map_err(|e| GgufError::new(name, e))?;
        buffer.as_mut().copy_from_slice(bytes);
        Self::from_host_bytes(name, buffer.into_host_bytes())
    }

    fn from_host_bytes(name: &str, bytes: HostBytes) -> Result<Self, GgufError> {
        let fail = |e| GgufError::new(name, e);
        let header = header::parse(&bytes).map_err(fail)?;
        let count = split::count(&header).map_err(fail)?;
        if count > 1 {
            return Err(fail(ErrorKind::SplitName { count }));
        }
        Self::join(name.into(), vec![(header, Part { path: name.into(), bytes, map: None })])
    }

    fn join(path: PathBuf, parts: Vec<(Header, Part)>) -> Result<Self, GgufError> {
        let mut file = Self {
            path,
            version: parts[0].0.version,
            alignment: parts[0].0.alignment,
            metadata: Metadata::default(),
            tensors: Vec::new(),
            index: HashMap::new(),
            parts: Vec::new(),
            headers: false,
            missing: 0,
        };
        for (i, (header, part)) in parts.into_iter().enumerate() {
            if i == 0 {
                file.metadata = header.metadata;
            }
            let n = header.tensors.len();
            let reserved = file.index.try_reserve(n).and_then(|()| file.tensors.try_reserve(n));
            reserved.map_err(|_| GgufError::new(&part.path, no_room::<TensorInfo>(n)))?;
            for mut t in header.tensors {
                t.part = i;
                if file.index.insert(t.name.clone(), file.tensors.len()).is_some() {
                    let tensor = shown(&t.name);
                    return Err(GgufError::new(&part.path, ErrorKind::DuplicateTensor { tensor }));
                }
                file.tensors.push(t);
            }
            file.parts.push(part);
        }
        Ok(file)
    }

    /// The path given to [`File::open`], or the name of an embedded file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// GGUF version, 2 or 3 (of the first part).
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of tensor data in bytes: a power of two of at least 8 (of the first part).
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Bytes of all parts together.
    pub fn total_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes.len() as u64).sum()
    }

    /// Number of parts; 1 if the model is not split.
    pub fn n_parts(&self) -> usize {
        self.parts.len()
    }

    /// Whether the tensors' data are there.
    pub fn has_data(&self) -> bool {
        !self.headers
    }

    /// Parts of a split model that [`File::headers`] did not find.
    pub fn missing_parts(&self) -> u64 {
        self.missing
    }

    /// The paths of all parts.
    pub fn part_paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// All metadata (of the first part, which holds them all).
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in file order, part after part. Empty for files that hold a vocabulary only.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// The data of a tensor, `n_bytes` of them, aligned in memory to at least 8 bytes.
    ///
    /// # Panics
    /// If `tensor` is not one of this file's [`File::tensors`], or only headers were read.
    pub fn bytes(&self, tensor: &TensorInfo) -> HostBytes {
        let part = self.parts.get(tensor.part);
        part.and_then(|p| p.bytes.slice(range(tensor)))
            .expect("a tensor of this file: the reader checked its range")
    }

    /// Tells the system how a tensor's data will be read. Advice only: no effect on files that are not mapped.
    pub fn advise(&self, tensor: &TensorInfo, access: Access) {
        self.advise_range(tensor.part, range(tensor), access);
    }

    /// Tells the system how the whole file will be read; see [`File::advise`].
    pub fn advise_all(&self, access: Access) {
        for (i, part) in self.parts.iter().enumerate() {
            self.advise_range(i, 0..part.bytes.len(), access);
        }
    }

    /// Whether the mapped files are still what was opened: the bytes that were read since are to be trusted only if they are.
    /// Files that were replaced or deleted meanwhile are: the map holds on to what was opened.
    ///
    /// # Errors
    /// [`ErrorKind::Changed`], [`ErrorKind::Unreadable`].
    pub fn check(&self) -> Result<(), GgufError> {
        for p in &self.parts {
            if let Some(Err(damage)) = p.map.as_ref().map(|m| m.check()) {
                let kind = match damage {
                    Damage::Truncated => ErrorKind::Changed { how: "truncated" },
                    Damage::Changed => ErrorKind::Changed { how: "written to" },
                    Damage::Unreadable => ErrorKind::Unreadable,
                    Damage::Io(e) => ErrorKind::Io(e),
                };
                return Err(GgufError::new(&p.path, kind));
            }
        }
        Ok(())
    }

    /// Keeps the mapped bytes of the tensors for whose names `here` holds in memory, reading them now.
    ///
    /// # Errors
    /// [`ErrorKind::Lock`], [`ErrorKind::Stopped`].
    pub fn lock(&self, here: impl Fn(&str) -> bool, progress: &Progress) -> Result<(), GgufError> {
        let tensors = self.tensors().iter().filter(|t| here(&t.name));
        let mapped: Vec<_> = tensors
            .filter_map(|t| Some((t, &self.parts.get(t.part)?.path, self.map(t.part)?)))
            .map(|(t, path, map)| (path, map, t.offset as usize..(t.offset + t.n_bytes) as usize))
            .collect();
        let bytes = mapped.iter().map(|m| m.2.len() as u64).sum();
        progress.expect(bytes);
        for (path, map, range) in mapped {
            for from in range.clone().step_by(PIECE) {
                if progress.is_stopped() {
                    return Err(GgufError::new(path, ErrorKind::Stopped));
                }
                let to = range.end.min(from + PIECE);
                map.lock(from..to).map_err(|e| GgufError::new(path, ErrorKind::Lock { bytes, error: e }))?;
                progress.add((to - from) as u64);
            }
        }
        Ok(())
    }

    /// The map of a part; `None` where it is in memory.
    pub(crate) fn map(&self, part: usize) -> Option<&Arc<Map>> {
        self.parts.get(part)?.map.as_ref()
    }

    fn advise_range(&self, part: usize, range: Range<usize>, access: Access) {
        if let Some(map) = self.parts.get(part).and_then(|p| p.map.as_ref()) {
            // A kernel that refuses the advice costs speed, not correctness.
            let _ = map.advise(range, access);
        }
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File")
            .field("path", &self.path)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

fn range(t: &TensorInfo) -> Range<usize> {
    t.offset as usize..(t.offset + t.n_bytes) as usize
}

/// A missing part is named by its number too.
fn missing(e: GgufError, index: u64, count: u64) -> GgufError {
    match e.kind() {
        ErrorKind::Io(io) if io.kind() == io::ErrorKind::NotFound => {
            GgufError::new(e.path(), ErrorKind::SplitMissing { number: index + 1, count })
        }
        _ => e,
    }
}

/// Bytes read, or locked, between two looks at who waits.
const PIECE: usize = 64 << 20;

/// Opens one file and parses its header.
fn load(path: &Path, mode: Option<OpenMode>, progress: &Progress) -> Result<(Header, Part), GgufError> {
    read_part(path, mode, progress).map_err(|e| GgufError::new(path, e))
}

fn read_part(path: &Path, mode: Option<OpenMode>, progress: &Progress) -> Result<(Header, Part), ErrorKind> {
    // Looked at before opening: opening a pipe would wait for its other end.
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        return Err(ErrorKind::Directory);
    }
    if !meta.is_file() {
        return Err(ErrorKind::NotRegular);
    }
    let mut file = fs::File::open(path)?;
    let len = file.metadata()?.len();
    if len == 0 {
        return Err(ErrorKind::Empty);
    }
    let part = match mode {
        None => {
            let header = header::parse_alone(map(&file)?.as_ref())?;
            return Ok((
                header,
                Part { path: path.into(), bytes: HostBytes::from_vec(Vec::new()), map: None },
            ));
        }
        Some(OpenMode::Mmap) => {
            let map = Arc::new(map(&file)?);
            let len = (*map).as_ref().len();
            let bytes = HostBytes::new(map.clone(), 0..len).expect("the whole map");
            Part { path: path.into(), bytes, map: Some(map) }
        }
        Some(OpenMode::Read) => {
            // The magic first: a huge file of another format is refused without reading it.
            let mut start = Vec::with_capacity(16);
            (&mut file).take(16).read_to_end(&mut start)?;
            header::check_magic(&start)?;
            let mut buffer = Buffer::new(len)?;
            let (head, rest) = buffer.as_mut().split_at_mut(start.len());
            head.copy_from_slice(&start);
            progress.expect(len);
            progress.add(start.len() as u64);
            for piece in rest.chunks_mut(PIECE) {
                if progress.is_stopped() {
                    return Err(ErrorKind::Stopped);
                }
                file.read_exact(piece)?;
                progress.add(piece.len() as u64);
            }
            Part { path: path.into(), bytes: buffer.into_host_bytes(), map: None }
        }
    };
    Ok((header::parse(&part.bytes)?, part))
}

fn map(file: &fs::File) -> Result<Map, ErrorKind> {
    Map::new(file)?.ok_or(ErrorKind::TooManyMaps { most: MOST_MAPS })
}

/// A cache line: buffers made of them give tensors the alignment they have in the file.
#[derive(Clone, Copy, Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// `len` bytes aligned to 64.
struct Buffer {
    lines: Box<[Line]>,
    len: usize,
}

impl Buffer {
    /// Zeros; pages are not touched until they are written.
    fn new(len: u64) -> Result<Self, ErrorKind> {
        let memory = |()| ErrorKind::Memory { bytes: len };
        let len = usize::try_from(len).map_err(|_| memory(()))?;
        let lines = bytemuck::allocation::try_zeroed_slice_box(len.div_ceil(64)).map_err(memory)?;
        Ok(Self { lines, len })
    }

    fn as_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }

    fn into_host_bytes(self) -> HostBytes {
        let len = self.len;
        HostBytes::new(Arc::new(self), 0..len).expect("the whole buffer")
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}
