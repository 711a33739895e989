//! Arguments of `plan`, and those of placement and fitting that other commands share.

use super::shared::{BatchArg, CacheArgs, LoadArgs, ModelArgs, size};
use crate::cmd::plan::Config;
use crate::model::Placement;
use clap::Args;
use engine::DType;
use engine::plan::{Device, Gpu};
use regex::Regex;

/// Show where every byte would go, before anything is loaded
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer plan model.gguf                                this machine, default context\n  \
    rsinfer plan model.gguf -c 32768 --parallel 4 -ctk q8_0 -ctv q8_0\n  \
    rsinfer plan model-00001-of-00030.gguf --memory 64GiB --gpu 24GiB\n  \
    rsinfer plan model.gguf --memory 64GiB --gpu '24GiB,8GiB(display)' --cpu-moe --json\n\n\
    Headers are enough: a file without its data, or the first part of a split one. Where a plan does not fit, the flags that\n\
    do are printed. Placing weights on GPUs can be planned; running so far uses the CPU alone.")]
pub struct PlanArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Context size of a sequence in tokens, 0 for what the model was trained for [default: that, but at most 4096]
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Sequences at a time (-np)
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    parallel: u32,
    #[command(flatten)]
    batch: BatchArg,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Memory of the host, such as 16GiB [default: what this machine has left, control groups counted]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// GPUs by their memory, such as 24GiB,8GiB(display); those with a display are left out unless named by a rule
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',', value_parser = gpu)]
    gpu: Vec<Gpu>,
    #[command(flatten)]
    place: PlacementArgs,
    /// Change what must change to fit, and say what
    #[arg(long)]
    fit: bool,
    /// JSON instead of a table; sizes in bytes
    #[arg(long)]
    json: bool,
}

/// What goes to which device.
#[derive(Args)]
#[command(next_help_heading = "Placement")]
pub struct PlacementArgs {
    /// Layers on GPUs, from the last; the output counts as one (-ngl) [default: as many as fit]
    #[arg(long, alias = "num-gpu", value_name = "N")]
    gpu_layers: Option<usize>,
    /// Use this GPU alone (counted from 0)
    #[arg(long, value_name = "I")]
    main_gpu: Option<usize>,
    /// Shares of the GPUs [default: by size]
    #[arg(long, value_name = "X,...", value_delimiter = ',')]
    tensor_split: Vec<f64>,
    /// Keep all routed experts on the CPU
    #[arg(long)]
    cpu_moe: bool,
    /// Keep the routed experts of the first N layers on the CPU
    #[arg(long, value_name = "N", conflicts_with = "cpu_moe")]
    n_cpu_moe: Option<usize>,
    /// Tensors whose names match a regular expression go to CPU, GPU0, GPU1 ... (-ot; repeatable)
    #[arg(long, value_name = "PATTERN=DEVICE", value_parser = rule)]
    override_tensor: Vec<(Regex, Device)>,
}

impl PlacementArgs {
    pub fn resolve(self) -> Placement {
        Placement {
            gpu_layers: self.gpu_layers,
            main_gpu: self.main_gpu,
            split: self.tensor_split,
            cpu_moe: if self.cpu_moe { Some(usize::MAX) } else { self.n_cpu_moe },
            tensors: self.override_tensor,
        }
    }
}

impl PlanArgs {
    pub fn resolve(self) -> anyhow::Result<Config> {
        let load = self.load.resolve(self.model.source()?);
        Ok(Config {
            session: self.cache.session(self.ctx_size, self.batch.get(), DType::F16),
            load,
            parallel: self.parallel as usize,
            memory: self.memory,
            gpus: self.gpu,
            place: self.place.resolve(),
            fit: self.fit,
            json: self.json,
        })
    }
}

fn gpu(s: &str) -> Result<Gpu, String> {
    let (s, display) = match s.trim().strip_suffix("(display)") {
        Some(s) => (s, true),
        None => (s, false),
    };
    Ok(Gpu { bytes: size(s.trim())?, display })
}

fn rule(s: &str) -> Result<(Regex, Device), String> {
    let (pattern, device) =
        s.rsplit_once('=').ok_or_else(|| format!("{s:?} is not of the form PATTERN=DEVICE"))?;
    let name = device.to_ascii_lowercase();
    let device = match name.strip_prefix("gpu").or(name.strip_prefix("cuda")).map(str::parse) {
        None if name == "cpu" => Device::Cpu,
        Some(Ok(i)) => Device::Gpu(i),
        _ => return Err(format!("{device:?} is no device (CPU, GPU0, GPU1 ...)")),
    };
    Ok((Regex::new(pattern).map_err(|e| e.to_string())?, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_devices() {
        for (s, want) in
            [("16GiB", 16 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29), ("77", 77), ("2 TiB", 2 << 40)]
        {
            assert_eq!(size(s), Ok(want), "{s}");
        }
        for s in ["", "x", "12 apples", "1e9GiB", "-1", "99999999TiB"] {
            assert!(size(s).is_err(), "{s}");
        }
        assert_eq!(gpu("8GiB(display)"), Ok(Gpu { bytes: 8 << 30, display: true }));
        assert_eq!(rule("exps=CPU").unwrap().1, Device::Cpu);
        assert_eq!(rule("a=b=gpu1").unwrap().1, Device::Gpu(1));
        assert!(rule("x=TPU").is_err() && rule("(=CPU").is_err() && rule("x").is_err());
    }
}
