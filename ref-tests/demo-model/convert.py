"""The demo model's weights (Hugging Face names) to GGUF, with every key that llama.cpp's converter writes.

usage: convert.py MODEL_DIR OUT.gguf [--type q8_0|bf16|f32]
Matrices get the type asked for; norms, the router and its bias stay F32. `<think>` and `</think>` are marked as
user-defined tokens, as in DeepSeek's own files, so that they show up in text.
"""
import argparse
import json
import os
import sys

import gguf
import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "models"))
import to_gguf  # noqa: E402

SHOWN = ("<think>", "</think>")


def load(folder, name):
    """One of the model's JSON files."""
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        return json.load(f)


def tokenizer(w, folder, size):
    """Write the vocabulary of tokenizer.json (byte-level BPE) and what tokenizer_config.json says about it."""
    data, settings = load(folder, "tokenizer.json"), load(folder, "tokenizer_config.json")
    special = {t["content"]: t["id"] for t in data["added_tokens"]}
    by_id = {i: t for t, i in {**data["model"]["vocab"], **special}.items()}
    if sorted(by_id) != list(range(size)):
        raise SystemExit(f"{folder}: the vocabulary does not have exactly the ids 0 to {size - 1}")
    kind = {t: gguf.TokenType.USER_DEFINED if t in SHOWN else gguf.TokenType.CONTROL for t in special}
    tokens = [by_id[i] for i in range(size)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-v3")
    w.add_token_list(tokens)
    w.add_token_types([kind.get(t, gguf.TokenType.NORMAL) for t in tokens])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    w.add_bos_token_id(special[settings["bos_token"]])
    w.add_eos_token_id(special[settings["eos_token"]])
    w.add_pad_token_id(special[settings["pad_token"]])
    w.add_add_bos_token(settings["add_bos_token"])
    w.add_add_eos_token(False)
    w.add_chat_template(settings["chat_template"])


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model", help="folder with model.safetensors, config.json, tokenizer.json, tokenizer_config.json")
    ap.add_argument("out")
    ap.add_argument("--type", default="q8_0", choices=["q8_0", "bf16", "f32"])
    a = ap.parse_args()
    model = DeepseekV3ForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    cfg = model.config
    w = gguf.GGUFWriter(a.out, "deepseek2")
    w.add_type("model")
    w.add_name("rsinfer demo")
    w.add_description("A small DeepSeek-V3 that tells stories and answers questions about them, made for rsinfer")
    w.add_size_label("8x1.3M")
    w.add_file_type(to_gguf.FILE_TYPES[a.type])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    to_gguf.metadata(w, cfg, "deepseek2", {})
    tokenizer(w, a.model, cfg.vocab_size)
    for name, v in to_gguf.tensors(to_gguf.state_of(model), cfg, "deepseek2", {}).items():
        to_gguf.add(w, name, np.ascontiguousarray(v, np.float32), a.type)
    to_gguf.finish(w)


if __name__ == "__main__":
    main()
