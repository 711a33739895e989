//! Instruction sets: which one this process uses, and the proof that it may. A value of [`Isa`] other than the first two
//! holds a token that only detection mints, so code that has one may call that set's `#[target_feature]` functions.

use crate::KernelError;
use std::sync::OnceLock;

/// Proof that the CPU has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Proof that the CPU has AVX-512 F, BW, VL, DQ and VNNI (and the set above).
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proof that the CPU has AMX tiles with bf16 products and AVX-512 VBMI and BF16 (and the set above), and that the system has
/// allowed this process to use tiles.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amx(Avx512);

#[cfg(target_arch = "x86_64")]
impl Amx {
    /// The set it contains.
    pub fn avx512(self) -> Avx512 {
        self.0
    }
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// The executable specification: plain Rust, no vectors.
    Scalar,
    /// Portable vectors (the `wide` crate).
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AMX: tile products in bf16 for prompts, and AVX-512.
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
}

/// The names `RSINFER_ISA` takes, slowest first.
pub const NAMES: [&str; 5] = ["scalar", "portable", "avx2", "avx512", "amx"];

impl Isa {
    /// Every set this CPU has, slowest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::Scalar, Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 {
                all.push(Self::Avx2(Avx2(())));
            }
            let foundation = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
            if avx2 && foundation && has!("avx512vnni") {
                all.push(Self::Avx512(Avx512(())));
                if has!("avx512vbmi") && has!("avx512bf16") && tiles_allowed() {
                    all.push(Self::Amx(Amx(Avx512(()))));
                }
            }
        }
        all
    }

    /// The name in [`NAMES`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "amx",
        }
    }

    /// Whether prompts take tile products in bf16 here.
    pub fn has_tiles(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => true,
            _ => false,
        }
    }

    /// The set called `name`.
    ///
    /// # Errors
    /// [`KernelError::Isa`] if this CPU does not have it or there is no such set.
    pub fn named(name: &str) -> Result<Self, KernelError> {
        let all = Self::available();
        all.iter().copied().find(|i| i.name() == name).ok_or_else(|| KernelError::Isa {
            asked: name.to_owned(),
            here: all.iter().map(|i| i.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The set this process uses: `RSINFER_ISA` if it is set, the fastest otherwise. Read once.
    ///
    /// # Errors
    /// As [`Isa::named`].
    pub fn active() -> Result<Self, KernelError> {
        static ACTIVE: OnceLock<Result<Isa, KernelError>> = OnceLock::new();
        ACTIVE
            .get_or_init(|| match std::env::var("RSINFER_ISA") {
                Ok(name) => Self::named(&name),
                Err(_) => Ok(*Self::available().last().expect("scalar is always there")),
            })
            .clone()
    }

    /// The set this process computes with. A bad `RSINFER_ISA` is reported when a backend is set up ([`Isa::active`]); until
    /// then it counts as unset.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            Self::active().unwrap_or_else(|_| *Self::available().last().expect("scalar is always there"))
        })
    }
}

/// Whether the CPU has AMX tiles with bf16 products and the system lets this process use them. Asked once: permission holds for all
/// threads.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_allowed() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` of Linux (arch/x86/include/uapi/asm/prctl.h), and the state component of tile data.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // AMX-BF16 and AMX-TILE are bits 22 and 24 (Intel SDM, CPUID leaf 7).
        let bits = 1 << 22 | 1 << 24;
        let here = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & bits == bits;
        // SAFETY: a request that changes nothing but what this process may use.
        here && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } == 0
    })
}

/// No system but Linux is known to be asked for them.
#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles_allowed() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_and_others_refused() {
        for isa in Isa::available() {
            assert!(NAMES.contains(&isa.name()));
            assert_eq!(Isa::named(isa.name()), Ok(isa));
        }
        let e = Isa::named("mmx").unwrap_err().to_string();
        assert!(e.contains("mmx") && e.contains("scalar"), "{e}");
    }

    /// CI names what its machine must have: a run that silently skipped a set would prove nothing.
    #[test]
    fn required_sets_are_here() {
        for name in std::env::var("RSINFER_REQUIRE_ISA").unwrap_or_default().split(',') {
            if !name.is_empty() {
                Isa::named(name).unwrap();
            }
        }
    }
}
