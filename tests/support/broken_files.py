"""Safetensors files that are broken in every way in which a header can lie."""

from __future__ import annotations

import json
import struct
from typing import Any

NAME = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"


def entry(dtype: Any = "F32", shape: Any = (1, 4), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: Any, data: bytes = bytes(32), *, length: int | None = None) -> bytes:
    """A file with any header: text, bytes, or what becomes JSON."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


GOOD = {DOWN: entry(), UP: entry(shape=(4, 1), begin=16, end=32)}

BROKEN_FILES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a length alone": struct.pack("<Q", 2),
    "no header": file_of(b"", b""),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a text": b"no tensors here, but a text that is long enough",
    "longer than the file": file_of(GOOD, length=10**6),
    "the longest length": file_of(GOOD, length=2**64 - 1),
    "cut off in the header": file_of(GOOD)[:60],
    "cut off in the data": file_of(GOOD)[:-1],
    "more data than tensors": file_of(GOOD, bytes(33)),
    "a list": file_of([]),
    "a list with an entry": file_of([DOWN]),
    "null": file_of(None),
    "a number": file_of(3),
    "a string": file_of("lora"),
    "true": file_of(True),
    "no JSON": file_of(b"{'a': 1}"),
    "half of JSON": file_of(b'{"a": '),
    "no Unicode": file_of(b'{"\xff": 1}'),
    "nested without end": file_of(b"[" * 100_000),
    "nested objects": file_of(b'{"a":' * 50_000),
    "a huge number": file_of(b'{"a": ' + b"1" * 5000 + b"}"),
    "an entry that is a list": file_of({DOWN: []}),
    "an entry that is null": file_of({DOWN: None}),
    "an empty entry": file_of({DOWN: {}}),
    "a type that is a number": file_of({DOWN: entry(dtype=3)}),
    "a type that is a list": file_of({DOWN: entry(dtype=["F32"])}),
    "an unknown type": file_of({DOWN: entry(dtype="F12")}),
    "F8_E8M0": file_of({DOWN: entry("F8_E8M0", (4, 4))}, bytes(16)),
    "F4": file_of({DOWN: entry("F4", (4, 8))}, bytes(16)),
    "F6_E2M3": file_of({DOWN: entry("F6_E2M3", (4, 4), 0, 12)}, bytes(12)),
    "a shape that is a number": file_of({DOWN: entry(shape=4)}),
    "a shape of strings": file_of({DOWN: entry(shape=["1", "4"])}),
    "a shape of fractions": file_of({DOWN: entry(shape=[1.0, 4.0])}),
    "a shape of switches": file_of({DOWN: entry(shape=[True, 4])}),
    "a negative shape": file_of({DOWN: entry(shape=[-1, -4])}),
    "a huge shape": file_of({DOWN: entry(shape=[2**40, 2**40])}),
    "a shape of another size": file_of({DOWN: entry(shape=[1, 5])}, bytes(16)),
    "no place": file_of({DOWN: {"dtype": "F32", "shape": [1, 4]}}),
    "half a place": file_of({DOWN: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0]}}),
    "a place of strings": file_of({DOWN: entry(begin="0", end="16")}),
    "a negative place": file_of({DOWN: entry(begin=-16, end=0)}),
    "a place that ends first": file_of({DOWN: entry(begin=16, end=0)}),
    "a place outside": file_of({DOWN: entry(begin=1000, end=1016)}),
    "tensors over each other": file_of({DOWN: entry(), UP: entry(shape=(4, 1), begin=8, end=24)}, bytes(24)),
    "tensors in the same place": file_of({DOWN: entry(), UP: entry(shape=(4, 1))}, bytes(16)),
    "a hole": file_of({DOWN: entry(), UP: entry(shape=(4, 1), begin=20, end=36)}, bytes(36)),
    "metadata that are a list": file_of({**GOOD, "__metadata__": ["a"]}),
    "metadata of numbers": file_of({**GOOD, "__metadata__": {"ss_steps": 5}}),
    "metadata of objects": file_of({**GOOD, "__metadata__": {"a": {"b": "c"}}}),
}
