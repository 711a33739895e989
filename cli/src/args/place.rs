//! Arguments that say what computes, and what goes to which device: part of all commands that load or plan a model.

use crate::model::Placement;
use anyhow::{Result, bail};
use clap::Args;
use engine::device::DeviceChoice;
use engine::plan::Device;
use regex::Regex;

/// What goes to which device.
#[derive(Args)]
#[command(next_help_heading = "Placement")]
pub struct PlacementArgs {
    /// What computes: cpu; cuda:N (a NVIDIA GPU), cuda:0,cuda:1 (several); or auto: GPUs as far as the model fits them, else the
    /// CPU [default: cpu, or auto where an option below speaks of GPUs]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Layers on GPUs, from the last; the output counts as one (-ngl) [default: all; with auto as many as fit]
    #[arg(long, alias = "num-gpu", value_name = "N")]
    gpu_layers: Option<usize>,
    /// Use this GPU alone (counted from 0)
    #[arg(long, value_name = "I")]
    main_gpu: Option<usize>,
    /// Shares of the bytes on GPUs that each gets [default: by size]
    #[arg(long, value_name = "X,...", value_delimiter = ',')]
    tensor_split: Vec<f64>,
    /// Keep all routed experts on the CPU
    #[arg(long, overrides_with = "n_cpu_moe")]
    cpu_moe: bool,
    /// Keep the routed experts of the first N layers on the CPU
    #[arg(long, value_name = "N", overrides_with = "cpu_moe")]
    n_cpu_moe: Option<usize>,
    /// Tensors whose names match a regular expression go to CPU, GPU0, GPU1 ... (-ot; repeatable): whole layers, the routed
    /// experts of layers, or the output
    #[arg(long, value_name = "PATTERN=DEVICE", value_parser = rule)]
    override_tensor: Vec<(Regex, Device)>,
}

impl PlacementArgs {
    /// What computes, and where parts of a model should go.
    ///
    /// # Errors
    /// GPUs asked for and forbidden in one.
    pub fn resolve(&self) -> Result<(DeviceChoice, Placement)> {
        let place = Placement {
            gpu_layers: self.gpu_layers,
            main_gpu: self.main_gpu,
            split: self.tensor_split.clone(),
            cpu_moe: if self.cpu_moe { Some(usize::MAX) } else { self.n_cpu_moe },
            tensors: self.override_tensor.clone(),
        };
        let device = match &self.device {
            Some(DeviceChoice::Cpu) if place.asks_for_gpus() => {
                bail!(
                    "--device cpu leaves nothing for GPUs to do: choose --device auto or cuda:0, or no other placement"
                )
            }
            Some(device) => device.clone(),
            None if place == Placement::default() || place.gpu_layers == Some(0) => DeviceChoice::Cpu,
            None => DeviceChoice::Auto,
        };
        Ok((device, place))
    }
}

fn rule(s: &str) -> std::result::Result<(Regex, Device), String> {
    let (pattern, device) =
        s.rsplit_once('=').ok_or_else(|| format!("{s:?} is not of the form PATTERN=DEVICE"))?;
    let name = device.to_ascii_lowercase();
    let number = name.strip_prefix("gpu").or(name.strip_prefix("cuda:")).or(name.strip_prefix("cuda"));
    let device = match number.map(str::parse) {
        None if name == "cpu" => Device::Cpu,
        Some(Ok(i)) => Device::Gpu(i),
        _ => return Err(format!("{device:?} is no device (CPU, GPU0 or cuda:0 ...)")),
    };
    Ok((Regex::new(pattern).map_err(|e| e.to_string())?, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        assert_eq!(rule("exps=CPU").unwrap().1, Device::Cpu);
        for same in ["a=b=gpu1", "a=b=CUDA1", "a=b=cuda:1"] {
            assert_eq!(rule(same).unwrap().1, Device::Gpu(1));
        }
        for wrong in ["x=TPU", "x=cuda:", "(=CPU", "x"] {
            assert!(rule(wrong).is_err(), "{wrong}");
        }
    }
}
