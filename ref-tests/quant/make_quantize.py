"""Makes fixtures/llama_cpp_rmse.tsv: the error of llama.cpp's quantisers on seeded tensors, which ours must not exceed by more
than 2%.

The tensors come from splitmix64 by arithmetic that Rust repeats exactly (ref-tests/src/quant_tensors.rs). llama.cpp is called
through ggml_quantize_chunk in the libggml-base that the llama-cpp-python package brings, without and with an importance matrix
(one weight a column, as llama-imatrix writes it). Errors: sqrt(mean (x - y)^2), and with importance sqrt(sum w (x - y)^2 / sum w).

Run: pip install gguf==0.19.0 numpy llama-cpp-python==0.3.36, then `python ref-tests/quant/make_quantize.py`. The test is
ref-tests/tests/quant_quantize.rs.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

from make_dequantize import dequantize, splitmix64

OUT = Path(__file__).parent / "fixtures" / "llama_cpp_rmse.tsv"
ROWS, COLS = 16, 1024
N = ROWS * COLS
TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"]


def uniform(seed, n):
    """In [0, 1), f64."""
    return (splitmix64(seed, n) >> np.uint64(40)).astype(np.float64) / 2**24


def gaussian(seed, n):
    """Twelve 16-bit uniforms, summed: mean 0, variance 1 (nearly), f64, exact."""
    z = splitmix64(seed, 3 * n).reshape(n, 3)
    parts = sum((z >> np.uint64(s)) & np.uint64(0xFFFF) for s in (0, 16, 32, 48))
    return (parts.sum(axis=1).astype(np.float64) - 12 * 32767.5) / 65536


def tensors():
    """Name, [ROWS, COLS] f32. Every product and sum is f64, rounded once."""
    g, i = gaussian, np.arange(N)
    yield "gaussian", g(1, N) * 0.02
    yield "heavy tails", g(2, N) * g(3, N) * g(4, N) * 0.01
    yield "outliers", g(5, N) * np.where(i % 97 == 0, 0.6, 0.02)
    yield "zero", np.zeros(N)
    yield "constant rows", np.repeat(g(6, ROWS) * 0.1, COLS)
    yield "tiny", g(7, N) * 1e-6
    yield "small", g(8, N) * 1e-4
    yield "large", g(9, N) * 1e4
    yield "beyond f16", g(10, N) * 1e7
    yield "off centre", g(11, N) * 0.02 + 0.05
    yield "scales that jump", g(12, N) * np.ldexp(1.0, -(i // 16 % 8))
    yield "sparse", np.where(uniform(13, N) < 0.9, 0.0, g(14, N))
    yield "uniform", uniform(15, N) - 0.5


def importance():
    """One weight a column, some of them large, some zero."""
    return np.where(np.arange(COLS) % 61 == 7, 0.0, gaussian(100, COLS) ** 2 * gaussian(100, COLS) ** 2 + 0.01)


def library():
    lib = ctypes.CDLL(str(Path(find_spec("llama_cpp").origin).parent / "lib" / "libggml-base.so"))
    f32p = ctypes.POINTER(ctypes.c_float)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, f32p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, f32p,
    ]  # fmt: skip
    lib.quantize_row_q8_K_ref.argtypes = [f32p, ctypes.c_void_p, ctypes.c_int64]
    return lib, f32p


def quantize(lib, f32p, name, x, weights):
    qtype = gguf.GGMLQuantizationType[name]
    length, size = gguf.GGML_QUANT_SIZES[qtype]
    out = np.zeros(N // length * size, np.uint8)
    x = np.ascontiguousarray(x, np.float32)
    w = None if weights is None else np.ascontiguousarray(weights, np.float32).ctypes.data_as(f32p)
    if name == "Q8_K":
        lib.quantize_row_q8_K_ref(x.ctypes.data_as(f32p), out.ctypes.data, N)
    else:
        lib.ggml_quantize_init(int(qtype))
        lib.ggml_quantize_chunk(int(qtype), x.ctypes.data_as(f32p), out.ctypes.data, 0, ROWS, COLS, w)
    return out


def main():
    lib, f32p = library()
    w = importance().astype(np.float32)
    weights = np.tile(w.astype(np.float64), ROWS)
    lines = ["# type, tensor, RMSE, RMSE weighted by importance after packing with importance"]
    for tensor, x in tensors():
        x = x.astype(np.float32)
        for name in TYPES:
            with np.errstate(all="ignore"):
                plain = dequantize(name, quantize(lib, f32p, name, x, None)).astype(np.float64) - x
                aware = dequantize(name, quantize(lib, f32p, name, x, w)).astype(np.float64) - x
                a = np.sqrt(np.mean(plain**2))
                b = np.sqrt(np.sum(weights * aware**2) / np.sum(weights))
            lines.append(f"{name}\t{tensor}\t{a:.6e}\t{b:.6e}")
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
