"""What the `gguf` package reads in a file, as one line of JSON: tensors with type, dimensions and the spread of their values.

usage: describe.py MODEL.gguf
For small files: every tensor is dequantised. Needs numpy and gguf.
"""
import json
import sys

import gguf
import numpy as np


def main():
    reader = gguf.GGUFReader(sys.argv[1])
    tensors = []
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        tensors.append(dict(name=t.name, type=t.tensor_type.name, dims=[int(d) for d in t.shape],
                            finite=bool(np.isfinite(values).all()), mean=float(values.mean()), deviation=float(values.std())))
    print(json.dumps(dict(keys=[k for k in reader.fields if not k.startswith("GGUF.")], tensors=tensors)))


if __name__ == "__main__":
    main()
