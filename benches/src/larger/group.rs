//! A control group with a memory limit, version 1 or 2, made below the one this process is in and removed with it.

use super::Outcome;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// See the module.
pub struct Group {
    path: PathBuf,
    version: u8,
    /// Version 2: where this process was, if it had to leave it.
    home: Option<Home>,
}

/// The group that this process was in, and the one below it that it has gone to.
struct Home {
    group: PathBuf,
    leaf: PathBuf,
}

impl Home {
    fn leave(group: &Path, leaf: PathBuf) -> Result<Self> {
        fs::create_dir(&leaf).context(NEEDS)?;
        let home = Self { group: group.into(), leaf };
        fs::write(home.leaf.join("cgroup.procs"), std::process::id().to_string()).context(NEEDS)?;
        Ok(home)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // A group takes processes only while it hands nothing down.
        let _ = fs::write(self.group.join("cgroup.subtree_control"), "-memory");
        let _ = fs::write(self.group.join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.leaf);
    }
}

const NEEDS: &str = "control groups cannot be made here: run as root, or in a delegated group \
                     (systemd-run --user --scope -p Delegate=yes ...)";

impl Group {
    /// Makes one.
    pub fn create() -> Result<Self> {
        Self::under(Path::new("/"))
    }

    /// The same with the system's files under `root`.
    fn under(root: &Path) -> Result<Self> {
        let mounts = fs::read_to_string(root.join("proc/self/mounts")).context("this is no Linux")?;
        let own = fs::read_to_string(root.join("proc/self/cgroup"))?;
        let name = format!("rsinfer-larger-{}", std::process::id());
        // Where a hierarchy is mounted, and the group of this process in it.
        let place = |kind: &str, option: &str, line: &dyn Fn(&str) -> bool| -> Option<PathBuf> {
            let mount = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>()).find(|f| {
                f.len() > 3 && f[2] == kind && (option.is_empty() || f[3].split(',').any(|o| o == option))
            })?;
            let path = own.lines().find(|l| line(l))?.splitn(3, ':').nth(2)?;
            let base = root.join(mount[1].trim_start_matches('/'));
            let full = base.join(path.trim_start_matches('/'));
            Some(if full.is_dir() { full } else { base })
        };
        let one = place("cgroup", "memory", &|l| {
            l.split(':').nth(1).is_some_and(|c| c.split(',').any(|c| c == "memory"))
        });
        if let Some(parent) = one {
            let path = parent.join(name);
            fs::create_dir(&path).context(NEEDS)?;
            return Ok(Self { path, version: 1, home: None });
        }
        let parent = place("cgroup2", "", &|l| l.starts_with("0::")).context(NEEDS)?;
        let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        if !controllers.split_whitespace().any(|c| c == "memory") {
            bail!("{NEEDS}: {} does not control memory", parent.display());
        }
        // A group that hands its controllers down may hold no process itself: this one moves into a group of its own.
        let enable = || fs::write(parent.join("cgroup.subtree_control"), "+memory");
        let mut home = None;
        if enable().is_err() {
            home = Some(Home::leave(&parent, parent.join(format!("{name}-self")))?);
            let alone = || format!("{NEEDS}, where no other process is; {} has some", parent.display());
            enable().with_context(alone)?;
        }
        let path = parent.join(name);
        fs::create_dir(&path).context(NEEDS)?;
        Ok(Self { path, version: 2, home })
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| path.display().to_string())
    }

    /// Processes ended for want of memory so far.
    fn kills(&self) -> u64 {
        let file = if self.version == 1 { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Lets what runs in the group have `limit` bytes of memory, pages of files included, and no swap.
    fn limit(&self, limit: u64) -> Result<()> {
        if self.version == 1 {
            // What other runs have left behind would count.
            let _ = self.write("memory.force_empty", "0");
            let _ = self.write("memory.memsw.limit_in_bytes", "-1");
            self.write("memory.limit_in_bytes", &limit.to_string())?;
            let _ = self.write("memory.memsw.limit_in_bytes", &limit.to_string());
        } else {
            self.write("memory.max", &limit.to_string())?;
            let _ = self.write("memory.swap.max", "0");
        }
        Ok(())
    }

    /// Runs a command that prints an outcome with `limit` bytes of memory.
    pub fn run(&self, limit: u64, command: &Command) -> Result<Outcome> {
        self.limit(limit)?;
        let before = self.kills();
        let out = Command::new("sh")
            .args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""])
            .arg(&self.path)
            .arg(command.get_program())
            .args(command.get_args())
            .stderr(Stdio::inherit())
            .output()?;
        if self.kills() > before {
            return Ok(Outcome { killed: true, ..Default::default() });
        }
        match serde_json::from_slice(&out.stdout) {
            Ok(outcome) if out.status.success() => Ok(outcome),
            _ => {
                eprintln!("{command:?} ended with {}", out.status);
                Ok(Outcome { failed: true, ..Default::default() })
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
        // What is handed down can be taken back now.
        drop(self.home.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        root
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(path).expect("a file")
    }

    #[test]
    fn version_two_below_the_group_of_this_process() {
        let root = tree(&[
            ("proc/self/mounts", "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"),
            ("proc/self/cgroup", "0::/user/me\n"),
            ("sys/fs/cgroup/user/me/cgroup.controllers", "cpu memory pids\n"),
        ]);
        let me = root.path().join("sys/fs/cgroup/user/me");
        let group = Group::under(root.path()).expect("a group");
        assert_eq!((group.version, group.path.parent()), (2, Some(me.as_path())));
        assert_eq!(text(&me.join("cgroup.subtree_control")), "+memory");
        group.limit(1 << 30).expect("a limit");
        assert_eq!(text(&group.path.join("memory.max")), "1073741824");
        assert_eq!(text(&group.path.join("memory.swap.max")), "0");
        assert_eq!(group.kills(), 0);
        fs::write(group.path.join("memory.events"), "low 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n")
            .expect("written");
        assert_eq!(group.kills(), 1);
    }

    #[test]
    fn version_one_where_both_are_mounted() {
        let root = tree(&[
            (
                "proc/self/mounts",
                "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
            ),
            // In a container the path may not be there.
            ("proc/self/cgroup", "4:memory:/docker/1\n1:cpu:/\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1"),
            ("sys/fs/cgroup/unified/cgroup.controllers", "hugetlb"),
        ]);
        let group = Group::under(root.path()).expect("a group");
        assert_eq!(group.path.parent(), Some(root.path().join("sys/fs/cgroup/memory").as_path()));
        group.limit(77).expect("a limit");
        assert_eq!(text(&group.path.join("memory.limit_in_bytes")), "77");
        fs::write(group.path.join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
            .expect("written");
        assert_eq!(group.kills(), 3);
    }

    #[test]
    fn without_a_memory_controller_there_is_none() {
        let root = tree(&[
            ("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu pids\n"),
        ]);
        let why = Group::under(root.path()).err().expect("an error").to_string();
        assert!(why.contains("does not control memory"), "{why}");
    }
}
