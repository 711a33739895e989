//! What calls will ask of a device, collected from the weights themselves, so that a backend can size its working memory once.
//! Knows shapes; nothing of threads or instruction sets, which is where the bytes come from.

use crate::Weight;
use crate::backend::Ffn;
use crate::cpu::matmul::needs_quantized;

/// The widest hidden layers, by what the next product reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    /// Values of a row that is rounded.
    pub rounded: usize,
    /// Values of a row that stays in f32.
    pub float: usize,
}

/// Upper bounds on what calls will ask for, from which a backend sizes its scratch memory once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a batch.
    pub tokens: usize,
    /// The widest input of any product whose weight is quantised.
    pub max_in: usize,
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
    /// Whether calls ask for [`crate::Mass`].
    pub mass: bool,
}

impl Limits {
    /// A product with `w` will be asked for.
    pub fn product(&mut self, w: &Weight) {
        if needs_quantized(w) {
            self.max_in = self.max_in.max(w.cols());
        }
        self.max_out = self.max_out.max(w.rows());
        let row = w.row_bytes();
        self.min_row_bytes = if self.min_row_bytes == 0 { row } else { self.min_row_bytes.min(row) };
    }

    fn layer(&mut self, f: &Ffn<'_>) -> Hidden {
        if needs_quantized(f.gate) || needs_quantized(f.up) {
            self.max_in = self.max_in.max(f.gate.cols());
        }
        self.width = self.width.max(f.gate.cols());
        let width = f.down.cols();
        match needs_quantized(f.down) {
            true => Hidden { rounded: width, float: 0 },
            false => Hidden { rounded: 0, float: width },
        }
    }

    /// A dense layer, or shared experts.
    pub fn ffn(&mut self, f: Ffn<'_>) {
        let h = self.layer(&f);
        self.hidden.rounded = self.hidden.rounded.max(h.rounded);
        self.hidden.float = self.hidden.float.max(h.float);
    }

    /// A mixture of experts of which each token uses `used`.
    pub fn experts(&mut self, f: Ffn<'_>, used: usize) {
        let h = self.layer(&f);
        self.routed.rounded = self.routed.rounded.max(h.rounded);
        self.routed.float = self.routed.float.max(h.float);
        self.experts = self.experts.max(f.gate.count());
        self.used = self.used.max(used);
    }
}
