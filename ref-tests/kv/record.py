"""Record what eviction policies look at: one layer of two of the tiny models, by transformers, in float32.

usage: record.py [--out ../fixtures/kv-policies] [--kvpress]
Writes OUT/MODEL/{keys,k_pe,values,queries,mass_total,mass_recent_W}.npy (float32, two dimensions: heads and entries are
rows) and layer.json. Keys and queries are rotated; of MLA the latent, the shared rotary key and absorbed queries are kept.
Attention mass is the sum of transformers' own probabilities. With --kvpress (NVIDIA's package, which knows no MLA) its scores
decide `kvpress.json`: what its presses keep. Afterwards run policies.py, which works out what the papers' formulas keep.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "fixtures")
sys.path.insert(0, os.path.join(HERE, "..", "models"))

import reference  # noqa: E402
import zoo  # noqa: E402

LAYER, TOKENS = 1, 96
WINDOWS = (1, 16)


def watch_attention(model):
    """Makes the model's eager attention tell what it gets and gives; returns the list that fills."""
    module = sys.modules[type(model).__module__]
    plain, seen = module.eager_attention_forward, []

    def eager_attention_forward(layer, q, k, v, mask, scaling, **more):
        out, probabilities = plain(layer, q, k, v, mask, scaling=scaling, **more)
        seen.append((layer, q[0], k[0], v[0], probabilities[0], scaling))
        return out, probabilities

    module.eager_attention_forward = eager_attention_forward
    return seen


def rotate(x, positions, freqs, adjacent):
    """x [..., n, dims] turned by the angles positions * freqs."""
    angle = positions[:, None] * freqs[None]
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = (x[..., 0::2], x[..., 1::2]) if adjacent else np.split(x, 2, -1)
    a, b = a * cos - b * sin, a * sin + b * cos
    return np.stack([a, b], -1).reshape(x.shape) if adjacent else np.concatenate([a, b], -1)


def save(folder, **tensors):
    """Each tensor as a float32 .npy of two dimensions."""
    for name, t in tensors.items():
        np.save(os.path.join(folder, name + ".npy"), np.asarray(t, np.float32).reshape(-1, t.shape[-1]))


@torch.no_grad()
def record(name, out, use_kvpress):
    """One model's layer."""
    entry = next(e for e in zoo.MODELS if e.name == name)
    model = reference.build(entry)
    with open(os.path.join(FIXTURES, name, "tokens.json")) as f:
        tokens = json.load(f)[:TOKENS]
    seen, inputs = watch_attention(model), []
    attention = model.model.layers[LAYER].self_attn
    attention.register_forward_pre_hook(lambda m, a, k: inputs.append(k["hidden_states"]), with_kwargs=True)
    norms, projected = [], []
    mla = hasattr(attention, "kv_a_layernorm")
    if mla:
        attention.kv_a_layernorm.register_forward_hook(lambda m, i, o: norms.append(o[0]))
    attention.q_proj.register_forward_hook(lambda m, i, o: projected.append(o[0]))
    logits = reference.logits(model, tokens)
    # The same model as the fixture's, and hooks that change nothing.
    assert np.abs(logits - np.load(os.path.join(FIXTURES, name, "logits.npy"))[:TOKENS]).max() < 1e-4
    layer, q, k, v, probabilities, scale = seen[LAYER]
    assert layer is attention
    heads, n, width = q.shape
    positions = np.arange(n)
    freqs = model.model.rotary_emb.inv_freq.double().numpy()
    group = heads if mla else heads // k.shape[0]
    mass = probabilities.double().reshape(-1, group, n, n).sum(1)
    folder = os.path.join(out, name)
    os.makedirs(folder, exist_ok=True)
    before = projected[0].double().view(n, heads, width).transpose(0, 1).numpy()
    if mla:
        rope = 2 * len(freqs)
        latent, k_pe = norms[0], k[0, :, width - rope:]
        up = attention.kv_b_proj.weight.view(heads, -1, latent.shape[1])[:, :width - rope]
        absorbed = torch.cat([torch.einsum("hnd,hdc->hnc", q[..., :width - rope], up), q[..., width - rope:]], -1)
        keys = torch.cat([latent, k_pe], -1)
        again = torch.einsum("hnc,mc->hnm", absorbed, keys) * scale
        assert torch.allclose(masked_softmax(again), probabilities, atol=1e-5)
        turned, start = before[..., width - rope:], latent.shape[1]
        adjacent = np.allclose(rotate(turned, positions, freqs, True), q[..., width - rope:], atol=1e-4)
        assert adjacent
        save(folder, keys=latent, k_pe=k_pe, queries=absorbed)
        geometry = dict(kind="mla", heads=heads, kv_heads=1, key=latent.shape[1], k_pe=rope, value=0)
    else:
        assert np.allclose(rotate(before, positions, freqs, False), q, atol=1e-4)
        adjacent, start = False, 0
        save(folder, keys=k, values=v, queries=q)
        geometry = dict(kind="gqa", heads=heads, kv_heads=k.shape[0], key=width, k_pe=0, value=v.shape[-1])
    save(folder, mass_total=mass.sum(1), **{f"mass_recent_{w}": mass[:, -w:].sum(1) for w in WINDOWS})
    rotary = dict(start=start, adjacent=bool(adjacent), freqs=freqs.tolist())
    info = dict(geometry, model=name, layer=LAYER, n_layers=len(model.model.layers), entries=n, scale=float(scale),
                rotary=rotary)
    with open(os.path.join(folder, "layer.json"), "w") as f:
        json.dump(info, f, indent=1)
    if use_kvpress and not mla:
        kvpress_keeps(folder, model, attention, inputs[0], k, v, probabilities)


def masked_softmax(scores):
    """Causal probabilities of scores [heads, n, n]."""
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


def kvpress_keeps(folder, model, attention, hidden, k, v, probabilities):
    """What NVIDIA's presses keep of the layer, by the `--kv` string that says the same here."""
    import kvpress

    attention.rotary_emb = model.model.rotary_emb
    expected = dict(n_future_positions=64, n_sink=4)
    presses = {
        "knorm:budget=24": kvpress.KnormPress(),
        "keydiff:budget=24": kvpress.KeyDiffPress(),
        "tova:budget=24": kvpress.TOVAPress(),
        "snapkv:budget=32,window=16,kernel=5": kvpress.SnapKVPress(window_size=16, kernel_size=5),
        "expected:budget=24,queries=96,future=64": kvpress.ExpectedAttentionPress(**expected),
        "expected:budget=24,queries=96,future=64,covariance=no": kvpress.ExpectedAttentionPress(
            use_covariance=False, **expected),
        "expected:budget=24,queries=96,future=64,values=no": kvpress.ExpectedAttentionPress(use_vnorm=False, **expected),
    }
    kept = {}
    for spec, press in presses.items():
        scores = press.score(attention, hidden, k[None], v[None], probabilities[None], {})[0]
        budget = int(spec.split("budget=")[1].split(",")[0])
        kept[spec] = scores.topk(budget, -1).indices.sort(-1).values.tolist()
    with open(os.path.join(folder, "kvpress.json"), "w") as f:
        json.dump(kept, f)


def main():
    """Records both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(FIXTURES, "kv-policies"))
    parser.add_argument("--kvpress", action="store_true")
    args = parser.parse_args()
    for name in ("llama3", "deepseek2-v2-lite"):
        record(name, args.out, args.kvpress)


if __name__ == "__main__":
    main()
