"""Make the reference models: tiny random models of every architecture, their GGUF files, tokens and logits.

usage: make.py [--out ../fixtures] [--only NAME ...]
Writes OUT/NAME/{model.gguf, tokens.json, logits.npy, info.json}; see ../README.md for the layout.
"""
import argparse
import dataclasses
import json
import os
import sys

import numpy as np
import torch

import reference
import to_gguf
import zoo

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "llama_cpp"))
import peer  # noqa: E402


def hold_against_llama_cpp(entry, model, tokens, folder):
    """llama.cpp's distance from the reference on an F32 file (F32 cache, no flash attention).

    Two comparisons: of this model, None where llama.cpp does not load it, and of the configuration that entry.check
    turns it into (the same where it changes nothing), which shows the conversion to be right.
    """
    def distance(e, m, **more):
        path = os.path.join(folder, "check.gguf")
        to_gguf.write(path, m, e, store="f32")
        try:
            return reference.compare(reference.logits(m, tokens), peer.logits(path, tokens, cache="f32", **more))
        except peer.Refused:
            return None
        finally:
            os.remove(path)

    plain = distance(entry, model)
    if not entry.llama_cpp:
        return plain, plain
    other = dataclasses.replace(entry, config=dict(entry.config, **entry.check))
    return plain, distance(other, reference.build(other), yarn_beta=entry.check_yarn_beta)


def make(entry, out):
    folder = os.path.join(out, entry.name)
    os.makedirs(folder, exist_ok=True)
    model = reference.build(entry)
    tokens, margins = reference.choose_tokens(model, entry.tokens, entry.seed)
    want, exact = reference.logits(model, tokens), reference.logits_f64(model, tokens)
    path = os.path.join(folder, "model.gguf")
    to_gguf.write(path, model, entry)
    noise = reference.compare(exact, want)
    plain, checked = hold_against_llama_cpp(entry, model, tokens, folder)
    info = dict(name=entry.name, arch=entry.arch, transformers_class=entry.model, matrices=entry.store,
                covers=entry.covers, config=entry.config, seed=entry.seed, tokens=len(tokens),
                parameters=sum(p.numel() for p in model.parameters()),
                **margins, f32_against_f64=noise, llama_cpp_f32_file=plain,
                llama_cpp_remark=entry.llama_cpp or None, llama_cpp_check=entry.check or None,
                llama_cpp_check_result=checked)
    np.save(os.path.join(folder, "logits.npy"), want.astype(np.float32))
    with open(os.path.join(folder, "tokens.json"), "w", encoding="utf-8") as f:
        json.dump(tokens, f)
        f.write("\n")
    with open(os.path.join(folder, "info.json"), "w", encoding="utf-8") as f:
        json.dump(info, f, indent=1)
        f.write("\n")
    said = "does not load it" if plain is None else f"max {plain['max_kl']:.1e} top1 {plain['top1']}"
    print(f"{entry.name:22s} {os.path.getsize(path)/1e6:5.2f} MB  f32 noise max {noise['max_kl']:.1e}  "
          f"llama.cpp {said}, check max {checked['max_kl']:.1e} top1 {checked['top1']}  {margins}", flush=True)
    if checked["max_kl"] > 1e-5 or checked["top1"] < 1:
        raise SystemExit(f"{entry.name}: llama.cpp and transformers disagree: the conversion is wrong")


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", default=os.path.join(here, "..", "fixtures"))
    ap.add_argument("--only", nargs="*", help="names of models; default: all")
    a = ap.parse_args()
    torch.set_num_threads(1)
    for entry in zoo.MODELS:
        if not a.only or entry.name in a.only:
            make(entry, a.out)


if __name__ == "__main__":
    main()
