//! What the backend asks of a GPU: memory, copies, kernels. Everything above runs unchanged on whatever implements it: a driver, or
//! an interpreter of PTX where there is no GPU. Knows addresses and bytes; nothing of shapes or formats.

use super::modules::Ptx;
use super::queue::Queue;
use crate::Place;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

/// Why there is no GPU to compute on, or none any more. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// The program was built without the driver's interface.
    #[error("this program was built without CUDA (cargo feature `cuda`): use --device cpu")]
    NotBuilt,
    /// No driver library on this machine.
    #[error("no NVIDIA driver was found ({library} cannot be loaded): install one, or use --device cpu")]
    NoDriver {
        /// The library looked for.
        library: String,
    },
    /// The driver does not read the PTX that ships.
    #[error(
        "the NVIDIA driver is too old: it supports CUDA {found}, {needed} is needed (driver 530 or later): update it, or use --device cpu"
    )]
    OldDriver {
        /// What the driver supports.
        found: String,
        /// What is needed.
        needed: String,
    },
    /// A driver, and nothing for it to drive.
    #[error("there is no GPU cuda:{index}: {count} here{hidden}; use --device cpu, or one that is here")]
    NoDevice {
        /// The one asked for.
        index: usize,
        /// GPUs that there are.
        count: usize,
        /// A remark on `CUDA_VISIBLE_DEVICES`, where it is set.
        hidden: String,
    },
    /// A GPU of before Turing.
    #[error(
        "{name} has compute capability {major}.{minor}; 7.5 (Turing) is the oldest supported: use --device cpu"
    )]
    OldDevice {
        /// The GPU.
        name: String,
        /// Its capability.
        major: u32,
        /// And the second half.
        minor: u32,
    },
    /// The driver does not begin: a service of it is missing, or another program has the GPU to itself.
    #[error(
        "NVIDIA's driver does not give access to the GPU ({call}: {why}): look at nvidia-smi, or use --device cpu"
    )]
    NotReady {
        /// What was called.
        call: &'static str,
        /// In the driver's words.
        why: String,
    },
    /// The driver does not take a kernel.
    #[error("the driver refuses the kernels of {module} ({why}): update it, or use --device cpu")]
    Refused {
        /// The module.
        module: String,
        /// In its own words.
        why: String,
    },
    /// Not enough memory.
    #[error(
        "out of GPU memory: {bytes} bytes for the {what}, {free} are free: choose a smaller context (-c), batch (-b) or model"
    )]
    Memory {
        /// What for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free at that time.
        free: u64,
    },
    /// The GPU, or its context, is gone; nothing on it can be used any more.
    #[error(
        "the GPU was lost ({why}): restart the program; if it happens again, look at the system's log (dmesg, nvidia-smi)"
    )]
    Lost {
        /// In the driver's words.
        why: String,
    },
    /// Any other refusal.
    #[error("{call}: {why}")]
    Driver {
        /// What was called.
        call: &'static str,
        /// In the driver's words.
        why: String,
    },
}

/// A kernel that was loaded, by the number that the [`Gpu`] gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelId(pub usize);

/// An argument of a launch, of the size that the kernel's parameter has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A device address or 64-bit number.
    U64(u64),
    /// A 32-bit number.
    U32(u32),
    /// A float.
    F32(f32),
}

/// How many blocks, of how many threads, with how many bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block (one dimension).
    pub threads: u32,
    /// Dynamic shared memory of a block; with what the kernel declares at most [`GpuInfo::shared`].
    pub shared: u32,
    /// In a graph, behind another launch: it may begin while that one runs, and whatever that one may overlap. The kernel itself waits for
    /// them before it touches what they write, or writes.
    pub overlaps: bool,
}

/// A step of a graph.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step<'a> {
    /// A launch.
    Launch {
        /// The kernel.
        kernel: KernelId,
        /// Its grid.
        launch: Launch,
        /// Its arguments.
        args: &'a [Arg],
    },
    /// A copy from the host, of bytes that are told when the graph runs.
    Write {
        /// Where to.
        at: u64,
        /// How many.
        bytes: usize,
    },
}

/// A graph, by the number that the [`Gpu`] gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphId(pub usize);

/// Bytes that the writes of graphs have room for.
pub const STAGED: usize = 1 << 20;

/// Bytes of weights that are sent at a time.
pub(super) const PIECE: usize = 4 << 20;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// For people.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of shared memory that a block may have.
    pub shared: u32,
    /// It drives a display.
    pub display: bool,
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, compute capability {}.{}", self.name, self.capability.0, self.capability.1)
    }
}

/// A GPU. Copies, launches and graphs happen in the order of the calls, whichever thread makes them; only [`Gpu::read`] and
/// [`Gpu::synchronize`] wait. Addresses are the GPU's: an implementor may not assume that they are sound, and must answer with an
/// error where it can tell.
///
/// # Errors
/// Of all calls: [`GpuError`]. After [`GpuError::Lost`] every further call gives it again.
pub trait Gpu: Send + Sync {
    /// What it is.
    fn info(&self) -> GpuInfo;
    /// Bytes free and in all.
    fn memory(&self) -> Result<(u64, u64), GpuError>;
    /// Memory for `bytes` (not 0), aligned to 256; its content is open.
    fn alloc(&self, bytes: usize) -> Result<u64, GpuError>;
    /// Gives memory back, once what was launched before is done with it.
    fn free(&self, at: u64) -> Result<(), GpuError>;
    /// Fills with zeros.
    fn zero(&self, at: u64, bytes: usize) -> Result<(), GpuError>;
    /// Copies from the host; `bytes` may be changed when it returns.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError>;
    /// Copies to `at` and behind what `fill` makes, piece by piece, until it says that it made nothing; pieces have room for `least` bytes and
    /// begin at a multiple of eight. A GPU may copy one while the next is made.
    fn stream(
        &self,
        at: u64,
        least: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Result<(), GpuError> {
        piece_by_piece(self, at, least, fill)
    }
    /// Copies to the host, after everything before.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError>;
    /// Makes the kernels of a module usable.
    fn load(&self, module: &Ptx) -> Result<(), GpuError>;
    /// The kernel `entry` of a loaded module.
    fn kernel(&self, module: &str, entry: &str) -> Result<KernelId, GpuError>;
    /// Runs a kernel, some time.
    fn launch(&self, kernel: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError>;
    /// Waits for everything, and reports what went wrong meanwhile.
    fn synchronize(&self) -> Result<(), GpuError>;
    /// A graph of `steps`, each after the one before (but see [`Launch::overlaps`]), that the GPU runs at one call. The bytes of its writes
    /// wait from byte `from` of [`STAGED`] on. A GPU that knows no graphs refuses, and launches one by one do the same.
    fn graph(&self, steps: &[Step<'_>], from: usize) -> Result<GraphId, GpuError>;
    /// Another grid and other arguments for step `i` of a graph, a launch of the same kernel.
    fn change(&self, graph: GraphId, i: usize, launch: Launch, args: &[Arg]) -> Result<(), GpuError>;
    /// Runs a graph, some time. `bytes`: those of its writes, one after the other, which may be changed when it returns. The host must have
    /// waited since the last run of a graph whose bytes were in the same place.
    fn run(&self, graph: GraphId, bytes: &[u8]) -> Result<(), GpuError>;
    /// Gives a graph up, once it has run.
    fn forget(&self, graph: GraphId) -> Result<(), GpuError>;
}

/// [`Gpu::stream`] through plain memory.
pub(super) fn piece_by_piece<G: Gpu + ?Sized>(
    gpu: &G,
    mut at: u64,
    least: usize,
    fill: &mut dyn FnMut(&mut [u8]) -> usize,
) -> Result<(), GpuError> {
    // Aligned as what is pinned: makers may take it for floats.
    let mut words = vec![0u64; PIECE.max(least).div_ceil(8)];
    let piece = bytemuck::cast_slice_mut(&mut words);
    loop {
        let n = fill(piece);
        if n == 0 {
            return Ok(());
        }
        gpu.write(at, &piece[..n])?;
        at += n as u64;
    }
}

/// A GPU with a count of what was allocated on it.
pub(crate) struct Counted {
    pub gpu: Queue,
    pub place: Place,
    bytes: AtomicUsize,
}

impl Counted {
    pub fn new(gpu: Box<dyn Gpu>) -> Self {
        static PLACES: AtomicU32 = AtomicU32::new(1);
        let place = Place(PLACES.fetch_add(1, Relaxed));
        Self { gpu: Queue::new(gpu), place, bytes: AtomicUsize::new(0) }
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }
}

/// Memory on a GPU, given back when it goes.
pub struct Memory {
    of: Arc<Counted>,
    at: u64,
    bytes: usize,
}

impl Memory {
    pub(crate) fn new(of: &Arc<Counted>, bytes: usize, what: &'static str) -> Result<Self, GpuError> {
        let at = of.gpu.alloc(bytes.max(1)).map_err(|e| match e {
            GpuError::Memory { bytes, free, .. } => GpuError::Memory { what, bytes, free },
            e => e,
        })?;
        of.bytes.fetch_add(bytes, Relaxed);
        Ok(Self { of: of.clone(), at, bytes })
    }

    /// Its address.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn place(&self) -> Place {
        self.of.place
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A GPU that is lost has nothing to give back; a caller could do nothing about any other refusal.
        let _ = self.of.gpu.free(self.at);
        self.of.bytes.fetch_sub(self.bytes, Relaxed);
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes of device {})", self.bytes, self.of.place.0)
    }
}
