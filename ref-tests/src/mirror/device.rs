//! The GPU that tests run on besides the interpreter: one for the process, its modules loaded once. Knows names; nothing of memory.

use kernels::cuda::modules::Ptx;
use kernels::cuda::{Arg, Gpu, GpuError, KernelId, Launch, open};
use std::collections::HashMap;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};

type Kernels = HashMap<(&'static str, String), Result<KernelId, GpuError>>;

/// See the module.
pub struct Device {
    pub(super) gpu: Box<dyn Gpu>,
    /// As in 75 for 7.5.
    capability: u32,
    /// By module, loaded when it is first asked for, and entry.
    kernels: Mutex<Kernels>,
    launches: AtomicUsize,
    /// Launches by number and kernels by name that are not run: they have lost a GPU before.
    skipped: Vec<String>,
}

/// Says it past the test harness, which keeps what a test prints to itself.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The number of the GPU that `RSINFER_TEST_GPU=cuda:N` asks for, if it is there; says once which, or why not.
///
/// # Panics
/// For a value that is no `cuda:N`; without that GPU where `RSINFER_TEST_GPU_REPORT` asks for a report.
pub fn asked() -> Option<usize> {
    // Held for good: each test opens it anew, which takes no time while its context stays.
    static ASKED: OnceLock<Option<(usize, Box<dyn Gpu>)>> = OnceLock::new();
    let asked = ASKED.get_or_init(|| {
        let Ok(name) = std::env::var("RSINFER_TEST_GPU") else {
            say("no GPU was asked for (RSINFER_TEST_GPU=cuda:0): the PTX interpreter alone");
            return None;
        };
        let index =
            name.strip_prefix("cuda:").and_then(|n| n.parse().ok()).expect("RSINFER_TEST_GPU is cuda:N");
        match open(index) {
            Ok(gpu) => {
                say(&format!("{name}: {}", gpu.info()));
                Some((index, gpu))
            }
            // Whoever wants a report wants a GPU.
            Err(e) if std::env::var_os("RSINFER_TEST_GPU_REPORT").is_some() => panic!("{name}: {e}"),
            Err(e) => {
                say(&format!("{name} is not here, the PTX interpreter alone: {e}"));
                None
            }
        }
    });
    asked.as_ref().map(|a| a.0)
}

/// The GPU to mirror tests on, where one was asked for.
pub fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let opened = DEVICE.get_or_init(|| {
        let gpu = open(asked()?).expect("it was opened before");
        let (major, minor) = gpu.info().capability;
        let skipped = std::env::var("RSINFER_TEST_GPU_SKIP").unwrap_or_default();
        Some(Device {
            gpu,
            capability: 10 * major + minor,
            kernels: Mutex::default(),
            launches: AtomicUsize::new(0),
            skipped: skipped.split(',').map(str::to_owned).collect(),
        })
    });
    opened.as_ref()
}

impl Device {
    /// What it is.
    pub fn capability(&self) -> (u32, u32) {
        (self.capability / 10, self.capability % 10)
    }

    /// The next launch's number, from 1.
    pub(super) fn count(&self) -> usize {
        self.launches.fetch_add(1, Relaxed) + 1
    }

    pub(super) fn skips(&self, n: usize, kernel: &str) -> bool {
        self.skipped.iter().any(|s| s == kernel || s.parse() == Ok(n))
    }

    /// Whether it is new enough for a text.
    pub(super) fn takes(&self, ptx: &Ptx) -> bool {
        let target = ptx.text.split_once(".target sm_").map_or("", |t| t.1);
        let digits = target.split(|c: char| !c.is_ascii_digit()).next().unwrap_or("");
        digits.parse().is_ok_and(|sm: u32| sm <= self.capability)
    }

    /// A kernel; its module is compiled when it is first asked for, which takes seconds.
    pub(super) fn kernel(&self, ptx: &'static Ptx, entry: &str) -> Result<KernelId, GpuError> {
        let mut known = self.kernels.lock().unwrap_or_else(|e| e.into_inner());
        let name = (ptx.name, entry.to_owned());
        if let Some(k) = known.get(&name) {
            return k.clone();
        }
        let loaded = known.keys().any(|k| k.0 == ptx.name);
        let load = if loaded { Ok(()) } else { self.gpu.load(ptx) };
        let found = load.and_then(|()| self.gpu.kernel(ptx.name, entry));
        known.insert(name, found.clone());
        found
    }

    /// Runs a kernel to its end.
    pub(super) fn run(&self, kernel: KernelId, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        self.gpu.launch(kernel, launch, args)?;
        self.gpu.synchronize()
    }
}
