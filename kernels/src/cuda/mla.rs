//! MLA in absorbed form as typed calls: which of its kernels a layer takes, and their launches. Decided by the GPU, the types of the caches
//! and the layer's shape alone. Knows addresses and strides; nothing of what is computed.

use super::gpu::Arg;
use super::launch::{HEADS, Launcher, MAX_VALUE, TILE, n, p, refuse};
use super::modules::Ptx;
use super::operands::{Absorbed, Cache, Floats, Lists, Tiles};
use crate::KernelError;
use quant::DType;

/// A kernel of mla.cu: its name, heads of a block, f16 parts of queries and weights, entries of a tile, stages, as there.
#[derive(Clone, Copy)]
struct Tensor {
    entry: &'static str,
    heads: usize,
    parts: usize,
    tile: usize,
    stages: usize,
}

/// A module's kernels: the one for up to 16 heads, then for more, the smallest blocks first.
type Kernels = (&'static str, &'static [Tensor]);

const fn tensor(entry: &'static str, heads: usize, parts: usize, tile: usize, stages: usize) -> Tensor {
    Tensor { entry, heads, parts, tile, stages }
}

const MODULES: [Kernels; 2] = [
    (
        "mla_f16",
        &[
            tensor("mla_split", 16, 2, 32, 4),
            tensor("mla_16", 16, 1, 32, 3),
            tensor("mla_32", 32, 1, 32, 3),
            tensor("mla_64", 64, 1, 32, 3),
        ],
    ),
    (
        "mla_small_f16",
        &[tensor("mla_split", 16, 2, 16, 4), tensor("mla_16", 16, 1, 16, 3), tensor("mla_32", 32, 1, 16, 3)],
    ),
];

impl Tensor {
    /// Bytes of shared memory: stages of entries of 576 values and 16 bytes of padding, scores of four warps, two tiles' weights, nine
    /// floats a head, 256 slots, twelve words more, a word a stage.
    const fn shared(self) -> usize {
        let row = self.heads * (self.tile + 8);
        let heads = 4 * 4 * row + 2 * self.parts * 2 * row + 9 * 4 * self.heads;
        self.stages * (self.tile * 1168 + 4) + heads + 4 * (256 + 12)
    }

    /// The one for so many heads and parts of rows: 17 heads and more have the same bits from three kernels. The larger a block, the less it
    /// reads, as long as there are blocks for most of a large GPU.
    fn of(kernels: &[Self], heads: usize, parts: usize) -> Self {
        let fills = |k: &&Self| heads > k.heads / 2 && heads.div_ceil(k.heads) * parts > 64;
        match heads {
            ..=16 => kernels[0],
            _ => *kernels[1..].iter().rev().find(fills).unwrap_or(&kernels[1]),
        }
    }
}

impl Absorbed {
    fn operands(&self) -> Result<[Arg; 9], KernelError> {
        if self.latent > MAX_VALUE {
            return refuse(format!("latents of {} values; {MAX_VALUE} are possible", self.latent));
        }
        Ok([
            p(self.q_latent),
            p(self.q.at),
            p(self.q_sink),
            n(self.q.stride)?,
            p(self.latents.at),
            p(self.latents.row_bytes() as u64),
            p(self.k_pe.at),
            p(self.k_pe.row_bytes() as u64),
            n(self.heads)?,
        ])
    }

    fn shape(&self) -> Result<[Arg; 4], KernelError> {
        Ok([n(self.latent)?, n(self.nope)?, n(self.rope)?, Arg::F32(self.scale)])
    }
}

impl Launcher {
    /// The kernels on tensor cores for such a layer, if there are any: f16 caches, dimensions in units of eight, a GPU since 8.0.
    fn on_tensor_cores(&self, latents: Cache, k_pe: Cache) -> Option<(&'static Ptx, &'static [Tensor])> {
        let fits = |c: Cache, most| c.dtype == DType::F16 && c.width <= most && c.width.is_multiple_of(8);
        if !(fits(latents, MAX_VALUE) && fits(k_pe, 64)) {
            return None;
        }
        MODULES.into_iter().find_map(|(module, kernels)| {
            let room = kernels.iter().all(|k| k.shared() <= self.shared);
            room.then(|| self.text(module)).flatten().map(|m| (m, kernels))
        })
    }

    /// Whether prompts of such a layer go in tiles; on tensor cores they are rows like others.
    pub fn takes_mla_prompts(&self, latents: Cache, k_pe: Cache) -> bool {
        self.takes_prompts(latents, k_pe, 0) && self.on_tensor_cores(latents, k_pe).is_none()
    }

    /// Absorbed MLA of a prompt's rows in tiles; out `[rows, heads, latent]`.
    pub fn prompt_mla(&self, a: &Absorbed, t: Tiles, out: u64) -> Result<(), KernelError> {
        let m = self.pair("prompt", a.latents, a.k_pe)?;
        let args = [
            &a.operands()?[..],
            &[n(t.heads)?],
            &a.shape()?,
            &[p(t.tiles), p(t.segments), p(t.ranges), p(out)],
        ]
        .concat();
        self.run(m, "prompt_mla", [t.count, a.heads.div_ceil(t.heads), 1], 256, 0, &args)
    }

    /// Parts `[rows, heads, splits, latent + 2]` of absorbed MLA.
    pub fn attend_mla(&self, a: &Absorbed, l: Lists, parts: u64) -> Result<(), KernelError> {
        let args = [
            &a.operands()?[..],
            &a.shape()?,
            &[p(l.spans), p(l.ends), n(l.parts.split)?, n(l.parts.most)?, p(parts)],
        ]
        .concat();
        if let Some((m, kernels)) = self.on_tensor_cores(a.latents, a.k_pe) {
            let k = Tensor::of(kernels, a.heads, l.splits * l.rows);
            let grid = [a.heads.div_ceil(k.heads), l.splits, l.rows];
            return self.run(m, k.entry, grid, 256, k.shared() / 4, &args);
        }
        let m = self.pair("attention", a.latents, a.k_pe)?;
        let grid = [l.splits, a.heads.div_ceil(HEADS), l.rows];
        self.run(m, "attend_mla", grid, 128, TILE * (a.latent + a.rope + 1), &args)
    }

    /// Adds the probabilities of row `row` to mass `[1, slots]`, after `attend_mla`.
    pub fn mass_mla(
        &self,
        a: &Absorbed,
        l: Lists,
        row: usize,
        parts: u64,
        mass: Floats,
    ) -> Result<(), KernelError> {
        let m = self.pair("mass", a.latents, a.k_pe)?;
        let args = [
            &a.operands()?[..],
            &a.shape()?,
            &[p(l.spans), p(l.ends), n(row)?, n(l.parts.split)?, n(l.parts.most)?],
            &[p(parts), n(l.splits)?, p(mass.at)],
        ]
        .concat();
        self.run(m, "mass_mla", [l.longest.div_ceil(64), 1, 1], 128, 2 * a.heads, &args)
    }
}
