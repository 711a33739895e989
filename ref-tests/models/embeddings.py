"""Make the embeddings of the reference models' tokens: transformers' last hidden states, pooled, of length 1.

usage: embeddings.py [--out ../fixtures] [--only NAME ...]
Writes OUT/NAME/embeddings.json: {"mean": [...], "last": [...]} over the tokens in OUT/NAME/tokens.json.
"""
import argparse
import json
import os

import torch

import reference
import zoo


@torch.no_grad()
def embeddings(model, tokens):
    states = model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0].double()
    unit = lambda v: (v / v.norm()).tolist()  # noqa: E731
    return dict(mean=unit(states.mean(0)), last=unit(states[-1]))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default=os.path.join(here, "..", "fixtures"))
    ap.add_argument("--only", nargs="*")
    args = ap.parse_args()
    for entry in zoo.MODELS:
        folder = os.path.join(args.out, entry.name)
        if args.only and entry.name not in args.only or not os.path.isdir(folder):
            continue
        with open(os.path.join(folder, "tokens.json")) as f:
            tokens = json.load(f)
        got = {k: [round(x, 9) for x in v] for k, v in embeddings(reference.build(entry), tokens).items()}
        with open(os.path.join(folder, "embeddings.json"), "w") as f:
            json.dump(got, f)
            f.write("\n")
        print(entry.name, len(got["mean"]))


if __name__ == "__main__":
    main()
