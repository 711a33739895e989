"""Tiny vocabularies that llama.cpp loads: byte-level BPE with a few merges, or SentencePiece with byte fallback.

They exist so that a file is complete; the reference tests feed ids and never tokenise.
"""
import gguf

PIECES = ("th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri "
          "ro ic ne ea ra ce li ch ll be ma si om ur").split()
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6


def byte_letters():
    """GPT-2's printable stand-in for each byte value: list of 256 one-character strings."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, spare = {b: chr(b) for b in plain}, 256
    for b in range(256):
        if b not in letters:
            letters[b] = chr(spare)
            spare += 1
    return [letters[b] for b in range(256)]


def _fill(tokens, types, scores, size):
    while len(tokens) < size:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(UNUSED)
        scores.append(-1000.0)


def write(w: gguf.GGUFWriter, kind: str, size: int):
    """Write the vocabulary `kind` ("spm", "spm:gemma" or "bpe:PRE") of `size` tokens into w."""
    kind, _, flavour = kind.partition(":")
    if kind == "bpe":
        tokens = ["<|begin|>", "<|end|>"] + byte_letters() + PIECES
        types = [CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 2)
        _fill(tokens, types, [], size)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(flavour)
        w.add_token_list(tokens)
        w.add_token_types(types)
        w.add_token_merges([f"{p[0]} {p[1]}" for p in PIECES])
        w.add_bos_token_id(0)
        w.add_eos_token_id(1)
        w.add_add_bos_token(flavour != "qwen2")
        return
    gemma = flavour == "gemma"
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    types = [UNKNOWN if t == "<unk>" else CONTROL for t in tokens]
    scores = [0.0] * len(tokens)
    for b in range(256):
        tokens.append(f"<0x{b:02X}>")
        types.append(BYTE)
        scores.append(0.0)
    for i, p in enumerate(["\u2581"] + [c for c in "etaoinshrdlu"] + PIECES):
        if len(tokens) < size:
            tokens.append(p)
            types.append(NORMAL)
            scores.append(-float(i))
    _fill(tokens, types, scores, size)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(tokens.index("<bos>" if gemma else "<s>"))
    w.add_eos_token_id(tokens.index("<eos>" if gemma else "</s>"))
    w.add_unk_token_id(tokens.index("<unk>"))
    if gemma:
        w.add_pad_token_id(0)
        w.add_add_space_prefix(False)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
