"""Time llama.cpp on a file: prompt and generation, tokens per second, as one line of JSON.

usage: bench_peer.py MODEL.gguf [-p 512] [-n 64] [-d 0] [-t 1] [-r 3] [--cache f16] [--flash-attention] [--no-repack]
       [--state FILE]
Meant to be called in turns with `rsinfer bench`, so that both meet the same machine: best of -r runs after one to warm
up. `tg` decodes -n tokens one by one after -d tokens of context; with --state these are computed by the first call and
read from FILE by the next ones. Needs llama-cpp-python.
"""
import argparse
import json
import os

import llama_cpp

import peer


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model")
    ap.add_argument("-p", type=int, default=512, help="tokens of the prompt (0: leave out)")
    ap.add_argument("-n", type=int, default=64, help="tokens to generate (0: leave out)")
    ap.add_argument("-d", type=int, default=0, help="tokens of context before both")
    ap.add_argument("-t", type=int, default=1, help="threads")
    ap.add_argument("-r", type=int, default=3, help="runs")
    ap.add_argument("--cache", default="f16", choices=["f16", "f32", "q8_0"])
    ap.add_argument("--flash-attention", action="store_true")
    ap.add_argument("--no-repack", action="store_true", help="leave the weights as they lie in the file")
    ap.add_argument("--state", help="file of the context at depth, made if it is not there")
    a = ap.parse_args()
    try:
        found = peer.timings(a.model, a.p, a.n, a.t, depth=a.d, cache=a.cache, repeat=a.r, flash=a.flash_attention,
                             state=a.state, repack=not a.no_repack)
    except peer.Refused as e:
        raise SystemExit(str(e)) from None
    print(json.dumps(dict(engine=f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", model=os.path.basename(a.model),
                          bytes=os.path.getsize(a.model), threads=a.t, depth=a.d, **found)))


if __name__ == "__main__":
    main()
