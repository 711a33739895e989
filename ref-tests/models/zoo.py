"""The list of tiny models: which transformers class, which hyper-parameters, and what each one covers.

Everything is a small random model with the structure of a public one. Widths are multiples of 256 only where K-quants
must apply (QUANTISED); elsewhere they are smaller, so that the F32 files fit into the repository.
This file holds plain data and must not know how models are built, converted or run.
"""
from dataclasses import dataclass, field


@dataclass
class Entry:
    """One model.

    model: transformers' model class by name; its configuration class is found from it.
    arch: GGUF architecture. store: tensor type of the matrices in the file ("f32", "f16", "bf16"); the weights are
    rounded to it before the reference forward, so the reference is exact for the file.
    options: switches of to_gguf.py. covers: what would go unnoticed without this model.
    embedding: standard deviation of the embeddings (default: 1, or 2.5/sqrt(columns) if they are also the output).
    final_norm: mean of the last norm's weights; it sets how peaked the logits are where the output is tied.
    gate_gain: size of the router's weights. committed: of the quantised files, the types that the repository keeps.
    llama_cpp: where llama.cpp departs from transformers on this model; check: changes to the configuration under which
    the conversion is held against llama.cpp all the same; check_yarn_beta: what llama.cpp must be told for it.
    """

    name: str
    model: str
    arch: str
    config: dict
    covers: str
    vocab: str = "bpe:llama-bpe"
    tokens: int = 96
    store: str = "f32"
    seed: int = 1
    options: dict = field(default_factory=dict)
    committed: tuple = ()
    embedding: float | None = None
    final_norm: float = 1.0
    gate_gain: float = 2.5
    llama_cpp: str = ""
    check: dict = field(default_factory=dict)
    check_yarn_beta: tuple | None = None


VOCAB = 320
COMMON = dict(vocab_size=VOCAB, max_position_embeddings=512, rms_norm_eps=1e-5)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
ALL_TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K",
             "IQ4_NL", "IQ4_XS", "MXFP4")


def rope(theta, **scaling):
    """rope_parameters of transformers 5: the base and, if any, the scaling."""
    return dict(rope_theta=theta, **(scaling or dict(rope_type="default")))


def yarn(factor, original, mscale, **more):
    """YaRN as DeepSeek configures it: mscale and mscale_all_dim are equal, so cos and sin carry no factor."""
    return rope(10000.0, rope_type="yarn", factor=factor, original_max_position_embeddings=original, mscale=mscale,
                mscale_all_dim=mscale, **more)


def deepseek(**changes):
    """DeepSeek-V3 in miniature; `changes` override."""
    base = dict(COMMON, rms_norm_eps=1e-6, hidden_size=128, intermediate_size=256, moe_intermediate_size=32,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=96, kv_lora_rank=64,
                qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=8, num_experts_per_tok=2,
                n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=1.0, bos_token_id=0,
                eos_token_id=1)
    return dict(base, **changes)


V3 = deepseek(moe_intermediate_size=64, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
              rope_parameters=yarn(40.0, 64, 1.0, beta_fast=32, beta_slow=1))
HEADS = dict(V3, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
             num_attention_heads=40, num_key_value_heads=40, q_lora_rank=16, kv_lora_rank=32, qk_nope_head_dim=8,
             v_head_dim=8)
KIMI = deepseek(num_attention_heads=2, num_key_value_heads=2, n_routed_experts=12, num_experts_per_tok=4, n_group=1,
                topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.827,
                rope_parameters=yarn(32.0, 48, 1.0, beta_fast=1, beta_slow=1))
V2_LITE = deepseek(q_lora_rank=None, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=3,
                   topk_method="greedy", norm_topk_prob=False, rope_parameters=yarn(40.0, 48, 0.707))
V2 = deepseek(n_shared_experts=2, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
              topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0,
              rope_parameters=yarn(40.0, 64, 0.707))
GEMMA = dict(COMMON, rms_norm_eps=1e-6, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
             num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=16,
             tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, pad_token_id=0,
             rope_parameters=dict(full_attention=rope(1e6, rope_type="linear", factor=8.0),
                                  sliding_attention=rope(10000.0)))
NOT_LITE = "refuses a file without attention.q_lora_rank unless it has 26 or 27 layers"

MODELS = [
    Entry("llama", "LlamaForCausalLM", "llama",
          dict(COMMON, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=4, tie_word_embeddings=False, rope_parameters=rope(10000.0)),
          "Llama 1/2: as many KV heads as heads, SentencePiece vocabulary, no key_length in the file; embeddings "
          "so small that the epsilon of the norms counts", vocab="spm", embedding=0.02),
    Entry("llama3", "LlamaForCausalLM", "llama",
          dict(COMMON, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
          "Llama 3.x: grouped KV heads, rope_freqs.weight, tied output; longer than the original context",
          tokens=128, seed=2),
    Entry("mistral", "MistralForCausalLM", "llama",
          dict(COMMON, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=48, tie_word_embeddings=False, sliding_window=None,
               rope_parameters=rope(1e6)),
          "Mistral: key_length (48) other than embedding / heads (32); F16 matrices", store="f16", vocab="spm", seed=3),
    Entry("qwen2", "Qwen2ForCausalLM", "qwen2",
          dict(COMMON, rms_norm_eps=1e-6, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=rope(1e6)),
          "Qwen 2/2.5: biases on Q, K and V; rotary halves instead of pairs", vocab="bpe:qwen2", seed=4),
    Entry("qwen3", "Qwen3ForCausalLM", "qwen3",
          dict(COMMON, rms_norm_eps=1e-6, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
               num_attention_heads=4, num_key_value_heads=2, head_dim=48, tie_word_embeddings=False,
               rope_parameters=rope(1e6)),
          "Qwen 3: norms of Q and K per head, key_length other than embedding / heads", vocab="bpe:qwen2", seed=5),
    Entry("qwen3moe", "Qwen3MoeForCausalLM", "qwen3moe",
          dict(COMMON, rms_norm_eps=1e-6, hidden_size=128, intermediate_size=256, moe_intermediate_size=32,
               num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8,
               num_experts_per_tok=3, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
               tie_word_embeddings=False, rope_parameters=rope(1e6)),
          "Qwen 3 MoE: softmax gate whose chosen weights are normalised without any key saying so",
          vocab="bpe:qwen2", seed=6),
    Entry("gemma3", "Gemma3ForCausalLM", "gemma3", GEMMA,
          "Gemma 3: window (16) far shorter than the text, 5 local layers to 1 global, two rope bases, linear rope "
          "factor on the global layer only, post-norms, norms with +1, embedding scale, tanh GELU", vocab="spm:gemma",
          seed=7, embedding=0.1, final_norm=3.0),
    Entry("deepseek2-v2-lite", "DeepseekV2ForCausalLM", "deepseek2", V2_LITE,
          "DeepSeek-V2-Lite: no q_lora, softmax gate without normalisation, 2 shared experts, YaRN with mscale 0.707; "
          "BF16 matrices", store="bf16", vocab="bpe:deepseek-llm", tokens=128, seed=8, llama_cpp=NOT_LITE,
          check=dict(num_hidden_layers=27)),
    Entry("deepseek2-v2-lite-old", "DeepseekV2ForCausalLM", "deepseek2", dict(V2_LITE, num_hidden_layers=2),
          "V2-Lite in a file of before the MLA split: attn_kv_b, head_count_kv = heads, no *_mla keys, no gating key; "
          "BF16 matrices", vocab="bpe:deepseek-llm", tokens=96, seed=12, store="bf16", options=dict(old_mla=True),
          llama_cpp=NOT_LITE, check=dict(num_hidden_layers=27)),
    Entry("deepseek2-v2", "DeepseekV2ForCausalLM", "deepseek2", V2,
          "DeepSeek-V2: q_lora, a group's score is its best expert, scale 16; BF16 matrices", store="bf16",
          vocab="bpe:deepseek-llm", tokens=128, seed=9, gate_gain=1.0,
          llama_cpp="scores a group by the sum of its two best experts with the softmax gate too",
          check=dict(n_group=None, topk_group=None, topk_method="greedy")),
    Entry("deepseek2-v3", "DeepseekV3ForCausalLM", "deepseek2", V3,
          "DeepSeek-V3/R1: sigmoid gate, correction bias, 4 groups of which 2, normalised and scaled by 2.5, YaRN with "
          "mscale 1", vocab="bpe:deepseek-v3", tokens=128, seed=10),
    Entry("deepseek2-v3-old", "DeepseekV3ForCausalLM", "deepseek2",
          dict(V3, num_hidden_layers=2, moe_intermediate_size=32),
          "DeepSeek-V3 in a file of before the MLA split (attn_kv_b); BF16 matrices", vocab="bpe:deepseek-v3",
          tokens=96, seed=13, store="bf16", options=dict(old_mla=True)),
    Entry("deepseek2-kimi-k2", "DeepseekV3ForCausalLM", "deepseek2", KIMI,
          "Kimi K2: one group (no restriction), more experts, fewer heads, YaRN with beta_fast 1; BF16 matrices",
          store="bf16", vocab="bpe:deepseek-v3", tokens=128, seed=11, check_yarn_beta=(1.0, 1.0),
          llama_cpp="does not read rope.scaling.yarn_beta_fast from deepseek2 files and takes 32"),
    Entry("deepseek2-v3-heads", "DeepseekV3ForCausalLM", "deepseek2", HEADS,
          "DeepSeek-V3 with 40 heads: more than one block of 16 or 32, and not a whole one of 64; BF16 matrices",
          store="bf16", vocab="bpe:deepseek-v3", tokens=72, seed=14),
]

# Bases of quantised files: every row that a K-quant can cover has a length that is a multiple of 256.
QUANTISED = [
    Entry("q-llama", "LlamaForCausalLM", "llama",
          dict(COMMON, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=1, head_dim=64, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
          "every weight type in a dense model", tokens=96, seed=21,
          committed=("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL",
                     "IQ4_XS")),
    Entry("q-gemma3", "Gemma3ForCausalLM", "gemma3",
          dict(GEMMA, hidden_size=256, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
               num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64),
          "every weight type through norms before and after each part", vocab="spm:gemma", tokens=96, seed=22,
          embedding=0.05, final_norm=3.0,
          committed=("QAT",)),
    Entry("q-deepseek2", "DeepseekV3ForCausalLM", "deepseek2",
          dict(V3, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2,
               q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
               n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2),
          "every weight type through latent attention and experts; attn_k_b's short rows fall back",
          vocab="bpe:deepseek-v3", tokens=96, seed=23, committed=("Q4_K_M", "MXFP4")),
]
