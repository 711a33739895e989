//! The shapes of public models, from their published `config.json`. Knows nothing of types or weights.

/// An architecture of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Arch {
    Llama,
    Qwen3,
    Gemma3,
    DeepSeek2,
}

impl Arch {
    /// `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
            Self::DeepSeek2 => "deepseek2",
        }
    }

    /// A pre-tokenizer that llama.cpp and this engine know: byte-level BPE for all, also for Gemma, whose own SentencePiece
    /// vocabulary would need a score for every token.
    pub fn pre_tokenizer(self) -> &'static str {
        match self {
            Self::Llama | Self::Gemma3 => "llama-bpe",
            Self::Qwen3 => "qwen2",
            Self::DeepSeek2 => "deepseek-llm",
        }
    }
}

/// How a model attends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attention {
    /// Grouped-query attention.
    Grouped {
        /// Heads of keys and values.
        kv_heads: usize,
        /// Dimensions of a head.
        head_dim: usize,
        /// Window of the local layers.
        window: Option<usize>,
    },
    /// Multi-head latent attention with YaRN (factor 40 over 4096).
    Latent {
        /// Width of the compressed query.
        q_lora: Option<usize>,
        /// Width of the latent.
        latent: usize,
        /// Key dimensions of a head without rotation.
        nope: usize,
        /// Rotary dimensions.
        rope: usize,
        /// Value dimensions of a head.
        value: usize,
        /// 0.1 times `mscale_all_dim`.
        yarn_log_multiplier: f32,
    },
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// Routed experts.
    pub count: usize,
    /// Routed experts per token.
    pub used: usize,
    /// Shared experts.
    pub shared: usize,
    /// Hidden features of one.
    pub hidden: usize,
    /// Layers without experts, at the beginning.
    pub dense_layers: usize,
    /// Groups, and how many of them a token uses.
    pub groups: Option<(usize, usize)>,
    /// Sigmoid gate with a correction bias and normalised weights (V3) instead of softmax (V2).
    pub sigmoid: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// A model's shape.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Geometry {
    /// The model's name in lower case, without its maker's.
    pub name: &'static str,
    pub arch: Arch,
    pub layers: usize,
    /// Width of the residual stream.
    pub d: usize,
    /// Hidden features of a dense feed-forward layer.
    pub ff: usize,
    pub heads: usize,
    pub vocab: usize,
    pub context: usize,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    pub rope_base: f32,
    /// Llama 3's frequency factors for this factor (low 1, high 4, original context 8192).
    pub llama3_rope: Option<f32>,
    /// Linear scaling of the rotary positions.
    pub linear_rope: Option<f32>,
    pub eps: f32,
    pub attention: Attention,
    pub experts: Option<Experts>,
}

const LLAMA_1B: Geometry = Geometry {
    name: "llama-3.2-1b",
    arch: Arch::Llama,
    layers: 16,
    d: 2048,
    ff: 8192,
    heads: 32,
    vocab: 128_256,
    context: 131_072,
    tied: true,
    rope_base: 500_000.0,
    llama3_rope: Some(32.0),
    linear_rope: None,
    eps: 1e-5,
    attention: Attention::Grouped { kv_heads: 8, head_dim: 64, window: None },
    experts: None,
};

const GEMMA_1B: Geometry = Geometry {
    name: "gemma-3-1b",
    arch: Arch::Gemma3,
    layers: 26,
    d: 1152,
    ff: 6912,
    heads: 4,
    vocab: 262_144,
    context: 32_768,
    tied: true,
    rope_base: 1e6,
    llama3_rope: None,
    linear_rope: None,
    eps: 1e-6,
    attention: Attention::Grouped { kv_heads: 1, head_dim: 256, window: Some(512) },
    experts: None,
};

const V2_LITE: Geometry = Geometry {
    name: "deepseek-v2-lite",
    arch: Arch::DeepSeek2,
    layers: 27,
    d: 2048,
    ff: 10_944,
    heads: 16,
    vocab: 102_400,
    context: 163_840,
    tied: false,
    rope_base: 10_000.0,
    llama3_rope: None,
    linear_rope: None,
    eps: 1e-6,
    attention: Attention::Latent {
        q_lora: None,
        latent: 512,
        nope: 128,
        rope: 64,
        value: 128,
        yarn_log_multiplier: 0.0707,
    },
    experts: Some(Experts {
        count: 64,
        used: 6,
        shared: 2,
        hidden: 1408,
        dense_layers: 1,
        groups: None,
        sigmoid: false,
        scale: 1.0,
    }),
};

/// The models that can be written.
pub const GEOMETRIES: [Geometry; 9] = [
    LLAMA_1B,
    Geometry {
        name: "llama-3.1-8b",
        layers: 32,
        d: 4096,
        ff: 14_336,
        tied: false,
        llama3_rope: Some(8.0),
        attention: Attention::Grouped { kv_heads: 8, head_dim: 128, window: None },
        ..LLAMA_1B
    },
    Geometry {
        name: "llama-3.3-70b",
        layers: 80,
        d: 8192,
        ff: 28_672,
        heads: 64,
        tied: false,
        llama3_rope: Some(8.0),
        attention: Attention::Grouped { kv_heads: 8, head_dim: 128, window: None },
        ..LLAMA_1B
    },
    GEMMA_1B,
    Geometry {
        name: "gemma-3-27b",
        layers: 62,
        d: 5376,
        ff: 21_504,
        heads: 32,
        vocab: 262_208,
        context: 131_072,
        linear_rope: Some(8.0),
        attention: Attention::Grouped { kv_heads: 16, head_dim: 128, window: Some(1024) },
        ..GEMMA_1B
    },
    Geometry {
        name: "gemma-3-4b",
        layers: 34,
        d: 2560,
        ff: 10_240,
        heads: 8,
        context: 131_072,
        linear_rope: Some(8.0),
        attention: Attention::Grouped { kv_heads: 4, head_dim: 256, window: Some(1024) },
        ..GEMMA_1B
    },
    Geometry {
        name: "qwen3-0.6b",
        arch: Arch::Qwen3,
        layers: 28,
        d: 1024,
        ff: 3072,
        heads: 16,
        vocab: 151_936,
        context: 40_960,
        rope_base: 1e6,
        llama3_rope: None,
        eps: 1e-6,
        attention: Attention::Grouped { kv_heads: 8, head_dim: 128, window: None },
        ..LLAMA_1B
    },
    V2_LITE,
    Geometry {
        name: "deepseek-v3",
        layers: 61,
        d: 7168,
        ff: 18_432,
        heads: 128,
        vocab: 129_280,
        attention: Attention::Latent {
            q_lora: Some(1536),
            latent: 512,
            nope: 128,
            rope: 64,
            value: 128,
            yarn_log_multiplier: 0.1,
        },
        experts: Some(Experts {
            count: 256,
            used: 8,
            shared: 1,
            hidden: 2048,
            dense_layers: 3,
            groups: Some((8, 4)),
            sigmoid: true,
            scale: 2.5,
        }),
        ..V2_LITE
    },
];

impl Geometry {
    /// The model called `name`, in any letter case.
    pub fn named(name: &str) -> Option<Self> {
        GEOMETRIES.into_iter().find(|g| g.name.eq_ignore_ascii_case(name))
    }

    /// The same structure in a few megabytes: narrower, fewer experts, a small vocabulary; the same number of layers, by
    /// which llama.cpp tells V2-Lite from its relatives.
    pub fn tiny(self) -> Self {
        let attention = match self.attention {
            Attention::Grouped { kv_heads, window, .. } => {
                Attention::Grouped { kv_heads: kv_heads.min(2), head_dim: 64, window: window.map(|_| 32) }
            }
            Attention::Latent { q_lora, yarn_log_multiplier, .. } => Attention::Latent {
                q_lora: q_lora.map(|_| 256),
                latent: 256,
                nope: 32,
                rope: 32,
                value: 32,
                yarn_log_multiplier,
            },
        };
        let experts = self.experts.map(|e| Experts {
            count: 8,
            used: 2,
            hidden: 128,
            groups: e.groups.map(|_| (4, 2)),
            ..e
        });
        Self { d: 256, ff: 512, heads: 4, vocab: 1000, attention, experts, ..self }
    }
}
