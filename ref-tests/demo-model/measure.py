"""What the demo model can do: Shakespeare in nats per character, and questions about facts planted in a story.

The same figures whatever runs the model (the trainer's module, transformers, llama.cpp): a model is here a function
from ids to logits of every position. As a script it measures transformers' DeepseekV3ForCausalLM in float32 on the
trained weights and on those of a GGUF, and writes questions.json and reference.json.

usage: measure.py MODEL_DIR --shakespeare FILE [--gguf FILE ...] [--out DIR] [--llama-cpp] [--files-only]

Rows of reference.json that are not measured stay as they are. With --files-only MODEL_DIR needs no weights, just
config.json and tokenizer.json.
"""
import argparse
import json
import os
import random
import sys

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import corpus

HERE = os.path.dirname(os.path.abspath(__file__))
CHUNK, LONGEST_ANSWER, END = 512, 60, 1


def held_out(text):
    """The last tenth of the text: what the model was never trained on."""
    return text[int(len(text) * 0.9):]


def chunks(tok, text):
    """(ids [n, CHUNK + 1], characters): back-to-back chunks; the id after each chunk starts the next one.

    One BOS stands before the whole text, as the tokenizer puts it; what does not fill a chunk is left out.
    """
    ids = torch.tensor(tok.encode(text).ids)
    n = (len(ids) - 1) // CHUNK
    rows = torch.stack([ids[j * CHUNK:j * CHUNK + CHUNK + 1] for j in range(n)])
    return rows, len(tok.decode(ids[1:n * CHUNK + 1].tolist()))


def questions(count=60):
    """[(prompt up to and including the opened think tag, expected answer)]: always the same ones."""
    r, out = random.Random(10**6), []
    for _ in range(count):
        text = corpus.chat(r, facts=2, fillers=6, turns=1)
        q, a = text.split(corpus.ASSISTANT)
        out.append((q + corpus.ASSISTANT + "<think>\n", a.split("</think>\n\n")[1].split(corpus.EOS)[0]))
    return out


def answer_of(text):
    """The answer in a generated text: what follows the thinking."""
    return text.split("</think>")[-1].replace(corpus.EOS, "").strip()


@torch.no_grad()
def nats_per_char(forward, tok, text):
    """forward: ids [B, T] -> logits [B, T, vocabulary]."""
    rows, chars = chunks(tok, text)
    nats = 0.0
    for part in rows.split(8):
        out = forward(part[:, :-1]).float()
        nats += F.cross_entropy(out.flatten(0, 1), part[:, 1:].flatten().to(out.device), reduction="sum").item()
    return nats / chars


@torch.no_grad()
def answers_right(forward, tok, show=None):
    """Share of the questions answered right, greedily; forward as above (called with a growing row each time)."""
    right, asked = 0, questions()
    for prompt, want in asked:
        ids = tok.encode(prompt).ids
        for _ in range(LONGEST_ANSWER):
            ids.append(forward(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] == END:
                break
        got = answer_of(tok.decode(ids, skip_special_tokens=False))
        right += got == want
        if show:
            show(want, got)
    return right / len(asked)


def measure(forward, tok, text):
    """Both figures under the names of metrics.json."""
    return dict(shakespeare_nats_per_char=nats_per_char(forward, tok, text),
                story_answers_right=answers_right(forward, tok))


def llama_cpp_forward(path, threads):
    """llama.cpp as such a function; generation re-uses what it has decoded of the same row."""
    import numpy as np
    import peer
    p, done = peer.Peer(path, context=CHUNK, batch=CHUNK, threads=threads, repack=False), []

    def forward(ids):
        out = []
        for row in ids.tolist():
            if done and row[:-1] == done:
                out.append(p.decode(row[-1:], len(done), True))
            else:
                out.append(p.logits(row))
            done[:] = row
        return torch.from_numpy(np.stack(out))
    return forward


def transformers_forward(model):
    """transformers' model as such a function; generation re-uses the cache of the same row."""
    state = dict(row=[], cache=None)

    def forward(ids):
        row = ids[0].tolist()
        if len(ids) == 1 and state["cache"] is not None and row[:-1] == state["row"]:
            out = model(ids[:, -1:], past_key_values=state["cache"], use_cache=True)
        else:
            out = model(ids, use_cache=len(ids) == 1)
        state.update(row=row, cache=out.past_key_values if len(ids) == 1 else None)
        return out.logits
    return forward


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model", help="folder with model.safetensors, config.json, tokenizer.json")
    ap.add_argument("--files-only", action="store_true", help="measure the --gguf files, not the trained weights")
    ap.add_argument("--shakespeare", required=True, help="the plain text; its last tenth is measured")
    ap.add_argument("--gguf", nargs="*", default=[], help="also measure the dequantised weights of these files")
    ap.add_argument("--llama-cpp", action="store_true", help="also let llama.cpp run the files")
    ap.add_argument("--out", default=HERE)
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    sys.path[:0] = [os.path.join(HERE, "..", "models"), os.path.join(HERE, "..", "llama_cpp")]
    import to_gguf
    from transformers import AutoConfig, DeepseekV3ForCausalLM
    with open(os.path.join(a.out, "questions.json"), "w", encoding="utf-8") as f:
        json.dump([dict(prompt=q, answer=w) for q, w in questions()], f, indent=1, ensure_ascii=False)
        f.write("\n")
    tok = Tokenizer.from_file(os.path.join(a.model, "tokenizer.json"))
    with open(a.shakespeare, encoding="utf-8") as f:
        text = held_out(f.read())
    how = dict(dtype=torch.float32, attn_implementation="eager")
    if a.files_only:
        model = DeepseekV3ForCausalLM._from_config(AutoConfig.from_pretrained(a.model), **how).eval()
    else:
        model = DeepseekV3ForCausalLM.from_pretrained(a.model, **how).eval()
    reference = os.path.join(a.out, "reference.json")
    found = {}
    if os.path.exists(reference):
        with open(reference, encoding="utf-8") as f:
            found = json.load(f)

    def record(name, forward):
        found[name] = measure(forward, tok, text)
        print(name, found[name], flush=True)
        with open(reference, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1)
            f.write("\n")

    if not a.files_only:
        record("transformers, f32, trained weights", transformers_forward(model))
    for path in a.gguf:
        name = os.path.basename(path)
        model.load_state_dict(to_gguf.invert(model, "deepseek2", {}, to_gguf.read(path)))
        record(f"transformers, f32, weights of {name}", transformers_forward(model))
        if a.llama_cpp:
            record(f"llama.cpp, f16 cache, {name}", llama_cpp_forward(path, a.threads))


if __name__ == "__main__":
    main()
