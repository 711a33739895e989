"""What each mistake costs on the fixtures: shows that the tests would notice it.

usage: sensitivity.py [--out ../fixtures/sensitivity.json]
Runs transformers on a fixture's weights and tokens with one hyper-parameter or rule changed, as an engine that had it
wrong would, and records the KL from the committed logits. A mistake below the tests' bar (1e-6) is an error here.
"""
import argparse
import json
import os

import numpy as np
import torch
import transformers

import reference
import zoo

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "fixtures")


def rope(part=None, **changes):
    """A change to rope_parameters, or to one layer type's."""
    def change(config):
        target = config["rope_parameters"] if part is None else config["rope_parameters"][part]
        target.update(changes)
    return change


def config(**changes):
    """A change to the configuration."""
    return lambda c: c.update(changes)


def weights(match, value):
    """All weights whose name contains `match` set to a value."""
    def change(model):
        for name, p in model.state_dict().items():
            if match in name:
                p.fill_(value)
    return change


MISTAKES = [
    ("llama", "rope base 20000", rope(rope_theta=20000.0), None),
    ("llama", "eps 1e-6 for 1e-5", config(rms_norm_eps=1e-6), None),
    ("llama3", "no rope_freqs", rope(rope_type="default"), None),
    ("qwen2", "no biases", None, weights("bias", 0.0)),
    ("qwen3", "no norms of Q and K", None, weights("k_norm", 1.0)),
    ("qwen3moe", "weights not normalised", config(norm_topk_prob=False), None),
    ("qwen3moe", "2 experts for 3", config(num_experts_per_tok=2), None),
    ("gemma3", "window one longer", config(sliding_window=17), None),
    ("gemma3", "window one shorter", config(sliding_window=15), None),
    ("gemma3", "pattern of 5", config(layer_types=["sliding_attention"] * 4 + ["full_attention"]
                                      + ["sliding_attention"] * 3), None),
    ("gemma3", "no linear factor", rope("full_attention", rope_type="default"), None),
    ("gemma3", "linear factor on local layers too", rope("sliding_attention", rope_type="linear", factor=8.0), None),
    ("gemma3", "one rope base", rope("sliding_attention", rope_theta=1e6), None),
    ("gemma3", "GELU by erf", config(hidden_activation="gelu"), None),
    ("deepseek2-v2-lite", "no YaRN", rope(rope_type="default"), None),
    ("deepseek2-v2-lite", "mscale_all_dim 1", rope(mscale=1.0, mscale_all_dim=1.0), None),
    ("deepseek2-v2-lite", "factor on cos and sin", rope(mscale=1.0), None),
    ("deepseek2-v2", "scale 1", config(routed_scaling_factor=1.0), None),
    ("deepseek2-v2", "no groups", config(topk_method="greedy"), None),
    ("deepseek2-v3", "no groups", config(n_group=1, topk_group=1), None),
    ("deepseek2-v3", "3 groups for 2", config(topk_group=3), None),
    ("deepseek2-v3", "weights not normalised", config(norm_topk_prob=False), None),
    ("deepseek2-v3", "scale 1", config(routed_scaling_factor=1.0), None),
    ("deepseek2-v3", "no correction bias", None, weights("e_score", 0.0)),
    ("deepseek2-v3", "rope as halves", config(rope_interleave=False), None),
    ("deepseek2-v3", "YaRN without softmax factor", rope(mscale=0.0, mscale_all_dim=0.0, attention_factor=1.0), None),
    ("deepseek2-kimi-k2", "beta_fast 32 for 1", rope(beta_fast=32), None),
]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", default=os.path.join(FIXTURES, "sensitivity.json"))
    a = ap.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    entries, found, weak = {e.name: e for e in zoo.MODELS}, {}, []
    for name, mistake, in_config, in_weights in MISTAKES:
        entry = entries[name]
        folder = os.path.join(FIXTURES, name)
        want = np.load(os.path.join(folder, "logits.npy"))
        with open(os.path.join(folder, "tokens.json"), encoding="utf-8") as f:
            tokens = json.load(f)
        model = reference.build(entry)
        if in_config:
            changed = json.loads(json.dumps(entry.config))
            in_config(changed)
            cls = type(model)
            other = cls._from_config(cls.config_class(**changed), attn_implementation="eager",
                                     experts_implementation="eager", dtype=torch.float32).eval()
            other.load_state_dict(model.state_dict())
            model = other
        else:
            in_weights(model)
        d = reference.compare(want, reference.logits(model, tokens))
        found.setdefault(name, {})[mistake] = dict(mean_kl=d["mean_kl"], max_kl=d["max_kl"], top1=d["top1"])
        print(f"{name:20s} {mistake:36s} mean {d['mean_kl']:.1e} max {d['max_kl']:.1e} top1 {d['top1']:.3f}", flush=True)
        if d["max_kl"] < 1e-6:
            weak.append(f"{name}: {mistake}")
    with open(a.out, "w", encoding="utf-8") as f:
        json.dump(found, f, indent=1)
        f.write("\n")
    if weak:
        raise SystemExit("too small to be noticed: " + "; ".join(weak))


if __name__ == "__main__":
    main()
