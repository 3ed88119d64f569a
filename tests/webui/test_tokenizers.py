"""A tokenizer of what the host has: CLIP's own, whoever brings its merges."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from comfy_host import find_comfyui
from pack.webui.tokenizers import made_tokenizer, open_clip_merges

MERGES = ["i n", "t h", "a n</w>", "th e</w>", "d o", "do g</w>"]


def packed(path: Path, lines: list[str]) -> Path:
    """As OpenCLIP brings it: a head, and many more merges than CLIP has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines]).encode()))
    return path


def test_merges_become_a_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    folder = made_tokenizer(packed(tmp_path / "merges.gz", MERGES), tmp_path / "tokenizer")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == [*range(512 + len(MERGES) + 2)]
    known = {"!": 0, "~": 93, "¡": 94, "Ā": 188, "!</w>": 256, "in": 512, "dog</w>": 517}
    assert vocabulary.items() >= (known | {"<|startoftext|>": 518, "<|endoftext|>": 519}).items()
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    assert tokenizer("The dog an").input_ids == [518, 515, 517, 514, 519]
    assert tokenizer.model_max_length == 77
    assert tokenizer("an", padding="max_length", max_length=5).input_ids == [518, 514, 519, 519, 519]


def test_it_is_made_once(tmp_path: Path) -> None:
    merges = packed(tmp_path / "merges.gz", MERGES)
    folder = made_tokenizer(merges, tmp_path / "tokenizer")
    before = (folder / "vocab.json").stat()
    merges.unlink()
    assert made_tokenizer(merges, tmp_path / "tokenizer") == folder
    assert (folder / "vocab.json").stat() == before


def test_more_merges_than_clip_has(tmp_path: Path) -> None:
    lines = [f"{number} x" for number in range(50_000)]
    folder = made_tokenizer(packed(tmp_path / "merges.gz", lines), tmp_path / "tokenizer")
    assert len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) == 49_408


def test_open_clip_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_clip_merges() is None
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("raise ImportError('it is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert open_clip_merges() is None, "without the file"
    merges = packed(tmp_path / "open_clip" / "bpe_simple_vocab_16e6.txt.gz", MERGES)
    assert open_clip_merges() == merges


@pytest.mark.comfy
def test_it_is_clips(tmp_path: Path) -> None:
    """Word for word the one that ComfyUI brings."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI")
    real = comfyui / "comfy" / "sd1_tokenizer"
    lines = (real / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    made = made_tokenizer(packed(tmp_path / "merges.gz", [*lines, "more merges"]), tmp_path / "tokenizer")
    wanted = json.loads((real / "vocab.json").read_text(encoding="utf-8"))
    assert json.loads((made / "vocab.json").read_text(encoding="utf-8")) == wanted
    assert (made / "merges.txt").read_text(encoding="utf-8").splitlines()[1:] == lines
