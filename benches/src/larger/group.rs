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
}

const NEEDS: &str = "control groups cannot be made here: run as root, or in a delegated group \
                     (systemd-run --user --scope -p Delegate=yes ...)";

impl Group {
    /// Makes one.
    pub fn create() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("this is no Linux")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let name = format!("rsinfer-larger-{}", std::process::id());
        // Where a hierarchy is mounted, and the group of this process in it.
        let place = |kind: &str, option: &str, line: &dyn Fn(&str) -> bool| -> Option<PathBuf> {
            let mount = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>()).find(|f| {
                f.len() > 3 && f[2] == kind && (option.is_empty() || f[3].split(',').any(|o| o == option))
            })?;
            let path = own.lines().find(|l| line(l))?.splitn(3, ':').nth(2)?;
            let base = Path::new(mount[1]);
            let full = base.join(path.trim_start_matches('/'));
            Some(if full.is_dir() { full } else { base.into() })
        };
        let one = place("cgroup", "memory", &|l| {
            l.split(':').nth(1).is_some_and(|c| c.split(',').any(|c| c == "memory"))
        });
        if let Some(parent) = one {
            let path = parent.join(name);
            fs::create_dir(&path).context(NEEDS)?;
            return Ok(Self { path, version: 1 });
        }
        let parent = place("cgroup2", "", &|l| l.starts_with("0::")).context(NEEDS)?;
        let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        if !controllers.split_whitespace().any(|c| c == "memory") {
            bail!("{NEEDS}: {} does not control memory", parent.display());
        }
        // A group that hands its controllers down may hold no process itself: this one moves into a group of its own.
        let enable = || fs::write(parent.join("cgroup.subtree_control"), "+memory");
        if enable().is_err() {
            let leaf = parent.join(format!("{name}-self"));
            fs::create_dir(&leaf).context(NEEDS)?;
            fs::write(leaf.join("cgroup.procs"), std::process::id().to_string()).context(NEEDS)?;
            enable().context(NEEDS)?;
        }
        let path = parent.join(name);
        fs::create_dir(&path).context(NEEDS)?;
        Ok(Self { path, version: 2 })
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

    /// Runs a command that prints an outcome with `limit` bytes of memory, pages of files included, and no swap.
    pub fn run(&self, limit: u64, command: &Command) -> Result<Outcome> {
        // What other runs have left behind would count.
        let _ = self.write("memory.force_empty", "0");
        if self.version == 1 {
            let _ = self.write("memory.memsw.limit_in_bytes", "-1");
            self.write("memory.limit_in_bytes", &limit.to_string())?;
            let _ = self.write("memory.memsw.limit_in_bytes", &limit.to_string());
        } else {
            self.write("memory.max", &limit.to_string())?;
            let _ = self.write("memory.swap.max", "0");
        }
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
    }
}
