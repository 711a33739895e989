"""Make the references of bounded caches: logits of some of the tiny models with sinks and windows.

usage: make.py [--out ../fixtures/kv]
Writes OUT/NAME.json (model, sinks, window, tokens, rows) and OUT/NAME.npy (float32, the logits of those rows). Before that,
the same code without a window is held against the logits of transformers in ../fixtures/MODEL/logits.npy.
"""
import argparse
import json
import os

import numpy as np

import reference

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "fixtures")
# Model, sinks, window, tokens (five windows and sinks at least), seed of the tokens.
CASES = [
    ("llama", 0, 20, 160, 1),
    ("llama", 4, 24, 200, 2),
    ("gemma3", 4, 24, 200, 3),
    ("gemma3", 3, 10, 120, 4),
    ("deepseek2-v2-lite", 4, 24, 200, 5),
    ("deepseek2-v3", 0, 24, 160, 6),
    ("deepseek2-v3", 5, 27, 200, 7),
]


def kl(p, q):
    """Largest KL(p || q) over rows, nats."""
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(p), log_softmax(q)
    return (np.exp(p) * (p - q)).sum(-1).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(FIXTURES, "kv"))
    out = parser.parse_args().out
    os.makedirs(out, exist_ok=True)
    files = {}
    for model, sinks, window, n, seed in CASES:
        if model not in files:
            files[model] = f = reference.File(os.path.join(FIXTURES, model, "model.gguf"))
            with open(os.path.join(FIXTURES, model, "tokens.json")) as j:
                tokens = json.load(j)
            far = kl(np.load(os.path.join(FIXTURES, model, "logits.npy")), reference.forward(f, tokens))
            print(f"{model}: without a window max KL {far:.1e} from transformers")
            assert far < 1e-9
        f = files[model]
        vocab = f["token_embd.weight"].shape[0]
        tokens = np.random.default_rng(seed).integers(3, vocab, n)
        logits = reference.forward(f, tokens, sinks, window)
        moved = kl(reference.forward(f, tokens), logits)
        rows = list(range(4, n, 7)) + [n - 1]
        name = f"{model}-s{sinks}-w{window}"
        np.save(os.path.join(out, name + ".npy"), logits[rows].astype(np.float32))
        with open(os.path.join(out, name + ".json"), "w") as j:
            json.dump({"model": model, "sinks": sinks, "window": window, "tokens": tokens.tolist(), "rows": rows}, j)
            j.write("\n")
        print(f"{name}: {n} tokens, max KL {moved:.1e} from the full cache")


if __name__ == "__main__":
    main()
