//! What the system counts of this process: resident memory, page faults, bytes read from disk. Linux only; elsewhere nothing is
//! known. Knows nothing of models.

use crate::pager::Paging;
use std::fs::read_to_string;

/// Figures of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resident pages of mapped files: weights, and the program itself.
    pub resident_file: u64,
    /// Resident memory that no file backs: cache, buffers, vocabulary.
    pub resident_anon: u64,
    /// Bytes locked in memory.
    pub locked: u64,
    /// Page faults since the start that found the page in memory.
    pub minor_faults: u64,
    /// Page faults since the start that had to read.
    pub major_faults: u64,
    /// Bytes that disks were asked for since the start, read-ahead included.
    pub disk_read: u64,
}

impl Usage {
    /// Now. `None` where the system does not say; single figures that it keeps to itself are 0.
    pub fn now() -> Option<Self> {
        let read = |name: &str| read_to_string(format!("/proc/self/{name}"));
        Self::parse(&read("status").ok()?, &read("stat").ok()?, &read("io").unwrap_or_default())
    }

    fn parse(status: &str, stat: &str, io: &str) -> Option<Self> {
        // Fields after the name, which may hold spaces and brackets: state is the first, minflt the eighth, majflt the tenth.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(7);
        let (minor, major) = (fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?);
        Some(Self {
            resident_file: kib(status, "RssFile:")?,
            resident_anon: kib(status, "RssAnon:")?,
            locked: kib(status, "VmLck:").unwrap_or(0),
            minor_faults: minor,
            major_faults: major,
            disk_read: io
                .lines()
                .find_map(|l| l.strip_prefix("read_bytes:")?.trim().parse().ok())
                .unwrap_or(0),
        })
    }

    /// Faults and bytes read since `before`; the rest as it is now.
    pub fn since(self, before: Self) -> Self {
        Self {
            minor_faults: self.minor_faults.saturating_sub(before.minor_faults),
            major_faults: self.major_faults.saturating_sub(before.major_faults),
            disk_read: self.disk_read.saturating_sub(before.disk_read),
            ..self
        }
    }
}

/// The memory of a session and its model, and what keeping within it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    /// Mapped weights, and what was done for them.
    pub paging: Paging,
    /// Bytes of cache in blocks that sequences hold.
    pub kv_used: u64,
    /// Bytes of cache allocated.
    pub kv_reserved: u64,
    /// Tokens that the cache has let go of.
    pub evicted: u64,
    /// The process; `None` where the system does not say.
    pub usage: Option<Usage>,
}

/// A line of /proc in kB, in bytes.
pub(crate) fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        let status = "Name:\tx\nVmLck:\t 8 kB\nRssAnon:\t    1234 kB\nRssFile:\t      56 kB\n";
        let stat = "71 (a b) c) R 1 2 3 4 5 6 77 8 99 10 11\n";
        let io = "rchar: 1\nread_bytes: 4096\n";
        let want = Usage {
            resident_file: 56 << 10,
            resident_anon: 1234 << 10,
            locked: 8 << 10,
            minor_faults: 77,
            major_faults: 99,
            disk_read: 4096,
        };
        assert_eq!(Usage::parse(status, stat, io), Some(want));
        assert_eq!(Usage::parse(status, stat, "").unwrap().disk_read, 0);
        for broken in ["", "1 (x) R", "1 x R 1 2 3 4 5 6 7 8 9 10"] {
            assert_eq!(Usage::parse(status, broken, io), None, "{broken}");
        }
        assert_eq!(Usage::parse("", stat, io), None);
        let now = Usage::now();
        assert_eq!(now.is_some(), cfg!(target_os = "linux"));
        assert!(now.is_none_or(|u| u.minor_faults > 0 && u.resident_anon > 0));
    }
}
