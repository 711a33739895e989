//! What goes where: a model's needs on devices of given sizes, by rules. Plain data in, plain data out.
//!
//! A layer's attention (with norms and its cache) and feed-forward weights go to the layer's device, routed experts there or to
//! the CPU. Layers are counted from the end, the output after the last, as llama.cpp's `-ngl` counts them. Embeddings stay on
//! the CPU: a pass reads a few rows of them.

use super::Access;
use super::model::{Needs, Part, WeightFact};
use std::collections::HashMap;

/// A device by its place in [`Plan::devices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// The host.
    Cpu,
    /// A GPU by its place in [`Machine::gpus`].
    Gpu(usize),
}

/// A GPU, real or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Bytes that may be used.
    pub bytes: u64,
    /// It drives a display: left out unless a rule names it.
    pub display: bool,
}

/// The devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Bytes of the host's memory that may be used.
    pub memory: u64,
    /// GPUs.
    pub gpus: Vec<Gpu>,
}

/// Where weights should go.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// The last so many layers, the output counted as one, go to GPUs (`-ngl`); `None`: as many as fit.
    pub gpu_layers: Option<usize>,
    /// One GPU takes it all (`--main-gpu`).
    pub main_gpu: Option<usize>,
    /// Shares of GPUs (`--tensor-split`); empty: by size.
    pub split: Vec<f64>,
    /// Experts of the first so many layers stay on the CPU (`--n-cpu-moe`; `--cpu-moe`: all).
    pub cpu_moe: Option<usize>,
    /// Tensors by name (`-ot`), above all other rules.
    pub tensors: HashMap<String, Device>,
}

/// Bytes of a kind of weight on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartBytes {
    /// Mapped from the file.
    pub mapped: u64,
    /// In memory of the process, or of the GPU.
    pub resident: u64,
    /// Of the resident ones, a second copy of what lies elsewhere too.
    pub copied: u64,
}

/// What a device holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlan {
    /// Which.
    pub device: Device,
    /// Its size.
    pub size: u64,
    /// Weights by part, in the order of [`Part::ALL`].
    pub weights: [PartBytes; 8],
    /// Tensors of the file placed here.
    pub tensors: usize,
    /// The cache of all sequences.
    pub kv: u64,
    /// Activations between operations.
    pub activations: u64,
    /// Working memory inside operations.
    pub scratch: u64,
    /// Logits and sampling.
    pub sampling: u64,
    /// Metadata, vocabulary, stacks of threads.
    pub host: u64,
    /// What a cache policy that chooses takes beside the cache.
    pub policy: u64,
    /// Mapped weights must stay in memory.
    pub locked: bool,
    /// Bytes of mapped experts that must stay in memory.
    pub pinned: u64,
}

impl DevicePlan {
    /// Bytes mapped.
    pub fn mapped(&self) -> u64 {
        self.weights.iter().map(|w| w.mapped).sum()
    }

    /// Bytes of weights that are not mapped.
    pub fn weights_resident(&self) -> u64 {
        self.weights.iter().map(|w| w.resident).sum()
    }

    /// Bytes that are not mapped.
    pub fn resident(&self) -> u64 {
        let rest = self.kv + self.activations + self.scratch + self.sampling + self.host + self.policy;
        self.weights_resident() + rest
    }

    /// Bytes that must fit: mapped weights need not, unless they are locked or pinned.
    pub fn required(&self) -> u64 {
        self.resident() + if self.locked { self.mapped() } else { self.pinned }
    }

    /// Bytes missing.
    pub fn shortfall(&self) -> u64 {
        self.required().saturating_sub(self.size)
    }

    /// Bytes left when everything, mapped weights too, is in memory.
    pub fn left(&self) -> u64 {
        self.size.saturating_sub(self.resident() + self.mapped())
    }

    /// Mapped bytes for which there is no room: they are read from disk again and again.
    pub fn streamed(&self) -> u64 {
        (self.resident() + self.mapped()).saturating_sub(self.size.max(self.resident()))
    }
}

/// Where everything goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The CPU, then the GPUs.
    pub devices: Vec<DevicePlan>,
    /// Layers on GPUs, the output counted as one.
    pub gpu_layers: usize,
    /// Layers whose experts stay on the CPU though the layer does not.
    pub cpu_moe: usize,
    /// Sequences.
    pub parallel: usize,
}

impl Plan {
    /// Bytes of the process's own memory.
    pub fn resident_bytes(&self) -> u64 {
        self.devices[0].resident()
    }

    /// Bytes of the file that the process maps.
    pub fn mapped_bytes(&self) -> u64 {
        self.devices[0].mapped()
    }

    /// Bytes missing, summed over devices.
    pub fn shortfall(&self) -> u64 {
        self.devices.iter().map(DevicePlan::shortfall).sum()
    }

    /// Whether every device holds what it must.
    pub fn fits(&self) -> bool {
        self.shortfall() == 0
    }

    /// Bytes of all sequences' caches.
    pub fn kv(&self) -> u64 {
        self.devices.iter().map(|d| d.kv).sum()
    }

    /// Whether anything lies on a GPU.
    pub fn uses_gpu(&self) -> bool {
        self.devices[1..].iter().any(|d| d.tensors > 0)
    }
}

/// What is placed.
#[derive(Clone, Copy)]
pub struct Load<'a> {
    /// The model's tensors.
    pub weights: &'a [WeightFact],
    /// Its layers.
    pub layers: usize,
    /// The output is the embedding table.
    pub tied: bool,
    /// What there is besides weights.
    pub needs: &'a Needs,
    /// How weights get into memory.
    pub access: Access,
    /// Bytes of mapped experts that must stay in memory.
    pub pinned: u64,
    /// Sequences.
    pub parallel: usize,
}

/// The GPUs that rules allow, with their shares.
fn usable(m: &Machine, r: &Rules) -> Vec<(usize, f64)> {
    let share = |i: usize| match (r.main_gpu, r.split.is_empty()) {
        (Some(main), _) => f64::from(u8::from(main == i)),
        (None, false) => r.split.get(i).copied().unwrap_or(0.0).max(0.0),
        (None, true) if m.gpus[i].display => 0.0,
        (None, true) => m.gpus[i].bytes as f64,
    };
    (0..m.gpus.len()).map(|i| (i, share(i))).filter(|g| g.1 > 0.0).collect()
}

/// Puts a model on a machine. Where the rules leave the number of layers or experts on GPUs open, the most that fit.
pub fn place(l: Load<'_>, m: &Machine, r: &Rules) -> Plan {
    let gpus = usable(m, r);
    let all = l.layers + 1;
    if gpus.is_empty() {
        return fixed(l, m, r, &gpus, 0, 0);
    }
    let experts = l.weights.iter().any(|w| w.part == Part::Experts);
    let moe = |n: usize| fixed(l, m, r, &gpus, r.gpu_layers.unwrap_or(all).min(all), n);
    match (r.gpu_layers, r.cpu_moe) {
        (Some(n), Some(c)) => fixed(l, m, r, &gpus, n.min(all), c.min(l.layers)),
        (Some(n), None) => fixed(l, m, r, &gpus, n.min(all), 0),
        (None, Some(c)) => {
            let at = |n: usize| fixed(l, m, r, &gpus, n, c.min(l.layers));
            largest(all, at)
        }
        // Experts leave before layers: they are read sparsely.
        (None, None) if experts => {
            let few = (0..=l.layers).map(moe).find(Plan::fits);
            few.unwrap_or_else(|| largest(all, |n| fixed(l, m, r, &gpus, n, l.layers)))
        }
        (None, None) => largest(all, |n| fixed(l, m, r, &gpus, n, 0)),
    }
}

/// The plan with the most layers that fits, or the one without any on GPUs.
fn largest(all: usize, at: impl Fn(usize) -> Plan) -> Plan {
    (1..=all).rev().map(&at).find(Plan::fits).unwrap_or_else(|| at(0))
}

/// Where the parts of `n` layers on GPUs, with the experts of the first `cpu_moe` layers on the CPU, go.
struct Rule<'a> {
    l: Load<'a>,
    rules: &'a Rules,
    gpus: usize,
    cpu_moe: usize,
    /// The device of each layer, the output last.
    layers: Vec<Device>,
}

impl Rule<'_> {
    /// Where a tensor goes; true: because `-ot` says so.
    fn device(&self, w: &WeightFact) -> (Device, bool) {
        let there = |d: &Device| !matches!(d, Device::Gpu(i) if *i >= self.gpus);
        if let Some(d) = self.rules.tensors.get(&w.name).copied().filter(there) {
            return (d, true);
        }
        let d = match (w.part, w.layer) {
            (Part::Embeddings, _) => Device::Cpu,
            (Part::Output, _) => self.layers[self.l.layers],
            (Part::Experts, Some(layer)) if layer < self.cpu_moe => Device::Cpu,
            (_, Some(layer)) => self.layers.get(layer).copied().unwrap_or(Device::Cpu),
            (_, None) => Device::Cpu,
        };
        (d, false)
    }

    /// Bytes of the output where it is the embedding table, which lies elsewhere.
    fn tied_output(&self) -> u64 {
        let output = self.layers[self.l.layers];
        let table = |w: &&WeightFact| w.part == Part::Embeddings && self.device(w).0 != output;
        if self.l.tied { self.l.weights.iter().filter(table).map(|w| w.bytes).sum() } else { 0 }
    }
}

/// Bytes that a tensor takes on a GPU: vectors are widened.
fn on_gpu(w: &WeightFact) -> u64 {
    if w.copy > 0 { w.copy } else { w.bytes }
}

/// Deals `loads`, in order, to GPUs of these sizes: each a run, and the fullest GPU, as a share of its size, as empty as can be.
/// `held`: bytes that each holds already. Returns the GPU of each load, by its place in `sizes`.
///
/// (Dealt by number instead, layers that keep their experts, the last ones, would all lie on the last GPU.)
fn deal(loads: &[u64], sizes: &[f64], held: &[u64]) -> Vec<usize> {
    let within = |share: f64| {
        let (mut gpu, mut used, mut dealt) = (0, held[0] as f64, Vec::with_capacity(loads.len()));
        for &bytes in loads {
            while used + bytes as f64 > sizes[gpu] * share {
                gpu += 1;
                used = *held.get(gpu)? as f64;
            }
            used += bytes as f64;
            dealt.push(gpu);
        }
        Some(dealt)
    };
    // If all fit their GPUs, they do so at a share of 1.
    let mut high = 1.0;
    let mut best = within(high);
    while best.is_none() && high < 1e30 {
        high *= 2.0;
        best = within(high);
    }
    let mut low = 0.0;
    for _ in 0..40 {
        let mid = (low + high) / 2.0;
        match within(mid) {
            Some(dealt) => (best, high) = (Some(dealt), mid),
            None => low = mid,
        }
    }
    best.unwrap_or_else(|| vec![sizes.len() - 1; loads.len()])
}

/// `n` layers on GPUs, the experts of the first `cpu_moe` layers not.
fn fixed(l: Load<'_>, m: &Machine, r: &Rules, gpus: &[(usize, f64)], n: usize, cpu_moe: usize) -> Plan {
    let n = if gpus.is_empty() { 0 } else { n.min(l.layers + 1) };
    let first = l.layers + 1 - n;
    let on = |layer: usize| if layer < first { Device::Cpu } else { Device::Gpu(gpus[0].0) };
    let layers = (0..=l.layers).map(on).collect();
    let mut rule = Rule { l, rules: r, gpus: m.gpus.len(), cpu_moe, layers };
    if n > 0 && gpus.len() > 1 {
        let mut loads = vec![0; l.layers + 1];
        // A GPU works in as much as the CPU does: an upper bound until it says itself.
        let mut held = vec![l.needs.activations + l.needs.scratch; m.gpus.len()];
        for w in l.weights {
            match (rule.device(w), w.layer) {
                ((Device::Gpu(i), true), _) => held[i] += on_gpu(w),
                ((Device::Gpu(_), false), layer) => loads[layer.unwrap_or(l.layers)] += on_gpu(w),
                ((Device::Cpu, _), _) => {}
            }
        }
        l.needs.kv.iter().zip(&mut loads).for_each(|(kv, load)| *load += kv);
        loads[l.layers] += rule.tied_output();
        // Shares that the user chose are of the layers alone.
        let by_size = r.split.is_empty();
        let held: Vec<u64> = gpus.iter().map(|g| if by_size { held[g.0] } else { 0 }).collect();
        let sizes: Vec<f64> = gpus.iter().map(|g| g.1).collect();
        let dealt = deal(&loads[first..], &sizes, &held);
        dealt.iter().zip(&mut rule.layers[first..]).for_each(|(g, d)| *d = Device::Gpu(gpus[*g].0));
    }
    let empty = |device, size| DevicePlan {
        device,
        size,
        weights: Default::default(),
        tensors: 0,
        kv: 0,
        activations: 0,
        scratch: 0,
        sampling: 0,
        host: 0,
        policy: 0,
        locked: l.access == Access::Locked && device == Device::Cpu,
        pinned: 0,
    };
    let mut devices = vec![empty(Device::Cpu, m.memory)];
    devices.extend(m.gpus.iter().enumerate().map(|(i, g)| empty(Device::Gpu(i), g.bytes)));
    let index = |d: Device| match d {
        Device::Cpu => 0,
        Device::Gpu(i) => i + 1,
    };
    for w in l.weights {
        let (d, _) = rule.device(w);
        let to = &mut devices[index(d)];
        to.tensors += 1;
        let part = &mut to.weights[w.part as usize];
        match (d, l.access) {
            (Device::Cpu, Access::Mapped | Access::Locked) => {
                part.mapped += w.bytes;
                part.resident += w.copy;
            }
            (Device::Cpu, Access::Read) => part.resident += w.bytes + w.copy,
            (Device::Gpu(_), _) => part.resident += on_gpu(w),
        }
    }
    if rule.layers[l.layers] != Device::Cpu {
        let (table, output) = (rule.tied_output(), index(rule.layers[l.layers]));
        let part = &mut devices[output].weights[Part::Output as usize];
        part.resident += table;
        part.copied += table;
    }
    for (bytes, d) in l.needs.kv.iter().zip(&rule.layers) {
        devices[index(*d)].kv += bytes;
    }
    for d in &mut devices {
        if d.device == Device::Cpu || d.tensors > 0 || d.kv > 0 {
            d.activations = l.needs.activations;
            d.scratch = l.needs.scratch;
        }
    }
    devices[0].pinned = l.pinned.min(devices[0].weights[Part::Experts as usize].mapped);
    devices[0].sampling = l.needs.sampling;
    devices[0].host = l.needs.host;
    devices[0].policy = l.needs.policy;
    Plan { devices, gpu_layers: n, cpu_moe: if n == 0 { 0 } else { cpu_moe }, parallel: l.parallel }
}
