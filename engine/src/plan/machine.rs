//! What memory this machine has left for a process, from Linux's files. Knows nothing of models.

use crate::usage::{Usage, kib};
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that the process may still take: what the system calls available, within the limits of its control groups (version 1
/// or 2). `None` where the system does not say (no Linux).
pub fn available_memory() -> Option<u64> {
    available_under(Path::new("/"))
}

/// The same with the files under `root`.
fn available_under(root: &Path) -> Option<u64> {
    let system = kib(&fs::read_to_string(root.join("proc/meminfo")).ok()?, "MemAvailable:")?;
    Some(group_room(root, Pages::Unused).map_or(system, |g| g.min(system)))
}

/// Bytes of memory that pages of files may take when this process and its groups give up all they have: what is not taken by
/// anything else. Pages that this process has locked count as its own.
pub(crate) fn room_for_files() -> Option<u64> {
    room_for_files_under(Path::new("/"), Usage::now().map_or(0, |u| u.locked))
}

fn room_for_files_under(root: &Path, locked: u64) -> Option<u64> {
    let system = kib(&fs::read_to_string(root.join("proc/meminfo")).ok()?, "MemAvailable:")?;
    Some(group_room(root, Pages::All).unwrap_or(u64::MAX).min(system + locked))
}

/// Pages of files that count as free memory.
#[derive(Clone, Copy, PartialEq)]
enum Pages {
    /// Those that nobody has used lately.
    Unused,
    /// All of them.
    All,
}

/// The least that any group of the process has left.
fn group_room(root: &Path, free: Pages) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(names), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        // Version 2 has one line without controllers; version 1 a line for memory.
        let (base, limits, used, all, shared, unused) = match names {
            "" => {
                let limits = &["memory.max", "memory.high"][..];
                ("sys/fs/cgroup", limits, "memory.current", "file ", "shmem ", "inactive_file ")
            }
            n if n.split(',').any(|n| n == "memory") => (
                "sys/fs/cgroup/memory",
                &["memory.limit_in_bytes"][..],
                "memory.usage_in_bytes",
                "total_cache ",
                "total_shmem ",
                "total_inactive_file ",
            ),
            _ => continue,
        };
        // Shared memory counts among the pages of files, but there is no file to read it from again.
        let (cache, except) = if free == Pages::All { (all, shared) } else { (unused, "-") };
        let base = root.join(base);
        let mut dir: PathBuf = base.join(path.trim_start_matches('/'));
        // In a container the group's own files are often mounted at the base, whatever its path says.
        if !dir.starts_with(&base) || !dir.is_dir() {
            dir = base.clone();
        }
        loop {
            if let Some(room) = room(&dir, limits, used, (cache, except)) {
                least = Some(least.map_or(room, |l| l.min(room)));
            }
            if dir == base || !dir.pop() {
                break;
            }
        }
    }
    least
}

/// What is left of a group's lowest limit when the pages counted under the first key of `cache`, less the second, count as free.
fn room(dir: &Path, limits: &[&str], used: &str, cache: (&str, &str)) -> Option<u64> {
    let number = |f: &str| fs::read_to_string(dir.join(f)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (limits.iter().filter_map(|l| number(l)).min()?, number(used)?);
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let counted = |key: &str| {
        stat.lines().find_map(|l| l.strip_prefix(key)).and_then(|n| n.trim().parse().ok()).unwrap_or(0u64)
    };
    let free = counted(cache.0).saturating_sub(counted(cache.1));
    Some(limit.saturating_sub(used.saturating_sub(free)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    const MEMINFO: &str = "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n";

    #[test]
    fn the_system_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(available_under(dir.path()), None);
        write(dir.path(), &[("proc/meminfo", MEMINFO)]);
        assert_eq!(available_under(dir.path()), Some(8000 << 10));
        assert_eq!(room_for_files_under(dir.path(), 4096), Some((8000 << 10) + 4096));
    }

    #[test]
    fn version_two_takes_the_tightest_of_the_groups_above() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/a/b\n"),
                ("sys/fs/cgroup/a/memory.max", "3000000\n"),
                ("sys/fs/cgroup/a/memory.current", "1500000\n"),
                ("sys/fs/cgroup/a/memory.stat", "anon 5\nfile 900000\nshmem 100000\ninactive_file 500000\n"),
                ("sys/fs/cgroup/a/memory.high", "max\n"),
                ("sys/fs/cgroup/a/b/memory.max", "max\n"),
                ("sys/fs/cgroup/a/b/memory.current", "10\n"),
            ],
        );
        assert_eq!(available_under(dir.path()), Some(2_000_000));
        assert_eq!(room_for_files_under(dir.path(), 0), Some(2_300_000));
        // Above this one the system slows a group down instead of ending it.
        write(dir.path(), &[("sys/fs/cgroup/a/memory.high", "2500000\n")]);
        assert_eq!(available_under(dir.path()), Some(1_500_000));
    }

    #[test]
    fn version_one_and_a_path_that_is_not_mounted() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/1234\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "400000"),
                ("sys/fs/cgroup/memory/memory.stat", "total_cache 300000\ntotal_inactive_file 100000\n"),
            ],
        );
        assert_eq!(available_under(dir.path()), Some(700_000));
        assert_eq!(room_for_files_under(dir.path(), 0), Some(900_000));
    }
}
