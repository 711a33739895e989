//! What calls will ask of a device, collected from the weights themselves, so that a backend can size its working memory once.
//! Knows shapes; nothing of threads or instruction sets, which is where the bytes come from.

use crate::Weight;
use crate::backend::Ffn;
use crate::cpu::matmul::needs_quantized;
use quant::DType;

/// The widest hidden layers, by what the next product reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    /// Values of a row that is rounded.
    pub rounded: usize,
    /// Values of a row that stays in f32.
    pub float: usize,
    /// Of these, values that meet weights of F16 or BF16.
    pub half: usize,
}

impl Hidden {
    fn max(self, other: Self) -> Self {
        Self {
            rounded: self.rounded.max(other.rounded),
            float: self.float.max(other.float),
            half: self.half.max(other.half),
        }
    }
}

/// Upper bounds on what calls will ask for, from which a backend sizes its scratch memory once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a batch.
    pub tokens: usize,
    /// The widest input of any product whose weight is quantised.
    pub max_in: usize,
    /// The widest input of any product whose weight is F16 or BF16.
    pub half_in: usize,
    /// The most outputs of any product.
    pub max_out: usize,
    /// Bytes of the shortest row of a product's weight; 0: no product.
    pub min_row_bytes: usize,
    /// Width of what feed-forward layers read and write.
    pub width: usize,
    /// Hidden layers of which a token has one row: dense ones and shared experts.
    pub hidden: Hidden,
    /// Hidden layers of routed experts: `used` rows a token.
    pub routed: Hidden,
    /// Routed experts of a layer.
    pub experts: usize,
    /// Routed experts of a token.
    pub used: usize,
    /// Heads times the widest per-head vector attention keeps (value, or the latent for MLA).
    pub max_heads_out: usize,
    /// MLA's latent; 0: other attention.
    pub latent: usize,
    /// Cache entries one query may see.
    pub slots: usize,
    /// Query heads.
    pub heads: usize,
    /// Columns of what calls ask the best of; 0: none do.
    pub choices: usize,
    /// Whether calls ask for [`crate::Mass`].
    pub mass: bool,
}

impl Limits {
    /// A product with `w` will be asked for.
    pub fn product(&mut self, w: &Weight) {
        self.input(w);
        self.max_out = self.max_out.max(w.rows());
        let row = w.row_bytes();
        self.min_row_bytes = if self.min_row_bytes == 0 { row } else { self.min_row_bytes.min(row) };
    }

    fn input(&mut self, w: &Weight) {
        let most = match w.dtype() {
            DType::F16 | DType::BF16 => &mut self.half_in,
            _ if needs_quantized(w) => &mut self.max_in,
            _ => return,
        };
        *most = w.cols().max(*most);
    }

    fn layer(&mut self, f: &Ffn<'_>) -> Hidden {
        self.input(f.gate);
        self.input(f.up);
        self.width = self.width.max(f.gate.cols());
        let width = f.down.cols();
        match needs_quantized(f.down) {
            true => Hidden { rounded: width, ..Hidden::default() },
            false => {
                let half = if f.down.dtype() == DType::F32 { 0 } else { width };
                Hidden { rounded: 0, float: width, half }
            }
        }
    }

    /// A dense layer, or shared experts.
    pub fn ffn(&mut self, f: Ffn<'_>) {
        self.hidden = self.hidden.max(self.layer(&f));
    }

    /// A mixture of experts of which each token uses `used`.
    pub fn experts(&mut self, f: Ffn<'_>, used: usize) {
        self.routed = self.routed.max(self.layer(&f));
        self.experts = self.experts.max(f.gate.count());
        self.used = self.used.max(used);
    }
}
