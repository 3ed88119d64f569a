"""What was trained, in the Extra Networks browser: the file with a picture, its words, weight and version."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from ..trainer.core.errors import StorageError
from ..trainer.core.files import write_atomic, write_file
from ..trainer.training.gallery import (
    CARD,
    file_metadata,
    is_wanted,
    recommended_strength,
    words_for,
    write_gallery,
)
from ..trainer.training.runs.layout import RunLayout
from . import host
from .jobs import TRAIN, Job

_BUNDLED = "bundle_emb."  # of trainer.adapters.keys and embeddings, likewise
_BUNDLED_ALONE = "string_to_param.*"
_ALONE = "emb_params"


def made_by(job: Job) -> Path:
    """The LoRA file that a job made.

    Raises:
        StorageError: There is none.
    """
    made = [Path(line) for line in job.output() if line.endswith(".safetensors")]
    if made and made[-1].is_file():
        return made[-1]
    if job.kind == TRAIN:
        raise StorageError(
            f"The training '{job.name}' is done, but its file no longer exists.",
            "Open the run in the list of runs, and use one of its checkpoints.",
        )
    raise StorageError(
        f"'{job.name}' is done, but its file no longer exists.", f"Run it again: {job.kind} does not change any LoRA."
    )


def deliver(job: Job) -> tuple[Path, float]:
    """Copy a finished training's file into the host's LoRA folder under a free name, with its card.

    Returns:
        The path, and the recommended weight.

    Raises:
        StorageError: The folder can't be written.
    """
    made = made_by(job)
    path = write_file(
        host.loras_folder() / made.name, lambda temporary: shutil.copyfile(made, temporary), replace=False
    )
    name = job.progress().facts.get("run")
    run = RunLayout(host.data_folder() / "runs" / str(name)) if name else None
    write_card(path, run)
    return path, recommended_strength(path, run)


def write_card(path: Path, run: RunLayout | None = None, words: str = "") -> None:
    """Write picture and cards beside a LoRA file, and the embeddings that it bundles among the host's.

    The words call these embeddings, since Forge reads none in a LoRA file.

    Args:
        path: The file; its metadata has the family.
        run: The run that it comes from, which may want no such files; None: there is no picture.
        words: The trigger words; "": those in the settings of the run, or else in the metadata.

    Raises:
        StorageError: They can't be written, or the file is damaged.
    """
    words = words or words_for(file_metadata(path), run)
    for word, name in _unbundled(path).items():
        words = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", name, words)
    if run is None or is_wanted(run):
        write_gallery(path, run, words)


def _unbundled(path: Path) -> dict[str, str]:
    """Put the embeddings that a LoRA file bundles among the host's, unless they are there.

    Args:
        path: The file, by whose name and the word each is called.

    Returns:
        The word that each was learned for → its name.

    Raises:
        StorageError: The host's folder can't be written.
    """
    bundled: dict[str, dict[str, Any]] = {}
    with safe_open(str(path), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith(_BUNDLED):
                word, _, part = key.removeprefix(_BUNDLED).partition(".")
                bundled.setdefault(word, {})[_ALONE if part == _BUNDLED_ALONE else part] = file.get_tensor(key)
    return {word: _embedding_of(path, word, save(tensors)) for word, tensors in sorted(bundled.items())}


def _embedding_of(path: Path, word: str, content: bytes) -> str:
    """The name of an embedding file of the host's with that content, which is written if it is not there."""
    safe_word = re.sub(r"[^\w-]+", "-", word).strip("-") or "word"
    wanted = host.embeddings_folder() / f"{path.stem}-{safe_word}.safetensors"
    for file in [wanted, *sorted(wanted.parent.glob(f"{glob.escape(wanted.stem)}-*.safetensors"))]:
        if file.is_file() and file.read_bytes() == content:
            return file.stem
    return write_atomic(wanted, content, replace=False).stem


def joined_words(paths: Iterable[Path]) -> str:
    """The words of several LoRA files, each once: what their cards say, or else their metadata."""
    return ", ".join(dict.fromkeys(filter(None, map(_words_for, paths))))


def _words_for(path: Path) -> str:
    try:
        card = json.loads(path.with_suffix(CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is damaged
        card = None
    said = card.get("activation text") if isinstance(card, dict) else None
    try:
        return said.strip() if isinstance(said, str) and said.strip() else words_for(file_metadata(path))
    except StorageError:  # it is gone since
        return ""
