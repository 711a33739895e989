//! The GPUs of this machine as NVIDIA's `nvidia-smi` tells them, for plans (`--gpu auto`). Knows nothing of models, and of GPUs
//! nothing but what is left of their memory and whether they drive a display.

use anyhow::{Context, Result, bail};
use engine::plan::Gpu;
use std::process::Command;

/// A GPU that the driver knows.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    uuid: String,
    gpu: Gpu,
}

/// What this process may use, in the order of its numbers.
///
/// # Errors
/// No `nvidia-smi`, or one that answers otherwise than expected.
pub fn here() -> Result<Vec<Gpu>> {
    let query = ["--query-gpu=uuid,memory.free,display_active", "--format=csv,noheader,nounits"];
    let out = Command::new("nvidia-smi").args(query).output();
    let out = out.context("--gpu auto asks nvidia-smi; give sizes instead (--gpu 24GiB)")?;
    if !out.status.success() {
        bail!("--gpu auto: nvidia-smi ended with {}; give sizes instead (--gpu 24GiB)", out.status);
    }
    let found = parse(&String::from_utf8_lossy(&out.stdout))?;
    Ok(visible(&found, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref()))
}

/// Lines of `uuid, MiB left, Enabled or Disabled`.
fn parse(text: &str) -> Result<Vec<Found>> {
    let line = |l: &str| {
        let mut fields = l.split(',').map(str::trim);
        let (uuid, free, display) = (fields.next()?, fields.next()?, fields.next()?);
        let bytes = free.parse::<u64>().ok()?.checked_mul(1 << 20)?;
        Some(Found { uuid: uuid.into(), gpu: Gpu { bytes, display: display == "Enabled" } })
    };
    let lines = text.lines().filter(|l| !l.trim().is_empty());
    lines.map(|l| line(l).with_context(|| format!("--gpu auto: nvidia-smi answered {l:?}"))).collect()
}

/// What `CUDA_VISIBLE_DEVICES` leaves, as CUDA reads it: numbers or beginnings of UUIDs, in the order wanted, up to the first
/// that names no GPU; none if one is named twice.
fn visible(all: &[Found], variable: Option<&str>) -> Vec<Gpu> {
    let Some(variable) = variable else { return all.iter().map(|f| f.gpu).collect() };
    let mut chosen: Vec<usize> = Vec::new();
    for name in variable.split(',').map(str::trim) {
        let uuid = |f: &Found| name.starts_with("GPU-") && f.uuid.starts_with(name);
        let at = match name.parse::<usize>() {
            Ok(i) => Some(i).filter(|i| *i < all.len()),
            Err(_) => all.iter().position(uuid),
        };
        match at {
            None => break,
            Some(i) if chosen.contains(&i) => return Vec::new(),
            Some(i) => chosen.push(i),
        }
    }
    chosen.into_iter().map(|i| all[i].gpu).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_nvidia_smi() {
        let found = parse("GPU-aa1, 24112, Enabled\nGPU-ab2, 81000, Disabled\n\n").unwrap();
        assert_eq!(found[0].gpu, Gpu { bytes: 24112 << 20, display: true });
        assert_eq!((found[1].uuid.as_str(), found[1].gpu.display), ("GPU-ab2", false));
        assert_eq!(parse("").unwrap(), []);
        assert!(parse("No devices were found").is_err() && parse("GPU-1, [N/A], Disabled").is_err());
    }

    #[test]
    fn cuda_visible_devices() {
        let gpu = |i: u64| Gpu { bytes: i, display: false };
        let all: Vec<Found> = (0..3).map(|i| Found { uuid: format!("GPU-{i}a{i}"), gpu: gpu(i) }).collect();
        for (variable, want) in [
            (None, &[0, 1, 2][..]),
            (Some("2,0"), &[2, 0]),
            (Some(""), &[]),
            (Some("-1"), &[]),
            (Some("1,7,0"), &[1]),
            (Some("1, 1"), &[]),
            (Some("GPU-1a,GPU-0"), &[1, 0]),
            (Some("1a"), &[]),
        ] {
            let want: Vec<Gpu> = want.iter().map(|i| gpu(*i)).collect();
            assert_eq!(visible(&all, variable), want, "{variable:?}");
        }
    }
}
