"""A CLIP tokenizer from what the host has: checkpoints hold none, and Automatic1111 brings only OpenCLIP's merges."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

from ..trainer.core.files import write_folder

_MERGES = 49152 - 256 - 2  # of OpenAI's CLIP: the vocabulary without single bytes and the two marks
_START, _END = "<|startoftext|>", "<|endoftext|>"


def open_clip_merges() -> Path | None:
    """The file of merges that OpenCLIP brings; None if the host has no OpenCLIP."""
    try:
        spec = importlib.util.find_spec("open_clip")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    return None


def made_tokenizer(merges: Path, folder: Path) -> Path:
    """Write CLIP's tokenizer as transformers reads it, unless it is there; returns its folder.

    Args:
        merges: OpenAI's `bpe_simple_vocab_16e6.txt.gz`: a head, then the merges, the most frequent first.
        folder: Where it is written.

    Raises:
        StorageError: It can't be written.
    """
    if folder.is_dir():
        return folder
    lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    letters = list(_letters_of_bytes().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    vocabulary = {token: number for number, token in enumerate([*tokens, _START, _END])}
    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": {"content": _START, **mark}, "eos_token": {"content": _END, **mark}}
    special |= {"unk_token": {"content": _END, **mark}, "pad_token": _END}
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    contents = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines]) + "\n",
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(config),
    }
    return write_folder(
        folder,
        lambda temporary: [(temporary / name).write_text(text, encoding="utf-8") for name, text in contents.items()],
    )


def _letters_of_bytes() -> dict[int, str]:
    """Byte → the letter that stands for it in the merges, in the vocabulary's order (OpenAI's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
