//! The kernels that ship, as PTX texts. `build.py` makes them of src/*.cu; ref-tests runs every one of them.

use miniz_oxide::inflate::decompress_to_vec;
use quant::DType;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock};

/// The committed PTX of a module.
pub struct Ptx {
    /// Its name, as in `ptx/NAME.ptx`. A text for newer GPUs ends in `_sm80` or `_sm90`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl Ptx {
    /// The module that it is a text of.
    pub fn module(&self) -> &'static str {
        parts(self.name).0
    }

    /// The lowest compute capability that takes it, as in `sm_75`.
    pub fn target(&self) -> u32 {
        parts(self.name).1
    }

    /// Whether its kernels may begin while the one before ends: each of their threads waits for that (`src/overlap.cuh`).
    pub fn overlaps(&self) -> bool {
        self.target() >= 90
    }
}

/// A text's module, and the lowest compute capability that takes it: another of the same module serves older GPUs, if any does.
fn parts(name: &str) -> (&str, u32) {
    let newer = name.rsplit_once("_sm").and_then(|(module, sm)| Some((module, sm.parse().ok()?)));
    newer.unwrap_or((name, 75))
}

macro_rules! modules {
    ($($name:ident)*) => {
        /// Names, and texts as build.rs packed them.
        const PACKED: &[(&str, &[u8])] =
            &[$((stringify!($name), include_bytes!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".z")))),*];
    };
}

modules! {
    matvec_q4_0 matvec_q4_1 matvec_q5_0 matvec_q5_1 matvec_q8_0 matvec_q2_k matvec_q3_k matvec_q4_k matvec_q5_k matvec_q6_k
    matvec_q8_k matvec_iq4_nl matvec_iq4_xs matvec_mxfp4 matvec_f32 matvec_f16 matvec_bf16
    skinny_q4_0 skinny_q4_1 skinny_q5_0 skinny_q5_1 skinny_q8_0 skinny_q2_k skinny_q3_k skinny_q4_k skinny_q5_k skinny_q6_k
    skinny_q8_k skinny_iq4_nl skinny_iq4_xs skinny_mxfp4
    skinny_q4_0_sm80 skinny_q4_1_sm80 skinny_q5_0_sm80 skinny_q5_1_sm80 skinny_q8_0_sm80 skinny_q2_k_sm80 skinny_q3_k_sm80
    skinny_q4_k_sm80 skinny_q5_k_sm80 skinny_q6_k_sm80 skinny_q8_k_sm80 skinny_iq4_nl_sm80 skinny_iq4_xs_sm80 skinny_mxfp4_sm80
    matmul_q4_0 matmul_q4_1 matmul_q5_0 matmul_q5_1 matmul_q8_0 matmul_q2_k matmul_q3_k matmul_q4_k matmul_q5_k matmul_q6_k
    matmul_q8_k matmul_iq4_nl matmul_iq4_xs matmul_mxfp4 matmul_f32 matmul_f16 matmul_bf16
    matmul_q4_0_sm80 matmul_q4_1_sm80 matmul_q5_0_sm80 matmul_q5_1_sm80 matmul_q8_0_sm80 matmul_q2_k_sm80 matmul_q3_k_sm80
    matmul_q4_k_sm80 matmul_q5_k_sm80 matmul_q6_k_sm80 matmul_q8_k_sm80 matmul_iq4_nl_sm80 matmul_iq4_xs_sm80 matmul_mxfp4_sm80
    matmul_half_q4_0_sm80 matmul_half_q4_1_sm80 matmul_half_q5_0_sm80 matmul_half_q5_1_sm80 matmul_half_q8_0_sm80
    matmul_half_q2_k_sm80 matmul_half_q3_k_sm80 matmul_half_q4_k_sm80 matmul_half_q5_k_sm80 matmul_half_q6_k_sm80
    matmul_half_q8_k_sm80 matmul_half_iq4_nl_sm80 matmul_half_iq4_xs_sm80 matmul_half_mxfp4_sm80 matmul_half_f16_sm80
    matmul_half_bf16_sm80 prompt_half_sm80 attend_half_sm80
    attention_f32 attention_f16 attention_bf16 attention_q8_0 attention_q4_0
    prompt_f32 prompt_f16 prompt_bf16 prompt_q8_0 prompt_q4_0
    mass_f32 mass_f16 mass_bf16 mass_q8_0 mass_q4_0
    store_f32 store_f16 store_bf16 store_q8_0 store_q4_0
    attention_f16_q8_0 attention_f16_q4_0 attention_q8_0_f16 attention_q8_0_q4_0 attention_q4_0_f16 attention_q4_0_q8_0
    prompt_f16_q8_0 prompt_f16_q4_0 prompt_q8_0_f16 prompt_q8_0_q4_0 prompt_q4_0_f16 prompt_q4_0_q8_0
    mass_f16_q8_0 mass_f16_q4_0 mass_q8_0_f16 mass_q8_0_q4_0 mass_q4_0_f16 mass_q4_0_q8_0
    mla_f16_sm80 mla_small_f16_sm80
    cache round router rows
    matvec_q4_0_sm90 matvec_q4_1_sm90 matvec_q5_0_sm90 matvec_q5_1_sm90 matvec_q8_0_sm90 matvec_q2_k_sm90 matvec_q3_k_sm90
    matvec_q4_k_sm90 matvec_q5_k_sm90 matvec_q6_k_sm90 matvec_q8_k_sm90 matvec_iq4_nl_sm90 matvec_iq4_xs_sm90
    matvec_mxfp4_sm90 matvec_f32_sm90 matvec_f16_sm90 matvec_bf16_sm90
    attention_f32_sm90 attention_f16_sm90 attention_bf16_sm90 attention_q8_0_sm90 attention_q4_0_sm90 attention_f16_q8_0_sm90
    attention_f16_q4_0_sm90 attention_q8_0_f16_sm90 attention_q8_0_q4_0_sm90 attention_q4_0_f16_sm90 attention_q4_0_q8_0_sm90
    skinny_q4_0_sm90 skinny_q4_1_sm90 skinny_q5_0_sm90 skinny_q5_1_sm90 skinny_q8_0_sm90 skinny_q2_k_sm90
    skinny_q3_k_sm90 skinny_q4_k_sm90 skinny_q5_k_sm90 skinny_q6_k_sm90 skinny_q8_k_sm90 skinny_iq4_nl_sm90
    skinny_iq4_xs_sm90 skinny_mxfp4_sm90 mla_f16_sm90 mla_small_f16_sm90
    store_f32_sm90 store_f16_sm90 store_bf16_sm90 store_q8_0_sm90 store_q4_0_sm90
    round_sm90 router_sm90 rows_sm90 attend_half_sm90
}

/// Unpacked when it is first asked for, and kept.
fn unpacked(i: usize) -> &'static Ptx {
    static TEXTS: [OnceLock<Ptx>; PACKED.len()] = [const { OnceLock::new() }; PACKED.len()];
    TEXTS[i].get_or_init(|| {
        let (name, packed) = PACKED[i];
        let bytes = decompress_to_vec(packed).expect("build.rs packed it");
        Ptx { name, text: String::from_utf8(bytes).expect("PTX is ASCII").leak() }
    })
}

/// Every module, unpacked.
pub fn all() -> impl ExactSizeIterator<Item = &'static Ptx> {
    (0..PACKED.len()).map(unpacked)
}

/// The module of this name.
pub fn module(name: &str) -> Option<&'static Ptx> {
    PACKED.iter().position(|m| m.0 == name).map(unpacked)
}

/// The text of this module for a GPU of compute capability `sm` (75, 80, ...): the newest that it takes. Asked for at every launch.
pub fn text_for(name: &str, sm: u32) -> Option<&'static Ptx> {
    /// The texts of each module, the newest first.
    static OF: LazyLock<HashMap<&str, Vec<(u32, usize)>>> = LazyLock::new(|| {
        let mut of = HashMap::<_, Vec<_>>::new();
        for (i, (name, _)) in PACKED.iter().enumerate() {
            let (module, target) = parts(name);
            of.entry(module).or_default().push((target, i));
        }
        of.values_mut().for_each(|texts| texts.sort_by_key(|t| Reverse(t.0)));
        of
    });
    OF.get(name)?.iter().find(|t| t.0 <= sm).map(|t| unpacked(t.1))
}

/// The text that all GPUs take of the module that multiplies weights of `dtype` and looks up their rows.
pub fn of_format(dtype: DType) -> &'static Ptx {
    module(&name_of("matvec", dtype)).expect("every format has its module")
}

/// The name of the module of a kind (`matvec`; for cache types `attention`, `mass`) and format.
pub fn name_of(kind: &str, dtype: DType) -> String {
    format!("{kind}_{}", dtype.name().to_ascii_lowercase())
}

/// The name of the module of a kind (`attention`, `mass`) for a layer's two caches.
pub fn name_of_pair(kind: &str, first: DType, second: DType) -> String {
    let of = name_of(kind, first);
    if first == second { of } else { name_of(&of, second) }
}

/// What the texts were compiled from, and by what.
pub const MANIFEST: &str = include_str!("MANIFEST");
