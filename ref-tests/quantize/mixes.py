"""Asks llama.cpp which type it gives to each tensor, for every file type and several kinds of model.

Writes ../fixtures/quantize/mixes.json: per kind the metadata and tensors of the model that llama.cpp was given (its
quantiser reads names, shapes and hyper-parameters only, so the matrices have two rows), and per case a string with one
letter a tensor. Run: python mixes.py (needs gguf, numpy and llama-cpp-python, see ../requirements.txt).
"""

import ctypes
import json
import pathlib
import tempfile

import gguf
import llama_cpp
import numpy as np

HERE = pathlib.Path(__file__).parent
OUT = HERE.parent / "fixtures" / "quantize" / "mixes.json"

TARGETS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
    "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21,
    "BF16": 32,
}  # fmt: skip
LETTERS = {
    "F32": "f", "F16": "h", "BF16": "b", "Q4_0": "o", "Q4_1": "p", "Q5_0": "q", "Q5_1": "r", "Q8_0": "8",
    "Q2_K": "2", "Q3_K": "3", "Q4_K": "4", "Q5_K": "5", "Q6_K": "6",
}  # fmt: skip

ROWS = 2


def dense(n, width=256, ff=256, qk_norm=False, fused=False, bias=False, post=False):
    """Names and dimensions (innermost first) of n layers with a dense feed-forward network."""
    for i in range(n):
        b = f"blk.{i}."
        yield b + "attn_norm.weight", [width]
        if fused:
            yield b + "attn_qkv.weight", [width, ROWS]
        else:
            for m in "qkv":
                yield b + f"attn_{m}.weight", [width, ROWS]
                if bias:
                    yield b + f"attn_{m}.bias", [ROWS]
        if qk_norm:
            yield b + "attn_q_norm.weight", [32]
            yield b + "attn_k_norm.weight", [32]
        yield b + "attn_output.weight", [width, ROWS]
        if post:
            yield b + "post_attention_norm.weight", [width]
            yield b + "post_ffw_norm.weight", [width]
        yield b + "ffn_norm.weight", [width]
        yield b + "ffn_gate.weight", [width, ROWS]
        yield b + "ffn_up.weight", [width, ROWS]
        yield b + "ffn_down.weight", [ff, ROWS]


def experts(b, n_expert, width, ff, shared, sigmoid):
    """The tensors of one mixture of experts."""
    yield b + "ffn_gate_inp.weight", [width, n_expert]
    if sigmoid:
        yield b + "exp_probs_b.bias", [n_expert]
    for m, row in (("gate", width), ("up", width), ("down", ff)):
        yield b + f"ffn_{m}_exps.weight", [row, ROWS, n_expert]
        if shared:
            yield b + f"ffn_{m}_shexp.weight", [row, ROWS]


def moe(n, n_expert, width=256, ff=256):
    """n layers of grouped-query attention and experts."""
    for i in range(n):
        b = f"blk.{i}."
        yield b + "attn_norm.weight", [width]
        for m in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield b + m + ".weight", [width, ROWS]
        yield b + "ffn_norm.weight", [width]
        yield from experts(b, n_expert, width, ff, False, False)


def mla(n, n_dense, n_expert, split, q_lora, ff=256):
    """n layers of multi-head latent attention, the first n_dense with a dense feed-forward network."""
    for i in range(n):
        b = f"blk.{i}."
        yield b + "attn_norm.weight", [256]
        if q_lora:
            yield b + "attn_q_a.weight", [256, ROWS]
            yield b + "attn_q_a_norm.weight", [256]
            yield b + "attn_q_b.weight", [256, ROWS]
        else:
            yield b + "attn_q.weight", [256, ROWS]
        yield b + "attn_kv_a_mqa.weight", [256, ROWS]
        yield b + "attn_kv_a_norm.weight", [256]
        if split:
            yield b + "attn_k_b.weight", [128, ROWS, 4]
            yield b + "attn_v_b.weight", [256, ROWS, 4]
        else:
            yield b + "attn_kv_b.weight", [256, ROWS]
        yield b + "attn_output.weight", [256, ROWS]
        yield b + "ffn_norm.weight", [256]
        if i < n_dense:
            for m in ("gate", "up", "down"):
                yield b + f"ffn_{m}.weight", [256, ROWS]
        else:
            yield from experts(b, n_expert, 256, ff, True, split)


def around(layers, width=256, tied=False, extra=()):
    """Embedding, layers, output."""
    out = [("token_embd.weight", [width, ROWS]), ("output_norm.weight", [width])]
    if not tied:
        out.append(("output.weight", [width, ROWS]))
    # Layers out of order: converters sort names as text, and so do some merges.
    return out + list(extra) + sorted(layers)


def meta(arch, n, heads, kv, **more):
    """Hyper-parameters without which llama.cpp does not know an architecture."""
    base = {
        "block_count": n, "context_length": 512, "embedding_length": 256, "feed_forward_length": 256,
        "attention.head_count": heads, "attention.head_count_kv": kv, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32, "rope.freq_base": 10000.0, "vocab_size": 2,
    } | more  # fmt: skip
    return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in base.items()}


def deepseek(n, n_dense, n_expert, kv, q_lora, gating):
    """Hyper-parameters of deepseek2."""
    more = {
        "leading_dense_block_count": n_dense, "expert_count": n_expert, "expert_used_count": 2,
        "expert_shared_count": 1, "expert_feed_forward_length": 256, "expert_weights_scale": 1.0,
        "expert_gating_func": gating, "attention.kv_lora_rank": 256, "attention.key_length": 192,
        "attention.value_length": 128, "rope.dimension_count": 64,
    }  # fmt: skip
    if q_lora:
        more["attention.q_lora_rank"] = 256
    if kv == 1:
        more |= {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
        more |= {"attention.key_length": 320, "attention.value_length": 256}
    return meta("deepseek2", n, 16, kv, **more)


MOE = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 256}
HEAD_8 = {"embedding_length": 64, "attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
KINDS = {
    "llama-32": (meta("llama", 32, 32, 8), around(dense(32))),
    "llama-32-mha": (meta("llama", 32, 32, 32), around(dense(32), extra=[("rope_freqs.weight", [16])])),
    "llama-16-tied": (meta("llama", 16, 32, 8), around(dense(16), tied=True)),
    "llama-80": (meta("llama", 80, 64, 8), around(dense(80))),
    "llama-80-mha": (meta("llama", 80, 64, 64), around(dense(80))),
    "mixtral": (meta("llama", 32, 32, 8, **MOE), around(moe(32, 8))),
    # Rows that are whole blocks of 32 but not of 256, and rows that are neither.
    "llama-odd": (meta("llama", 12, 5, 5), around(dense(12, 160, 72), 160)),
    "llama-odd-tied": (meta("llama", 12, 5, 5), around(dense(12, 72, 160), 72, tied=True)),
    # The shape of stories260K.gguf.
    "llama-5-tiny": (meta("llama", 5, 8, 4, **HEAD_8), around(dense(5, 64, 172), 64)),
    "qwen2-80": (meta("qwen2", 80, 64, 8), around(dense(80, bias=True))),
    "qwen2-24-tied": (meta("qwen2", 24, 14, 2), around(dense(24, bias=True), tied=True)),
    "qwen3-28": (meta("qwen3", 28, 16, 8), around(dense(28, qk_norm=True), tied=True)),
    "qwen3moe-24": (meta("qwen3moe", 24, 32, 4, **(MOE | {"expert_count": 16})), around(moe(24, 16))),
    "gemma3-26": (
        meta("gemma3", 26, 4, 1, **{"attention.sliding_window": 512}),
        around(dense(26, qk_norm=True, post=True), tied=True),
    ),
    "phi3-32": (meta("phi3", 32, 32, 32), around(dense(32, fused=True))),
    "deepseek2-27-old": (deepseek(27, 1, 16, 16, False, 1), around(mla(27, 1, 16, False, False))),
    "deepseek2-32-new": (deepseek(32, 3, 16, 1, True, 2), around(mla(32, 3, 16, True, True))),
    "deepseek2-8-experts": (deepseek(8, 1, 8, 1, True, 2), around(mla(8, 1, 8, True, True, ff=96))),
}

# Flags beside the file type, and the file types they are tried with.
FLAGS = {
    "pure": ({"pure": True}, ["Q2_K", "Q4_K_M", "Q6_K"]),
    "output": ({"output_tensor_type": "Q5_K"}, ["Q4_K_M", "Q8_0", "F16"]),
    "embedding": ({"token_embedding_type": "Q8_0"}, ["Q4_K_M", "F16"]),
    "leave": ({"quantize_output_tensor": False}, ["Q4_K_M", "F16"]),
    "importance": ({"importance": True}, ["Q4_0", "Q5_0", "Q4_K_M"]),
}


def write_model(path, metadata, tensors):
    """A model of tiny random matrices."""
    w = gguf.GGUFWriter(str(path), metadata["general.architecture"])
    for k, v in metadata.items():
        if k == "general.architecture":
            continue
        (w.add_float32 if isinstance(v, float) else w.add_uint32)(k, v)
    rng = np.random.default_rng(1)
    for name, dims in tensors:
        w.add_tensor(name, rng.standard_normal(dims[::-1], dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def importance_data(tensors):
    """Ones for every matrix, as llama.cpp takes them."""
    rows = [(n, d) for n, d in tensors if len(d) > 1]
    data = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
    keep = []
    for slot, (name, dims) in zip(data, rows):
        ones = (ctypes.c_float * (dims[0] * (dims[2] if len(dims) > 2 else 1)))()
        ones[:] = [1.0] * len(ones)
        keep.append(ones)
        slot.name = name.encode()
        slot.data = ctypes.cast(ones, ctypes.POINTER(ctypes.c_float))
        slot.size = len(ones)
    return data, keep


def types_of(path, names):
    """One letter a tensor, in the order of names."""
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
    return "".join(LETTERS[found[n]] for n in names)


def quantize(source, tensors, target, folder, flags):
    """The letters of llama.cpp's choice, or None where it refuses."""
    p = llama_cpp.llama_model_quantize_default_params()
    p.ftype = TARGETS[target]
    p.nthread = 1
    for k, v in flags.items():
        if k != "importance":
            setattr(p, k, gguf.GGMLQuantizationType[v] if isinstance(v, str) else v)
    # Q2_K_S is refused without importance weights.
    if flags.get("importance") or target == "Q2_K_S":
        data, keep = importance_data(tensors)
        p.imatrix = ctypes.cast(data, type(p.imatrix))
    out = folder / "out.gguf"
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(p)) != 0:
        return None
    return types_of(out, [n for n, _ in tensors])


def main():
    """Writes the fixture."""

    @llama_cpp.llama_log_callback
    def silent(level, text, data):
        if level >= 4:
            print(text.decode(errors="replace"), end="")

    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    result = {"made by": f"llama-cpp-python {llama_cpp.__version__}", "letters": LETTERS, "kinds": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for kind, (metadata, tensors) in KINDS.items():
            source = folder / "in.gguf"
            write_model(source, metadata, tensors)
            cases = {t: quantize(source, tensors, t, folder, {}) for t in TARGETS}
            for flag, (flags, targets) in FLAGS.items():
                # A type asked for does not fit odd rows: llama.cpp aborts, this engine refuses.
                if "odd" in kind and flag in ("output", "embedding"):
                    continue
                for t in targets:
                    cases[f"{t} {flag}"] = quantize(source, tensors, t, folder, flags)
            refused = [c for c, v in cases.items() if v is None]
            print(kind, len(tensors), "tensors", len(cases), "cases", "refused:" if refused else "", *refused)
            result["kinds"][kind] = {
                "metadata": metadata,
                "tensors": [[n, d] for n, d in tensors],
                "cases": {c: v for c, v in cases.items() if v is not None},
            }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, separators=(",", ":"))
    # One line a kind keeps differences readable.
    OUT.write_text(text.replace('},"', '},\n"') + "\n")
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
