//! Memory maps: the one unsafe file of the engine. Knows files and ranges of bytes; nothing of GGUF.
//!
//! A mapped file can fail when it is read: it was truncated, or its disk has an error. The system says so with a signal (SIGBUS)
//! that ends the process. Here (on Linux) the bytes that cannot be read become zeros instead, and [`Map::check`] reports it: what
//! was computed with them is thrown away with an error, and the process lives on. So many files at a time ([`MOST_MAPS`]) are
//! watched over; more are not mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::SystemTime;

/// How a range is going to be read, for the kernel's read-ahead (madvise).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Front to back: read far ahead, drop what is behind.
    Sequential,
    /// Here and there: no read-ahead (experts).
    Random,
    /// Soon, all of it: start reading now.
    WillNeed,
    /// The system's default.
    Normal,
}

/// Why a map cannot be trusted any more.
#[derive(Debug)]
pub(super) enum Damage {
    /// The file is shorter than the map.
    Truncated,
    /// Something wrote to the file.
    Changed,
    /// Some of its bytes could not be read.
    Unreadable,
    /// The system does not even say how long it is.
    Io(io::Error),
}

/// Files that can be mapped at a time: the signal handler's table has a fixed length.
pub(super) const MOST_MAPS: usize = 512;

/// A whole file, read-only.
pub(crate) struct Map {
    /// First, so that it is dropped before the map.
    #[cfg(target_os = "linux")]
    guard: bus::Guard,
    map: memmap2::Mmap,
    file: File,
    modified: Option<SystemTime>,
    /// Bytes that one call reads ahead at most.
    stride: usize,
}

impl Map {
    /// Maps `file`, which must not be empty. `None`: [`MOST_MAPS`] are mapped already.
    pub(super) fn new(file: &File) -> io::Result<Option<Self>> {
        let file = file.try_clone()?;
        // SAFETY: the map is read-only and private to this value, which hands out shared slices only. What cannot be
        // excluded is that another program changes or truncates the file meanwhile: as in every program that maps model
        // files, that it does not is the user's promise, and OpenMode::Read is there for those who cannot give it. A change
        // shows as changed weights, bytes that are gone as zeros (see `bus`), and both in `check`. Nothing read from the map
        // later is trusted to be unchanged for memory safety: the header is parsed into owned values once, and weights are
        // plain numbers.
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        let modified = file.metadata()?.modified().ok();
        #[cfg(target_os = "linux")]
        let Some(guard) = bus::Guard::new(&map, &file) else { return Ok(None) };
        Ok(Some(Self {
            modified,
            stride: stride(&file),
            #[cfg(target_os = "linux")]
            guard,
            map,
            file,
        }))
    }

    /// Whether the file is still what was mapped. Cheap: one call to the system. A file that was replaced or deleted is as good
    /// as before: the map holds on to what it was.
    pub(super) fn check(&self) -> Result<(), Damage> {
        let now = self.file.metadata().map_err(Damage::Io)?;
        if now.len() < self.map.len() as u64 {
            return Err(Damage::Truncated);
        }
        #[cfg(target_os = "linux")]
        if self.guard.hit() {
            return Err(Damage::Unreadable);
        }
        if now.modified().ok() != self.modified { Err(Damage::Changed) } else { Ok(()) }
    }

    /// Tells the kernel how `range` will be read. Only advice: ranges outside the map are cut, and systems without
    /// madvise do nothing.
    pub(crate) fn advise(&self, range: Range<usize>, access: Access) -> io::Result<()> {
        let range = self.cut(range);
        #[cfg(unix)]
        if !range.is_empty() {
            let advice = match access {
                Access::Sequential => memmap2::Advice::Sequential,
                Access::Random => memmap2::Advice::Random,
                Access::WillNeed => memmap2::Advice::WillNeed,
                Access::Normal => memmap2::Advice::Normal,
            };
            self.map.advise_range(advice, range.start, range.len())?;
        }
        #[cfg(not(unix))]
        let _ = (range, access);
        Ok(())
    }

    /// The pieces of `range` that [`Access::WillNeed`] reads whole: Linux reads the beginning of longer ones only.
    pub(crate) fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (range, stride) = (self.cut(range), self.stride);
        range.clone().step_by(stride).map(move |at| at..range.end.min(at + stride))
    }

    /// Gives back the memory of the pages that lie whole in `range`; reading them again reads the file again. Pages that
    /// another process maps stay.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            let (range, page) = (self.cut(range), page_size());
            let (from, to) = (range.start.next_multiple_of(page), range.end / page * page);
            if from < to {
                // SAFETY: the pages are a read-only map of a file: after the call they hold the same bytes, read anew.
                let _ = unsafe {
                    self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from)
                };
                // SAFETY: only advice about a file that is open.
                unsafe {
                    libc::posix_fadvise(
                        self.file.as_raw_fd(),
                        from as libc::off_t,
                        (to - from) as libc::off_t,
                        libc::POSIX_FADV_DONTNEED,
                    )
                };
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Reads `range` and keeps it in memory.
    ///
    /// # Errors
    /// The system's: mostly that the process may not lock so much (RLIMIT_MEMLOCK).
    pub(crate) fn lock(&self, range: Range<usize>) -> io::Result<()> {
        let range = self.cut(range);
        #[cfg(unix)]
        if !range.is_empty() {
            let bytes = &self.map[range];
            // SAFETY: these bytes are mapped; locking does not change them.
            if unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        #[cfg(not(unix))]
        if !range.is_empty() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    /// Takes back [`Map::lock`]. Pages at the edges, which neighbours may have locked too, are unlocked with them.
    pub(crate) fn unlock(&self, range: Range<usize>) {
        let range = self.cut(range);
        #[cfg(unix)]
        if !range.is_empty() {
            // SAFETY: the range lies in the map; unlocking changes no bytes.
            unsafe { libc::munlock(self.map[range.clone()].as_ptr().cast(), range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    fn cut(&self, range: Range<usize>) -> Range<usize> {
        let start = range.start.min(self.map.len());
        start..range.end.clamp(start, self.map.len())
    }
}

/// Deals the pages that this thread and those it starts get from now on to these nodes of a NUMA machine in turn.
#[cfg(target_os = "linux")]
pub(crate) fn interleave(nodes: &[usize]) -> io::Result<()> {
    const BITS: usize = libc::c_ulong::BITS as usize;
    let mut mask = [0 as libc::c_ulong; 16];
    for n in nodes.iter().filter(|n| **n < 16 * BITS) {
        mask[n / BITS] |= 1 << (n % BITS);
    }
    // SAFETY: the mask is as long as the call is told; it says where new pages go and touches none.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::MPOL_INTERLEAVE as libc::c_long,
            mask.as_ptr(),
            16 * BITS,
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(target_os = "linux")]
fn page_size() -> usize {
    // SAFETY: asks for a constant.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// What the disk of `file` takes in one request: Linux cuts read-ahead that was asked for to this.
#[cfg(target_os = "linux")]
fn stride(file: &File) -> usize {
    use std::os::linux::fs::MetadataExt;
    let queue = || {
        let dev = file.metadata().ok()?.st_dev();
        let disk = format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev));
        let number = |path: String| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
        // A partition's queue is its disk's.
        ["queue", "../queue"].iter().find_map(|q| number(format!("{disk}/{q}/max_sectors_kb")))
    };
    queue().unwrap_or(128).clamp(128, 2048) << 10
}

#[cfg(not(target_os = "linux"))]
fn stride(_: &File) -> usize {
    1 << 20
}

/// Bytes of mapped files that cannot be read. A signal handler may do very little: it looks at a fixed table of atomics, asks how
/// long the file is, and puts zeros where there is nothing to read any more.
#[cfg(target_os = "linux")]
mod bus {
    use std::cell::UnsafeCell;
    use std::fs::File;
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd;
    use std::sync::Once;
    use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::*};

    struct Slot {
        /// Address of the map; 0: free; 1: being filled.
        start: AtomicUsize,
        end: AtomicUsize,
        fd: AtomicI32,
        hit: AtomicBool,
    }

    static SLOTS: [Slot; super::MOST_MAPS] = [const {
        Slot {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            fd: AtomicI32::new(-1),
            hit: AtomicBool::new(false),
        }
    }; super::MOST_MAPS];

    static PAGE: AtomicUsize = AtomicUsize::new(4096);

    struct Before(UnsafeCell<MaybeUninit<libc::sigaction>>);
    // SAFETY: written once, before the handler that reads it is installed.
    unsafe impl Sync for Before {}
    /// What handled the signal before.
    static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::zeroed()));

    /// Watches over a map for as long as it lives; must be dropped before it is unmapped.
    pub struct Guard(&'static Slot);

    impl Guard {
        /// `None`: no slot is free.
        pub fn new(map: &[u8], file: &File) -> Option<Self> {
            install();
            let slot = SLOTS.iter().find(|s| s.start.compare_exchange(0, 1, AcqRel, Relaxed).is_ok())?;
            let start = map.as_ptr().addr();
            slot.hit.store(false, Relaxed);
            slot.fd.store(file.as_raw_fd(), Relaxed);
            slot.end.store(start + map.len(), Relaxed);
            slot.start.store(start, Release);
            Some(Self(slot))
        }

        /// Whether something could not be read.
        pub fn hit(&self) -> bool {
            self.0.hit.load(Acquire)
        }
    }

    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.end.store(0, Relaxed);
            self.0.start.store(0, Release);
        }
    }

    fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            PAGE.store(super::page_size(), Relaxed);
            // SAFETY: all zeros is a valid sigaction; the handler has the signature that SA_SIGINFO asks for, and does only
            // what a handler may do. `BEFORE` is written by nobody else.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_bus as *const () as usize;
                // On the alternate stack, where there is one.
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                libc::sigaction(libc::SIGBUS, std::ptr::null(), (*BEFORE.0.get()).as_mut_ptr());
                libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            }
        });
    }

    extern "C" fn on_bus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the system passes a valid record; for SIGBUS it holds an address.
        let at = unsafe { (*info).si_addr() }.addr();
        // SAFETY: the address of this thread's errno, which the calls below may change.
        let (errno, saved) = unsafe { (libc::__errno_location(), *libc::__errno_location()) };
        let inside = |s: &&Slot| {
            let start = s.start.load(Acquire);
            start > 1 && at >= start && at < s.end.load(Relaxed)
        };
        let done = SLOTS.iter().find(inside).is_some_and(|s| blank(s, at));
        // SAFETY: as above.
        unsafe { *errno = saved };
        if !done {
            // SAFETY: gives the signal back to whatever had it; the instruction is run again and meets that.
            unsafe { libc::sigaction(libc::SIGBUS, (*BEFORE.0.get()).as_ptr(), std::ptr::null_mut()) };
        }
    }

    /// Puts zeros where `at` cannot be read: its page, and if the file ends before it, all that the file has lost.
    fn blank(slot: &Slot, at: usize) -> bool {
        let (page, start, end) = (PAGE.load(Relaxed), slot.start.load(Relaxed), slot.end.load(Relaxed));
        let here = at / page * page;
        let mut stat = MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: a record of the right size, zeroed: valid whether or not the call fills it.
        let (known, len) = unsafe {
            let known = libc::fstat(slot.fd.load(Relaxed), stat.as_mut_ptr()) == 0;
            (known, stat.assume_init().st_size.max(0) as usize)
        };
        let lost = start + len.next_multiple_of(page);
        let range = if known && lost <= here { lost..end.next_multiple_of(page) } else { here..here + page };
        // SAFETY: the range lies in a live map of ours, which only ever hands out shared slices of plain bytes; it stays mapped
        // and readable, and is unmapped with the rest.
        let new = unsafe {
            libc::mmap(
                range.start as *mut libc::c_void,
                range.len(),
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        slot.hit.store(true, Release);
        new != libc::MAP_FAILED
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(bytes).unwrap();
        f
    }

    #[test]
    fn what_is_cut_off_reads_as_zeros_and_is_reported() {
        let page = page_size();
        let f = file(&vec![7; 5 * page + 9]);
        let map = Map::new(&f).unwrap().unwrap();
        assert!(map.check().is_ok());
        f.set_len(2 * page as u64 + 3).unwrap();
        assert!(matches!(map.check(), Err(Damage::Truncated)));
        let bytes = map.as_ref();
        assert_eq!((bytes[0], bytes[2 * page]), (7, 7));
        assert_eq!((bytes[3 * page], bytes[4 * page], bytes[5 * page + 8]), (0, 0, 0));
        assert_eq!(bytes[page], 7);
        // Growing again brings nothing back.
        f.set_len(5 * page as u64 + 9).unwrap();
        assert!(matches!(map.check(), Err(Damage::Unreadable)));
        let other = file(&[1; 10]);
        assert!(Map::new(&other).unwrap().unwrap().check().is_ok());
    }

    #[test]
    fn a_change_is_reported() {
        let mut f = file(&[7; 100]);
        let map = Map::new(&f).unwrap().unwrap();
        f.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(matches!(map.check(), Err(Damage::Changed)));
        f.write_all(&[1]).unwrap();
        assert!(map.check().is_err());
    }

    #[test]
    fn released_pages_come_back() {
        let page = page_size();
        let bytes: Vec<u8> = (0..64 * page).map(|i| (i / 7) as u8).collect();
        let f = file(&bytes);
        f.sync_all().unwrap();
        let map = Map::new(&f).unwrap().unwrap();
        assert!(map.as_ref() == bytes);
        map.advise(0..map.len(), Access::Random).unwrap();
        map.release(page + 1..50 * page);
        map.pieces(0..map.len()).for_each(|p| map.advise(p, Access::WillNeed).unwrap());
        assert!(map.as_ref() == bytes);
        assert_eq!(map.pieces(3..usize::MAX).map(|p| p.len()).sum::<usize>(), map.len() - 3);
        map.lock(5..page).unwrap();
        map.unlock(5..page);
        map.release(10..11);
    }
}
