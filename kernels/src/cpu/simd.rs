//! The bridge from an instruction set to its lanes. The scalar set has no lanes of its own: it takes the portable ones.

use super::isa::Isa;
use super::lanes::{Kernel, Portable, Simd};

impl Isa {
    /// Runs `k` compiled for this set.
    #[inline]
    pub(super) fn vectorize<K: Kernel>(self, k: K) -> K::Out {
        match self {
            Self::Scalar | Self::Portable => Portable.vectorize(k),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => s.vectorize(k),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => s.vectorize(k),
            #[cfg(target_arch = "x86_64")]
            Self::Amx(s) => s.avx512().vectorize(k),
        }
    }
}
