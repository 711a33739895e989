//! What computes: the CPU, or a GPU that holds the whole model. Choosing among GPUs is plain data; opening one is `kernels`'.

use crate::plan::GpuNeeds;
use kernels::cuda::{self, CudaBackend, GpuError, GpuInfo};
use kernels::{Device, KernelError};
use std::fmt;
use std::str::FromStr;

/// `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The host's cores.
    #[default]
    Cpu,
    /// This NVIDIA GPU, as the driver counts them.
    Cuda(usize),
    /// A GPU where one can be used and the model fits, else the CPU.
    Auto,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let index = |n: &str| n.parse().ok().filter(|_| n.bytes().all(|b| b.is_ascii_digit()));
        match s.to_ascii_lowercase().as_str() {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda(0)),
            s => s
                .strip_prefix("cuda:")
                .and_then(index)
                .map(Self::Cuda)
                .ok_or_else(|| format!("{s:?} is no device: cpu, cuda:0, cuda:1 ..., or auto")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(i) => write!(f, "cuda:{i}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// What a choice came to.
#[derive(Debug)]
pub struct Chosen {
    /// `None`: the CPU.
    pub device: Option<Device>,
    /// With `auto`: what was taken and why, for people.
    pub note: Option<String>,
}

/// Bytes of a GPU that are left alone: kernels, the driver's own, and the rounding of allocations.
pub const GPU_MARGIN: u64 = 512 << 20;

/// A GPU, its number and its free bytes, or why it cannot be used.
struct Candidate {
    index: usize,
    info: GpuInfo,
    free: Result<u64, GpuError>,
}

impl DeviceChoice {
    /// Opens what was chosen for a run that needs so much of a GPU; nothing is asked for where that does not matter.
    ///
    /// # Errors
    /// A GPU asked for by name that cannot be used or does not hold the run: one line that says what to do.
    pub fn open<E: From<KernelError>>(
        self,
        needs: impl FnOnce() -> Result<GpuNeeds, E>,
    ) -> Result<Chosen, E> {
        match self {
            Self::Cpu => Ok(Chosen { device: None, note: None }),
            Self::Cuda(index) => {
                let gpu = cuda::open(index).map_err(KernelError::from)?;
                let (free, _) = gpu.memory().map_err(KernelError::from)?;
                fits(&needs()?, free).map_err(KernelError::from)?;
                let device = Device::new(CudaBackend::new(gpu, &self.to_string())?);
                Ok(Chosen { device: Some(device), note: None })
            }
            Self::Auto => {
                let all = match cuda::devices() {
                    Err(e) => return Ok(cpu(&e.to_string())),
                    Ok(all) => all,
                };
                let look = |(index, info): (usize, GpuInfo)| {
                    let free = cuda::open(index).and_then(|g| g.memory()).map(|m| m.0);
                    Candidate { index, info, free }
                };
                let candidates: Vec<Candidate> = all.into_iter().enumerate().map(look).collect();
                let needs = if candidates.is_empty() { GpuNeeds::default() } else { needs()? };
                let index = match best(&candidates, &needs) {
                    Err(why) => return Ok(cpu(&why)),
                    Ok(index) => index,
                };
                let opened = cuda::open(index).map_err(KernelError::from);
                match opened.and_then(|g| CudaBackend::new(g, &format!("cuda:{index}"))) {
                    Err(e) => Ok(cpu(&e.to_string())),
                    Ok(backend) => {
                        let device = Device::new(backend);
                        let note = Some(format!("--device auto: {}", device.name()));
                        Ok(Chosen { device: Some(device), note })
                    }
                }
            }
        }
    }
}

fn cpu(why: &str) -> Chosen {
    Chosen { device: None, note: Some(format!("--device auto: the CPU; {why}")) }
}

fn fits(needs: &GpuNeeds, free: u64) -> Result<(), GpuError> {
    if needs.total() + GPU_MARGIN <= free {
        return Ok(());
    }
    let bytes = usize::try_from(needs.total() + GPU_MARGIN).unwrap_or(usize::MAX);
    Err(GpuError::Memory { what: "model, its cache and working memory", bytes, free })
}

/// The one with most free memory of those that hold the run and serve no display; why not, where there is none.
fn best(all: &[Candidate], needs: &GpuNeeds) -> Result<usize, String> {
    let why = |c: &Candidate| match &c.free {
        Err(e) => Some(e.to_string()),
        Ok(_) if c.info.display => Some(format!("cuda:{} serves a display: name it to use it", c.index)),
        Ok(free) => fits(needs, *free).err().map(|e| e.to_string()),
    };
    let usable = all.iter().filter(|c| why(c).is_none());
    let most = usable.max_by_key(|c| (c.free.as_ref().map_or(0, |f| *f), std::cmp::Reverse(c.index)));
    match most {
        Some(c) => Ok(c.index),
        None if all.is_empty() => Err("the driver shows no GPU".into()),
        None => Err(all.iter().filter_map(why).collect::<Vec<_>>().join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (s, want) in
            [("cpu", DeviceChoice::Cpu), ("CUDA:12", DeviceChoice::Cuda(12)), ("auto", DeviceChoice::Auto)]
        {
            assert_eq!(s.parse(), Ok(want));
            assert_eq!(want.to_string(), s.to_lowercase());
        }
        for s in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:99999999999999999999"] {
            assert!(s.parse::<DeviceChoice>().is_err(), "{s}");
        }
    }

    #[test]
    fn auto_takes_the_roomiest_without_a_display() {
        let gpu = |index, gib: u64, display| Candidate {
            index,
            info: GpuInfo { name: "test".into(), capability: (8, 9), display },
            free: Ok(gib << 30),
        };
        let needs = GpuNeeds { weights: 8 << 30, kv: 1 << 30, scratch: 1 << 20 };
        assert_eq!(
            best(&[gpu(0, 10, false), gpu(1, 24, false), gpu(2, 24, false), gpu(3, 48, true)], &needs),
            Ok(1)
        );
        let lost = Candidate { free: Err(GpuError::Lost { why: "gone".into() }), ..gpu(0, 0, false) };
        let why = best(&[lost, gpu(1, 9, false), gpu(2, 80, true)], &needs).unwrap_err();
        assert!(why.contains("gone") && why.contains("out of GPU memory") && why.contains("cuda:2"), "{why}");
        assert!(best(&[], &needs).is_err());
        assert!(fits(&needs, needs.total() + GPU_MARGIN).is_ok());
        assert!(fits(&needs, needs.total() + GPU_MARGIN - 1).is_err());
    }
}
