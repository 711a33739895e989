//! Machines whose memory lies in several nodes (NUMA): where threads run and where pages go. Linux only; knows nothing of models.

use crate::EngineError;

/// How a process uses the nodes; llama.cpp's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numa {
    /// Pages are dealt to all nodes in turn: every thread reads from all of them.
    Distribute,
    /// Threads run on the node that the process started on, whose memory they prefer.
    Isolate,
    /// As the process was started (`numactl`).
    Numactl,
}

impl Numa {
    /// Applies it to the calling thread and those it starts from now on: call it before a model is loaded. With one node there is
    /// nothing to do. Pages that are in the page cache already stay where they are.
    ///
    /// # Errors
    /// The system refuses.
    pub fn apply(self) -> Result<(), EngineError> {
        #[cfg(target_os = "linux")]
        {
            let list = |path: &str| std::fs::read_to_string(format!("/sys/devices/system/node/{path}"));
            let nodes = numbers(&list("online").unwrap_or_default());
            let fail = |e: std::io::Error| EngineError::Option(format!("--numa: the system refuses: {e}"));
            match self {
                Self::Distribute if nodes.len() > 1 => crate::gguf::interleave(&nodes).map_err(fail)?,
                Self::Isolate if nodes.len() > 1 => {
                    let here = rustix::thread::sched_getcpu();
                    let cpus = |n: &usize| numbers(&list(&format!("node{n}/cpulist")).unwrap_or_default());
                    let mut set = rustix::thread::CpuSet::new();
                    let node = nodes.iter().map(cpus).find(|c| c.contains(&here)).unwrap_or_default();
                    node.iter().filter(|c| **c < rustix::thread::CpuSet::MAX_CPU).for_each(|c| set.set(*c));
                    if set.count() > 0 {
                        rustix::thread::sched_setaffinity(None, &set).map_err(|e| fail(e.into()))?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The kernel's lists: `0-3,8`.
#[cfg(any(target_os = "linux", test))]
fn numbers(list: &str) -> Vec<usize> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        Some(a.parse().ok()?..=b.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flat_map(|r| r.take(4096)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        assert_eq!(numbers("0-2,5\n"), [0, 1, 2, 5]);
        assert!(numbers("").is_empty() && numbers("x-").is_empty());
    }

    #[test]
    fn one_node_needs_nothing() {
        for n in [Numa::Distribute, Numa::Numactl] {
            n.apply().unwrap();
        }
    }
}
