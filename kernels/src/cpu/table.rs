//! The kernel table: which function multiplies which format on which instruction set. With `quant::FORMATS`, the only place
//! that lists formats: a new format is a row here and an unpacking per instruction set.

use super::isa::Isa;
use super::quantized::Block;
use super::tiles::Panel;
#[cfg(target_arch = "x86_64")]
use super::x86_64::{amx, avx2, avx512};
use super::{portable, scalar};
use crate::KernelError;
use quant::DType;

/// `y[c * rows + r] = row r of w . x[c]`, where `w` holds `rows = y.len() / x.len()` rows of `row_bytes` bytes, each of at most
/// `x[c].len()` values (floats) or groups of 256 (blocks).
///
/// # Safety
/// The CPU has the instruction set that the function was listed under.
pub type Rows<X> = unsafe fn(w: &[u8], row_bytes: usize, x: &[&[X]], y: &mut [f32]);

/// The same product with a prompt's rows in bf16 (`scalar/tiles.rs` is its text): weights are rounded to bf16 too.
///
/// # Safety
/// As for [`Rows`].
pub type Tiled = unsafe fn(w: &[u8], row_bytes: usize, x: Panel<'_>, y: &mut [f32]);

/// The kernels of one format on one instruction set. All give the same bits; they differ in speed.
#[derive(Clone, Copy)]
pub struct Kernels<X> {
    /// For one column: reads weights once, straight from memory.
    pub one: Rows<X>,
    /// For up to [`SEVERAL`]: the same for a batch of sequences, which shares the unpacking.
    pub several: Rows<X>,
    /// For more: unpacks tiles of weights and multiplies them by all columns.
    pub many: Rows<X>,
}

/// Up to how many columns `several` is.
pub const SEVERAL: usize = 16;

impl<X> Kernels<X> {
    /// The one for `n` columns.
    pub fn of(&self, n: usize) -> Rows<X> {
        if n == 1 {
            self.one
        } else if n <= SEVERAL {
            self.several
        } else {
            self.many
        }
    }
}

/// What a format multiplies with.
#[derive(Clone, Copy)]
pub enum Kernel {
    /// Activations rounded to int8, or to bf16.
    Quantized(Kernels<Block>, Tiled),
    /// Activations as they are.
    Float(Kernels<f32>),
}

/// Whether products with this format read rounded activations (or else f32 ones).
pub fn rounds_activations(dtype: DType) -> bool {
    !matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Bytes of a thread's memory that the kernels of `isa` keep for weights with rows of at most `max_in` values.
pub fn scratch_bytes(isa: Isa, max_in: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => avx512::scratch_bytes(max_in),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx(_) => avx512::scratch_bytes(max_in) + amx::SCRATCH_BYTES,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => avx2::scratch_bytes(max_in),
        _ => 0,
    }
}

/// Allocates it, for the calling thread.
pub fn reserve(isa: Isa, max_in: usize) -> Result<(), KernelError> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => avx512::reserve(max_in),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx(_) => avx512::reserve(max_in).and_then(|()| amx::reserve()),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => avx2::reserve(max_in),
        _ => {
            _ = max_in;
            Ok(())
        }
    }
}

/// The kernels for `dtype` on `isa`.
pub fn kernel(dtype: DType, isa: Isa) -> Kernel {
    macro_rules! same {
        ($which:ident, $f:expr $(, $tiled:expr)?) => {
            Kernel::$which(Kernels { one: $f, several: $f, many: $f } $(, $tiled)?)
        };
    }
    macro_rules! table {
        (quantized: $($q:ident)*; float: $($f:ident)*) => {
            match (dtype, isa) {
                $(
                    (DType::$q, Isa::Scalar) => {
                        same!(Quantized, scalar::rows::<scalar::$q>, scalar::tile_rows::<scalar::$q>)
                    }
                    (DType::$q, Isa::Portable) => {
                        same!(Quantized, portable::rows::<scalar::$q>, scalar::tile_rows::<scalar::$q>)
                    }
                    #[cfg(target_arch = "x86_64")]
                    (DType::$q, Isa::Avx2(_)) => Kernel::Quantized(
                        Kernels {
                            one: avx2::one::<scalar::$q>,
                            several: avx2::several::<scalar::$q>,
                            many: avx2::many::<scalar::$q>,
                        },
                        scalar::tile_rows::<scalar::$q>,
                    ),
                    #[cfg(target_arch = "x86_64")]
                    (DType::$q, Isa::Avx512(_) | Isa::Amx(_)) => Kernel::Quantized(
                        Kernels {
                            one: avx512::one::<scalar::$q>,
                            several: avx512::several::<scalar::$q>,
                            many: avx512::many::<scalar::$q>,
                        },
                        if isa.has_tiles() { amx::rows::<scalar::$q> } else { scalar::tile_rows::<scalar::$q> },
                    ),
                )*
                $(
                    (DType::$f, Isa::Scalar) => same!(Float, scalar::float_rows::<scalar::$f>),
                    (DType::$f, Isa::Portable) => same!(Float, portable::float_rows::<scalar::$f>),
                    #[cfg(target_arch = "x86_64")]
                    (DType::$f, Isa::Avx2(_)) => same!(Float, avx2::float_rows::<scalar::$f>),
                    #[cfg(target_arch = "x86_64")]
                    (DType::$f, Isa::Avx512(_) | Isa::Amx(_)) => Kernel::Float(Kernels {
                        one: avx512::float_few::<scalar::$f>,
                        several: avx512::float_few::<scalar::$f>,
                        many: avx512::float_many::<scalar::$f>,
                    }),
                )*
            }
        };
    }
    table! {
        quantized: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ4_NL IQ4_XS MXFP4;
        float: F32 F16 BF16
    }
}
