#!/usr/bin/env python3
"""rsinfer's ids against llama.cpp's on the same vocabularies: corpus lines, written and random texts. Not run by CI.

Usage: llama_cpp_compare.py RSINFER_IDS CORPUS.txt ... -- VOCAB.gguf ...

needs llama-cpp-python. RSINFER_IDS is the built example `encode_lines` (cargo build --release -p rsinfer-engine --example
encode_lines): reads a JSON string a line, writes a JSON array of ids a line.
"""
import json
import subprocess
import sys

import llama_cpp
from samples import WRITTEN, random_texts

SPECIAL = ["<|im_start|>user\nx<|im_end|> <s>a</s>  b<|eot_id|>", "<｜begin▁of▁sentence｜>x<|endoftext|>\n", "</s><s> </s> x", "<unk>a<unk> b"]


def llama_ids(vocab, text, special):
    data = text.encode()
    n = max(len(data) + 8, 16)
    buf = (llama_cpp.llama_token * n)()
    got = llama_cpp.llama_tokenize(vocab, data, len(data), buf, n, special, special)
    assert got >= 0
    return list(buf[:got])


def main(args):
    cut = args.index("--")
    binary, corpora, vocabs = args[0], args[1:cut], args[cut + 1:]
    texts = WRITTEN + SPECIAL + list(random_texts(20000, seed=3))
    for path in corpora:
        whole = open(path, encoding="utf-8").read()
        texts += [whole[i:i + 1500] for i in range(0, len(whole), 1500)]
    # llama.cpp takes a C string's length, but NUL and lone surrogates are not worth its time.
    texts = [t for t in texts if "\0" not in t]
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    bad = 0
    for path in vocabs:
        model = llama_cpp.llama_load_model_from_file(path.encode(), params)
        vocab = llama_cpp.llama_model_get_vocab(model)
        for special in (False, True):
            lines = "".join(json.dumps(t) + "\n" for t in texts)
            command = [binary, path] + (["--special"] if special else [])
            ours = [json.loads(l) for l in subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout.splitlines()]
            assert len(ours) == len(texts)
            wrong = [(t, o, w) for t, o in zip(texts, ours) if o != (w := llama_ids(vocab, t, special))]
            bad += len(wrong)
            print(f"{path.split('/')[-1]:36} special={special!s:5} texts {len(texts)} ids {sum(map(len, ours))} differ {len(wrong)}")
            for t, o, w in sorted(wrong, key=lambda x: len(x[0]))[:3]:
                print("  ", ascii(t), "\n      ours ", o, "\n      llama", w)
        llama_cpp.llama_free_model(model)
    return bad != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
