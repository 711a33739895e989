//! `DType` and the table of format facts: one row per format, the only place that lists them.

use crate::formats;

/// A tensor element type of GGUF. The discriminants are ggml's type ids
/// (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum DType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    MXFP4 = 39,
}

/// Packs `src` into `dst`: see [`Format::quantize`].
pub type Quantize = fn(src: &[f32], dst: &mut [u8], importance: Option<&[f32]>);

/// Everything format-specific that other crates need: a row of [`FORMATS`].
pub struct Format {
    /// The type this row describes.
    pub dtype: DType,
    /// Lower-case name as llama.cpp prints it (`q4_K`, `f16`).
    pub name: &'static str,
    /// Elements in a block; a row's length must be a multiple of it.
    pub block_len: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Reads whole blocks: `src.len() == n * block_bytes`, `dst.len() == n * block_len`; panics otherwise.
    pub dequantize: fn(src: &[u8], dst: &mut [f32]),
    /// Packs one or more whole blocks; same length rule. The third argument is an importance weight per element
    /// (`len == src.len()`), as llama-quantize's imatrix gives it. `None` where the format can only be read.
    pub quantize: Option<Quantize>,
    /// Bound on |kernel dot - f64 dot of the dequantised weights| over sum |w_i x_i|, for activations rounded to int8 per 32
    /// values (formats that are floats: f32 rounding only). See docs/numerics.md.
    pub dot_tolerance: f32,
}

/// Why bytes could not be interpreted as a tensor.
#[derive(Debug, PartialEq, Eq, Clone)]
pub enum QuantError {
    /// The row length is not a multiple of the block length.
    RowLength {
        /// The type asked for.
        dtype: DType,
        /// The row's number of elements.
        len: usize,
    },
}

impl std::fmt::Display for QuantError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RowLength { dtype, len } => write!(
                f,
                "a row of {len} values cannot be stored as {}: not a multiple of {}",
                dtype.name(),
                dtype.format().block_len
            ),
        }
    }
}

impl std::error::Error for QuantError {}

/// Tolerance of formats that are multiplied in f32: rounding of the sum alone.
const FLOAT_DOT: f32 = 1e-6;
/// Tolerance of formats whose kernels round activations to int8 per 32 values. Each activation is off by at most half a step,
/// max|x| / 254; for activations spread evenly over their range that is at most 2 / 254 of the mean |x|.
const INT8_DOT: f32 = 1e-2;

/// The format facts, ordered by ggml's type id.
pub static FORMATS: &[Format] = ROWS;

// A constant beside the static so that `ROW_OF_ID` can be computed from it.
const ROWS: &[Format] = &[
    Format {
        dtype: DType::F32,
        name: "f32",
        block_len: 1,
        block_bytes: 4,
        dequantize: formats::f32::dequantize,
        quantize: Some(formats::f32::quantize),
        dot_tolerance: FLOAT_DOT,
    },
    Format {
        dtype: DType::F16,
        name: "f16",
        block_len: 1,
        block_bytes: 2,
        dequantize: formats::f16::dequantize,
        quantize: Some(formats::f16::quantize),
        dot_tolerance: FLOAT_DOT,
    },
    Format {
        dtype: DType::Q4_0,
        name: "q4_0",
        block_len: 32,
        block_bytes: 18,
        dequantize: formats::q4_0::dequantize,
        quantize: Some(formats::q4_0::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q4_1,
        name: "q4_1",
        block_len: 32,
        block_bytes: 20,
        dequantize: formats::q4_1::dequantize,
        quantize: Some(formats::q4_1::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q5_0,
        name: "q5_0",
        block_len: 32,
        block_bytes: 22,
        dequantize: formats::q5_0::dequantize,
        quantize: Some(formats::q5_0::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q5_1,
        name: "q5_1",
        block_len: 32,
        block_bytes: 24,
        dequantize: formats::q5_1::dequantize,
        quantize: Some(formats::q5_1::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q8_0,
        name: "q8_0",
        block_len: 32,
        block_bytes: 34,
        dequantize: formats::q8_0::dequantize,
        quantize: Some(formats::q8_0::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q2_K,
        name: "q2_K",
        block_len: 256,
        block_bytes: 84,
        dequantize: formats::q2_k::dequantize,
        quantize: Some(formats::q2_k::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q3_K,
        name: "q3_K",
        block_len: 256,
        block_bytes: 110,
        dequantize: formats::q3_k::dequantize,
        quantize: Some(formats::q3_k::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q4_K,
        name: "q4_K",
        block_len: 256,
        block_bytes: 144,
        dequantize: formats::q4_k::dequantize,
        quantize: Some(formats::q4_k::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q5_K,
        name: "q5_K",
        block_len: 256,
        block_bytes: 176,
        dequantize: formats::q5_k::dequantize,
        quantize: Some(formats::q5_k::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q6_K,
        name: "q6_K",
        block_len: 256,
        block_bytes: 210,
        dequantize: formats::q6_k::dequantize,
        quantize: Some(formats::q6_k::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::Q8_K,
        name: "q8_K",
        block_len: 256,
        block_bytes: 292,
        dequantize: formats::q8_k::dequantize,
        quantize: Some(formats::q8_k::quantize),
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::IQ4_NL,
        name: "iq4_nl",
        block_len: 32,
        block_bytes: 18,
        dequantize: formats::iq4_nl::dequantize,
        quantize: None,
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::IQ4_XS,
        name: "iq4_xs",
        block_len: 256,
        block_bytes: 136,
        dequantize: formats::iq4_xs::dequantize,
        quantize: None,
        dot_tolerance: INT8_DOT,
    },
    Format {
        dtype: DType::BF16,
        name: "bf16",
        block_len: 1,
        block_bytes: 2,
        dequantize: formats::bf16::dequantize,
        quantize: Some(formats::bf16::quantize),
        dot_tolerance: FLOAT_DOT,
    },
    Format {
        dtype: DType::MXFP4,
        name: "mxfp4",
        block_len: 32,
        block_bytes: 17,
        dequantize: formats::mxfp4::dequantize,
        quantize: None,
        dot_tolerance: INT8_DOT,
    },
];

/// Row of [`FORMATS`] for each ggml id; `NO_ROW` where there is none.
const ROW_OF_ID: [u8; 64] = {
    let mut map = [NO_ROW; 64];
    let mut row = 0;
    while row < ROWS.len() {
        map[ROWS[row].dtype as usize] = row as u8;
        row += 1;
    }
    map
};
const NO_ROW: u8 = u8::MAX;

impl DType {
    /// The type with ggml's id `id`, or `None` if this engine does not know it.
    pub fn from_id(id: u32) -> Option<Self> {
        let row = *ROW_OF_ID.get(usize::try_from(id).ok()?)?;
        FORMATS.get(usize::from(row)).map(|f| f.dtype)
    }

    /// The type called `name`, in any letter case.
    pub fn from_name(name: &str) -> Option<Self> {
        FORMATS.iter().find(|f| f.name.eq_ignore_ascii_case(name)).map(|f| f.dtype)
    }

    /// This type's row of [`FORMATS`].
    pub fn format(self) -> &'static Format {
        &FORMATS[usize::from(ROW_OF_ID[self as usize])]
    }

    /// ggml's type id.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// Lower-case name as llama.cpp prints it.
    pub fn name(self) -> &'static str {
        self.format().name
    }

    /// Bytes of a row of `len` elements.
    ///
    /// # Errors
    /// [`QuantError::RowLength`] if `len` is not a multiple of the block length.
    pub fn row_bytes(self, len: usize) -> Result<usize, QuantError> {
        let f = self.format();
        if !len.is_multiple_of(f.block_len) {
            return Err(QuantError::RowLength { dtype: self, len });
        }
        Ok(len / f.block_len * f.block_bytes)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_id_and_name() {
        for (i, f) in FORMATS.iter().enumerate() {
            assert!(i == 0 || FORMATS[i - 1].dtype < f.dtype, "FORMATS is not ordered by id at {}", f.name);
            assert_eq!(f.dtype.format().name, f.name);
            assert_eq!(DType::from_id(f.dtype.id()), Some(f.dtype));
            assert_eq!(DType::from_name(&f.name.to_uppercase()), Some(f.dtype));
            assert_eq!(f.dtype.row_bytes(4 * f.block_len), Ok(4 * f.block_bytes));
        }
    }

    #[test]
    fn unknown_ids_and_names_are_none() {
        let known = FORMATS.iter().map(|f| f.dtype.id()).collect::<Vec<_>>();
        for id in (0..300).chain([u32::MAX - 1, u32::MAX]).filter(|id| !known.contains(id)) {
            assert_eq!(DType::from_id(id), None, "{id}");
        }
        assert_eq!(DType::from_name("q4_k_m"), None);
    }

    #[test]
    fn a_row_that_is_no_multiple_is_refused_by_name() {
        let e = DType::Q4_K.row_bytes(300).unwrap_err();
        assert_eq!(e.to_string(), "a row of 300 values cannot be stored as q4_K: not a multiple of 256");
    }
}
