"""Files that strangers send: strategies that start from valid content and break it.

Each strategy draws `bytes`. Damage is of three kinds: to the bytes (flipped, cut, repeated, removed), to the structure
(a JSON value replaced by one of another type, a key removed, an offset moved) and to the words (names and texts as no
program writes them).
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

DrawFn = st.DrawFn

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308]
) | st.sampled_from([float("nan"), float("inf"), float("-inf")])
_ODD_NAMES = [
    "",
    " ",
    "\0",
    "\n",
    "..",
    "../x",
    "/etc/x",
    "C:\\x",
    "a" * 300,
    "犬",
    "e\u0301",
    "\ufeffx",
    "\ud800",
    "\u202e",
]
_ODD_WORDS = [
    "null",
    "NaN",
    "1e999",
    "[]",
    "{token}",
    "{class",
    "|",
    "a | ",
    "!!!!!!!!",
    "?" * 64,
    "%s",
    "(",
    "[",
    "*",
    "\\",
]
TEXTS = st.sampled_from(_ODD_NAMES) | st.sampled_from(_ODD_WORDS) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=4
)


@st.composite
def damaged(draw: DrawFn, content: bytes) -> bytes:
    """The content with one to four places damaged."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64]))
        kind = draw(st.sampled_from(["replace", "cut", "remove", "repeat", "insert"]))
        if kind == "replace":
            changed[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del changed[start:]
        elif kind == "remove":
            del changed[start : start + length]
        elif kind == "repeat":
            changed[start:start] = changed[start : start + length] * draw(st.integers(1, 3))
        else:
            changed[start:start] = draw(
                st.sampled_from([b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"\xd8\0"])
            )
    return bytes(changed)


@st.composite
def other_shape(draw: DrawFn, value: Any) -> Any:
    """A JSON value in which one value, at any depth, is replaced, removed, renamed or wrapped."""
    if isinstance(value, Mapping) and value and draw(st.booleans()):
        changed = dict(value)
        key = draw(st.sampled_from(sorted(changed)))
        kind = draw(st.sampled_from(["inside", "inside", "remove", "rename", "add"]))
        if kind == "inside":
            changed[key] = draw(other_shape(changed[key]))
        elif kind == "remove":
            del changed[key]
        elif kind == "rename":
            changed[draw(TEXTS)] = changed.pop(key)
        else:
            changed[draw(TEXTS)] = draw(VALUES)
        return changed
    if isinstance(value, list) and value and draw(st.booleans()):
        changed_list = list(value)
        position = draw(st.integers(0, len(value) - 1))
        changed_list[position] = draw(other_shape(value[position]))
        return changed_list
    return draw(st.just([value]) | VALUES)


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, with NaN and lone surrogates."""
    return json.dumps(value).encode()


@st.composite
def json_files(draw: DrawFn, value: Any) -> bytes:
    """A JSON file of another shape, or damaged."""
    if draw(st.booleans()):
        value = draw(other_shape(value))
    content = as_json(value)
    return draw(damaged(content)) if draw(st.booleans()) else content


@st.composite
def json_lines(draw: DrawFn, lines: Sequence[Any]) -> bytes:
    """A file of JSON lines of which some are of another shape, or damaged."""
    changed = [draw(other_shape(line)) if draw(st.booleans()) else line for line in lines]
    content = b"\n".join(map(as_json, changed)) + b"\n"
    return draw(damaged(content)) if draw(st.booleans()) else content


@st.composite
def safetensors_files(draw: DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header or bytes are broken."""
    kind = draw(st.sampled_from(["header", "header", "metadata", "bytes", "length"]))
    if kind == "bytes":
        return draw(damaged(content))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    if kind == "length":
        lie = draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", lie) + content[8:]
    if kind == "metadata":
        metadata = header.get("__metadata__") or {"ss_network_dim": "4"}
        header["__metadata__"] = draw(other_shape(metadata))
    else:
        header = draw(other_shape(header))
    try:
        text = json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def zip_files(draw: DrawFn, entries: Mapping[str, bytes]) -> bytes:
    """A zip file with entries of odd names or content; the whole may be damaged."""
    buffer = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(draw(_entry_names(name)) if draw(st.booleans()) else name)
            entry.compress_type = method
            entry.external_attr = draw(st.sampled_from([0, 0o100644 << 16, 0o120777 << 16, 0x10]))
            archive.writestr(entry, draw(damaged(content)) if draw(st.booleans()) else content)
    content = buffer.getvalue()
    if draw(st.booleans()):
        return content
    position = content.rfind(b"PK\1\2")
    if position > 0 and draw(st.booleans()):  # the directory: encryption flags, methods, sizes, offsets
        return content[:position] + draw(damaged(content[position:]))
    return draw(damaged(content))


def _entry_names(name: str) -> st.SearchStrategy[str]:
    prefixes = [
        "../",
        "/",
        "C:\\",
        "..\\",
        "a/../../",
        "__MACOSX/",
        "._",
        ".hidden/",
        "10_dog/",
        "\u202e",
        "a:b",
        "aux.",
    ]
    return st.sampled_from(prefixes).map(lambda prefix: prefix + name) | st.just(name + "/") | st.just(name.upper())


@st.composite
def png_files(draw: DrawFn, content: bytes) -> bytes:
    """A PNG file with a chunk changed, repeated or put in, under a right checksum; or damaged bytes."""
    if draw(st.booleans()):
        return draw(damaged(content))
    chunks = []
    position = 8
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += length + 12
    at = draw(st.integers(0, len(chunks) - 1))
    name, data = chunks[at]
    kind = draw(st.sampled_from(["data", "repeat", "remove", "insert"]))
    if kind == "data":
        chunks[at] = (name, draw(damaged(data)))
    elif kind == "repeat":
        chunks.insert(at, (name, data))
    elif kind == "remove":
        del chunks[at]
    else:
        name = draw(st.sampled_from([b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tRNS", b"gAMA", b"acTL", b"PLTE"]))
        chunks.insert(1, (name, draw(st.binary(max_size=40)) + b"\0" + zlib.compress(draw(st.binary(max_size=40)))))
    return content[:8] + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@st.composite
def text_files(draw: DrawFn, text: str) -> bytes:
    """A text in any encoding, with odd words in it, or damaged."""
    words = text.split(" ")
    for _ in range(draw(st.integers(0, 2))):
        words[draw(st.integers(0, len(words) - 1))] = draw(TEXTS)
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]))
    content = " ".join(words).encode(encoding, "replace")
    return draw(damaged(content)) if draw(st.booleans()) else content


_TOML_VALUES = [
    *("true", "0", "-1", "1e400", "nan", "inf", "9223372036854775808", "0x7f", "1979-05-27"),
    *('""', '"x"', '"../x"', '"犬"', '"\\u0000"', "'''\n'''", "[]", "{}", "[1, [2]]", "[{a=1}]"),
]


@st.composite
def toml_files(draw: DrawFn, keys: Mapping[str, str]) -> bytes:
    """A settings file: known and unknown keys with TOML values that may not fit them; or damaged."""
    values = st.sampled_from(_TOML_VALUES)
    lines = []
    for key, usual in keys.items():
        spelled = draw(st.sampled_from([key, key.upper(), key.replace("_", "-"), f"{key}.x", f'"{key}"']))
        lines.append(f"{spelled if draw(st.booleans()) else key} = {draw(values) if draw(st.booleans()) else usual}")
    tables = [f"[{key}]" for key in keys] + ["[[base_lora]]", "[x", "x", "= 1"]
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(tables)))
    content = "\n".join(lines).encode()
    return draw(damaged(content)) if draw(st.booleans()) else content
