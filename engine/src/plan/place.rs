//! What goes where: a model's needs on devices of given sizes, by rules. Plain data in, plain data out.
//!
//! A layer's attention (with norms and its cache) and feed-forward weights go to the layer's device, routed experts and their
//! router there or to the CPU. Layers are counted from the end, the output after the last, as llama.cpp's `-ngl` counts them. Embeddings stay on
//! the CPU: a pass reads a few rows of them.

use super::Access;
use super::model::{Needs, Part, WeightFact};
use crate::context::Work;
use crate::stages::{Layout, Spot};
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
    /// Layers without their routed experts (`-ot`), above all other rules.
    pub layers: HashMap<usize, Device>,
    /// Routed experts of layers, likewise.
    pub experts: HashMap<usize, Device>,
    /// The output, likewise.
    pub output: Option<Device>,
}

impl Rules {
    /// What `-ot` says of a part, if anything.
    fn ruled(&self, part: Part, layer: Option<usize>) -> Option<Device> {
        match (part, layer) {
            (Part::Output, _) => self.output,
            (Part::Experts | Part::Router, Some(i)) => self.experts.get(&i).copied(),
            (_, Some(i)) => self.layers.get(&i).copied(),
            (_, None) => None,
        }
    }

    /// Whether they leave open how much lies on GPUs.
    pub fn is_open(&self) -> bool {
        let ruled = !self.layers.is_empty() || !self.experts.is_empty() || self.output.is_some();
        self.gpu_layers.is_none() && self.cpu_moe.is_none() && !ruled
    }
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
    /// What lies where, by places in `devices`.
    pub layout: Layout,
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
        self.devices[1..].iter().any(|d| d.resident() > 0)
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
    /// What there is besides weights, wherever layers lie.
    pub needs: &'a Needs,
    /// What each device works in under a layout; those that are not listed need nothing.
    pub work: &'a dyn Fn(&Layout) -> Vec<Work>,
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

/// Where the parts of a model go by the rules, with the experts of the first `cpu_moe` layers on the CPU.
struct Rule<'a> {
    l: Load<'a>,
    rules: &'a Rules,
    gpus: usize,
    cpu_moe: usize,
    /// Layers that have routed experts.
    sparse: Vec<bool>,
}

impl Rule<'_> {
    /// What `-ot` says, of devices that are there.
    fn ruled(&self, part: Part, layer: Option<usize>) -> Option<usize> {
        let there = |d: &Device| !matches!(d, Device::Gpu(i) if *i >= self.gpus);
        self.rules.ruled(part, layer).filter(there).map(index)
    }

    /// With layers, and the output behind them, on these devices unless rules say otherwise.
    fn layout(&self, at: &[usize]) -> Layout {
        let spot = |i: usize| {
            let layer = self.ruled(Part::Attention, Some(i)).unwrap_or(at[i]);
            let by_count = if i < self.cpu_moe { CPU } else { at[i] };
            let experts = self.ruled(Part::Experts, Some(i)).unwrap_or(by_count);
            Spot { layer, experts: if self.sparse[i] { experts } else { layer } }
        };
        let n = self.l.layers;
        let head = self.ruled(Part::Output, None).unwrap_or(at[n]);
        Layout { layers: (0..n).map(spot).collect(), head }
    }

    /// Bytes that the output takes on a GPU where it is the embedding table, which stays on the host.
    fn tied_output(&self, layout: &Layout) -> u64 {
        let table = |w: &&WeightFact| w.part == Part::Embeddings;
        let copied = self.l.tied && layout.head != CPU;
        if copied { self.l.weights.iter().filter(table).map(|w| w.gpu).sum() } else { 0 }
    }

    /// `at`, its entries from `first` on dealt to `gpus` by bytes.
    fn dealt(&self, mut at: Vec<usize>, first: usize, gpus: &[(usize, f64)]) -> Vec<usize> {
        let (n, whole) = (self.l.layers, self.layout(&at));
        let mut loads = vec![0; n + 1];
        let mut held = vec![0; self.gpus + 1];
        for &(g, _) in gpus {
            // What it would work in if it had all of them: more than its part asks for, but not by much.
            let alone = at.iter().map(|d| if *d == CPU { CPU } else { g + 1 }).collect::<Vec<_>>();
            held[g + 1] = work_of(self.l, &self.layout(&alone), g + 1).total();
        }
        for w in self.l.weights {
            match (self.ruled(w.part, w.layer), whole.of(w.part, w.layer)) {
                (Some(d), _) => held[d] += w.gpu,
                (None, Some(d)) if d != CPU => loads[w.layer.unwrap_or(n)] += w.gpu,
                _ => {}
            }
        }
        for (i, bytes) in self.l.needs.kv_on_gpu.iter().enumerate() {
            match self.ruled(Part::Attention, Some(i)) {
                Some(d) => held[d] += bytes,
                None => loads[i] += bytes,
            }
        }
        match self.ruled(Part::Output, None) {
            Some(d) => held[d] += self.tied_output(&whole),
            None => loads[n] += self.tied_output(&whole),
        }
        // Shares that the user chose are of the layers alone.
        let by_size = self.rules.split.is_empty();
        let held: Vec<u64> = gpus.iter().map(|g| if by_size { held[g.0 + 1] } else { 0 }).collect();
        let sizes: Vec<f64> = gpus.iter().map(|g| g.1).collect();
        let dealt = deal(&loads[first..], &sizes, &held);
        dealt.iter().zip(&mut at[first..]).for_each(|(g, d)| *d = gpus[*g].0 + 1);
        at
    }
}

/// The place of the CPU in [`Plan::devices`]; GPU i comes i + 1 behind it.
const CPU: usize = 0;

fn index(d: Device) -> usize {
    match d {
        Device::Cpu => CPU,
        Device::Gpu(i) => i + 1,
    }
}

fn work_of(l: Load<'_>, layout: &Layout, d: usize) -> Work {
    (l.work)(layout).get(d).copied().unwrap_or_default()
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
    let mut sparse = vec![false; l.layers];
    for i in l.weights.iter().filter(|w| w.part == Part::Experts).filter_map(|w| w.layer) {
        sparse.get_mut(i).into_iter().for_each(|s| *s = true);
    }
    let rule = Rule { l, rules: r, gpus: m.gpus.len(), cpu_moe, sparse };
    let mut at: Vec<usize> = (0..=l.layers).map(|i| if i < first { CPU } else { gpus[0].0 + 1 }).collect();
    if n > 0 && gpus.len() > 1 {
        at = rule.dealt(at, first, gpus);
    }
    let layout = rule.layout(&at);
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
    for w in l.weights {
        let d = layout.of(w.part, w.layer).unwrap_or(CPU);
        devices[d].tensors += 1;
        let on_host = &mut devices[CPU].weights[w.part as usize];
        match (d, l.access) {
            (CPU, Access::Mapped | Access::Locked) => {
                on_host.mapped += w.bytes;
                on_host.resident += w.copy;
            }
            (CPU, Access::Read) => on_host.resident += w.bytes + w.copy,
            (_, access) => {
                // A file that is read stays in memory, though a GPU has its own copy.
                if access == Access::Read {
                    on_host.resident += w.bytes;
                    on_host.copied += w.bytes;
                }
                devices[d].weights[w.part as usize].resident += w.gpu;
            }
        }
    }
    let output = &mut devices[layout.head].weights[Part::Output as usize];
    output.resident += rule.tied_output(&layout);
    output.copied += rule.tied_output(&layout);
    for (i, (host, gpu)) in l.needs.kv.iter().zip(&l.needs.kv_on_gpu).enumerate() {
        let d = layout.spot(i).layer;
        devices[d].kv += if d == CPU { *host } else { *gpu };
    }
    for (d, work) in devices.iter_mut().zip((l.work)(&layout)) {
        (d.activations, d.scratch) = (work.activations as u64, work.scratch as u64);
    }
    devices[CPU].pinned = l.pinned.min(devices[CPU].weights[Part::Experts as usize].mapped);
    devices[CPU].sampling = l.needs.sampling;
    devices[CPU].host = l.needs.host;
    devices[CPU].policy = l.needs.policy;
    let cpu_moe = if n == 0 { 0 } else { cpu_moe };
    Plan { devices, gpu_layers: n, cpu_moe, layout, parallel: l.parallel }
}
