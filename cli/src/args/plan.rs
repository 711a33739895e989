//! Arguments of `plan`.

use super::shared::{BatchArg, CacheArgs, LoadArgs, ModelArgs, size};
use crate::cmd::plan::Config;
use anyhow::anyhow;
use clap::Args;
use engine::DType;
use engine::plan::Gpu;

/// Show where every byte would go, before anything is loaded
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    rsinfer plan model.gguf                                this machine, default context\n  \
    rsinfer plan model.gguf -c 32768 --parallel 4 -ctk q8_0 -ctv q8_0\n  \
    rsinfer plan model-00001-of-00030.gguf --memory 64GiB --gpu 24GiB\n  \
    rsinfer plan model.gguf --memory 64GiB --gpu '24GiB,8GiB(display)' --cpu-moe --json\n\n\
    Headers are enough: a file without its data, or the first part of a split one. Where a plan does not fit, the flags that\n\
    do are printed. With --device the GPUs of this machine are planned for, as a run with the same flags does it.")]
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
    /// GPUs by their memory, such as 24GiB,8GiB(display), or `auto`: those of this machine that CUDA_VISIBLE_DEVICES shows, with
    /// what they have left. Those with a display are left out unless a rule names them
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',', value_parser = gpu)]
    gpu: Vec<GpuArg>,
    /// Change what must change to fit, and say what
    #[arg(long)]
    fit: bool,
    /// JSON instead of a table; sizes in bytes
    #[arg(long)]
    json: bool,
}

/// `--gpu`.
#[derive(Clone, Debug, PartialEq)]
enum GpuArg {
    Auto,
    Given(Gpu),
}

impl PlanArgs {
    pub fn resolve(self) -> anyhow::Result<Config> {
        let load = self.load.resolve(self.model.source()?)?;
        let mut gpus = Vec::new();
        for g in self.gpu {
            match g {
                GpuArg::Auto => {
                    let here = engine::device::gpus();
                    gpus.extend(here.map_err(|e| anyhow!("--gpu auto: {e}; or give sizes (--gpu 24GiB)"))?);
                }
                GpuArg::Given(g) => gpus.push(g),
            }
        }
        Ok(Config {
            session: self.cache.session(self.ctx_size, self.batch.get(), DType::F16),
            load,
            parallel: self.parallel as usize,
            memory: self.memory,
            gpus,
            fit: self.fit,
            json: self.json,
        })
    }
}

fn gpu(s: &str) -> Result<GpuArg, String> {
    if s.trim() == "auto" {
        return Ok(GpuArg::Auto);
    }
    let (s, display) = match s.trim().strip_suffix("(display)") {
        Some(s) => (s, true),
        None => (s, false),
    };
    Ok(GpuArg::Given(Gpu { bytes: size(s.trim())?, display }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_devices() {
        for (s, want) in [
            ("16GiB", 16 << 30),
            ("512M", 512 << 20),
            ("1.5g", 3 << 29),
            ("7700000", 7_700_000),
            ("2 TiB", 2 << 40),
            ("0", 0),
        ] {
            assert_eq!(size(s), Ok(want), "{s}");
        }
        for s in ["", "x", "24", "12 apples", "1e9GiB", "-1", "99999999TiB"] {
            assert!(size(s).is_err(), "{s}");
        }
        assert_eq!(gpu("8GiB(display)"), Ok(GpuArg::Given(Gpu { bytes: 8 << 30, display: true })));
        assert_eq!(gpu(" auto"), Ok(GpuArg::Auto));
    }
}
