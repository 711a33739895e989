"""Logits of llama.cpp as .npy, and how far two .npy files of logits lie apart.

usage: compare.py logits MODEL.gguf --tokens-file IDS.json --out OUT.npy [--cache f16|f32|q8_0] [--batch N]
       compare.py diff REFERENCE.npy OTHER.npy
       compare.py fixtures FOLDER --binary rsinfer
`logits` writes what `rsinfer logits` writes: float32 [n_tokens, n_vocab]. `diff` prints KL(reference || other) in nats
per row (mean, median, max, computed in float64) and the share of rows with the same best token, as JSON. `fixtures`
runs the binary on every fixture below FOLDER and prints its distance from the committed logits beside llama.cpp's.
Needs numpy; `logits` needs llama-cpp-python.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np


def kl(p, q):
    """KL(p || q) in nats per row, from logits [n, vocab], in float64."""
    def log_softmax(x):
        x = np.asarray(x, np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(p), log_softmax(q)
    return (np.exp(p) * (p - q)).sum(-1)


def distance(want, got):
    """Mean, median and largest KL(want || got), share of rows with the same best token."""
    if want.shape != got.shape:
        raise SystemExit(f"shapes differ: {want.shape} and {got.shape}")
    d = kl(want, got)
    return dict(mean_kl=float(d.mean()), median_kl=float(np.median(d)), max_kl=float(d.max()),
                worst_row=int(d.argmax()), top1=float((want.argmax(-1) == got.argmax(-1)).mean()))


def fixtures(folder, binary):
    """One line a fixture: the binary's figures, llama.cpp's where they are recorded."""
    for name in sorted(os.listdir(folder)):
        here = os.path.join(folder, name)
        if not os.path.exists(os.path.join(here, "logits.npy")):
            continue
        with open(os.path.join(here, "info.json"), encoding="utf-8") as f:
            info = json.load(f)
        with tempfile.TemporaryDirectory() as scratch:
            out = os.path.join(scratch, "out.npy")
            done = subprocess.run([binary, "logits", os.path.join(here, "model.gguf"), "--tokens-file",
                                   os.path.join(here, "tokens.json"), "--out", out], capture_output=True, text=True)
            if done.returncode:
                print(f"{name:24s} failed: {done.stderr.strip()}")
                continue
            d = distance(np.load(os.path.join(here, "logits.npy")), np.load(out))
        peer = info.get("llama_cpp", {}).get("cache_f16") or info.get("llama_cpp_f32_file")
        said = "-" if peer is None else "mean {mean_kl:.1e} max {max_kl:.1e}".format(**peer)
        print("{:24s} mean {mean_kl:.1e} max {max_kl:.1e} top1 {top1:.3f}   llama.cpp {said}".format(name, said=said, **d))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = ap.add_subparsers(dest="command", required=True)
    p = sub.add_parser("logits", help="llama.cpp's logits")
    p.add_argument("model")
    p.add_argument("--tokens-file", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--cache", default="f16", choices=["f16", "f32", "bf16", "q8_0"])
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    p = sub.add_parser("diff", help="compare two files of logits")
    p.add_argument("reference")
    p.add_argument("other")
    p = sub.add_parser("fixtures", help="run a binary over all fixtures")
    p.add_argument("folder")
    p.add_argument("--binary", required=True)
    a = ap.parse_args()
    if a.command == "logits":
        import peer
        with open(a.tokens_file, encoding="utf-8") as f:
            ids = json.load(f)
        try:
            np.save(a.out, peer.logits(a.model, ids, cache=a.cache, batch=a.batch, threads=a.threads))
        except peer.Refused as e:
            sys.exit(str(e))
    elif a.command == "diff":
        print(json.dumps(distance(np.load(a.reference), np.load(a.other))))
    else:
        fixtures(a.folder, a.binary)


if __name__ == "__main__":
    main()
