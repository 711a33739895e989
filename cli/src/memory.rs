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
        Self::parse(&std::fs::read_to_string("/proc/self/status").ok()?)
    }

    /// `RssFile` and `RssAnon` of /proc/PID/status.
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Self { file: field("RssFile")?, anon: field("RssAnon")? })
    }

    /// The larger of each.
    pub fn max(self, other: Self) -> Self {
        Self { file: self.file.max(other.file), anon: self.anon.max(other.anon) }
    }
}

/// Page faults of the process so far: minor, and major ones, which read from disk.
pub fn page_faults() -> Option<(u64, u64)> {
    faults(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

/// `minflt` and `majflt` of /proc/PID/stat; the program's name before them may hold anything.
fn faults(stat: &str) -> Option<(u64, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(7);
    let minor = fields.next()?.parse().ok()?;
    Some((minor, fields.nth(1)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_faults_are_read() {
        let stat = "12 (a ) b) S 1 12 12 0 -1 4194304 345 0 67 0 1 2 3";
        assert_eq!(faults(stat), Some((345, 67)));
        assert_eq!(faults("12 (a) S 1"), None);
        assert_eq!(page_faults().is_some(), cfg!(target_os = "linux"));
    }

    #[test]
    fn fields_are_read() {
        let status =
            "Name:\tx\nVmHWM:\t  999 kB\nRssAnon:\t    1234 kB\nRssFile:\t      56 kB\nRssShmem:\t 0 kB\n";
        assert_eq!(Resident::parse(status), Some(Resident { file: 56 * 1024, anon: 1234 * 1024 }));
        for broken in
            ["", "RssAnon: 1 kB\n", "RssAnon: x kB\nRssFile: 1 kB\n", "RssAnon: 1 MB\nRssFile: 1 kB\n"]
        {
            assert_eq!(Resident::parse(broken), None, "{broken}");
        }
        assert_eq!(Resident::now().is_some(), cfg!(target_os = "linux"));
    }
}
