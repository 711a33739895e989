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

/// For up to 16 heads, then for more: blocks of 16, 32 and 64.
const fn kernels(tile: usize) -> [Tensor; 4] {
    [
        Tensor { entry: "mla_split", heads: 16, parts: 2, tile, stages: 4 },
        Tensor { entry: "mla_16", heads: 16, parts: 1, tile, stages: 3 },
        Tensor { entry: "mla_32", heads: 32, parts: 1, tile, stages: 3 },
        Tensor { entry: "mla_64", heads: 64, parts: 1, tile, stages: 3 },
    ]
}

impl Tensor {
    /// Bytes of shared memory: stages of entries of 576 values, scores of four warps, two tiles' weights, eight floats a head, a word a
    /// stage.
    const fn shared(self) -> usize {
        let row = self.heads * (self.tile + 8);
        self.stages * (self.tile * 1152 + 4) + 4 * 4 * row + 2 * self.parts * 2 * row + 8 * 4 * self.heads
    }

    /// The one for so many heads and parts of rows: 17 heads and more have the same bits from three kernels. The larger a block, the less it
    /// reads, as long as there are blocks for most of a large GPU.
    fn of(kernels: [Self; 4], heads: usize, parts: usize) -> Self {
        let [split, small, larger @ ..] = kernels;
        let fills = |k: &Self| heads > k.heads / 2 && heads.div_ceil(k.heads) * parts > 64;
        match heads {
            ..=16 => split,
            _ => larger.into_iter().rev().find(fills).unwrap_or(small),
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
    fn on_tensor_cores(&self, latents: Cache, k_pe: Cache) -> Option<(&'static Ptx, [Tensor; 4])> {
        let fits = |c: Cache, most| c.dtype == DType::F16 && c.width <= most && c.width.is_multiple_of(8);
        if !(fits(latents, MAX_VALUE) && fits(k_pe, 64)) {
            return None;
        }
        [("mla_f16", 32), ("mla_small_f16", 16)].into_iter().find_map(|(module, tile)| {
            let kernels = kernels(tile);
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
