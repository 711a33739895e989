//! Threads that ask the disk for ranges of mapped files, many at a time: asking costs time too (pages are found, requests made),
//! and blocks when the disk's queue is full. What is asked for arrives later; whoever needs it waits for it in a page fault.

use crate::gguf::{Access, Map};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

const THREADS: usize = 3;

/// A range of a map.
pub type Piece = (Arc<Map>, Range<usize>);

struct Batch {
    pieces: Vec<Piece>,
    next: AtomicUsize,
    done: AtomicUsize,
}

impl Batch {
    /// Asks for pieces until none is left.
    fn work(&self) {
        while let Some((map, range)) = self.pieces.get(self.next.fetch_add(1, Relaxed)) {
            // A refusal costs speed: the pages are then read when they are used.
            let _ = map.advise(range.clone(), Access::WillNeed);
            self.done.fetch_add(1, Release);
        }
    }

    fn taken(&self) -> bool {
        self.next.load(Relaxed) >= self.pieces.len()
    }
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Arc<Batch>>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn run(&self) {
        let mut queue = self.lock();
        while !queue.stop {
            queue.batches.retain(|b| !b.taken());
            match queue.batches.front().cloned() {
                Some(batch) => {
                    drop(queue);
                    batch.work();
                    queue = self.lock();
                }
                None => queue = self.wake.wait(queue).unwrap_or_else(|e| e.into_inner()),
            }
        }
    }
}

/// The threads.
pub struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    /// Starts them; fewer if the system refuses some.
    pub fn new() -> Self {
        let shared = Arc::new(Shared::default());
        let start = |i: usize| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("rsinfer-read-{i}")).spawn(move || shared.run()).ok()
        };
        let threads = (0..THREADS).map_while(start).collect();
        Self { shared, threads }
    }

    /// Asks for the pieces, sooner than what was asked for before; returns when all requests are made.
    pub fn now(&self, pieces: Vec<Piece>) {
        let batch = self.add(pieces, true);
        batch.work();
        // Others have taken the last pieces and are about to finish.
        while batch.done.load(Acquire) < batch.pieces.len() {
            std::thread::yield_now();
        }
    }

    /// Asks for the pieces some time; returns at once.
    pub fn later(&self, pieces: Vec<Piece>) {
        self.add(pieces, false);
    }

    fn add(&self, pieces: Vec<Piece>, first: bool) -> Arc<Batch> {
        let batch = Arc::new(Batch { pieces, next: AtomicUsize::new(0), done: AtomicUsize::new(0) });
        if batch.pieces.is_empty() {
            return batch;
        }
        let mut queue = self.shared.lock();
        if first {
            queue.batches.push_front(batch.clone());
        } else {
            queue.batches.push_back(batch.clone());
        }
        drop(queue);
        self.shared.wake.notify_all();
        batch
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        self.threads.drain(..).for_each(|t| drop(t.join()));
    }
}
