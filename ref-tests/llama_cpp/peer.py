"""llama.cpp through its Python package's low-level API: logits of given ids, quantised files, timings.

Must not know transformers or the fixtures; everything here takes a path to a GGUF.
"""
import ctypes
import os
import time

import llama_cpp as lc
import numpy as np

CACHE = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8}
TYPES = {"F16": lc.LLAMA_FTYPE_MOSTLY_F16, "BF16": lc.LLAMA_FTYPE_MOSTLY_BF16, "Q8_0": lc.LLAMA_FTYPE_MOSTLY_Q8_0,
         "Q4_0": lc.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_1": lc.LLAMA_FTYPE_MOSTLY_Q4_1, "Q5_0": lc.LLAMA_FTYPE_MOSTLY_Q5_0,
         "Q5_1": lc.LLAMA_FTYPE_MOSTLY_Q5_1, "Q2_K": lc.LLAMA_FTYPE_MOSTLY_Q2_K, "Q3_K_S": lc.LLAMA_FTYPE_MOSTLY_Q3_K_S,
         "Q3_K_M": lc.LLAMA_FTYPE_MOSTLY_Q3_K_M, "Q3_K_L": lc.LLAMA_FTYPE_MOSTLY_Q3_K_L,
         "Q4_K_S": lc.LLAMA_FTYPE_MOSTLY_Q4_K_S, "Q4_K_M": lc.LLAMA_FTYPE_MOSTLY_Q4_K_M,
         "Q5_K_S": lc.LLAMA_FTYPE_MOSTLY_Q5_K_S, "Q5_K_M": lc.LLAMA_FTYPE_MOSTLY_Q5_K_M,
         "Q6_K": lc.LLAMA_FTYPE_MOSTLY_Q6_K, "IQ4_NL": lc.LLAMA_FTYPE_MOSTLY_IQ4_NL,
         "IQ4_XS": lc.LLAMA_FTYPE_MOSTLY_IQ4_XS, "MXFP4": lc.LLAMA_FTYPE_MOSTLY_MXFP4_MOE}


class Refused(Exception):
    """llama.cpp did not load, run or quantise the file."""


@lc.llama_log_callback
def _quiet(_level, _text, _data):
    pass


def silence():
    """Stop llama.cpp's log; the callback lives as long as this module."""
    lc.llama_log_set(_quiet, ctypes.c_void_p(0))


class Peer:
    """A loaded model with one context. cache: type of the KV cache; threads: for prompts and generation alike.

    yarn_beta: (fast, slow), which this llama.cpp does not read from deepseek2 files. repack: let it copy weights into
    its own layouts, which is faster and aborts (0.3.36) on some deepseek2 files.
    """

    def __init__(self, path, context=1024, batch=512, threads=2, cache="f16", flash=False, yarn_beta=None, repack=True):
        silence()
        lc.llama_backend_init()
        m = lc.llama_model_default_params()
        m.use_extra_bufts = repack
        self.model = lc.llama_model_load_from_file(path.encode(), m)
        if not self.model:
            raise Refused(f"llama.cpp cannot load {path}")
        p = lc.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = context, batch, batch
        p.n_threads = p.n_threads_batch = threads
        p.type_k = p.type_v = CACHE[cache]
        p.flash_attn_type = int(flash)
        if yarn_beta:
            p.yarn_beta_fast, p.yarn_beta_slow = yarn_beta
        p.no_perf = True
        self.context = lc.llama_init_from_model(self.model, p)
        if not self.context:
            raise Refused(f"llama.cpp cannot make a context for {path}")
        self.vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.size = batch
        self.batch = lc.llama_batch_init(batch, 0, 1)

    def clear(self):
        """Forget everything decoded so far."""
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)

    def decode(self, ids, start, every):
        """Decode ids (at most one batch) at positions start...; logits of every token, or of the last one alone."""
        b = self.batch
        b.n_tokens = len(ids)
        for i, t in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = t, start + i, 1, 0
            b.logits[i] = every or i == len(ids) - 1
        if lc.llama_decode(self.context, b):
            raise Refused("llama_decode failed")
        rows = len(ids) if every else 1
        return np.ctypeslib.as_array(lc.llama_get_logits(self.context), (rows, self.vocab_size)).copy()

    def logits(self, ids, batch=None):
        """float32 [n, vocab]: the logits after each id, decoded `batch` at a time from an empty cache."""
        self.clear()
        step = batch or self.size
        return np.concatenate([self.decode(ids[i:i + step], i, True) for i in range(0, len(ids), step)])

    def save(self, path, ids):
        """Write the context of ids to a file."""
        tokens = (lc.llama_token * len(ids))(*ids)
        if not lc.llama_state_save_file(self.context, path.encode(), tokens, len(ids)):
            raise Refused(f"llama.cpp cannot write its state to {path}")

    def load(self, path, count):
        """Read a context of `count` tokens from a file; False if there is none. Its context must have the same size."""
        if not os.path.exists(path):
            return False
        tokens, found = (lc.llama_token * count)(), ctypes.c_size_t()
        if not lc.llama_state_load_file(self.context, path.encode(), tokens, count, ctypes.byref(found)):
            raise Refused(f"llama.cpp cannot read its state from {path}")
        if found.value != count:
            raise Refused(f"{path} holds {found.value} tokens, not {count}")
        return True

    def close(self):
        lc.llama_batch_free(self.batch)
        lc.llama_free(self.context)
        lc.llama_model_free(self.model)


def logits(path, ids, cache="f16", batch=512, threads=2, flash=False, yarn_beta=None):
    """Logits of a file for ids; see Peer."""
    p = Peer(path, context=max(256, len(ids)), batch=min(batch, max(256, len(ids))), threads=threads, cache=cache,
             flash=flash, yarn_beta=yarn_beta)
    try:
        return p.logits(ids, batch)
    finally:
        p.close()


def quantise(source, target, kind, embedding=None, output=None, pure=False):
    """llama-quantize: source GGUF -> target GGUF of type `kind` (a key of TYPES)."""
    silence()
    lc.llama_backend_init()
    p = lc.llama_model_quantize_default_params()
    p.ftype, p.nthread, p.pure, p.allow_requantize = TYPES[kind], 1, pure, True
    if embedding is not None:
        p.token_embedding_type = embedding
    if output is not None:
        p.output_tensor_type = output
    if lc.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(p)):
        raise Refused(f"llama.cpp cannot quantise {source} to {kind}")


def timings(path, prompt, generate, threads, depth=0, cache="f16", repeat=3, flash=False, state=None, repack=True):
    """Tokens per second, best and mean of `repeat`, after `depth` tokens of context.

    {"pp512": {"best", "mean"}, "tg64": ...} for a prompt of 512 tokens in batches of 512, and 64 tokens one by one. The
    context is computed once and cut back before each run; `state` names a file that keeps it from one call to the next.
    """
    # A fixed size, so that a state fits whatever is measured after it.
    p = Peer(path, context=depth + max(prompt, generate, 256) + 64, batch=512, threads=threads, cache=cache, flash=flash,
             repack=repack)
    r, out = np.random.default_rng(1), {}
    ids = [int(x) for x in r.integers(3, p.vocab_size, depth + max(prompt, generate, 256))]
    memory = lc.llama_get_memory(p.context)

    def in_batches(start, count):
        for i in range(start, start + count, p.size):
            p.decode(ids[i:min(i + p.size, start + count)], i, False)

    def one_by_one(start, count):
        for i in range(start, start + count):
            p.decode([ids[i]], i, False)

    def fill():
        p.clear()
        if depth and not (state and p.load(state, depth)):
            in_batches(0, depth)
            if state:
                p.save(state, ids[:depth])

    fill()
    for name, count, work in (("pp", prompt, in_batches), ("tg", generate, one_by_one)):
        rates = []
        for i in range(repeat + 1 if count else 0):
            # What cannot be cut back (a window's cache) is computed anew.
            if not lc.llama_memory_seq_rm(memory, 0, depth, -1):
                fill()
            # The first run only warms up: of many tokens one by one, a few do.
            n = count if i or name == "pp" else min(count, 4)
            start = time.perf_counter()
            work(depth, n)
            if i:
                rates.append(n / (time.perf_counter() - start))
        if rates:
            out[f"{name}{count}"] = dict(best=max(rates), mean=sum(rates) / len(rates))
    p.close()
    return out
