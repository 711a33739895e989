//! What computes: the CPU, or GPUs beside it. Which of those that are there are used, and for what, is decided in plain data; opening
//! them is `kernels`'.

use crate::EngineError;
use crate::plan::{Fit, Gpu, Machine, Plan, PlanModel, PlanOptions, Rules, fit, plan};
use crate::stages::Devices;
use kernels::cpu::CpuBackend;
use kernels::cuda::{self, CudaBackend};
use kernels::{Device, KernelError};
use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

/// `--device`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The host's cores.
    #[default]
    Cpu,
    /// These NVIDIA GPUs, as the driver counts them; one named several times is as many, each with its share of the memory.
    Cuda(Vec<usize>),
    /// GPUs where they can be used and anything of the model fits them, else the CPU.
    Auto,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let digits = |n: &str| n.parse().ok().filter(|_| n.bytes().all(|b| b.is_ascii_digit()));
        let gpu = |s: &str| if s == "cuda" { Some(0) } else { s.strip_prefix("cuda:").and_then(digits) };
        match s.to_ascii_lowercase().as_str() {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            names => {
                names.split(',').map(|s| gpu(s.trim())).collect::<Option<_>>().map(Self::Cuda).ok_or_else(
                    || format!("{s:?} is no device: cpu, cuda:0, cuda:1, cuda:0,cuda:1 ..., or auto"),
                )
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(all) => {
                f.write_str(&all.iter().map(|i| format!("cuda:{i}")).collect::<Vec<_>>().join(","))
            }
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// Bytes of a GPU that are left alone: kernels, the driver's own, and the rounding of allocations.
pub const GPU_MARGIN: u64 = 512 << 20;

/// A GPU that was looked at.
#[derive(Clone, Debug)]
struct Found {
    /// As the driver counts.
    index: usize,
    /// For people.
    info: String,
    /// What plans may use of it.
    gpu: Gpu,
    /// Why it cannot be used.
    broken: Option<String>,
}

/// The GPUs that a choice allows, as they were when it looked.
#[derive(Clone, Debug)]
pub struct Gpus {
    choice: DeviceChoice,
    all: Vec<Found>,
    /// Why there are none.
    none: Option<String>,
}

impl DeviceChoice {
    /// Looks at the GPUs that it allows; at none for the CPU.
    ///
    /// # Errors
    /// One asked for by name that cannot be used: one line that says what to do.
    pub fn look(&self) -> Result<Gpus, EngineError> {
        let (mut all, mut none) = (Vec::new(), None);
        match self {
            Self::Cpu => {}
            Self::Cuda(named) => {
                for &index in named {
                    let times = named.iter().filter(|i| **i == index).count() as u64;
                    let gpu = cuda::open(index).map_err(KernelError::from)?;
                    let free = gpu.memory().map_err(KernelError::from)?.0 / times;
                    // Who names it wants it, whatever else it does; without room plans would pass over it in silence.
                    let bytes = free.saturating_sub(GPU_MARGIN).max(1);
                    let info = gpu.info().to_string();
                    all.push(Found { index, info, gpu: Gpu { bytes, display: false }, broken: None });
                }
            }
            Self::Auto => match cuda::devices() {
                Err(e) => none = Some(e.to_string()),
                Ok(infos) => {
                    for (index, info) in infos.into_iter().enumerate() {
                        let free = cuda::open(index).and_then(|g| g.memory()).map(|m| m.0);
                        let bytes = free.as_ref().map_or(0, |f| f.saturating_sub(GPU_MARGIN));
                        let gpu = Gpu { bytes, display: info.display };
                        let broken = free.err().map(|e| e.to_string());
                        all.push(Found { index, info: info.to_string(), gpu, broken });
                    }
                }
            },
        }
        Ok(Gpus { choice: self.clone(), all, none })
    }
}

/// The GPUs that the driver shows, in its order, with what plans may use of each.
///
/// # Errors
/// No driver, or one too old.
pub fn gpus() -> Result<Vec<Gpu>, EngineError> {
    cuda::devices().map_err(KernelError::from)?;
    Ok(DeviceChoice::Auto.look()?.machine())
}

impl Gpus {
    /// Plans a run on them and `memory` bytes of the host. With GPUs named and rules that leave it open the model must fit them whole;
    /// `auto` takes one GPU if that holds it, else all that serve no display together. Also what `auto` came to, for people.
    ///
    /// # Errors
    /// Options that no session accepts.
    pub fn fit(
        &self,
        model: &PlanModel,
        o: &PlanOptions,
        memory: u64,
        rules: &Rules,
    ) -> Result<(Fit, Option<String>), EngineError> {
        let machine = Machine { memory, gpus: self.machine() };
        let whole = Rules { gpu_layers: Some(usize::MAX), ..rules.clone() };
        match self.choice {
            DeviceChoice::Cpu => Ok((fit(model, o, &machine, &Rules::default())?, None)),
            DeviceChoice::Cuda(_) if rules.is_open() => Ok((fit(model, o, &machine, &whole)?, None)),
            DeviceChoice::Cuda(_) => Ok((fit(model, o, &machine, rules)?, None)),
            DeviceChoice::Auto => {
                if rules.is_open() && rules.main_gpu.is_none() && rules.split.is_empty() {
                    for i in self.roomiest() {
                        let alone = Rules { main_gpu: Some(i), ..whole.clone() };
                        let plan = plan(model, o, &machine, &alone)?;
                        if plan.fits() {
                            let note = self.note(&plan, model);
                            return Ok((Fit { plan, ways: Vec::new(), least: 0 }, Some(note)));
                        }
                    }
                }
                let found = fit(model, o, &machine, rules)?;
                let note = self.note(&found.plan, model);
                Ok((found, Some(note)))
            }
        }
    }

    /// What plans may use.
    pub fn machine(&self) -> Vec<Gpu> {
        self.all.iter().map(|f| f.gpu).collect()
    }

    /// Bytes that a plan takes of each GPU, as the driver counts them.
    pub fn held(&self, plan: &Plan) -> Vec<(usize, u64)> {
        let bytes = |(i, f): (usize, &Found)| Some((f.index, plan.devices.get(i + 1)?.resident()));
        self.all.iter().enumerate().filter_map(bytes).filter(|h| h.1 > 0).collect()
    }

    /// Counts `bytes` of a GPU as free that something is going to give back.
    pub fn give_back(&mut self, index: usize, bytes: u64) {
        if let Some(f) = self.all.iter_mut().find(|f| f.index == index) {
            f.gpu.bytes += bytes;
        }
    }

    /// Those without a display, the one with most free memory first.
    fn roomiest(&self) -> Vec<usize> {
        let usable = |i: &usize| !self.all[*i].gpu.display && self.all[*i].broken.is_none();
        let mut order: Vec<usize> = (0..self.all.len()).filter(usable).collect();
        order.sort_by_key(|i| (Reverse(self.all[*i].gpu.bytes), *i));
        order
    }

    /// What `auto` came to.
    fn note(&self, plan: &Plan, model: &PlanModel) -> String {
        let used = (0..self.all.len()).filter(|i| plan.devices[i + 1].resident() > 0);
        let used: Vec<String> =
            used.map(|i| format!("cuda:{} ({})", self.all[i].index, self.all[i].info)).collect();
        if used.is_empty() {
            return format!("--device auto: the CPU; {}", self.why_none());
        }
        let layers = model.n_layers() + 1;
        let what = match (plan.gpu_layers >= layers, plan.cpu_moe) {
            (true, 0) => "the whole model".into(),
            (_, 0) => format!("{} of {layers} layers", plan.gpu_layers),
            (_, n) => format!("{} of {layers} layers, the experts of {n} on the CPU", plan.gpu_layers),
        };
        format!("--device auto: {}: {what}", used.join(", "))
    }

    fn why_none(&self) -> String {
        let why = |f: &Found| match &f.broken {
            Some(why) => why.clone(),
            None if f.gpu.display => format!("cuda:{} serves a display: name it to use it", f.index),
            None => format!("cuda:{} has no room for any of it", f.index),
        };
        match &self.none {
            Some(why) => why.clone(),
            None if self.all.is_empty() => "the driver shows no GPU".into(),
            None => self.all.iter().map(why).collect::<Vec<_>>().join("; "),
        }
    }

    /// The same without any GPU, where the choice allows that.
    pub fn without(&self, why: &str) -> Option<Self> {
        let none = Some(why.to_owned());
        let auto = self.choice == DeviceChoice::Auto && !self.all.is_empty();
        auto.then(|| Self { choice: self.choice.clone(), all: Vec::new(), none })
    }

    /// Opens what the plan uses, the CPU with so many threads; `None`: the CPU alone.
    ///
    /// # Errors
    /// A driver that does not take the kernels, a GPU that is gone.
    pub fn open(&self, plan: &Plan, threads: usize) -> Result<Option<Devices>, EngineError> {
        let used = plan.layout.used();
        if used == [0] {
            return Ok(None);
        }
        let mut all = Vec::new();
        for d in &used {
            all.push(match d.checked_sub(1).map(|i| self.all[i].index) {
                None => Device::new(CpuBackend::new(threads)),
                Some(index) => {
                    let gpu = cuda::open(index).map_err(KernelError::from)?;
                    Device::new(CudaBackend::new(gpu, &format!("cuda:{index}"))?)
                }
            });
        }
        let place = |d: usize| used.iter().position(|u| *u == d).unwrap_or(0);
        Ok(Some(Devices::new(all, plan.layout.renumbered(place))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (s, want) in [
            ("cpu", DeviceChoice::Cpu),
            ("CUDA:12", DeviceChoice::Cuda(vec![12])),
            ("cuda:1,cuda:0,cuda:1", DeviceChoice::Cuda(vec![1, 0, 1])),
            ("auto", DeviceChoice::Auto),
        ] {
            assert_eq!(s.parse(), Ok(want.clone()));
            assert_eq!(want.to_string(), s.to_lowercase());
        }
        let wrong = [
            "",
            "gpu",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda:x",
            "cuda:99999999999999999999",
            "cpu,cuda:0",
            "cuda:0,",
        ];
        for s in wrong {
            assert!(s.parse::<DeviceChoice>().is_err(), "{s}");
        }
    }

    #[test]
    fn auto_takes_the_roomiest_without_a_display() {
        let lost = Found { broken: Some("gone".into()), ..roomy(4, 96, false) };
        let all =
            vec![roomy(0, 10, false), roomy(1, 24, false), roomy(2, 24, false), roomy(3, 48, true), lost];
        let gpus = Gpus { choice: DeviceChoice::Auto, all, none: None };
        assert_eq!(gpus.roomiest(), [1, 2, 0]);
        let why = gpus.why_none();
        assert!(
            ["gone", "cuda:3 serves a display", "cuda:1 has no room"].iter().all(|p| why.contains(p)),
            "{why}"
        );
        let none = gpus.without("no driver").expect("auto goes on");
        assert!(none.without("again").is_none() && none.why_none() == "no driver");
        assert!(Gpus { choice: DeviceChoice::Cuda(vec![0]), ..gpus }.without("no").is_none());
    }

    fn roomy(index: usize, bytes: u64, display: bool) -> Found {
        Found { index, info: "test".into(), gpu: Gpu { bytes, display }, broken: None }
    }

    /// One GPU where that holds the model, all together where none does; experts go before layers, and the CPU takes over last.
    #[test]
    fn auto_comes_to_what_fits() {
        let model =
            PlanModel::open("../ref-tests/demo-model/demo-q8_0.gguf".as_ref()).expect("the demo model");
        let session = crate::SessionOptions { ctx: 128, batch: 8, ..Default::default() };
        let o = PlanOptions { session, parallel: 1, threads: 1, ..PlanOptions::default() };
        let on = |choice: DeviceChoice, all: Vec<Found>| {
            let gpus = Gpus { choice, all, none: None };
            let (found, note) = gpus.fit(&model, &o, 1 << 40, &Rules::default()).expect("a plan");
            (found, note.unwrap_or_default())
        };
        let auto = |all| on(DeviceChoice::Auto, all);
        let layers = model.n_layers() + 1;
        let whole = auto(vec![roomy(0, 1 << 30, false)]).0.plan.devices[1].resident();
        let all = vec![roomy(0, whole, false), roomy(1, 2 * whole, false), roomy(2, 4 * whole, true)];
        let (found, note) = auto(all);
        assert_eq!((found.plan.layout.used(), found.plan.gpu_layers), (vec![2], layers));
        assert!(note.contains("cuda:1 (test): the whole model"), "{note}");
        let (found, note) = auto(vec![roomy(0, whole / 4 * 3, false), roomy(1, whole / 4 * 3, false)]);
        assert!(found.plan.fits() && [1, 2].iter().all(|d| found.plan.layout.used().contains(d)), "{note}");
        let (found, note) = auto(vec![roomy(0, whole / 4 * 3, false)]);
        assert!(found.plan.fits() && found.plan.gpu_layers == layers && found.plan.cpu_moe > 0, "{note}");
        assert!(note.contains("on the CPU"), "{note}");
        let (found, note) = auto(vec![roomy(0, 1000, false), roomy(1, whole, true)]);
        assert!(found.plan.fits() && found.plan.layout.used() == [0]);
        assert!(
            note.contains("the CPU; cuda:0 has no room for any of it; cuda:1 serves a display"),
            "{note}"
        );
        // Who names a GPU is told what would fit it.
        let (found, _) = on(DeviceChoice::Cuda(vec![0]), vec![roomy(0, whole / 4 * 3, false)]);
        assert!(!found.plan.fits() && found.ways.iter().any(|w| w.flags().contains("--n-cpu-moe")));
    }
}
