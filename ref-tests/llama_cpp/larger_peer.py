"""Decode with llama.cpp from a mapped file and print tokens, seconds and bytes read from disk as one line of JSON.

usage: larger_peer.py MODEL.gguf --warm 32 --tokens 64 --seconds 60 --threads 2
Called by benches/src/bin/larger.rs in a control group with little memory. Weights stay mapped: nothing is repacked.
"""
import argparse
import json
import time

import peer


def counts():
    """Bytes that this process had read from disk, and page faults that had to read."""
    with open("/proc/self/io") as f:
        read = next(int(line.split()[1]) for line in f if line.startswith("read_bytes"))
    with open("/proc/self/stat") as f:
        return read, int(f.read().rsplit(")", 1)[1].split()[9])


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model")
    ap.add_argument("--warm", type=int, required=True)
    ap.add_argument("--tokens", type=int, required=True)
    ap.add_argument("--seconds", type=float, required=True)
    ap.add_argument("--threads", type=int, required=True)
    a = ap.parse_args()
    p = peer.Peer(a.model, context=max(256, a.warm + a.tokens), batch=64, threads=a.threads, repack=False)

    def decode(i):
        p.decode([(i * 7919 + 13) % p.vocab_size], i, False)

    def run(first, count):
        """Decode at most so many tokens in at most so many seconds; how many it were."""
        start, done = time.perf_counter(), 0
        while done < count and time.perf_counter() - start < a.seconds:
            decode(first + done)
            done += 1
        return done

    warm = run(0, a.warm)
    read, faults = counts()
    start = time.perf_counter()
    done = run(warm, a.tokens)
    seconds = time.perf_counter() - start
    read_now, faults_now = counts()
    print(json.dumps(dict(tokens=done, seconds=seconds, read=read_now - read, faults=faults_now - faults)))


if __name__ == "__main__":
    main()
