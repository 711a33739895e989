"""rsinfer's server beside llama-cpp-python's on one machine, in turns: tokens per second, time to the first token, gaps.

usage: serve_peer.py RSINFER MODEL.gguf [--clients 1,4,16] [--tokens 128] [--rounds 4] [--turns 3] [--alone]
Needs llama-cpp-python[server]. Both get the same streamed requests to /v1/completions with the model's end banned, two threads, and
weights as they lie in the file (repacked ones crash llama.cpp 0.3.36 on some machines). llama-cpp-python answers one request at a
time. The medians of all turns are printed as rows of a table; then how long an answer stands still beside a long prompt.
"""
import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time

import gguf

WORDS = "The dog ran to the barn. "


def peer(model, port):
    """Becomes llama-cpp-python's server."""
    import llama_cpp
    import llama_cpp.llama as high
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    default = llama_cpp.llama_model_default_params

    def plain():
        p = default()
        p.use_extra_bufts = False
        return p

    high.llama_cpp.llama_model_default_params = plain
    settings = ModelSettings(model=model, n_ctx=2048, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False)
    app = create_app(server_settings=ServerSettings(interrupt_requests=False), model_settings=[settings])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, command, port):
        self.port = port
        env = {**os.environ, "RSINFER_MODELS": "/nonexistent", "OLLAMA_MODELS": "/nonexistent"}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                if self.ask("GET", "/v1/models", None).status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"{command[0]} does not answer")

    def ask(self, method, path, body):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        text = None if body is None else json.dumps(body)
        c.request(method, path, text, {"content-type": "application/json"})
        return c.getresponse()

    def stream(self, body):
        """Seconds to the first token, and between tokens, until the answer or the server ends."""
        start = last = time.perf_counter()
        first, gaps = None, []
        try:
            for line in self.ask("POST", "/v1/completions", {**body, "stream": True}):
                choice = json.loads(line[6:])["choices"] if line.startswith(b"data: {") else None
                if not choice or not choice[0].get("text"):
                    continue
                now = time.perf_counter()
                if first is None:
                    first = now - start
                else:
                    gaps.append(now - last)
                last = now
        except (OSError, http.client.HTTPException):
            pass
        return first, gaps

    def stop(self):
        self.process.kill()
        self.process.wait()


def rsinfer(binary, model, *more):
    port = free_port()
    return Server([binary, "serve", "--host", f"127.0.0.1:{port}", "-t", "2", "-m", model, *more], port)


def at(values, share):
    return sorted(values)[int((len(values) - 1) * share)] * 1e3


def crowd(server, body, clients, rounds, tokens):
    """tokens/s, and milliseconds: first token p50 and p99, gaps p50 and p99."""
    server.stream({**body(999), "max_tokens": 4})
    all_, lock = [], threading.Lock()

    def client(c):
        mine = [server.stream(body(100 * c + i)) for i in range(rounds)]
        with lock:
            all_.extend(mine)

    threads = [threading.Thread(target=client, args=(c,)) for c in range(clients)]
    start = time.perf_counter()
    [t.start() for t in threads]
    [t.join() for t in threads]
    rate = clients * rounds * tokens / (time.perf_counter() - start)
    firsts, gaps = [f for f, _ in all_], [g for _, gs in all_ for g in gs]
    return rate, at(firsts, 0.5), at(firsts, 0.99), at(gaps, 0.5), at(gaps, 0.99)


def main():
    if sys.argv[1] == "--peer":
        return peer(sys.argv[2], int(sys.argv[3]))
    ap = argparse.ArgumentParser()
    ap.add_argument("rsinfer")
    ap.add_argument("model")
    ap.add_argument("--clients", default="1,4,16")
    ap.add_argument("--tokens", type=int, default=128)
    ap.add_argument("--rounds", type=int, default=4)
    ap.add_argument("--turns", type=int, default=3)
    ap.add_argument("--alone", action="store_true", help="without the peer")
    ap.add_argument("--long", type=int, default=700, help="sentences of the long prompt; 0: leave it out")
    a = ap.parse_args()
    field = gguf.GGUFReader(a.model).fields["tokenizer.ggml.eos_token_id"]
    end = str(int(field.parts[field.data[0]][0]))

    def body(seed):
        return {"model": "any" if is_peer else os.path.basename(a.model)[:-5], "prompt": f"Once upon a time there were {seed} dogs",
                "max_tokens": a.tokens, "seed": seed, "temperature": 1.0, "logit_bias": {end: -100}}

    print("| server | clients | tokens/s | first token p50 | p99 | between tokens p50 | p99 |\n| --- | --- | --- | --- | --- | --- | --- |")
    for clients in map(int, a.clients.split(",")):
        got = {False: [], True: []}
        for _ in range(a.turns):
            for is_peer in [False] if a.alone else [False, True]:
                if is_peer:
                    port = free_port()
                    s = Server([sys.executable, __file__, "--peer", a.model, str(port)], port)
                else:
                    s = rsinfer(a.rsinfer, a.model, "--parallel", "16", "-c", "2048")
                try:
                    got[is_peer].append(crowd(s, body, clients, a.rounds, a.tokens))
                finally:
                    s.stop()
        for is_peer, runs in got.items():
            if runs:
                rate, *ms = [statistics.median(v) for v in zip(*runs)]
                name = "llama-cpp-python" if is_peer else "rsinfer"
                print(f"| {name} | {clients} | {rate:.0f} | " + " | ".join(f"{m:.1f} ms" for m in ms) + " |", flush=True)
    if a.long:
        is_peer = False
        runs = []
        for _ in range(a.turns):
            s = rsinfer(a.rsinfer, a.model, "--parallel", "2", "-c", "8192")
            try:
                s.stream({**body(0), "max_tokens": 4})
                alone = s.stream(body(1))[1]
                beside = []
                # Goes on until the prompt is read, and the server with it.
                t = threading.Thread(target=lambda: beside.extend(s.stream({**body(1), "max_tokens": 100_000})[1]))
                t.start()
                time.sleep(0.3)
                start = time.perf_counter()
                long = s.ask("POST", "/v1/completions", {**body(2), "prompt": WORDS * a.long, "max_tokens": 1})
                tokens = json.loads(long.read())["usage"]["prompt_tokens"]
                took = time.perf_counter() - start
            finally:
                s.stop()
            t.join()
            runs.append((max(alone) * 1e3, max(beside) * 1e3, at(beside, 0.99), took))
        alone, beside, p99, took = [statistics.median(v) for v in zip(*runs)]
        print(f"\nlongest gap: {alone:.1f} ms alone, {beside:.1f} ms (p99 {p99:.1f}) beside a prompt of {tokens} tokens, read in {took:.2f} s")


if __name__ == "__main__":
    main()
