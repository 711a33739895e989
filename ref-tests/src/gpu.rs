//! A GPU for tests: the PTX interpreter behind the seam that the CUDA backend computes on, with faults on request. Reads of memory that
//! nothing wrote, accesses outside of allocations and whatever else the interpreter notices are errors of the launch or copy.

use crate::mirror::{self, Machine, Text};
use kernels::cuda::modules::Ptx;
use kernels::cuda::{Arg, CudaBackend, Gpu, GpuError, GpuInfo, GraphId, KernelId, Launch, STAGED, Step};
use kernels::{Device, KernelError};
use ptx::Param;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// What is to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The n-th allocation from now is refused.
    Alloc(usize),
    /// The n-th launch from now is refused, of a kernel or a graph, and so are all that follow.
    Launch(usize),
    /// The n-th call from now that makes, changes or runs a graph is refused, and so are all that follow.
    Graph(usize),
    /// Graphs of launches that overlap are refused.
    Overlaps,
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

/// What was asked of it so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Launches one by one.
    pub launches: usize,
    /// Copies from the host, one by one.
    pub writes: usize,
    /// How often the host waited.
    pub waits: usize,
    /// Bytes copied to the host.
    pub read: usize,
    /// Graphs made.
    pub graphs: usize,
    /// Launches of a graph that were changed.
    pub changes: usize,
    /// Graphs run.
    pub runs: usize,
    /// Launches of graphs that may begin while the one before runs.
    pub overlaps: usize,
}

impl std::ops::Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            launches: self.launches - before.launches,
            writes: self.writes - before.writes,
            waits: self.waits - before.waits,
            read: self.read - before.read,
            graphs: self.graphs - before.graphs,
            changes: self.changes - before.changes,
            runs: self.runs - before.runs,
            overlaps: self.overlaps - before.overlaps,
        }
    }
}

/// A step of a graph, with its arguments or its number of bytes.
#[derive(Clone)]
enum Kept {
    Launch(KernelId, Launch, Vec<Arg>),
    Write(u64, usize),
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
    capability: (u32, u32),
    watcher: Option<Box<dyn FnMut(Call) + Send>>,
    /// Where their bytes begin, and their steps.
    graphs: Vec<Option<(usize, Vec<Kept>)>>,
    /// Where the bytes lie of those that ran since the host last waited.
    running: Vec<Range<usize>>,
    counts: Counts,
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

    /// One of another generation than Turing: texts for `sm_80` run from 8.0 on.
    pub fn like(capability: (u32, u32), size: u64) -> Self {
        Self::of(Machine::alone(), size, capability)
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
            watcher: None,
            capability,
            graphs: Vec::new(),
            running: Vec::new(),
            counts: Counts::default(),
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

    /// What was asked of it so far.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Graphs that were made and not given up.
    pub fn graphs(&self) -> usize {
        self.state().graphs.iter().flatten().count()
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

impl State {
    fn tell(&mut self, call: Call) {
        if let Some(w) = &mut self.watcher {
            w(call);
        }
    }

    /// Bytes of shared memory that a block may have.
    fn room(&self) -> u32 {
        let kib = match self.capability {
            (7, _) => 64,
            (8, 6 | 9) | (12, _) => 99,
            (8, _) => 163,
            _ => 227,
        };
        kib << 10
    }

    /// See [`fits`].
    fn fits(&self, kernel: KernelId, launch: Launch) -> Result<(), GpuError> {
        let (m, entry) = &self.kernels[kernel.0];
        fits(self.modules[*m].1.shared_bytes(entry), launch.shared, self.room())
    }

    fn waited(&mut self) {
        self.counts.waits += 1;
        self.running.clear();
    }

    /// A launch, alone or of a graph.
    fn launches(&mut self) -> Result<(), GpuError> {
        let refused = due(match &mut self.fault {
            Some(Fault::Launch(n)) => Some(n),
            _ => None,
        });
        if refused { Err(refusal("launch")) } else { Ok(()) }
    }

    /// One kernel; `overlaps`: those before it may still run.
    fn execute(
        &mut self,
        kernel: KernelId,
        launch: Launch,
        args: &[Arg],
        overlaps: bool,
    ) -> Result<(), GpuError> {
        let (m, entry) = self.kernels[kernel.0].clone();
        self.tell(Call::Launch(entry.clone()));
        let module = self.modules[m].1.clone();
        let params: Vec<Param> = args
            .iter()
            .map(|a| match a {
                Arg::U64(x) => Param::U64(*x),
                Arg::U32(x) => Param::U32(*x),
                Arg::F32(x) => Param::F32(*x),
            })
            .collect();
        let block = [launch.threads, 1, 1];
        let (machine, shared) = (&mut self.machine, launch.shared as usize);
        let done = match overlaps {
            true => machine.launch_overlapping(&module, &entry, launch.grid, block, shared, &params),
            false => machine.launch(&module, &entry, launch.grid, block, shared, &params),
        };
        done.map(|_| ()).map_err(failed("launch"))
    }

    /// A call on a graph.
    fn graph(&mut self, id: GraphId) -> Result<&mut (usize, Vec<Kept>), GpuError> {
        self.grants()?;
        self.graphs.get_mut(id.0).and_then(Option::as_mut).ok_or_else(|| refusal("no such graph"))
    }

    fn grants(&mut self) -> Result<(), GpuError> {
        // Once it is time it stays so.
        let refused = due(match &mut self.fault {
            Some(Fault::Graph(n)) => Some(n),
            _ => None,
        });
        if refused { Err(refusal("graph")) } else { Ok(()) }
    }
}

/// The shared memory that a kernel declares and what it is launched with must fit a block together: a driver refuses any more.
fn fits(declared: usize, launched: u32, room: u32) -> Result<(), GpuError> {
    let bytes = declared + launched as usize;
    let why = || format!("{bytes} bytes of shared memory, a block has {room}");
    if bytes > room as usize { Err(GpuError::Driver { call: "launch", why: why() }) } else { Ok(()) }
}

fn refusal(call: &'static str) -> GpuError {
    GpuError::Driver { call, why: "a test asked for it".into() }
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
        let s = self.state();
        GpuInfo { name: "PTX interpreter".into(), capability: s.capability, shared: s.room(), display: false }
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
        s.counts.writes += 1;
        s.tell(Call::Write);
        s.machine.write(at, bytes).map_err(failed("write"))
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        let mut s = self.call()?;
        s.waited();
        s.counts.read += bytes.len();
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
        s.counts.launches += 1;
        s.launches()?;
        s.fits(kernel, launch)?;
        s.execute(kernel, launch, args, false)
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.call()?.waited();
        Ok(())
    }

    fn graph(&self, steps: &[Step<'_>], from: usize) -> Result<GraphId, GpuError> {
        let mut s = self.call()?;
        s.grants()?;
        for step in steps {
            if let Step::Launch { kernel, launch, .. } = *step {
                s.fits(kernel, launch)?;
            }
        }
        let overlaps = |s: &Step<'_>| matches!(s, Step::Launch { launch, .. } if launch.overlaps);
        if s.fault == Some(Fault::Overlaps) && steps.iter().any(overlaps) {
            return Err(refusal("graph"));
        }
        let kept = |step: &Step<'_>| match *step {
            Step::Launch { kernel, launch, args } => Kept::Launch(kernel, launch, args.to_vec()),
            Step::Write { at, bytes } => Kept::Write(at, bytes),
        };
        s.graphs.push(Some((from, steps.iter().map(kept).collect())));
        s.counts.graphs += 1;
        Ok(GraphId(s.graphs.len() - 1))
    }

    fn change(&self, graph: GraphId, i: usize, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        let mut s = self.call()?;
        match s.graph(graph)?.1.get_mut(i) {
            Some(Kept::Launch(_, l, a)) if l.threads == launch.threads && a.len() == args.len() => {
                (*l, *a) = (launch, args.to_vec());
            }
            _ => return Err(refusal("another kernel than the graph's")),
        }
        s.counts.changes += 1;
        Ok(())
    }

    fn run(&self, graph: GraphId, bytes: &[u8]) -> Result<(), GpuError> {
        let mut s = self.call()?;
        let (from, steps) = s.graph(graph)?.clone();
        s.launches()?;
        // What a driver could not notice: bytes that change while they are read.
        let place = from..from + bytes.len();
        let meets = |p: &Range<usize>| p.start.max(place.start) < p.end.min(place.end);
        assert!(
            !s.running.iter().any(meets),
            "the host waits between two graphs whose bytes lie in one place"
        );
        assert!(place.end <= STAGED);
        s.running.push(place);
        s.counts.runs += 1;
        let (mut rest, mut behind) = (bytes, false);
        for step in steps {
            match step {
                Kept::Launch(kernel, launch, args) => {
                    let overlaps = launch.overlaps && behind;
                    s.counts.overlaps += usize::from(overlaps);
                    s.execute(kernel, launch, &args, overlaps)?;
                    behind = true;
                }
                Kept::Write(at, n) => {
                    behind = false;
                    let (some, more) = rest.split_at(n);
                    s.tell(Call::Write);
                    s.machine.write(at, some).map_err(failed("write"))?;
                    rest = more;
                }
            }
        }
        assert!(rest.is_empty(), "bytes that no write takes");
        Ok(())
    }

    fn forget(&self, graph: GraphId) -> Result<(), GpuError> {
        self.call()?.graphs[graph.0] = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn shared_memory_is_counted_whole() {
        let room = 99 << 10;
        assert!(fits(512, room - 512, room).is_ok());
        let e = fits(512, room - 511, room).expect_err("a byte too many");
        assert_eq!(e.to_string(), "launch: 101377 bytes of shared memory, a block has 101376");
    }
}
