"""What the papers' formulas keep of the recorded layers: NumPy in float64, from keys, values and queries alone.

usage: policies.py [--fixtures ../fixtures/kv-policies]
Writes MODEL/kept.json: for each `--kv` string the kept entries per head. Must not know the engine. Where a formula leaves a
choice, the head of the policy's file (engine/src/kv/policies) says what is taken. Stops where rounding could decide.
"""
import argparse
import json
import os

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


class Layer:
    """A recorded layer: `keys` [kv_heads, n, d] as attention sees them, `queries` [heads, n, d], `values`."""

    def __init__(self, folder):
        with open(os.path.join(folder, "layer.json")) as f:
            g = json.load(f)
        self.g, self.n, self.scale = g, g["entries"], g["scale"]
        self.heads, self.kv_heads = g["heads"], g["kv_heads"]
        self.group = self.heads // self.kv_heads

        def load(name, heads):
            x = np.load(os.path.join(folder, name + ".npy")).astype(np.float64)
            return x.reshape(heads, self.n, -1)

        self.stored = load("keys", self.kv_heads)
        mla = g["kind"] == "mla"
        self.keys = np.concatenate([self.stored, load("k_pe", 1)], -1) if mla else self.stored
        self.values = self.stored if mla else load("values", self.kv_heads)
        self.queries = load("queries", self.heads)

    def attention(self):
        """Causal softmax, [heads, queries, entries]."""
        k = np.repeat(self.keys, self.group, 0)
        s = np.einsum("hqd,hkd->hqk", self.queries, k) * self.scale
        s = np.where(np.tril(np.ones((self.n, self.n), bool)), s, -np.inf)
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def by_kv_head(self, x):
        """Mean over the query heads that share a kv head."""
        return x.reshape(self.kv_heads, self.group, *x.shape[1:]).mean(1)


def knorm(layer):
    """arXiv:2406.11430: low L2 norm of the key stays."""
    return -np.linalg.norm(layer.stored, axis=-1)


def keydiff(layer):
    """arXiv:2504.15364: negative cosine to the mean of normalised keys."""
    unit = layer.stored / np.linalg.norm(layer.stored, axis=-1, keepdims=True)
    anchor = unit.mean(1, keepdims=True)
    return -(unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)


def tova(layer):
    """arXiv:2401.06104: attention of the last query, mean over all heads; one choice for the layer."""
    return layer.attention()[:, -1].mean(0)[None]


def h2o(layer):
    """arXiv:2306.14048: attention accumulated over all queries."""
    return layer.by_kv_head(layer.attention().sum(1))


def snapkv(layer, window, kernel, pool):
    """arXiv:2404.14469: votes of the window's queries for what lies before it, pooled along the sequence."""
    votes = layer.by_kv_head(layer.attention()[:, -window:, :-window].sum(1))
    half = kernel // 2
    padded = np.pad(votes, ((0, 0), (half, half)), constant_values=-np.inf if pool == "max" else 0)
    near = np.stack([padded[:, i:i + votes.shape[1]] for i in range(kernel)])
    pooled = near.max(0) if pool == "max" else near.mean(0)
    return np.pad(pooled, ((0, 0), (0, window)), constant_values=np.inf)


def rotation(rotary, width, position):
    """The matrix that turns a vector of `width` dimensions to `position`."""
    m = np.eye(width)
    half = len(rotary["freqs"])
    for i, f in enumerate(rotary["freqs"]):
        a, b = (2 * i, 2 * i + 1) if rotary["adjacent"] else (i, i + half)
        a, b = a + rotary["start"], b + rotary["start"]
        c, s = np.cos(position * f), np.sin(position * f)
        m[a, a], m[a, b], m[b, a], m[b, b] = c, -s, s, c
    return m


def expected(layer, queries, future, sinks=4, covariance=True, values=True, epsilon=0.0):
    """arXiv:2510.00636: a normal distribution of unrotated queries under the mean future rotation."""
    width, n = layer.keys.shape[-1], layer.n
    rotary = layer.g["rotary"]
    mean_rotation = np.mean([rotation(rotary, width, n + t) for t in range(future)], 0)
    first = max(n - queries, sinks)
    back = np.stack([rotation(rotary, width, p).T for p in range(first, n)])
    plain = np.einsum("nij,hnj->hni", back, layer.queries[:, first:])
    scores = np.zeros((layer.heads, n - sinks))
    for h in range(layer.heads):
        k = layer.keys[h // layer.group, sinks:]
        mean = mean_rotation @ plain[h].mean(0)
        z = k @ mean * layer.scale
        if covariance:
            c = mean_rotation @ np.cov(plain[h].T, bias=True) @ mean_rotation.T
            z += 0.5 * layer.scale**2 * np.einsum("ni,ij,nj->n", k, c, k)
        e = np.exp(z - z.max())
        scores[h] = e / e.sum()
    out = layer.by_kv_head(scores)
    if values:
        out = (out + epsilon) * np.linalg.norm(layer.values[:, sinks:], axis=-1)
    return np.pad(out, ((0, 0), (sinks, 0)), constant_values=np.inf)


CASES = {
    "knorm:budget=24": knorm,
    "knorm:budget=61": knorm,
    "keydiff:budget=24": keydiff,
    "keydiff:budget=61": keydiff,
    "tova:budget=24": tova,
    "tova:budget=61": tova,
    "h2o:budget=24": h2o,
    "h2o:budget=24,recent=5": h2o,
    "h2o:budget=60,recent=0": h2o,
    "snapkv:budget=32,window=16,kernel=5": lambda x: snapkv(x, 16, 5, "avg"),
    "snapkv:budget=48,window=16,kernel=7,pool=max": lambda x: snapkv(x, 16, 7, "max"),
    "snapkv:budget=20,window=1,kernel=1": lambda x: snapkv(x, 1, 1, "avg"),
    "expected:budget=24,queries=96,future=64": lambda x: expected(x, 96, 64),
    "expected:budget=24,queries=96,future=64,covariance=no": lambda x: expected(x, 96, 64, covariance=False),
    "expected:budget=24,queries=96,future=64,values=no": lambda x: expected(x, 96, 64, values=False),
    "expected:budget=50,queries=64,future=512,epsilon=0.02": lambda x: expected(x, 64, 512, epsilon=0.02),
    "expected:budget=12,queries=9,future=1,sinks=0": lambda x: expected(x, 9, 1, sinks=0),
}


def keep(scores, budget, recent):
    """The latest `recent` and the best others, `budget` in all; of equals the later (pooling makes equals)."""
    n = len(scores)
    order = sorted(range(n - recent), key=lambda i: (-scores[i], -i))
    wanted = budget - recent
    kept, lost = scores[order[wanted - 1]], scores[order[wanted]]
    assert kept == lost or not np.isfinite(kept) or kept - lost > 1e-5 * abs(kept), (kept, lost)
    return sorted(order[:wanted] + list(range(n - recent, n)))


def main():
    """Writes what is kept of every recorded layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", default=os.path.join(HERE, "..", "fixtures", "kv-policies"))
    root = parser.parse_args().fixtures
    for name in sorted(os.listdir(root)):
        layer, out = Layer(os.path.join(root, name)), {}
        for spec, score in CASES.items():
            parameters = dict(p.split("=") for p in spec.split(":")[1].split(","))
            budget = int(parameters["budget"])
            recent = int(parameters.get("recent", budget // 2)) if score is h2o else 0
            try:
                out[spec] = [keep(s, budget, recent) for s in score(layer)]
            except AssertionError as e:
                raise SystemExit(f"{name}, {spec}: rounding could decide {e}") from None
        with open(os.path.join(root, name, "kept.json"), "w") as f:
            json.dump(out, f)
        path = os.path.join(root, name, "kvpress.json")
        if os.path.exists(path):
            with open(path) as f:
                for spec, kept in json.load(f).items():
                    ours = out[spec] * (len(kept) // len(out[spec]))
                    others = sorted({i for a, b in zip(kept, ours) for i in set(a) - set(b)})
                    print(f"{name}: {spec}: kvpress keeps {f'others: {others}' if others else 'the same'}")
        print(f"{name}: {len(out)} selections")


if __name__ == "__main__":
    main()
