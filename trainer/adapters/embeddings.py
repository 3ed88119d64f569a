"""Embeddings of learned words (textual inversion): bundled in an adapter file, or in a separate file.

| where | one text encoder | SDXL |
|---|---|---|
| bundled with an adapter | bundle_emb.<word>.string_to_param.* | bundle_emb.<word>.clip_l, bundle_emb.<word>.clip_g |
| a separate file | emb_params | clip_l, clip_g |

Source: extensions-builtin/Lora/networks.py and modules/textual_inversion of AUTOMATIC1111's stable-diffusion-webui;
comfy/sd1_clip.py of ComfyUI, which reads both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import AdapterError
from ..core.files import write_file
from ..core.tensor_files import read_tensors, save_tensors
from ..models.families.base import DiffusionModel, Family, LearnedWord
from .keys import embedding_key, embedding_names, is_embedding

logger = logging.getLogger("dreambooth_lora")
_BUNDLED_ALONE = "string_to_param.*"
_FILE_ALONE = "emb_params"


def bundled_embeddings(words: Iterable[LearnedWord], family: Family) -> dict[str, Tensor]:
    """The tensors of words by their names in an adapter file, "bundle_emb.<word>.<part>"."""
    return {
        embedding_key(word.word, part): tensor
        for word in words
        for part, tensor in _parts(word, family, _BUNDLED_ALONE).items()
    }


def words_of(embeddings: Mapping[str, Tensor], family: Family) -> list[LearnedWord]:
    """The bundled words of an adapter for a model of that family.

    Args:
        embeddings: As `Adapter.embeddings` has them.
        family: The model's.

    Raises:
        AdapterError: One is made for another family.
    """
    words = []
    for name in embedding_names(embeddings):
        start = embedding_key(name, "")
        parts = {key.removeprefix(start): tensor for key, tensor in embeddings.items() if key.startswith(start)}
        words.append(_word(name, parts, family))
    return words


def read_embedding(path: Path, family: Family) -> LearnedWord:
    """The word of an embedding file, which has the file's name.

    Raises:
        AdapterError: Missing, damaged, or not an embedding for a model of that family.
    """
    try:
        tensors = read_tensors(path)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"The embedding {path} can't be read: {error}.",
            "Check the path; the file must be a complete .safetensors file.",
        ) from error
    if any(is_embedding(key) for key in tensors):
        raise AdapterError(
            f"{path.name} is an adapter with bundled embeddings, not an embedding.",
            "Load it as an adapter; its embeddings are loaded with it.",
        )
    try:
        return _word(path.stem, tensors, family)
    except AdapterError as error:
        raise error.about(path.name) from None


def write_embedding(path: Path, word: LearnedWord, family: Family, metadata: Mapping[str, str]) -> Path:
    """Write a word's file, float32, under this name or the next free one; returns its path.

    Raises:
        NotFiniteError: A value is NaN or infinite.
        StorageError: The file can't be written.
    """
    tensors = _parts(word, family, _FILE_ALONE)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return write_file(path, lambda temporary: save_tensors(temporary, tensors, metadata), size, replace=False)


def learn(model: DiffusionModel, word: LearnedWord) -> None:
    """Add a word to those that a model has learned.

    Raises:
        AdapterError: It is of another width, or the model has learned it with other vectors.
    """
    _require_width(model, word)
    for other in model.words:
        if other.word.lower() == word.word.lower() and not _are_equal(other, word):
            raise AdapterError(
                f"Two different embeddings have the name '{word.word}'.", "Use one of the two, or rename its file."
            )
    model.learn([*(other for other in model.words if other.word.lower() != word.word.lower()), word])


def learn_bundled(model: DiffusionModel, embeddings: Mapping[str, Tensor]) -> None:
    """Add an adapter's bundled words to those that a model has learned, with a warning for those that don't fit.

    Raises:
        AdapterError: The model has learned one of them with other vectors.
    """
    for name in embedding_names(embeddings):
        start = embedding_key(name, "")
        parts = {key: tensor for key, tensor in embeddings.items() if key.startswith(start)}
        try:
            [word] = words_of(parts, model.family)
            _require_width(model, word)
        except AdapterError as error:
            logger.warning("A bundled embedding was skipped. %s", error.problem)
            continue
        learn(model, word)


def _require_width(model: DiffusionModel, word: LearnedWord) -> None:
    """Check that a model's text encoders can read a word's vectors.

    Raises:
        AdapterError: They are of another width.
    """
    for encoder, vectors in word.vectors.items():
        width = model.token_embeddings(encoder, "").shape[-1]
        if vectors.shape[-1] != width:
            raise AdapterError(
                f"The vectors of the embedding '{word.word}' have {vectors.shape[-1]} dimensions, but this model's "
                f"{encoder} expects {width}.",
                f"Use an embedding made for a model of this family ({model.family.title}) and size.",
            )


def _are_equal(one: LearnedWord, other: LearnedWord) -> bool:
    return one.vectors.keys() == other.vectors.keys() and all(
        torch.equal(vectors.detach().cpu().float(), other.vectors[encoder].detach().cpu().float())
        for encoder, vectors in one.vectors.items()
    )


def file_stem(adapter_stem: str, word: str) -> str:
    """The name of a word's file, without extension: that of the adapter's file and the word.

    Automatic1111 uses an embedding wherever its file's name occurs in a prompt, so it must not be an ordinary word.
    """
    return f"{adapter_stem}-{prompt_name(word)}"


def prompt_name(word: str) -> str:
    """A word as a file name that a prompt can refer to: letters, digits, underscores and dashes."""
    return re.sub(r"[^\w-]+", "-", word).strip("-") or "word"


def _parts(word: LearnedWord, family: Family, alone: str) -> dict[str, Tensor]:
    """A word's tensors by their parts' names; `alone` is that of a single text encoder's."""
    encoders = family.text_encoders
    names = {spec.name: spec.short_name if len(encoders) > 1 else alone for spec in encoders}
    return {
        names[encoder]: vectors.detach().to("cpu", torch.float32).contiguous()
        for encoder, vectors in word.vectors.items()
    }


def _word(name: str, parts: Mapping[str, Tensor], family: Family) -> LearnedWord:
    """A word of the tensors that stand for it.

    Raises:
        AdapterError: They are not what a model of the family reads.
    """
    encoders = family.text_encoders
    vectors = {spec.name: parts[spec.short_name] for spec in encoders if spec.short_name in parts}
    if len(encoders) == 1 and not vectors and len(parts) == 1:
        vectors = {encoders[0].name: next(iter(parts.values()))}  # whatever its program calls it
    if len(vectors) != len(parts) or not vectors:
        raise AdapterError(
            f"The embedding '{name}' has the parts {', '.join(sorted(parts)) or 'none'}, which do not match "
            f"{family.title}.",
            f"Use an embedding made for a model of this family: {' and '.join(_names(family))}.",
        )
    for part, tensor in parts.items():
        if tensor.ndim not in (1, 2) or not tensor.is_floating_point() or not tensor.numel():
            raise AdapterError(
                f"The embedding '{name}' is damaged: {part} has shape {tuple(tensor.shape)} and type "
                f"{str(tensor.dtype).removeprefix('torch.')}.",
                "Use a textual inversion embedding in safetensors format.",
            )
    return LearnedWord(name, {encoder: tensor.reshape(-1, tensor.shape[-1]) for encoder, tensor in vectors.items()})


def _names(family: Family) -> list[str]:
    encoders = family.text_encoders
    return [spec.short_name for spec in encoders] if len(encoders) > 1 else [_FILE_ALONE]
