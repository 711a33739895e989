"""Makes fixtures/dequantize/: bytes of every format and what the `gguf` package reads from them.

For each format NAME.bin holds a few blocks (random bytes with ordinary scales, then blocks of extreme scales and of all-zero and
all-one bits) followed by the f32 values, and hashes.tsv holds a hash over many more blocks, drawn from a generator that the Rust
test repeats. NaNs are stored as 0x7fc00000: their sign and payload are not specified.

Run: pip install gguf==0.19.0 numpy, then `python ref-tests/quant/make_dequantize.py`. The test is
ref-tests/tests/quant_dequantize.rs.
"""

from pathlib import Path

import gguf
import numpy as np

OUT = Path(__file__).parent / "fixtures" / "dequantize"
HASHED_BLOCKS = 2048
# name: offsets of the f16 scales in a block (Q8_K: of its f32 scale)
FORMATS = {
    "F32": [], "F16": [], "BF16": [],
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q8_K": [0],
    "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip
# f16 patterns: zero, minus zero, subnormals, one, largest, infinities, NaN
EXTREME_F16 = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]
EXTREME_F32 = [0.0, -0.0, 1e-45, -1e-38, 1.0, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan]


def splitmix64(seed, n):
    """n numbers of splitmix64, vectorised."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_bytes(seed, n):
    return splitmix64(seed, (n + 7) // 8).astype("<u8").view(np.uint8)[:n].copy()


def dequantize(name, data):
    """f32 values, NaNs made uniform. Q8_K is not in the package: its definition is one multiplication."""
    with np.errstate(all="ignore"):
        if name == "Q8_K":
            b = data.reshape(-1, 292)
            d = b[:, :4].copy().view("<f4")
            y = (d * b[:, 4:260].copy().view(np.int8).astype(np.float32)).ravel()
        else:
            y = gguf.quants.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[name]).astype(np.float32).ravel()
    y = y.copy()
    y[np.isnan(y)] = np.array([0x7FC00000], dtype=np.uint32).view(np.float32)[0]
    return y


def fnv1a_words(words):
    """64-bit FNV-1a, a 32-bit word at a time."""
    h = 0xCBF29CE484222325
    for w in words.tolist():
        h = ((h ^ w) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (name, scales) in enumerate(FORMATS.items()):
        length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        ordinary = 4 if length == 256 else 256 // length
        blocks = random_bytes(1000 + i, ordinary * size).reshape(-1, size)
        for at in scales:
            if name == "Q8_K":
                blocks[:, :4] = np.linspace(-0.01, 0.02, ordinary, dtype="<f4").view(np.uint8).reshape(-1, 4)
            else:
                blocks[:, at : at + 2] = np.linspace(-0.01, 0.02, ordinary, dtype="<f2").view(np.uint8).reshape(-1, 2)
        extra = [np.zeros((1, size), np.uint8), np.full((1, size), 255, np.uint8)]
        values = np.array(EXTREME_F32, "<f4") if name == "Q8_K" else np.array(EXTREME_F16, "<u2")
        for k in range(len(values) if scales else 0):
            b = random_bytes(5000 + 100 * i + k, size)
            for n, at in enumerate(scales):
                v = values[(k + n) % len(values) : (k + n) % len(values) + 1].view(np.uint8)
                b[at : at + len(v)] = v
            extra.append(b.reshape(1, size))
        if length == 256:  # keep the folder small
            extra = extra[:2] + extra[2::3]
        blocks = np.concatenate([blocks] + extra).ravel()
        (OUT / f"{name}.bin").write_bytes(blocks.tobytes() + dequantize(name, blocks).astype("<f4").tobytes())
        if name in ("F16", "BF16"):
            many = np.arange(65536, dtype="<u2").view(np.uint8)
        else:
            many = random_bytes(9000 + i, HASHED_BLOCKS * size)
        rows.append(f"{name}\t{9000 + i}\t{len(many) // size}\t{fnv1a_words(dequantize(name, many).view(np.uint32)):016x}")
    head = "# format, seed of the bytes (F16 and BF16: all 65536 patterns instead), blocks, FNV-1a of the f32 words\n"
    (OUT / "hashes.tsv").write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
