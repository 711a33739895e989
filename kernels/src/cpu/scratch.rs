//! Working memory of the CPU backend, allocated once: an area per thread, and one shared buffer sized by the limits.
//! Knows sizes only.

use crate::KernelError;
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering::*};

/// Floats of a thread's area: 3 MiB, a tile of 64 query rows at any head width in use and the expanded form of 512 rows.
pub const AREA: usize = 3 << 18;
/// Cache lines are 16 floats.
const LINE: usize = 16;

struct Area {
    busy: AtomicBool,
    data: UnsafeCell<Vec<f32>>,
}

/// One area per thread; whoever runs claims one.
pub struct Areas(Vec<Area>);

// SAFETY: an area's data is reached only through the `Claim` that won its flag.
unsafe impl Sync for Areas {}

/// An area, until dropped.
pub struct Claim<'a>(&'a Area);

impl Areas {
    /// `n` areas, or fewer where memory is short ([`Areas::check`] says so); the pages are touched first by the thread that
    /// uses them.
    pub fn new(n: usize) -> Self {
        let area = |_| {
            let data = bytemuck::allocation::try_zeroed_vec(AREA + LINE).ok()?;
            Some(Area { busy: AtomicBool::new(false), data: UnsafeCell::new(data) })
        };
        Self((0..n).map_while(area).collect())
    }

    /// Whether there are `n`: a claim would wait for ever if there were none.
    pub fn check(&self, n: usize) -> Result<(), KernelError> {
        let bytes = Self::size(n);
        if self.0.len() < n { Err(KernelError::Memory { what: "scratch", bytes }) } else { Ok(()) }
    }

    /// Bytes of `n` areas.
    pub fn size(n: usize) -> usize {
        n * (AREA + LINE) * 4
    }

    /// A free area. There are as many as threads, so the wait is for another caller's short loop at most.
    pub fn claim(&self) -> Claim<'_> {
        loop {
            for a in &self.0 {
                if !a.busy.load(Relaxed) && !a.busy.swap(true, Acquire) {
                    return Claim(a);
                }
            }
            std::thread::yield_now();
        }
    }
}

impl Deref for Claim<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the flag is ours until drop.
        line(unsafe { &*self.0.data.get() })
    }
}

impl DerefMut for Claim<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: the flag is ours until drop, and self is borrowed mutably.
        let v = unsafe { &mut *self.0.data.get() };
        let skip = v.as_ptr().align_offset(64).min(LINE);
        &mut v[skip..][..AREA]
    }
}

fn line(v: &[f32]) -> &[f32] {
    let skip = v.as_ptr().align_offset(64).min(LINE);
    &v[skip..][..AREA]
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Release);
    }
}

/// Cuts pieces off the front of an area, each on a cache line.
pub struct Cut<'a>(pub &'a mut [f32]);

impl<'a> Cut<'a> {
    /// The next `n` floats, or an error naming `what`.
    pub fn take(&mut self, n: usize, what: &'static str) -> Result<&'a mut [f32], KernelError> {
        let whole = n.div_ceil(LINE) * LINE;
        let rest = std::mem::take(&mut self.0);
        if whole > rest.len() {
            return Err(KernelError::Scratch { what, bytes: whole * 4, reserved: rest.len() * 4 });
        }
        let (piece, rest) = rest.split_at_mut(whole);
        self.0 = rest;
        Ok(&mut piece[..n])
    }
}

/// Makes `v` at least `n` long.
pub fn grow<T: Copy>(v: &mut Vec<T>, n: usize, zero: T) -> Result<(), KernelError> {
    if n > v.len() {
        let fail = |_| KernelError::Memory { what: "scratch", bytes: n * size_of::<T>() };
        v.try_reserve_exact(n - v.len()).map_err(fail)?;
        v.resize(n, zero);
    }
    Ok(())
}

/// A buffer that grows until it is reserved, and never after.
#[derive(Default)]
pub struct Store {
    data: Vec<f32>,
    fixed: bool,
}

impl Store {
    /// Fixes the size at `n` floats.
    pub fn reserve(&mut self, n: usize) -> Result<usize, KernelError> {
        let bytes = n * 4;
        if n > self.data.len() {
            self.data = Vec::new();
            let fail = |_| KernelError::Memory { what: "scratch", bytes };
            self.data.try_reserve_exact(n).map_err(fail)?;
            self.data.resize(n, 0.0);
        }
        self.fixed = true;
        Ok(self.data.len() * 4)
    }

    /// Floats that a call may use without growing the buffer; everything where nothing was reserved.
    pub fn room(&self) -> usize {
        if self.fixed { self.data.len() } else { usize::MAX }
    }

    /// `n` floats.
    pub fn take(&mut self, n: usize, what: &'static str) -> Result<&mut [f32], KernelError> {
        if n > self.data.len() {
            if self.fixed {
                let reserved = self.data.len() * 4;
                return Err(KernelError::Scratch { what, bytes: n * 4, reserved });
            }
            self.data.resize(n, 0.0);
        }
        Ok(&mut self.data[..n])
    }
}

/// A pointer that the tasks of a loop share, each writing its own part.
#[derive(Clone, Copy)]
pub struct Shared<T>(pub *mut T);

// SAFETY: whoever dereferences it says why no two tasks meet.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer, moved by `n`.
    ///
    /// # Safety
    /// As `pointer::add`.
    #[inline(always)]
    pub unsafe fn at(self, n: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(n) }
    }
}
