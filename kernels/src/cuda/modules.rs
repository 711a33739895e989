//! The kernels that ship, as PTX texts. `build.py` makes them of src/*.cu; ref-tests runs every one of them.

use quant::DType;

/// The committed PTX of a module.
pub struct Ptx {
    /// Its name, as in `ptx/NAME.ptx`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! modules {
    ($($name:ident)*) => {
        /// Every module.
        pub const MODULES: &[Ptx] = &[$(Ptx {
            name: stringify!($name),
            text: include_str!(concat!("ptx/", stringify!($name), ".ptx")),
        }),*];
    };
}

modules! {
    matvec_q4_0 matvec_q4_1 matvec_q5_0 matvec_q5_1 matvec_q8_0 matvec_q2_k matvec_q3_k matvec_q4_k matvec_q5_k matvec_q6_k
    matvec_q8_k matvec_iq4_nl matvec_iq4_xs matvec_mxfp4 matvec_f32 matvec_f16 matvec_bf16
    attention_f32 attention_f16 attention_bf16 attention_q8_0 attention_q4_0
    round router rows
}

/// The module of this name.
pub fn module(name: &str) -> Option<&'static Ptx> {
    MODULES.iter().find(|m| m.name == name)
}

/// The module that multiplies weights of `dtype` and looks up their rows.
pub fn of_format(dtype: DType) -> &'static Ptx {
    let name = format!("matvec_{}", dtype.name().to_ascii_lowercase());
    module(&name).expect("every format has its module")
}

/// What the texts were compiled from, and by what.
pub const MANIFEST: &str = include_str!("MANIFEST");
