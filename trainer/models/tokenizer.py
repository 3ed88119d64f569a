"""Tokenizers: loaded from a folder, or CLIP's found for a checkpoint without one. None is ever downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import WeightsError, suggest


def _holds_tokenizer(folder: Path) -> bool:
    slow_files = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return slow_files or (folder / "tokenizer.json").is_file()  # all that transformers 5 writes


def load_tokenizer(folder: Path, *, clip: bool = True) -> Any:
    """Load a tokenizer from a folder.

    Args:
        folder: With its files.
        clip: Whether it is CLIP's; else the folder determines the class.

    Raises:
        WeightsError: The folder contains none.
    """
    from transformers import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast

    if not _holds_tokenizer(folder):
        raise WeightsError(
            f"{folder} contains no {'CLIP ' if clip else ''}tokenizer (vocab.json and merges.txt, or tokenizer.json).",
            "Use a folder that does.",
        )
    tokenizer_class: Any = CLIPTokenizer if (folder / "vocab.json").is_file() else CLIPTokenizerFast
    if not clip:
        tokenizer_class = AutoTokenizer
    try:
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise anything for files of another shape
        raise WeightsError(f"The tokenizer in {folder} can't be read: {error}.", "Copy it again.") from error


def _candidate_folders(checkpoint: Path) -> Iterator[Path]:
    """Beside the checkpoint, in a ComfyUI above it or above this pack, in the hub's cache."""
    yield checkpoint.parent / "tokenizer"
    for start in (checkpoint.resolve(), Path(__file__).resolve()):
        for parent in start.parents:
            yield parent / "comfy" / "sd1_tokenizer"
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return
    for repository, folder in (
        ("openai/clip-vit-large-patch14", ""),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ):
        cached = try_to_load_from_cache(repository, f"{folder}vocab.json")
        if isinstance(cached, str):
            yield Path(cached).parent


def find_language_tokenizer(text_encoder: Path, base: Path, given: Path | None) -> Any:
    """The tokenizer of a language model that encodes prompts.

    Args:
        text_encoder: Its file or folder; the tokenizer is searched in or next to it, as in transformers and diffusers.
        base: The base model's file; a ComfyUI is searched in the folders above it.
        given: The tokenizer's folder; None: to be searched.

    Raises:
        WeightsError: None was found.
    """
    near = [text_encoder, text_encoder / "tokenizer", text_encoder.parent / "tokenizer"]
    folders = [given] if given is not None else near
    if given is None:
        for start in (base.resolve(), Path(__file__).resolve()):
            folders += [parent / "comfy" / "text_encoders" / "qwen25_tokenizer" for parent in start.parents]
    for folder in folders:
        if given is not None or _holds_tokenizer(folder):
            return load_tokenizer(folder, clip=False)
    raise WeightsError(
        f"No tokenizer was found for {text_encoder.name}; a single file does not include one.",
        f"Set {suggest('tokenizer')} to a folder such as ComfyUI/comfy/text_encoders/qwen25_tokenizer, or the "
        "tokenizer folder of a diffusers model.",
    )


def find_target_tokenizer(folder_name: str, text_encoder: Path, base: Path, given: Path | None) -> Any:
    """T5's tokenizer, for models that use its tokens in addition to a language model's hidden states.

    Args:
        folder_name: Of its folder in diffusers' layout and in ComfyUI.
        text_encoder: The language model's file or folder; the tokenizer is searched in or next to it.
        base: The base model's file; a ComfyUI is searched in the folders above it.
        given: The language model's tokenizer, next to which it is searched first; None: it was not given.

    Raises:
        WeightsError: None was found.
    """
    near = [given.parent] if given is not None else []
    near += [text_encoder, text_encoder.parent]
    for start in (base.resolve(), Path(__file__).resolve()):
        near += [parent / "comfy" / "text_encoders" for parent in start.parents]
    for parent in near:
        if _holds_tokenizer(parent / folder_name):
            return load_tokenizer(parent / folder_name, clip=False)
    raise WeightsError(
        f"No {folder_name} was found next to {text_encoder.name}; this model needs two tokenizers.",
        f"Copy that folder next to it from ComfyUI/comfy/text_encoders/{folder_name} or the model's folder.",
    )


def find_tokenizer(checkpoint: Path, given: Path | None) -> Any:
    """The CLIP tokenizer for a single-file checkpoint, which does not include one.

    Args:
        checkpoint: The file, near which it is searched.
        given: Its folder; None: to be searched.

    Raises:
        WeightsError: None was found; the remedy names where to get one.
    """
    if given is not None:
        return load_tokenizer(given)
    for folder in _candidate_folders(checkpoint):
        if _holds_tokenizer(folder):
            return load_tokenizer(folder)
    raise WeightsError(
        f"No CLIP tokenizer was found for {checkpoint.name}; a single-file checkpoint does not include one.",
        f"Set {suggest('tokenizer')} to a folder such as ComfyUI/comfy/sd1_tokenizer, or the tokenizer folder of a "
        "diffusers model.",
    )
