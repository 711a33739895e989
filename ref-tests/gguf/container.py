"""Writes ../fixtures/gguf/container.gguf with the gguf package: every metadata type and tensors of several shapes.

The engine's writer must make the same bytes of the same content (tests/gguf_container.rs). Run: python container.py
"""

import pathlib

import gguf
import numpy as np

OUT = pathlib.Path(__file__).parent.parent / "fixtures" / "gguf" / "container.gguf"


def main():
    """Writes the fixture."""
    w = gguf.GGUFWriter(str(OUT), "llama")
    w.add_uint8("a.u8", 200)
    w.add_int8("a.i8", -100)
    w.add_uint16("a.u16", 60000)
    w.add_int16("a.i16", -30000)
    w.add_uint32("a.u32", 4_000_000_000)
    w.add_int32("a.i32", -2_000_000_000)
    w.add_uint64("a.u64", 2**64 - 1)
    w.add_int64("a.i64", -(2**63))
    w.add_float32("a.f32", 0.1)
    w.add_float64("a.f64", 0.1)
    w.add_bool("a.bool", True)
    w.add_string("a.str", "Grüße, 世界\n")
    w.add_array("b.str", ["one", "", "drei"])
    w.add_array("b.i32", [1, -2, 3])
    w.add_array("b.f32", [0.5, -0.25])
    w.add_array("b.bool", [True, False])
    w.add_array("b.nested", [[1, 2], [3]])
    w.add_custom_alignment(64)
    w.add_tensor("vector", np.arange(5, dtype=np.float32))
    w.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4) / 8)
    w.add_tensor("half", np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    blocks = (np.arange(2 * 34) * 7 % 64).astype(np.uint8).reshape(2, 34)
    w.add_tensor("quantised", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
