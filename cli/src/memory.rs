//! The memory this process holds, as the system counts it. Linux only; elsewhere nothing is known.

/// Resident bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Pages of mapped files: weights in the page cache, and the program itself.
    pub file: u64,
    /// Everything allocated: cache, buffers, vocabulary.
    pub anon: u64,
}

impl Resident {
    /// Now.
    pub fn now() -> Option<Self> {
        engine::Usage::now().map(|u| Self { file: u.resident_file, anon: u.resident_anon })
    }

    /// The larger of each.
    pub fn max(self, other: Self) -> Self {
        Self { file: self.file.max(other.file), anon: self.anon.max(other.anon) }
    }
}
