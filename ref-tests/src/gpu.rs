//! A GPU for tests: the PTX interpreter behind the seam that the CUDA backend computes on, with faults on request. Reads of memory that
//! nothing wrote, accesses outside of allocations and whatever else the interpreter notices are errors of the launch or copy.

use crate::mirror::{self, Machine, Text};
use kernels::cuda::modules::Ptx;
use kernels::cuda::{Arg, CudaBackend, Gpu, GpuError, GpuInfo, KernelId, Launch};
use kernels::{Device, KernelError};
use ptx::Param;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// What is to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The n-th allocation from now is refused.
    Alloc(usize),
    /// The n-th launch from now fails.
    Launch(usize),
    /// The n-th call of any kind from now finds the GPU lost, and so do all that follow.
    Lost(usize),
}

/// A call that a watcher is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Something was copied there.
    Write,
    /// Something was copied back: the host waited.
    Read,
    /// This kernel was launched.
    Launch(String),
}

struct State {
    machine: Machine,
    modules: Vec<(&'static str, Arc<Text>)>,
    kernels: Vec<(usize, String)>,
    held: HashMap<u64, usize>,
    /// Bytes that may be held.
    size: u64,
    fault: Option<Fault>,
    lost: bool,
    launches: usize,
    waits: usize,
    capability: (u32, u32),
    watcher: Option<Box<dyn FnMut(Call) + Send>>,
}

impl State {
    fn tell(&mut self, call: Call) {
        if let Some(w) = &mut self.watcher {
            w(call);
        }
    }
}

/// An interpreted GPU; clones are the same one.
#[derive(Clone)]
pub struct Interpreted(Arc<Mutex<State>>);

/// Texts parsed so far: they are the same for every GPU.
fn parse(ptx: &Ptx) -> Result<Arc<Text>, GpuError> {
    static PARSED: OnceLock<Mutex<HashMap<&'static str, Arc<Text>>>> = OnceLock::new();
    let mut parsed = PARSED.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
    if let Some(m) = parsed.get(ptx.name) {
        return Ok(m.clone());
    }
    let refused = |e: ptx::PtxError| GpuError::Refused { module: ptx.name.into(), why: e.to_string() };
    let module = Arc::new(Text::new(ptx.text).map_err(refused)?);
    parsed.insert(ptx.name, module.clone());
    Ok(module)
}

fn failed(call: &'static str) -> impl Fn(ptx::PtxError) -> GpuError {
    move |e| GpuError::Driver { call, why: e.to_string() }
}

impl Interpreted {
    /// One of so many bytes.
    pub fn new(size: u64) -> Self {
        Self::of(Machine::alone(), size, (7, 5))
    }

    /// One that a GPU mirrors, where `RSINFER_TEST_GPU` asks for it: kernels are those of its generation.
    pub fn mirrored(size: u64) -> Self {
        Self::of(Machine::new(), size, mirror::device().map_or((7, 5), |d| d.capability()))
    }

    fn of(machine: Machine, size: u64, capability: (u32, u32)) -> Self {
        let (held, modules, kernels) = (HashMap::new(), Vec::new(), Vec::new());
        let state = State {
            machine,
            modules,
            kernels,
            held,
            size,
            fault: None,
            lost: false,
            launches: 0,
            waits: 0,
            watcher: None,
            capability,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The backend's device on it.
    ///
    /// # Errors
    /// A fault asked for.
    pub fn device(&self) -> Result<Device, KernelError> {
        Ok(Device::new(CudaBackend::new(Box::new(self.clone()), "cuda:0")?))
    }

    /// Arms a fault.
    pub fn fail(&self, fault: Fault) {
        self.state().fault = Some(fault);
    }

    /// Has `watcher` told of copies and launches from now on.
    pub fn watch(&self, watcher: impl FnMut(Call) + Send + 'static) {
        self.state().watcher = Some(Box::new(watcher));
    }

    /// Launches so far, and how often the host waited for the GPU.
    pub fn counts(&self) -> (usize, usize) {
        let s = self.state();
        (s.launches, s.waits)
    }

    /// Bytes held.
    pub fn held(&self) -> usize {
        self.state().held.values().sum()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The state for a call, unless the GPU is lost by now.
    fn call(&self) -> Result<MutexGuard<'_, State>, GpuError> {
        let mut s = self.state();
        let lost = due(match &mut s.fault {
            Some(Fault::Lost(n)) => Some(n),
            _ => None,
        });
        s.lost |= lost;
        match s.lost {
            true => Err(GpuError::Lost { why: "a test asked for it".into() }),
            false => Ok(s),
        }
    }
}

/// Counts down; true when it is time.
fn due(n: Option<&mut usize>) -> bool {
    n.is_some_and(|n| {
        *n = n.saturating_sub(1);
        *n == 0
    })
}

impl Gpu for Interpreted {
    fn info(&self) -> GpuInfo {
        GpuInfo { name: "PTX interpreter".into(), capability: self.state().capability, display: false }
    }

    fn memory(&self) -> Result<(u64, u64), GpuError> {
        let s = self.call()?;
        Ok((s.size - s.held.values().sum::<usize>() as u64, s.size))
    }

    fn alloc(&self, bytes: usize) -> Result<u64, GpuError> {
        let mut s = self.call()?;
        let free = s.size - s.held.values().sum::<usize>() as u64;
        let refused = due(match &mut s.fault {
            Some(Fault::Alloc(n)) => Some(n),
            _ => None,
        });
        if refused || bytes as u64 > free {
            return Err(GpuError::Memory { what: "test", bytes, free });
        }
        let at = s.machine.alloc(bytes);
        s.held.insert(at, bytes);
        Ok(at)
    }

    fn free(&self, at: u64) -> Result<(), GpuError> {
        let mut s = self.state();
        s.held.remove(&at);
        s.machine.free(at).map_err(failed("free"))
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), GpuError> {
        self.call()?.machine.write(at, &vec![0; bytes]).map_err(failed("zero"))
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
        let mut s = self.call()?;
        s.tell(Call::Write);
        s.machine.write(at, bytes).map_err(failed("write"))
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        let mut s = self.call()?;
        s.waits += 1;
        s.tell(Call::Read);
        bytes.copy_from_slice(&s.machine.read(at, bytes.len()).map_err(failed("read"))?);
        Ok(())
    }

    fn load(&self, module: &Ptx) -> Result<(), GpuError> {
        let mut s = self.call()?;
        s.modules.push((module.name, parse(module)?));
        Ok(())
    }

    fn kernel(&self, module: &str, entry: &str) -> Result<KernelId, GpuError> {
        let mut s = self.call()?;
        let missing = || GpuError::Refused { module: module.into(), why: format!("it has no {entry}") };
        let m = s.modules.iter().position(|m| m.0 == module).ok_or_else(missing)?;
        s.modules[m].1.has(entry).then_some(()).ok_or_else(missing)?;
        s.kernels.push((m, entry.into()));
        Ok(KernelId(s.kernels.len() - 1))
    }

    fn launch(&self, kernel: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        let mut s = self.call()?;
        s.launches += 1;
        let refused = due(match &mut s.fault {
            Some(Fault::Launch(n)) => Some(n),
            _ => None,
        });
        if refused {
            return Err(GpuError::Driver { call: "launch", why: "a test asked for it".into() });
        }
        let (m, entry) = s.kernels[kernel.0].clone();
        s.tell(Call::Launch(entry.clone()));
        let module = s.modules[m].1.clone();
        let params: Vec<Param> = args
            .iter()
            .map(|a| match a {
                Arg::U64(x) => Param::U64(*x),
                Arg::U32(x) => Param::U32(*x),
                Arg::F32(x) => Param::F32(*x),
            })
            .collect();
        let block = [launch.threads, 1, 1];
        let done = s.machine.launch(&module, &entry, launch.grid, block, launch.shared as usize, &params);
        done.map(|_| ()).map_err(failed("launch"))
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.call()?.waits += 1;
        Ok(())
    }
}
