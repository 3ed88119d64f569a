"""The CLIP tokenizer: loaded from a folder, or found for a checkpoint that holds none. Never from the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import WeightsError


def _holds_tokenizer(folder: Path) -> bool:
    old = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return old or (folder / "tokenizer.json").is_file()  # all that transformers 5 writes


def load_tokenizer(folder: Path) -> Any:
    """Load a CLIP tokenizer from a folder, never from the network.

    Raises:
        WeightsError: The folder holds none.
    """
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    if not _holds_tokenizer(folder):
        raise WeightsError(
            f"{folder} holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json).",
            "Give a folder that does.",
        )
    kind = CLIPTokenizer if (folder / "vocab.json").is_file() else CLIPTokenizerFast
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"The tokenizer in {folder} can't be read: {error}.", "Copy it again.") from error


def _tokenizer_places(checkpoint: Path) -> Iterator[Path]:
    """Where a CLIP tokenizer may lie: beside the checkpoint, in a ComfyUI above it or this pack, in the hub's cache."""
    yield checkpoint.parent / "tokenizer"
    for start in (checkpoint.resolve(), Path(__file__).resolve()):
        for parent in start.parents:
            yield parent / "comfy" / "sd1_tokenizer"
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return
    for repository, inner in (
        ("openai/clip-vit-large-patch14", ""),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ):
        found = try_to_load_from_cache(repository, f"{inner}vocab.json")
        if isinstance(found, str):
            yield Path(found).parent


def find_tokenizer(checkpoint: Path, given: Path | None) -> Any:
    """The CLIP tokenizer for a single-file checkpoint, which holds none itself.

    Raises:
        WeightsError: None was found; says where one can be taken from.
    """
    if given is not None:
        return load_tokenizer(given)
    for place in _tokenizer_places(checkpoint):
        if _holds_tokenizer(place):
            return load_tokenizer(place)
    raise WeightsError(
        f"No CLIP tokenizer was found for {checkpoint.name}; a single-file checkpoint holds none.",
        "Give --tokenizer FOLDER, such as ComfyUI/comfy/sd1_tokenizer or the tokenizer folder of a diffusers model.",
    )
