//! Memory maps: the one unsafe file of the engine. Knows files and ranges; nothing of GGUF.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;

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

/// A whole file, read-only.
pub(super) struct Map(memmap2::Mmap);

impl Map {
    /// Maps `file`, which must not be empty.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only and private to this value, which hands out shared slices only. What cannot be
        // excluded is that another program changes or truncates the file meanwhile (a truncation is a SIGBUS, a change
        // shows as changed weights): as in every program that maps model files, that is the user's promise, and
        // OpenMode::Read is there for those who cannot give it. Nothing read from the map later is trusted to be
        // unchanged for memory safety: the header is parsed into owned values once, and weights are plain numbers.
        unsafe { memmap2::Mmap::map(file) }.map(Self)
    }

    /// Tells the kernel how `range` will be read. Only advice: ranges outside the map are cut, and systems without
    /// madvise do nothing.
    pub(super) fn advise(&self, range: Range<usize>, access: Access) -> io::Result<()> {
        let start = range.start.min(self.0.len());
        let len = range.end.clamp(start, self.0.len()) - start;
        #[cfg(unix)]
        if len > 0 {
            let advice = match access {
                Access::Sequential => memmap2::Advice::Sequential,
                Access::Random => memmap2::Advice::Random,
                Access::WillNeed => memmap2::Advice::WillNeed,
                Access::Normal => memmap2::Advice::Normal,
            };
            self.0.advise_range(advice, start, len)?;
        }
        #[cfg(not(unix))]
        let _ = (len, access);
        Ok(())
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
