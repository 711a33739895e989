"""Train the demo model: a small DeepSeek-V3 (MLA, mixture of experts) that a laptop can train in an hour.

usage: train.py OUT_DIR [--tokens 10] [--shakespeare FILE] [--device cpu|cuda] [--resume]
Writes OUT_DIR/{config.json, model.safetensors, tokenizer.json, tokenizer_config.json, metrics.json} under the names
that Hugging Face's DeepseekV3ForCausalLM uses on its hub, so that any converter of that family reads it.
"""
import argparse
import json
import math
import os
import random
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import corpus
from measure import held_out, measure
from model import CFG, Model

BOS, PAD = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL = [BOS, corpus.EOS, PAD, corpus.USER, corpus.ASSISTANT, "<think>", "</think>"]  # ids in this order
END, ASSISTANT = SPECIAL.index(corpus.EOS), SPECIAL.index(corpus.ASSISTANT)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + c + '<｜end▁of▁sentence｜>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}")
# DeepSeek-V3's pre-tokenizer: digits by three, Chinese and Japanese, then words, punctuation and spaces.
SPLITS = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
          r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
          r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
STAND_IN = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200


def tokenizer(texts, path):
    """Byte-level BPE with the pre-tokenizer of DeepSeek-V3; taken from path if it is there, else trained and saved."""
    if os.path.exists(path):
        return Tokenizer.from_file(path)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(s), "isolated") for s in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CFG["vocab_size"], special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    t.save(path)
    return t


def batches(tok, seed, shakespeare, size, length):
    """Endless [size, length + 1] tensors of ids cut from the stream of documents."""
    docs, ids = corpus.documents(seed, shakespeare), []
    need = size * (length + 1)
    while True:
        while len(ids) < need:
            for e in tok.encode_batch([next(docs) for _ in range(64)]):
                ids += e.ids
        x, ids = torch.tensor(ids[:need]).view(size, length + 1), ids[need:]
        yield x


def answers(x):
    """1 for the tokens of answers, their end included: stories are random by nature, what is asked of them is not."""
    at = torch.arange(x.shape[1], device=x.device)
    opened = torch.where(x == ASSISTANT, at, -1).cummax(1).values
    closed = torch.where(x == END, at, -1).cummax(1).values
    return ((opened >= 0) & (opened < at) & ((closed < opened) | (closed == at))).float()


def step(net, opt, loss):
    """One update with clipped gradients."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()


def set_rate(opt, rate):
    for g in opt.param_groups:
        g["lr"] = rate


def learn_to_copy(net, tok, device, amp, rate, minutes=20.0, size=48, length=128):
    """First stage: lists of random words said over and over, until 97% of the repeats are foreseen.

    Looking back and copying (induction) appears suddenly, after some 1.5 M tokens of this; from stories alone it had
    not after 10 M. Everything that asks for a planted fact needs it.
    """
    words = (corpus.NAMES + corpus.COLOURS + corpus.THINGS + corpus.ANIMALS + corpus.PLACES + corpus.FOOD)
    words = sorted({i for w in words for i in tok.encode(" " + w, add_special_tokens=False).ids})
    opt = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    r, start, done, foreseen = random.Random(5), time.time(), 0, 0.0
    while foreseen < 0.97 and time.time() - start < minutes * 60:
        xs, seen = [], []
        for _ in range(size):
            n = r.randrange(8, 50)
            s = [r.choice(words) for _ in range(n)]
            xs.append([0] + (s * ((length + 1) // n + 1))[:length])
            seen.append([0] * n + [1] * (length - n))
        x, m = torch.tensor(xs, device=device), torch.tensor(seen, dtype=torch.bool, device=device)
        set_rate(opt, rate * min(1, (done + 1) / 50))
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            out = net(x[:, :-1]).float()
        loss = F.cross_entropy(out.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(size, length)
        step(net, opt, loss[m].mean() + 0.05 * loss[~m].mean())
        done += 1
        foreseen = 0.9 * foreseen + 0.1 * (out.argmax(-1) == x[:, 1:])[m].float().mean().item()
        if done % 20 == 0:
            print(f"copying: step {done} loss {loss[m].mean().item():.3f} foreseen {foreseen:.3f}", flush=True)


def learn_texts(net, tok, text, a, save_now):
    """Second stage: stories, questions, Shakespeare, for a.tokens; the rate follows a cosine."""
    decay = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], lr=a.lr,
                            betas=(0.9, 0.95), fused=True)
    start, seen, done, shown, total = time.time(), 0, 0, 0.0, a.tokens * 1e6
    for x in batches(tok, a.seed, text, a.batch, CFG["max_position_embeddings"]):
        share = seen / total
        if share >= 1:
            break
        rate = a.lr * min(1, (done + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))
        set_rate(opt, rate)
        x = x.to(a.device)
        with torch.autocast(a.device, torch.bfloat16, enabled=bool(a.amp)):
            out = net(x[:, :-1]).float()
        loss = F.cross_entropy(out.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        weight = 1 + (a.answers - 1) * answers(x)[:, 1:].flatten()
        step(net, opt, (loss * weight).sum() / weight.sum())
        seen, done = seen + x[:, 1:].numel(), done + 1
        mean = loss.mean().item()
        shown = 0.95 * shown + 0.05 * mean if shown else mean
        if done % 20 == 0:
            print(f"step {done} tokens {seen / 1e6:.2f}M loss {shown:.3f} lr {rate:.1e} "
                  f"{seen / (time.time() - start):.0f} tok/s {share * 100:.0f}%", flush=True)
        if done % 100 == 0:
            save_now(dict(tokens=seen))
    return dict(tokens=seen, minutes=round((time.time() - start) / 60, 1), loss=shown)


def write_json(folder, name, data):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, ensure_ascii=False)


def save(net, out, metrics):
    """Weights (matrices BF16, norms and router F32), configuration, tokenizer settings, metrics."""
    def kind(name):
        return torch.float32 if "e_score" in name or "norm" in name or ".gate.weight" in name else torch.bfloat16

    state = {k: v.detach().to(kind(k)).contiguous().cpu() for k, v in net.state_dict().items()}
    save_file(state, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    write_json(out, "config.json", dict(
        CFG, architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_act="silu", attention_bias=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, num_key_value_heads=CFG["num_attention_heads"],
        scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1, tie_word_embeddings=False,
        num_nextn_predict_layers=0, rope_scaling=None, torch_dtype="bfloat16", use_cache=True, initializer_range=0.02,
        rope_interleave=True))
    write_json(out, "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=BOS, eos_token=corpus.EOS, pad_token=PAD,
        add_bos_token=True, chat_template=TEMPLATE, model_max_length=512))
    write_json(out, "metrics.json", metrics)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out")
    ap.add_argument("--tokens", type=float, default=10, help="of the second stage, in millions")
    ap.add_argument("--answers", type=float, default=3, help="weight of an answer's tokens beside the others")
    ap.add_argument("--shakespeare", help="plain text to mix in; its last tenth is held out")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--seed", type=int, default=11, help="of the texts; another one when going on, so that none comes twice")
    ap.add_argument("--amp", type=int, default=1, help="1: multiply in BF16")
    ap.add_argument("--resume", action="store_true", help="go on from OUT_DIR's weights, without the copying stage")
    a = ap.parse_args()
    torch.manual_seed(1)
    os.makedirs(a.out, exist_ok=True)
    train, val = None, STAND_IN
    if a.shakespeare:
        with open(a.shakespeare, encoding="utf-8") as f:
            text = f.read()
        val = held_out(text)
        train = text[:len(text) - len(val)]
    docs = corpus.documents(5, train)
    tok = tokenizer([next(docs) for _ in range(20000)], os.path.join(a.out, "tokenizer.json"))
    net = Model().to(a.device)
    net.train()

    def forward(ids):
        with torch.autocast(a.device, torch.bfloat16, enabled=bool(a.amp)):
            return net(ids.to(a.device))

    def figures():
        net.eval()
        out = measure(forward, tok, val)
        net.train()
        return out

    def save_now(metrics):
        save(net, a.out, metrics)
        print(figures(), flush=True)

    if a.resume:
        weights = load_file(os.path.join(a.out, "model.safetensors"))
        net.load_state_dict({k: v.float() for k, v in weights.items()})
    else:
        learn_to_copy(net, tok, a.device, bool(a.amp), a.lr)
    print("parameters", sum(p.numel() for p in net.parameters()))
    told = learn_texts(net, tok, train, a, save_now)
    metrics = dict(figures(), **told)
    print(metrics)
    save(net, a.out, metrics)


if __name__ == "__main__":
    main()
