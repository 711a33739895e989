//! What a file says about a tensor, and the names of ggml's type ids. Knows no tensor by name or purpose.

use quant::DType;

/// A tensor's description. Made by the reader, which has checked it against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// The type of its elements.
    pub dtype: DType,
    /// 1 to 4 dimensions in ggml's order, innermost (the row length) first, as in the file. None is zero.
    pub dims: Vec<u64>,
    /// Bytes of its data.
    pub n_bytes: u64,
    /// Index of the part of a split file that holds it; 0 otherwise.
    pub part: usize,
    /// Where its data start, in bytes from the start of that part.
    pub offset: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Elements of a row, the innermost dimension.
    pub fn row_len(&self) -> u64 {
        self.dims[0]
    }

    /// Number of rows: the product of all dimensions but the innermost.
    pub fn n_rows(&self) -> u64 {
        self.dims[1..].iter().product()
    }
}

/// ggml's name of a tensor type id, for messages: the types this engine reads, those it does not, and those that
/// ggml itself has removed. `None` for ids that never were.
pub fn type_id_name(id: u32) -> Option<&'static str> {
    if let Some(t) = DType::from_id(id) {
        return Some(t.name());
    }
    UNSUPPORTED.iter().find(|(i, _)| *i == id).map(|(_, name)| *name)
}

/// Types of ggml that this engine does not read (enum ggml_type in ggml.h).
const UNSUPPORTED: &[(u32, &str)] = &[
    (4, "Q4_2, which ggml has removed"),
    (5, "Q4_3, which ggml has removed"),
    (9, "Q8_1"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4, which ggml has removed"),
    (32, "Q4_0_4_8, which ggml has removed"),
    (33, "Q4_0_8_8, which ggml has removed"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4, which ggml has removed"),
    (37, "IQ4_NL_4_8, which ggml has removed"),
    (38, "IQ4_NL_8_8, which ggml has removed"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];
