#!/usr/bin/env python3
"""Ids of the demo model's tokenizer by Hugging Face `tokenizers`: the fixture of engine/tests/text_demo.rs.

Usage: demo_reference.py TOKENIZER.json OUT.json        needs tokenizers (see ../requirements.txt)
"""
import json
import sys

from samples import WRITTEN, random_texts
from tokenizers import Tokenizer

# Hugging Face always parses special tokens, as --parse-special does.
SPECIAL = ["<｜User｜>Hi<｜Assistant｜><think>\nhm</think> ok<｜end▁of▁sentence｜>", "< think>x<think", "<｜User｜><｜User｜>  <think> \n"]


def main(tokenizer, out):
    t = Tokenizer.from_file(tokenizer)
    texts = WRITTEN + SPECIAL + list(random_texts(400, seed=20))
    rows = [[text, t.encode(text, add_special_tokens=False).ids] for text in texts]
    with open(out, "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(r, ensure_ascii=True, separators=(",", ":")) for r in rows) + "\n]\n")
    print(f"{len(rows)} texts, {sum(len(r[1]) for r in rows)} ids")


if __name__ == "__main__":
    main(*sys.argv[1:])
