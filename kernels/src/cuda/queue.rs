//! Between the backend and a GPU. In a pass that decodes, launches and small writes are held back and go out together, as a graph where the
//! same steps went out before: what changed since is told, and one call runs it all. A long pass goes out in a few pieces, so that the GPU
//! begins while the host is still at the rest. Elsewhere every call goes out at once. Knows steps and bytes; nothing of what is computed.

use super::gpu::{Arg, Gpu, GpuError, GpuInfo, GraphId, KernelId, Launch, STAGED, Step};
use super::modules::Ptx;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Kinds of passes that are remembered, and the steps that they may have in all; those that were used longest ago go first.
const KINDS: usize = 128;
const STEPS: usize = 1 << 16;
/// Fewer steps are not worth a graph.
const LEAST: usize = 8;
/// Steps of a pass's first piece; the GPU takes longer for it than the host for the next, which is so many times as long.
const FIRST: usize = 64;
const GROWTH: usize = 4;
/// Pieces whose bytes wait in places of their own; those of all but the first have little room.
const PIECES: usize = 8;
const LATER: usize = 32 << 10;

/// Steps that piece `i` of a pass has at most.
const fn most(i: usize) -> usize {
    let i = if i < PIECES { i } else { PIECES - 1 };
    FIRST * GROWTH.pow(i as u32)
}

/// Where its bytes wait.
fn place(i: usize) -> Range<usize> {
    let first = STAGED - (PIECES - 1) * LATER;
    match i.min(PIECES - 1) {
        0 => 0..first,
        i => first + (i - 1) * LATER..first + i * LATER,
    }
}

/// See the module.
pub(crate) struct Queue {
    gpu: Box<dyn Gpu>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Calls are held back.
    holds: bool,
    held: Tape,
    /// Pieces of this pass that went out.
    piece: usize,
    kinds: Vec<Kind>,
    clock: u64,
    /// The GPU refused a graph of launches that overlap: none do from then on.
    apart: bool,
    /// It refused one of others: it is not asked again.
    plain: bool,
    /// Of which pieces a graph may still read its bytes.
    runs: [bool; PIECES],
    /// Why something that was held back did not go out. Its caller was told that it would: nothing may be built on this GPU's memory.
    failed: Option<GpuError>,
}

/// Steps in order, with their arguments and bytes.
#[derive(Clone, Default)]
struct Tape {
    steps: Vec<Held>,
    args: Vec<Arg>,
    bytes: Vec<u8>,
}

/// A step; the ends of its arguments or bytes, which begin where those before end.
#[derive(Clone, Copy)]
enum Held {
    Launch { kernel: KernelId, launch: Launch, args: usize },
    Write { at: u64, bytes: usize },
}

/// Passes of the same steps.
struct Kind {
    /// The last of them: what the graph was told.
    last: Tape,
    /// Where its bytes wait.
    place: Range<usize>,
    graph: Option<GraphId>,
    used: u64,
}

impl Tape {
    fn clear(&mut self) {
        self.steps.clear();
        self.args.clear();
        self.bytes.clear();
    }

    /// The steps, each with its bytes.
    fn each(&self) -> impl Iterator<Item = (Step<'_>, &[u8])> {
        let (mut args, mut bytes) = (0, 0);
        self.steps.iter().map(move |s| match *s {
            Held::Launch { kernel, launch, args: end } => {
                let from = std::mem::replace(&mut args, end);
                (Step::Launch { kernel, launch, args: &self.args[from..end] }, &[][..])
            }
            Held::Write { at, bytes: end } => {
                let some = &self.bytes[std::mem::replace(&mut bytes, end)..end];
                (Step::Write { at, bytes: some.len() }, some)
            }
        })
    }

    /// Whether a graph of the one can do the other: the same kernels for as many rows, the same writes. The x of a grid may differ, which
    /// follows the length of what rows see.
    fn like(&self, other: &Self) -> bool {
        let same = |(a, b): (&Held, &Held)| match (*a, *b) {
            (Held::Launch { kernel, launch, args }, Held::Launch { kernel: k, launch: l, args: n }) => {
                kernel == k
                    && args == n
                    && Launch { grid: [l.grid[0], launch.grid[1], launch.grid[2]], ..launch } == l
            }
            (Held::Write { at, bytes }, Held::Write { at: to, bytes: n }) => (at, bytes) == (to, n),
            _ => false,
        };
        self.steps.len() == other.steps.len() && self.steps.iter().zip(&other.steps).all(same)
    }

    /// Launches of one that are not those of the other, which is like it.
    fn changes(&self, other: &Self) -> usize {
        let launch = |step| matches!(step, Step::Launch { .. });
        self.each().zip(other.each()).filter(|((a, _), (b, _))| launch(*a) && a != b).count()
    }

    fn overlaps(&self) -> bool {
        self.steps.iter().any(|s| matches!(s, Held::Launch { launch, .. } if launch.overlaps))
    }

    /// Sends the steps one by one.
    fn play(&self, gpu: &dyn Gpu) -> Result<(), GpuError> {
        self.each().try_for_each(|(step, bytes)| match step {
            Step::Launch { kernel, launch, args } => gpu.launch(kernel, launch, args),
            Step::Write { at, .. } => gpu.write(at, bytes),
        })
    }
}

impl State {
    /// Sends what is held back.
    fn flush(&mut self, gpu: &dyn Gpu) -> Result<(), GpuError> {
        let mut held = std::mem::take(&mut self.held);
        if !held.steps.is_empty()
            && let Err(e) = self.issue(gpu, &mut held)
        {
            self.failed = Some(e);
        }
        self.piece += usize::from(!held.steps.is_empty());
        held.clear();
        self.held = held;
        self.sound()
    }

    fn sound(&self) -> Result<(), GpuError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn issue(&mut self, gpu: &dyn Gpu, held: &mut Tape) -> Result<(), GpuError> {
        if !self.plain && held.steps.len() >= LEAST {
            match self.as_graph(gpu, held) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(e @ GpuError::Lost { .. }) => return Err(e),
                // Nothing of it ran.
                Err(_) => self.refused(gpu, held.overlaps()),
            }
        }
        held.play(gpu)
    }

    /// There are no graphs like the one that was refused any more: of launches that overlap, or at all.
    fn refused(&mut self, gpu: &dyn Gpu, overlaps: bool) {
        self.apart = true;
        self.plain = !overlaps;
        self.holds &= overlaps;
        for g in self.kinds.drain(..).filter_map(|k| k.graph) {
            // A refusal here changes nothing for anybody.
            let _ = gpu.forget(g);
        }
    }

    /// Runs the steps as a graph, from the second time they come, and keeps them. False: they are to go out one by one.
    fn as_graph(&mut self, gpu: &dyn Gpu, held: &mut Tape) -> Result<bool, GpuError> {
        self.clock += 1;
        // Several layers may ask for the same steps with other weights: a graph is worth it where most of it stays.
        let place = place(self.piece);
        let alike = self.kinds.iter().enumerate().filter(|(_, k)| k.place == place && k.last.like(held));
        let nearest = alike.map(|(i, k)| (i, k.last.changes(held))).min_by_key(|c| c.1);
        let nearest = nearest.filter(|c| 2 * c.1 <= held.steps.len());
        let Some((i, changes)) = nearest else {
            let steps = |kinds: &[Kind]| kinds.iter().map(|k| k.last.steps.len()).sum::<usize>();
            while self.kinds.len() == KINDS || steps(&self.kinds) > STEPS {
                let oldest = (0..self.kinds.len()).min_by_key(|i| self.kinds[*i].used).unwrap_or(0);
                self.kinds.swap_remove(oldest).graph.map_or(Ok(()), |g| gpu.forget(g))?;
            }
            self.kinds.push(Kind { last: held.clone(), place, graph: None, used: self.clock });
            return Ok(false);
        };
        let kind = &mut self.kinds[i];
        kind.used = self.clock;
        let graph = match kind.graph {
            None => gpu.graph(&held.each().map(|s| s.0).collect::<Vec<_>>(), place.start)?,
            Some(g) if changes == 0 => g,
            Some(g) => {
                for (i, ((now, _), (last, _))) in held.each().zip(kind.last.each()).enumerate() {
                    match now {
                        Step::Launch { launch, args, .. } if now != last => gpu.change(g, i, launch, args)?,
                        _ => {}
                    }
                }
                g
            }
        };
        kind.graph = Some(graph);
        let runs = &mut self.runs[self.piece.min(PIECES - 1)];
        if !held.bytes.is_empty() && std::mem::replace(runs, true) {
            gpu.synchronize()?;
        }
        gpu.run(graph, &held.bytes)?;
        std::mem::swap(&mut kind.last, held);
        Ok(true)
    }
}

impl Queue {
    pub fn new(gpu: Box<dyn Gpu>) -> Self {
        Self { gpu, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic can leave steps held back, never half a step.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What was held back has gone out; until the guard drops nothing else does.
    fn flushed(&self) -> Result<MutexGuard<'_, State>, GpuError> {
        let mut s = self.state();
        s.flush(&*self.gpu)?;
        Ok(s)
    }

    /// A pass begins; `hold`: it waits for nothing but its result, and what it launches may be held back until then.
    pub fn begin(&self, hold: bool) {
        let mut s = self.state();
        // Whoever asks next is told.
        let _ = s.flush(&*self.gpu);
        s.piece = 0;
        s.holds = hold && !s.plain;
    }

    /// Sends what is held back.
    pub fn start(&self) -> Result<(), GpuError> {
        self.flushed().map(drop)
    }

    pub fn info(&self) -> GpuInfo {
        self.gpu.info()
    }

    pub fn alloc(&self, bytes: usize) -> Result<u64, GpuError> {
        self.gpu.alloc(bytes)
    }

    pub fn free(&self, at: u64) -> Result<(), GpuError> {
        // Memory goes back whatever became of the work on it.
        drop(self.flushed());
        self.gpu.free(at)
    }

    pub fn zero(&self, at: u64, bytes: usize) -> Result<(), GpuError> {
        let _held = self.flushed()?;
        self.gpu.zero(at, bytes)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
        let mut s = self.state();
        s.sound()?;
        if s.held.bytes.len() + bytes.len() > place(s.piece).len() {
            s.flush(&*self.gpu)?;
        }
        if !s.holds || bytes.len() > place(s.piece).len() {
            return self.gpu.write(at, bytes);
        }
        s.held.bytes.extend_from_slice(bytes);
        let end = s.held.bytes.len();
        s.hold(&*self.gpu, Held::Write { at, bytes: end })
    }

    /// See [`Gpu::stream`].
    pub fn stream(
        &self,
        at: u64,
        least: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
    ) -> Result<(), GpuError> {
        let _held = self.flushed()?;
        self.gpu.stream(at, least, fill)
    }

    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        let mut s = self.flushed()?;
        self.gpu.read(at, bytes)?;
        // Reading nothing waits for nothing.
        if !bytes.is_empty() {
            s.runs = [false; PIECES];
        }
        Ok(())
    }

    pub fn load(&self, module: &Ptx) -> Result<(), GpuError> {
        self.gpu.load(module)
    }

    pub fn kernel(&self, module: &str, entry: &str) -> Result<KernelId, GpuError> {
        self.gpu.kernel(module, entry)
    }

    pub fn launch(&self, kernel: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        let mut s = self.state();
        s.sound()?;
        if !s.holds {
            return self.gpu.launch(kernel, launch, args);
        }
        let launch = Launch { overlaps: launch.overlaps && !s.apart, ..launch };
        s.held.args.extend_from_slice(args);
        let end = s.held.args.len();
        s.hold(&*self.gpu, Held::Launch { kernel, launch, args: end })
    }
}

impl State {
    fn hold(&mut self, gpu: &dyn Gpu, step: Held) -> Result<(), GpuError> {
        self.held.steps.push(step);
        if self.held.steps.len() < most(self.piece) { Ok(()) } else { self.flush(gpu) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Writes down what it is asked for.
    #[derive(Default)]
    struct Log {
        calls: Vec<String>,
        graphs: usize,
        refuses: bool,
        /// Graphs of launches that overlap are refused.
        apart: bool,
    }

    struct Paper(Arc<Mutex<Log>>);

    const ONE: Launch = Launch { grid: [1; 3], threads: 32, shared: 0, overlaps: false };

    impl Paper {
        fn note(&self, what: String) -> Result<(), GpuError> {
            let mut log = self.0.lock().unwrap();
            log.calls.push(what);
            let why = "as asked".into();
            if log.refuses { Err(GpuError::Driver { call: "test", why }) } else { Ok(()) }
        }
    }

    impl Gpu for Paper {
        fn info(&self) -> GpuInfo {
            GpuInfo { name: "paper".into(), capability: (7, 5), shared: 64 << 10, display: false }
        }
        fn memory(&self) -> Result<(u64, u64), GpuError> {
            Ok((0, 0))
        }
        fn alloc(&self, _: usize) -> Result<u64, GpuError> {
            Ok(256)
        }
        fn free(&self, at: u64) -> Result<(), GpuError> {
            self.note(format!("free {at}"))
        }
        fn zero(&self, at: u64, _: usize) -> Result<(), GpuError> {
            self.note(format!("zero {at}"))
        }
        fn write(&self, at: u64, bytes: &[u8]) -> Result<(), GpuError> {
            self.note(format!("write {at} {}", bytes.len()))
        }
        fn read(&self, at: u64, _: &mut [u8]) -> Result<(), GpuError> {
            self.note(format!("read {at}"))
        }
        fn load(&self, _: &Ptx) -> Result<(), GpuError> {
            Ok(())
        }
        fn kernel(&self, _: &str, _: &str) -> Result<KernelId, GpuError> {
            Ok(KernelId(0))
        }
        fn launch(&self, k: KernelId, _: Launch, args: &[Arg]) -> Result<(), GpuError> {
            self.note(format!("launch {} {args:?}", k.0))
        }
        fn synchronize(&self) -> Result<(), GpuError> {
            self.note("wait".into())
        }
        fn graph(&self, steps: &[Step<'_>], from: usize) -> Result<GraphId, GpuError> {
            let overlaps = |s: &Step<'_>| matches!(s, Step::Launch { launch, .. } if launch.overlaps);
            if self.0.lock().unwrap().apart && steps.iter().any(overlaps) {
                return Err(GpuError::Driver { call: "test", why: "as asked".into() });
            }
            self.0.lock().unwrap().graphs += 1;
            self.note(format!("graph of {} from {from}", steps.len()))?;
            let kernel =
                |s: &Step<'_>| if let Step::Launch { kernel, .. } = s { Some(kernel.0) } else { None };
            Ok(GraphId(1000 * steps.iter().find_map(kernel).unwrap_or(0) + steps.len()))
        }
        fn change(&self, g: GraphId, i: usize, _: Launch, args: &[Arg]) -> Result<(), GpuError> {
            self.note(format!("change {} {i} {args:?}", g.0))
        }
        fn run(&self, g: GraphId, bytes: &[u8]) -> Result<(), GpuError> {
            self.note(format!("run {} {bytes:?}", g.0))
        }
        fn forget(&self, g: GraphId) -> Result<(), GpuError> {
            self.0.lock().unwrap().graphs -= 1;
            self.note(format!("forget {}", g.0))
        }
    }

    fn queue() -> (Queue, Arc<Mutex<Log>>) {
        let log = Arc::<Mutex<Log>>::default();
        (Queue::new(Box::new(Paper(log.clone()))), log)
    }

    /// A pass of a write and `n` launches, then a read unless it is `open`.
    fn pass(q: &Queue, n: usize, byte: u8, last: u32, open: bool) -> Result<(), GpuError> {
        q.begin(true);
        q.write(8, &[byte, 7])?;
        for i in 0..n {
            let grid = [if i + 1 == n { last } else { 1 }, 2, 1];
            q.launch(KernelId(i), Launch { grid, ..ONE }, &[Arg::U64(1), Arg::U32(i as u32)])?;
        }
        if open { Ok(()) } else { q.read(9, &mut [0]) }
    }

    fn calls(log: &Arc<Mutex<Log>>) -> Vec<String> {
        std::mem::take(&mut log.lock().unwrap().calls)
    }

    #[test]
    fn the_second_of_a_kind_is_a_graph() {
        let (q, log) = queue();
        pass(&q, 9, 1, 1, false).unwrap();
        let first = calls(&log);
        assert_eq!((first.len(), &*first[0], &*first[1]), (11, "write 8 2", "launch 0 [U64(1), U32(0)]"));
        pass(&q, 9, 2, 1, false).unwrap();
        assert_eq!(calls(&log), ["graph of 10 from 0", "run 10 [2, 7]", "read 9"]);
        // Another length of lists changes one launch; a graph that may still read its bytes is waited for.
        pass(&q, 9, 3, 5, true).unwrap();
        assert_eq!(calls(&log), [""; 0]);
        pass(&q, 9, 4, 5, false).unwrap();
        let want = ["change 10 9 [U64(1), U32(8)]", "run 10 [3, 7]", "wait", "run 10 [4, 7]", "read 9"];
        assert_eq!(calls(&log), want);
    }

    #[test]
    fn order_is_kept() {
        let (q, log) = queue();
        q.launch(KernelId(5), ONE, &[]).unwrap();
        assert_eq!(calls(&log), ["launch 5 []"]);
        pass(&q, 1, 1, 1, true).unwrap();
        q.zero(3, 4).unwrap();
        assert_eq!(calls(&log), ["write 8 2", "launch 0 [U64(1), U32(0)]", "zero 3"]);
        // What does not fit the memory that bytes wait in goes out by itself, behind all before it.
        pass(&q, 1, 1, 1, true).unwrap();
        q.write(7, &vec![0; STAGED + 1]).unwrap();
        q.write(7, &[0]).unwrap();
        q.free(4).unwrap();
        let want = ["write 8 2", "launch 0 [U64(1), U32(0)]", "write 7 1048577", "write 7 1", "free 4"];
        assert_eq!(calls(&log), want);
    }

    /// A long pass goes out piece by piece, none of which waits for another.
    #[test]
    fn pieces_grow() {
        let (q, log) = queue();
        let n = most(0) + most(1) + 20;
        let pass = |byte: u8| {
            pass(&q, n - 2, byte, 1, true).unwrap();
            let before = calls(&log);
            q.write(6, &[byte]).unwrap();
            q.read(9, &mut [0]).unwrap();
            [before, calls(&log)]
        };
        let [first, rest] = pass(1);
        assert_eq!((first.len(), rest.len()), (most(0) + most(1), 21));
        pass(2);
        let [first, rest] = pass(3);
        // Their numbers: the first kernel, and how many steps.
        assert_eq!(first, ["run 64 [3, 7]", "run 63256 []"]);
        assert_eq!(rest, ["run 319020 [3]", "read 9"]);
        // Bytes of pieces wait in places of their own.
        assert_eq!((place(0).start, place(1).start, place(2).len()), (0, place(0).end, LATER));
        assert_eq!(place(PIECES - 1), place(PIECES + 1));
        assert_eq!(place(PIECES).end, STAGED);
    }

    /// Layers that ask for the same steps with other weights have graphs of their own.
    #[test]
    fn other_arguments_are_another_kind() {
        let (q, log) = queue();
        let layer = |weights: u64| {
            q.begin(true);
            for i in 0..10 {
                let args = [Arg::U64(weights + i), Arg::U32(0)];
                q.launch(KernelId(0), ONE, &args).unwrap();
            }
            q.read(9, &mut [0]).unwrap();
        };
        (0..3).for_each(|_| [100, 200, 300].into_iter().for_each(layer));
        let calls = calls(&log);
        let count = |what: &str| calls.iter().filter(|c| c.starts_with(what)).count();
        assert_eq!((count("launch"), count("graph"), count("change"), count("run")), (30, 3, 0, 6));
    }

    #[test]
    fn graphs_are_bounded() {
        let (q, log) = queue();
        let pass = |kernel: usize| {
            q.begin(true);
            (0..9).for_each(|_| q.launch(KernelId(kernel), ONE, &[]).unwrap());
            q.read(9, &mut [0]).unwrap();
        };
        for kernel in 0..KINDS + 9 {
            (0..3).for_each(|_| pass(kernel));
        }
        assert_eq!(log.lock().unwrap().graphs, KINDS);
        calls(&log);
        pass(0);
        assert_eq!(calls(&log)[0], "forget 9009", "the one used longest ago");
    }

    /// A GPU that refuses a graph of launches that overlap is asked for graphs of others.
    #[test]
    fn a_refusal_of_overlaps_is_not_one_of_graphs() {
        let (q, log) = queue();
        log.lock().unwrap().apart = true;
        let pass = || {
            q.begin(true);
            let launch = Launch { overlaps: true, ..ONE };
            (0..9).for_each(|_| q.launch(KernelId(0), launch, &[]).unwrap());
            q.read(9, &mut [0]).unwrap();
            calls(&log).iter().filter(|c| c.starts_with("launch")).count()
        };
        // New; refused as a graph; of another kind; a graph of it.
        assert_eq!([(); 4].map(|()| pass()), [9, 9, 9, 0]);
    }

    /// Callers were told that it would go out: from then on every call that computes fails, and memory still goes back.
    #[test]
    fn what_failed_to_go_out_is_told_to_all() {
        let (q, log) = queue();
        pass(&q, 2, 1, 1, true).unwrap();
        log.lock().unwrap().refuses = true;
        let first = q.read(9, &mut [0]).unwrap_err();
        log.lock().unwrap().refuses = false;
        calls(&log);
        assert_eq!(pass(&q, 2, 1, 1, false).unwrap_err(), first);
        assert_eq!(q.zero(1, 1).unwrap_err(), first);
        q.free(4).unwrap();
        assert_eq!(calls(&log), ["free 4"]);
    }
}
