"""Forward passes of llama, gemma3 and deepseek2 files in float64 NumPy, token by token, with an explicit list of what every
query sees and where it sees it. Written from the papers; shares no code with the engine, transformers or llama.cpp.

A query at t sees a list of earlier tokens in order. Keys are kept unrotated, and rotated anew for every query at the places
0, 1, 2, ... of that list, the query at its last: the positions "in the cache" of StreamingLLM (arXiv:2309.17453).
"""
import sys

import gguf
import numpy as np


class File:
    """Metadata and dequantised tensors (numpy order, float64) of a GGUF file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.meta = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.")}
        self.arch = self.meta["general.architecture"]
        self.tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
                        .astype(np.float64) for t in reader.tensors}

    def key(self, name, default=None):
        return self.meta.get(f"{self.arch}.{name}", default)

    def __getitem__(self, name):
        return self.tensors[name]

    def get(self, name):
        return self.tensors.get(name)


def visible(t, sinks, window):
    """The tokens that a query at t sees: the first `sinks` and the last `window`; everything if `window` is None."""
    if window is None:
        return np.arange(t + 1)
    first = max(t - window + 1, 0)
    return np.concatenate([np.arange(min(sinks, first)), np.arange(first, t + 1)])


def frequencies(f, dims, base, scaling):
    """Radians per position [dims / 2] (RoPE arXiv:2104.09864; YaRN arXiv:2309.00071, section 3.2)."""
    freq = base ** (-np.arange(0, dims, 2) / dims)
    if scaling == "linear":
        return freq / f.key("rope.scaling.factor")
    if scaling == "yarn":
        context = f.key("rope.scaling.original_context_length")

        def dim_of(rotations):
            return dims * np.log(context / (rotations * 2 * np.pi)) / (2 * np.log(base))

        low = max(np.floor(dim_of(f.key("rope.scaling.yarn_beta_fast", 32.0))), 0)
        high = min(np.ceil(dim_of(f.key("rope.scaling.yarn_beta_slow", 1.0))), dims - 1)
        ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
        return freq / f.key("rope.scaling.factor") * ramp + freq * (1 - ramp)
    return freq


def rotate(x, positions, freq, adjacent):
    """x [..., n, dims] rotated at positions [n]."""
    angle = positions[:, None] * freq
    cos, sin = np.cos(angle), np.sin(angle)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if adjacent else (x[..., :half], x[..., half:])
    y, z = a * cos - b * sin, a * sin + b * cos
    if adjacent:
        return np.stack([y, z], -1).reshape(x.shape)
    return np.concatenate([y, z], -1)


def norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def attend(q, k, v, rotated, freq, adjacent, scale, see):
    """q [heads, n, d], k [heads, n, d], v [heads, n, dv], of whose last axis `rotated` are rotary: out [n, heads * dv]."""
    heads, n, d = q.shape
    plain = d - rotated
    out = np.zeros((n, heads, v.shape[-1]))
    for t in range(n):
        seen = see(t)
        places = np.arange(len(seen))
        key = np.concatenate([k[:, seen, :plain], rotate(k[:, seen, plain:], places, freq, adjacent)], -1)
        query = np.concatenate([q[:, t:t + 1, :plain], rotate(q[:, t:t + 1, plain:], places[-1:], freq, adjacent)], -1)
        p = softmax((query @ key.swapaxes(1, 2)) * scale)
        out[t] = (p @ v[:, seen])[:, 0]
    return out.reshape(n, -1)


def split(x, heads):
    """[n, heads * d] -> [heads, n, d]."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def gqa(f, p, h, freq, adjacent, see):
    heads, kv = f.key("attention.head_count"), f.key("attention.head_count_kv")
    q, k, v = (split(h @ f[p + f"attn_{n}.weight"].T, m) for n, m in (("q", heads), ("k", kv), ("v", kv)))
    if f.get(p + "attn_q_norm.weight") is not None:
        eps = f.key("attention.layer_norm_rms_epsilon")
        q, k = norm(q, f[p + "attn_q_norm.weight"], eps), norm(k, f[p + "attn_k_norm.weight"], eps)
    k, v = np.repeat(k, heads // kv, 0), np.repeat(v, heads // kv, 0)
    d = q.shape[-1]
    return attend(q, k, v, d, freq, adjacent, d ** -0.5, see) @ f[p + "attn_output.weight"].T


def mla(f, p, h, freq, see):
    """Multi-head latent attention with keys and values expanded (arXiv:2405.04434, section 2.1)."""
    heads, rope = f.key("attention.head_count"), f.key("rope.dimension_count")
    rank, eps = f.key("attention.kv_lora_rank"), f.key("attention.layer_norm_rms_epsilon")
    if f.get(p + "attn_q_a.weight") is None:
        q = h @ f[p + "attn_q.weight"].T
    else:
        q = norm(h @ f[p + "attn_q_a.weight"].T, f[p + "attn_q_a_norm.weight"], eps) @ f[p + "attn_q_b.weight"].T
    q = split(q, heads)
    kv = h @ f[p + "attn_kv_a_mqa.weight"].T
    c, k_pe = norm(kv[:, :rank], f[p + "attn_kv_a_norm.weight"], eps), kv[:, rank:]
    k = np.einsum("nr,hrd->hnd", c, f[p + "attn_k_b.weight"])
    v = np.einsum("nr,hvr->hnv", c, f[p + "attn_v_b.weight"])
    k = np.concatenate([k, np.broadcast_to(k_pe, (heads, *k_pe.shape))], -1)
    m = 1 + f.key("rope.scaling.yarn_log_multiplier") * np.log(f.key("rope.scaling.factor"))
    scale = q.shape[-1] ** -0.5 * m * m
    return attend(q, k, v, rope, freq, True, scale, see) @ f[p + "attn_output.weight"].T


def glu(f, h, gate, up, down, act=silu):
    return (act(h @ gate.T) * (h @ up.T)) @ down.T


def moe(f, p, h):
    used, scale = f.key("expert_used_count"), f.key("expert_weights_scale", 1.0)
    logits = h @ f[p + "ffn_gate_inp.weight"].T
    score = softmax(logits) if f.key("expert_gating_func") == 1 else 1 / (1 + np.exp(-logits))
    bias = f.get(p + "exp_probs_b.bias")
    choice = score + (0 if bias is None else bias)
    groups = f.key("expert_group_count", 1)
    if groups > 1:
        grouped = choice.reshape(len(h), groups, -1)
        best = np.sort(grouped, -1)[..., -2:].sum(-1)
        dropped = np.argsort(-best, -1)[:, f.key("expert_group_used_count"):]
        for i, d in enumerate(dropped):
            grouped[i, d] = -np.inf
        choice = grouped.reshape(len(h), -1)
    top = np.argsort(-choice, -1)[:, :used]
    out = glu(f, h, *(f[p + f"ffn_{n}_shexp.weight"] for n in ("gate", "up", "down")))
    for i, experts in enumerate(top):
        w = score[i, experts]
        w = (w / w.sum() if f.key("expert_weights_norm") else w) * scale
        for e, x in zip(experts, w):
            out[i] += x * glu(f, h[i:i + 1], *(f[p + f"ffn_{n}_exps.weight"][e] for n in ("gate", "up", "down")))[0]
    return out


def forward(f, tokens, sinks=0, window=None):
    """Logits [n, vocab]. Local layers (Gemma 3) see the shorter of their own window and `window`, and no sinks."""
    eps = f.key("attention.layer_norm_rms_epsilon")
    x = f["token_embd.weight"][tokens]
    gemma = f.arch == "gemma3"
    if gemma:
        x = x * np.sqrt(x.shape[-1])
    base = f.key("rope.freq_base")
    head = f.key("attention.key_length") or x.shape[-1] // f.key("attention.head_count")
    dims = f.key("rope.dimension_count") or head
    freq = frequencies(f, dims, base, f.key("rope.scaling.type"))
    local_freq = frequencies(f, dims, f.key("rope.freq_base_swa", base), None)
    for i in range(f.key("block_count")):
        p = f"blk.{i}."
        local = gemma and i % 6 != 5
        here = min(window or sys.maxsize, f.key("attention.sliding_window")) if local else window

        def see(t, s=0 if local else sinks, w=here):
            return visible(t, s, w)

        h = norm(x, f[p + "attn_norm.weight"], eps)
        if f.arch == "deepseek2":
            x = x + mla(f, p, h, freq, see)
        else:
            a = gqa(f, p, h, local_freq if local else freq, f.arch == "llama", see)
            x = x + (norm(a, f[p + "post_attention_norm.weight"], eps) if gemma else a)
        h = norm(x, f[p + "ffn_norm.weight"], eps)
        if f.get(p + "ffn_gate_inp.weight") is not None:
            x = x + moe(f, p, h)
        else:
            parts = (f[p + f"ffn_{n}.weight"] for n in ("gate", "up", "down"))
            y = glu(f, h, *parts, act=gelu_tanh if gemma else silu)
            x = x + (norm(y, f[p + "post_ffw_norm.weight"], eps) if gemma else y)
    out = f.get("output.weight")
    return norm(x, f["output_norm.weight"], eps) @ (f["token_embd.weight"] if out is None else out).T
