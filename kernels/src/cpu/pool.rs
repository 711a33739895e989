//! The thread pool: persistent workers that run one parallel loop at a time. A decode step is some hundred small loops, so
//! what counts is the time from `run` to its return: idle workers spin for a while before they sleep, indices are claimed from
//! one counter, and a worker that wakes too late is not waited for. Knows nothing of matrices.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps: longer than the serial parts between the loops of a decode step, short
/// enough that an idle engine costs nothing.
const SPIN: Duration = Duration::from_micros(50);

/// Bits of [`Shared::state`]: the number of workers that have joined the loop, whether it may still be joined, stop, epoch.
const JOINED: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const STOP: u64 = 1 << 17;
const EPOCH: u64 = 1 << 18;

/// Keeps what several threads write apart from everything else. Two lines: processors fetch them in pairs.
#[repr(align(128))]
struct Apart<T>(T);

struct Job {
    f: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Shared {
    state: Apart<AtomicU64>,
    next: Apart<AtomicUsize>,
    left: Apart<AtomicUsize>,
    job: UnsafeCell<Job>,
    asleep: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// More threads than cores: waiting threads give way at once.
    crowded: bool,
}

// SAFETY: `job` is written only by the thread that holds the pool's lock, while the state is closed and every worker that
// joined has left; it is read only by workers that joined an open state (acquire) and have not left yet.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is used only while `Pool::run`, which borrows its target, has not returned.
unsafe impl Send for Shared {}

/// Work below which a loop is not worth waking another thread.
const SMALL: usize = 1 << 16;

/// Workers for parallel loops. Loops started from inside a loop run on the calling thread.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    lock: Mutex<()>,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

fn noop(_: usize) {}

impl Pool {
    /// A pool of `threads` threads, the caller's included (at least one, at most 65536). Fewer if the system refuses some.
    pub fn new(threads: usize) -> Self {
        let n = threads.clamp(1, JOINED as usize) - 1;
        let cores = std::thread::available_parallelism().map_or(1, |c| c.get());
        let shared = Arc::new(Shared {
            state: Apart(AtomicU64::new(0)),
            next: Apart(AtomicUsize::new(0)),
            left: Apart(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { f: &noop, tasks: 0 }),
            asleep: (0..n).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
            crowded: n + 1 > cores,
        });
        let start = |i: usize| {
            let s = shared.clone();
            std::thread::Builder::new().name(format!("rsinfer-{}", i + 1)).spawn(move || s.work(i)).ok()
        };
        let workers: Vec<_> = (0..n).map_while(start).collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, handles, lock: Mutex::new(()) }
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once on every thread, the caller's included.
    pub fn on_all(&self, f: impl Fn() + Sync) {
        if self.workers.is_empty() || INSIDE.get() {
            return f();
        }
        // Nobody takes a second index before everybody has the first.
        let all = Barrier::new(self.threads());
        self.run(self.threads(), |_| {
            all.wait();
            f();
        });
    }

    /// [`Pool::run`], or a plain loop where `work` (multiply-adds, or values) is too little to share.
    pub fn share(&self, tasks: usize, work: usize, f: impl Fn(usize) + Sync) {
        if work < SMALL { (0..tasks).for_each(f) } else { self.run(tasks, f) }
    }

    /// Calls `f` once for every index below `tasks`, on any thread, in any order; returns when all are done.
    ///
    /// # Panics
    /// With `f`'s panic, after every running call has ended; indices not yet claimed are then left out.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        if tasks < 2 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(f);
            return;
        }
        // A loop that panicked has already put everything back: the lock's poison says nothing.
        let _one_at_a_time = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        let s = &*self.shared;
        let wide: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: only the lifetime changes; the pointer is not used after this function returns (see `Shared`).
        let wide: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(wide) };
        // SAFETY: the state is closed and everyone has left, so nobody else looks at the job.
        unsafe { *s.job.get() = Job { f: wide, tasks } };
        s.next.0.store(0, Relaxed);
        s.left.0.store(0, Relaxed);
        let epoch = s.state.0.load(Relaxed) & !(EPOCH - 1);
        s.state.0.store((epoch + EPOCH) | OPEN, SeqCst);
        for (asleep, thread) in s.asleep.iter().zip(&self.handles) {
            if asleep.load(SeqCst) && asleep.swap(false, SeqCst) {
                thread.unpark();
            }
        }
        s.claim(wide, tasks);
        let joined = (s.state.0.fetch_and(!OPEN, AcqRel) & JOINED) as usize;
        let mut spins = 0u32;
        while s.left.0.load(Acquire) < joined {
            s.pause(&mut spins);
        }
        let panicked = s.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(p) = panicked {
            drop(_one_at_a_time);
            resume_unwind(p);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.0.fetch_or(STOP, SeqCst);
        for h in &self.handles {
            h.unpark();
        }
        for w in self.workers.drain(..) {
            // Workers catch the panics of what they run; nothing is lost.
            let _ = w.join();
        }
    }
}

impl Shared {
    fn claim(&self, f: &(dyn Fn(usize) + Sync), tasks: usize) {
        INSIDE.set(true);
        let all = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.0.fetch_add(1, Relaxed);
                if i >= tasks {
                    break;
                }
                f(i);
            }
        }));
        INSIDE.set(false);
        if let Err(p) = all {
            self.next.0.store(tasks, Relaxed);
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(p);
        }
    }

    fn pause(&self, spins: &mut u32) {
        *spins += 1;
        if self.crowded || (*spins).is_multiple_of(1024) {
            std::thread::yield_now()
        } else {
            std::hint::spin_loop()
        }
    }

    fn work(&self, me: usize) {
        let mut seen = 0;
        let (mut idle, mut spins) = (None, 0u32);
        loop {
            let state = self.state.0.load(Acquire);
            if state & STOP != 0 {
                return;
            }
            if state & OPEN == 0 || state / EPOCH == seen {
                let since = *idle.get_or_insert_with(Instant::now);
                self.pause(&mut spins);
                // Reading the clock costs as much as a few pauses.
                if spins % 16 == 0 && since.elapsed() > SPIN {
                    self.asleep[me].store(true, SeqCst);
                    let now = self.state.0.load(SeqCst);
                    if now & STOP == 0 && (now & OPEN == 0 || now / EPOCH == seen) {
                        std::thread::park();
                    }
                    self.asleep[me].store(false, SeqCst);
                    idle = None;
                }
                continue;
            }
            if self.state.0.compare_exchange_weak(state, state + 1, AcqRel, Relaxed).is_err() {
                continue;
            }
            seen = state / EPOCH;
            // SAFETY: this worker has joined an open loop and has not left: the job is set and nobody writes it.
            let (f, tasks) = unsafe {
                let job = &*self.job.get();
                (&*job.f, job.tasks)
            };
            self.claim(f, tasks);
            self.left.0.fetch_add(1, Release);
            idle = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 7, 64, 1000] {
                let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=20 {
                    pool.run(tasks, |i| {
                        hits[i].fetch_add(1, Relaxed);
                    });
                    assert!(
                        hits.iter().all(|h| h.load(Relaxed) == round),
                        "{threads} threads, {tasks} tasks"
                    );
                }
            }
        }
    }

    #[test]
    fn on_all_reaches_every_thread_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for _ in 0..20 {
                let seen = Mutex::new(Vec::new());
                pool.on_all(|| seen.lock().unwrap().push(std::thread::current().id()));
                let mut seen = seen.into_inner().unwrap();
                assert_eq!(seen.len(), threads);
                seen.sort_by_key(|id| format!("{id:?}"));
                seen.dedup();
                assert_eq!(seen.len(), threads);
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(4);
        let sum = AtomicUsize::new(0);
        for _ in 0..5 {
            std::thread::sleep(SPIN * 4);
            pool.run(100, |i| {
                sum.fetch_add(i, Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 5 * 4950);
    }

    #[test]
    fn a_loop_inside_a_loop_runs_inline() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(8, |_| {
            let me = std::thread::current().id();
            pool.run(8, |i| {
                assert_eq!(me, std::thread::current().id());
                sum.fetch_add(i, Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 8 * 28);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            let r = catch_unwind(AssertUnwindSafe(|| pool.run(64, |i| assert!(i != 33, "thirty-three"))));
            let message = *r.unwrap_err().downcast::<&str>().unwrap();
            assert!(message.contains("thirty-three"));
            let n = AtomicUsize::new(0);
            pool.run(64, |_| {
                n.fetch_add(1, Relaxed);
            });
            assert_eq!(n.into_inner(), 64);
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        let n = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, |_| {
                            n.fetch_add(1, Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(n.into_inner(), 4 * 200 * 5);
    }
}
