"""From a transformers model to a GGUF file as llama.cpp's converter would write it: names, layouts, metadata keys.

The tensor mapping moves elements and never computes with them (Gemma's +1 on norms apart), so `invert` can turn the
tensors of a file back into transformers' weights whatever the layout: it converts element numbers instead of weights.
Must not know how the weights came about or what they are compared with.
"""
import math
import re

import gguf
import numpy as np
import torch

import vocab

FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
              "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
PLAIN = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp", "input_layernorm": "attn_norm",
}
GEMMA_NORMS = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}
OTHER_NORMS = {"post_attention_layernorm": "ffn_norm"}


def _pairs(w, heads):
    """Rows of a Q or K projection from rotary halves to adjacent pairs, as architecture `llama` stores them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tensors(state, cfg, arch, options):
    """GGUF name -> array, from transformers' state dict (name -> numpy array of any type).

    Only moves elements. Matrices are [rows, columns] and experts [expert, rows, columns], in numpy's order.
    """
    out = {}
    norms = GEMMA_NORMS if arch == "gemma3" else OTHER_NORMS
    tied = cfg.tie_word_embeddings
    for name, w in state.items():
        if name == "model.embed_tokens.weight":
            out["token_embd.weight"] = w
        elif name == "model.norm.weight":
            out["output_norm.weight"] = w
        elif name == "lm_head.weight":
            if not tied:
                out["output.weight"] = w
        else:
            layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
            for part, v in _layer(rest, w, cfg, arch, norms, options):
                out[f"blk.{layer}.{part}"] = v
    return out


def _layer(rest, w, cfg, arch, norms, options):
    stem, _, kind = rest.rpartition(".")
    if rest == "mlp.experts.gate_up_proj":
        half = w.shape[1] // 2
        return [("ffn_gate_exps.weight", w[:, :half]), ("ffn_up_exps.weight", w[:, half:])]
    if rest == "mlp.experts.down_proj":
        return [("ffn_down_exps.weight", w)]
    if rest == "mlp.gate.e_score_correction_bias":
        return [("exp_probs_b.bias", w)]
    if stem == "self_attn.kv_b_proj":
        if options.get("old_mla"):
            return [("attn_kv_b.weight", w)]
        per_head = w.reshape(cfg.num_attention_heads, cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.kv_lora_rank)
        return [("attn_k_b.weight", per_head[:, :cfg.qk_nope_head_dim].swapaxes(1, 2)),
                ("attn_v_b.weight", per_head[:, cfg.qk_nope_head_dim:])]
    if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
        w = _pairs(w, cfg.num_attention_heads if "q_proj" in stem else cfg.num_key_value_heads)
    return [(f"{norms.get(stem) or PLAIN[stem]}.{kind}", w)]


def state_of(model):
    """A model's weights as name -> numpy array, in the model's own precision."""
    return {k: v.detach().cpu().numpy() for k, v in model.state_dict().items()}


def invert(model, arch, options, values):
    """transformers' state dict from a file's tensors (GGUF name -> array): the inverse of `tensors` and of the +1."""
    like, start, numbers = state_of(model), 0, {}
    for name, w in like.items():
        numbers[name] = np.arange(start, start + w.size).reshape(w.shape)
        start += w.size
    flat, seen = np.zeros(start, np.float64), np.zeros(start, bool)
    for name, where in tensors(numbers, model.config, arch, options).items():
        v = np.asarray(values[name], np.float64)
        if arch == "gemma3" and name.endswith("norm.weight"):
            v = v - 1.0
        flat[where.reshape(-1)] = v.reshape(-1)
        seen[where.reshape(-1)] = True
    if model.config.tie_word_embeddings:
        flat[numbers["lm_head.weight"].reshape(-1)] = flat[numbers["model.embed_tokens.weight"].reshape(-1)]
        seen[numbers["lm_head.weight"].reshape(-1)] = True
    assert seen.all(), "a weight of the model has no tensor in the file"
    return {k: torch.from_numpy(flat[n.reshape(-1)].reshape(n.shape).astype(np.float32)) for k, n in numbers.items()}


def read(path):
    """A file's tensors dequantised: GGUF name -> float32 array in numpy's order."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
            for t in gguf.GGUFReader(path).tensors}


def llama3_factors(cfg):
    """rope_freqs.weight: what each rotary frequency is divided by (Llama 3.1's scaling), float32 [head_dim / 2]."""
    p, d = cfg.rope_parameters, cfg.head_dim
    freqs = 1.0 / (p["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    low = p["original_max_position_embeddings"] / p["low_freq_factor"]
    high = p["original_max_position_embeddings"] / p["high_freq_factor"]
    out = []
    for wave in (2 * math.pi / freqs).tolist():
        if wave < high:
            out.append(1.0)
        elif wave > low:
            out.append(p["factor"])
        else:
            smooth = (p["original_max_position_embeddings"] / wave - p["low_freq_factor"]) / (
                p["high_freq_factor"] - p["low_freq_factor"])
            out.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(out, np.float32)


def _rope(w, cfg, arch):
    p = cfg.rope_parameters
    p = p.get("full_attention", p)
    w.add_rope_freq_base(p["rope_theta"])
    if arch == "gemma3":
        w.add_rope_freq_base_swa(cfg.rope_parameters["sliding_attention"]["rope_theta"])
    if p["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(p["factor"])
    elif p["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(p["factor"])
        w.add_rope_scaling_orig_ctx_len(p["original_max_position_embeddings"])
        if "beta_fast" in p:
            w.add_rope_scaling_yarn_beta_fast(float(p["beta_fast"]))
            w.add_rope_scaling_yarn_beta_slow(float(p["beta_slow"]))
        w.add_rope_scaling_yarn_log_mul(0.1 * p["mscale_all_dim"])
    elif p["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"rope type {p['rope_type']}")


def _deepseek(w, cfg, options, v3):
    w.add_leading_dense_block_count(cfg.first_k_dense_replace)
    w.add_kv_lora_rank(cfg.kv_lora_rank)
    if cfg.q_lora_rank is not None:
        w.add_q_lora_rank(cfg.q_lora_rank)
    head = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    if options.get("old_mla"):
        w.add_head_count_kv(cfg.num_attention_heads)
        w.add_key_length(head)
        w.add_value_length(cfg.v_head_dim)
    else:
        w.add_head_count_kv(1)
        w.add_key_length(cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        w.add_value_length(cfg.kv_lora_rank)
        w.add_key_length_mla(head)
        w.add_value_length_mla(cfg.v_head_dim)
    w.add_rope_dimension_count(cfg.qk_rope_head_dim)
    w.add_expert_count(cfg.n_routed_experts)
    w.add_expert_used_count(cfg.num_experts_per_tok)
    w.add_expert_shared_count(cfg.n_shared_experts)
    w.add_expert_feed_forward_length(cfg.moe_intermediate_size)
    w.add_expert_weights_scale(cfg.routed_scaling_factor)
    if cfg.norm_topk_prob:
        w.add_expert_weights_norm(True)
    if cfg.n_group is not None:
        w.add_expert_group_count(cfg.n_group)
        w.add_expert_group_used_count(cfg.topk_group)
    if v3:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    elif not options.get("old_mla"):
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def metadata(w, cfg, arch, options):
    """Write the hyper-parameters of cfg (transformers' configuration)."""
    w.add_block_count(cfg.num_hidden_layers)
    w.add_context_length(cfg.max_position_embeddings)
    w.add_embedding_length(cfg.hidden_size)
    w.add_feed_forward_length(cfg.intermediate_size)
    w.add_head_count(cfg.num_attention_heads)
    w.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    w.add_vocab_size(cfg.vocab_size)
    _rope(w, cfg, arch)
    if arch == "deepseek2":
        return _deepseek(w, cfg, options, cfg.model_type == "deepseek_v3")
    w.add_head_count_kv(cfg.num_key_value_heads)
    head = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    if head * cfg.num_attention_heads != cfg.hidden_size or arch in ("gemma3", "qwen3", "qwen3moe"):
        w.add_key_length(head)
        w.add_value_length(head)
    if arch == "llama":
        w.add_rope_dimension_count(head)
    if arch == "gemma3":
        w.add_sliding_window(cfg.sliding_window)
    if arch == "qwen3moe":
        w.add_expert_count(cfg.num_experts)
        w.add_expert_used_count(cfg.num_experts_per_tok)
        w.add_expert_feed_forward_length(cfg.moe_intermediate_size)
    return None


def write(path, model, entry, store=None):
    """Write `model` as GGUF to path; matrices in `store` (default: the entry's), vectors and gates in F32."""
    store, cfg = store or entry.store, model.config
    w = gguf.GGUFWriter(path, entry.arch)
    w.add_name(f"rsinfer reference {entry.name}")
    w.add_file_type(FILE_TYPES[store])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    metadata(w, cfg, entry.arch, entry.options)
    vocab.write(w, entry.vocab, cfg.vocab_size)
    rope = cfg.rope_parameters
    if rope.get("rope_type") == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(cfg))
    for name, v in tensors(state_of(model), cfg, entry.arch, entry.options).items():
        v = np.ascontiguousarray(v, np.float32)
        if entry.arch == "gemma3" and name.endswith("norm.weight"):
            v = v + np.float32(1.0)
        add(w, name, v, store)
    finish(w)


def add(w, name, v, store):
    """Add one tensor: matrices in `store` (a key of FILE_TYPES), vectors and the router in F32."""
    if v.ndim == 1 or "ffn_gate_inp" in name or store == "f32":
        w.add_tensor(name, v)
    elif store == "f16":
        w.add_tensor(name, v.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType[store.upper()]
        w.add_tensor(name, gguf.quants.quantize(v, kind), raw_dtype=kind)


def finish(w):
    """Write everything out and close."""
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
