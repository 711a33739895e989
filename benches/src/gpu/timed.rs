//! A GPU that notes what is launched on it: to launch it again and time it alone, or to time each launch of a pass. Knows names of
//! kernels and wall clocks; nothing of what is computed.

use kernels::cuda::modules::Ptx;
use kernels::cuda::{Arg, Gpu, GpuError, GpuInfo, GraphId, KernelId, Launch, Step};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// A launch.
#[derive(Clone, Debug)]
pub struct Call {
    /// `module.entry`.
    pub kernel: String,
    id: KernelId,
    launch: Launch,
    args: Vec<Arg>,
}

/// What is done beside launching.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Nothing,
    Note,
    Measure,
}

#[derive(Default)]
struct State {
    mode: Mode,
    names: BTreeMap<usize, String>,
    calls: Vec<Call>,
    spent: BTreeMap<String, (usize, f64)>,
    /// What graphs do, to do it step by step when that is wanted.
    graphs: BTreeMap<usize, Vec<Done>>,
}

/// A step of a graph.
#[derive(Clone)]
enum Done {
    Launch(KernelId, Launch, Vec<Arg>),
    Write(u64, usize),
}

struct Inner {
    gpu: Box<dyn Gpu>,
    state: Mutex<State>,
}

/// See the module; clones are the same GPU.
#[derive(Clone)]
pub struct Timed(Arc<Inner>);

/// Seconds that a round of repetitions takes at least, so that starting it counts for nothing.
const ROUND: f64 = 0.02;
/// Rounds, of which the median counts.
const ROUNDS: usize = 5;
/// Launches of a round at most: toy sizes on an interpreter would never end.
const MOST: usize = 2000;

impl Timed {
    /// Around a GPU.
    pub fn new(gpu: Box<dyn Gpu>) -> Self {
        Self(Arc::new(Inner { gpu, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The launches of `f`, which are made.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn note<E>(&self, f: impl FnOnce() -> Result<(), E>) -> Result<Vec<Call>, E> {
        self.state().mode = Mode::Note;
        let done = f();
        let mut s = self.state();
        s.mode = Mode::Nothing;
        let calls = std::mem::take(&mut s.calls);
        done.map(|()| calls)
    }

    /// How often, and seconds in all, for each kernel that `f` launches; each launch is waited for.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn measure<E>(&self, f: impl FnOnce() -> Result<(), E>) -> Result<BTreeMap<String, (usize, f64)>, E> {
        self.state().mode = Mode::Measure;
        let done = f();
        let mut s = self.state();
        s.mode = Mode::Nothing;
        let spent = std::mem::take(&mut s.spent);
        done.map(|()| spent)
    }

    /// Seconds that these launches take, one behind the other without waiting: the median of some rounds of many.
    ///
    /// # Errors
    /// The GPU's.
    pub fn seconds(&self, calls: &[Call], quick: bool) -> Result<f64, GpuError> {
        let gpu = &self.0.gpu;
        let round = |n: usize| -> Result<f64, GpuError> {
            gpu.synchronize()?;
            let start = Instant::now();
            for _ in 0..n {
                calls.iter().try_for_each(|c| gpu.launch(c.id, c.launch, &c.args))?;
            }
            gpu.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / n as f64)
        };
        let first = round(1)?.min(round(1)?);
        if quick {
            return Ok(first);
        }
        let most = (MOST / calls.len().max(1)).max(1);
        let n = ((ROUND / first.max(1e-9)).ceil() as usize).clamp(1, most);
        let mut all = (0..ROUNDS).map(|_| round(n)).collect::<Result<Vec<f64>, _>>()?;
        all.sort_by(f64::total_cmp);
        Ok(all[ROUNDS / 2])
    }

    /// A launch that is made by hand.
    ///
    /// # Errors
    /// The GPU's.
    pub fn call(&self, ptx: &Ptx, entry: &str, launch: Launch, args: Vec<Arg>) -> Result<Call, GpuError> {
        let id = self.kernel(ptx.name, entry)?;
        Ok(Call { kernel: format!("{}.{entry}", ptx.name), id, launch, args })
    }
}

impl Gpu for Timed {
    fn info(&self) -> GpuInfo {
        self.0.gpu.info()
    }

    fn memory(&self) -> Result<(u64, u64), GpuError> {
        self.0.gpu.memory()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, GpuError> {
        self.0.gpu.alloc(bytes)
    }

    fn free(&self, at: u64) -> Result<(), GpuError> {
        self.0.gpu.free(at)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<(), GpuError> {
        self.0.gpu.zero(at, bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.0.gpu.write(at, bytes)
    }

    fn stream(
        &self,
        at: u64,
        least: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Result<(), GpuError> {
        self.0.gpu.stream(at, least, fill)
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.0.gpu.read(at, bytes)
    }

    fn load(&self, module: &Ptx) -> Result<(), GpuError> {
        self.0.gpu.load(module)
    }

    fn kernel(&self, module: &str, entry: &str) -> Result<KernelId, GpuError> {
        let id = self.0.gpu.kernel(module, entry)?;
        self.state().names.insert(id.0, format!("{module}.{entry}"));
        Ok(id)
    }

    fn launch(&self, id: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        let mode = self.state().mode;
        let name = || self.state().names.get(&id.0).cloned().unwrap_or_default();
        match mode {
            Mode::Nothing => self.0.gpu.launch(id, launch, args),
            Mode::Note => {
                self.0.gpu.launch(id, launch, args)?;
                let call = Call { kernel: name(), id, launch, args: args.into() };
                self.state().calls.push(call);
                Ok(())
            }
            Mode::Measure => {
                self.0.gpu.synchronize()?;
                let start = Instant::now();
                self.0.gpu.launch(id, launch, args)?;
                self.0.gpu.synchronize()?;
                let seconds = start.elapsed().as_secs_f64();
                let name = name();
                let mut s = self.state();
                let spent = s.spent.entry(name).or_default();
                *spent = (spent.0 + 1, spent.1 + seconds);
                Ok(())
            }
        }
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.0.gpu.synchronize()
    }

    fn graph(&self, steps: &[Step<'_>], from: usize) -> Result<GraphId, GpuError> {
        let id = self.0.gpu.graph(steps, from)?;
        let done = |s: &Step<'_>| match s {
            Step::Launch { kernel, launch, args } => Done::Launch(*kernel, *launch, args.to_vec()),
            Step::Write { at, bytes } => Done::Write(*at, *bytes),
        };
        self.state().graphs.insert(id.0, steps.iter().map(done).collect());
        Ok(id)
    }

    fn change(&self, graph: GraphId, i: usize, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        self.0.gpu.change(graph, i, launch, args)?;
        if let Some(Done::Launch(_, l, a)) = self.state().graphs.get_mut(&graph.0).and_then(|g| g.get_mut(i))
        {
            (*l, *a) = (launch, args.to_vec());
        }
        Ok(())
    }

    fn run(&self, graph: GraphId, bytes: &[u8]) -> Result<(), GpuError> {
        if self.state().mode == Mode::Nothing {
            return self.0.gpu.run(graph, bytes);
        }
        let steps = self.state().graphs.get(&graph.0).cloned().unwrap_or_default();
        let mut rest = bytes;
        for step in &steps {
            match step {
                Done::Launch(kernel, launch, args) => self.launch(*kernel, *launch, args)?,
                Done::Write(at, n) => {
                    let (now, later) = rest.split_at(*n);
                    self.0.gpu.write(*at, now)?;
                    rest = later;
                }
            }
        }
        Ok(())
    }

    fn forget(&self, graph: GraphId) -> Result<(), GpuError> {
        self.state().graphs.remove(&graph.0);
        self.0.gpu.forget(graph)
    }
}
