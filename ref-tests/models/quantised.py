"""Quantised reference files: the tiny models through llama.cpp's quantiser, Hugging Face's logits on the result.

usage: quantised.py [--out ../fixtures/quantised] [--all DIR] [--only BASE ...] [--types TYPE ...]
For each base of zoo.QUANTISED and each type: llama.cpp quantises, the file's weights are dequantised (gguf package) and
put back into transformers' model, whose float32 logits are the reference. llama.cpp's own distance from it is recorded
in OUT/llama_cpp.json for every type; the files of the types that the entry lists as committed are written to
OUT/BASE-TYPE/, those of the others to DIR/BASE-TYPE/ with --all.
"""
import argparse
import collections
import copy
import json
import os
import shutil
import sys
import tempfile

import gguf
import numpy as np
import torch

import reference
import to_gguf
import zoo

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "llama_cpp"))
import peer  # noqa: E402


def quantise(source, target, kind):
    """`kind` is one of llama-quantize's types, or QAT: Q4_0 throughout with F16 embeddings, as Gemma 3's QAT files."""
    if kind == "QAT":
        return peer.quantise(source, target, "Q4_0", embedding=int(gguf.GGMLQuantizationType.F16), pure=True)
    return peer.quantise(source, target, kind)


def one(entry, model, source, kind, folder):
    """Make folder/{model.gguf, tokens.json, logits.npy, info.json} for one type; returns info."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.gguf")
    quantise(source, path, kind)
    model = copy.deepcopy(model)
    model.load_state_dict(to_gguf.invert(model, entry.arch, entry.options, to_gguf.read(path)))
    tokens, margins = reference.choose_tokens(model, entry.tokens, entry.seed)
    want = reference.logits(model, tokens)
    held = {f"cache_{c}": reference.compare(want, peer.logits(path, tokens, cache=c)) for c in ("f16", "f32")}
    types = collections.Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors)
    info = dict(name=os.path.basename(folder), base=entry.name, arch=entry.arch, type=kind, covers=entry.covers,
                tensors=dict(types), bytes=os.path.getsize(path), config=entry.config, seed=entry.seed,
                tokens=len(tokens), **margins, llama_cpp=held)
    np.save(os.path.join(folder, "logits.npy"), want.astype(np.float32))
    for name, data, indent in (("tokens.json", tokens, None), ("info.json", info, 1)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(data, f, indent=indent)
            f.write("\n")
    return info


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", default=os.path.join(HERE, "..", "fixtures", "quantised"))
    ap.add_argument("--all", help="folder for the files that are not committed; default: they are thrown away")
    ap.add_argument("--only", nargs="*", help="bases; default: all")
    ap.add_argument("--types", nargs="*", help="types; default: all")
    a = ap.parse_args()
    torch.set_num_threads(1)
    os.makedirs(a.out, exist_ok=True)
    record = os.path.join(a.out, "llama_cpp.json")
    figures = {}
    if os.path.exists(record):
        with open(record, encoding="utf-8") as f:
            figures = json.load(f)
    scratch = tempfile.mkdtemp()
    for entry in zoo.QUANTISED:
        if a.only and entry.name not in a.only:
            continue
        model, source = reference.build(entry), os.path.join(scratch, "f32.gguf")
        to_gguf.write(source, model, entry)
        for kind in dict.fromkeys(zoo.ALL_TYPES + entry.committed):
            if a.types and kind not in a.types:
                continue
            name = f"{entry.name}-{kind.lower()}"
            info = one(entry, model, source, kind,
                       os.path.join(a.out if kind in entry.committed else a.all or scratch, name))
            figures[name] = dict(tensors=info["tensors"], **info["llama_cpp"])
            show = " ".join("{}: mean {mean_kl:.1e} max {max_kl:.1e} top1 {top1:.3f}".format(c, **v)
                            for c, v in info["llama_cpp"].items())
            print(f"{name:22s} {info['bytes'] / 1e6:5.2f} MB  {show}  {info['tensors']}  "
                  f"{info['smallest_expert_margin']}", flush=True)
            with open(record, "w", encoding="utf-8") as f:
                json.dump(dict(sorted(figures.items())), f, indent=1)
                f.write("\n")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
