"""What was trained, in the Extra Networks browser: the file with a picture, its words, weight and version."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..trainer.core.errors import StorageError
from ..trainer.core.files import explained_os_errors, write_atomic, write_file
from ..trainer.training.runs.index import newest_preview
from ..trainer.training.runs.layout import RunLayout
from . import host
from .jobs import TRAIN, Job

PREFERRED_WEIGHT = 0.9
_LONGEST_PHRASE = 100  # characters
_CONFIG_KEY = "dreambooth.config"  # of trainer.settings.sharing, which needs pydantic
_BUNDLED = "bundle_emb."  # of trainer.adapters.keys and embeddings, likewise
_BUNDLED_ALONE = "string_to_param.*"
_ALONE = "emb_params"
_VERSIONS = {"stable-diffusion-v1": "SD1", "stable-diffusion-v2": "SD2", "stable-diffusion-xl": "SDXL"}
"""Beginning of a file's architecture → what the browser calls it."""


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


def deliver(job: Job) -> Path:
    """Copy a finished training's file into the host's LoRA folder under a free name, with its card; returns the path.

    Raises:
        StorageError: The folder can't be written.
    """
    made = made_by(job)
    path = write_file(
        host.loras_folder() / made.name, lambda temporary: shutil.copyfile(made, temporary), replace=False
    )
    run = job.progress().facts.get("run")
    write_card(path, RunLayout(host.data_folder() / "runs" / str(run)) if run else None)
    return path


def write_card(path: Path, run: RunLayout | None = None, words: str = "") -> None:
    """Write picture and words beside a LoRA file, and the embeddings that it bundles among the host's.

    The words call these embeddings, since Forge reads none in a LoRA file.

    Args:
        path: The file; its metadata has the family.
        run: Whose newest sample becomes the picture; None: there is no picture.
        words: That call what it shows; "": they are looked for in the settings of the run, then in the metadata.

    Raises:
        StorageError: They can't be written, or the file is damaged.
    """
    metadata = _metadata(path)
    words = words or (run and _words_in(run.record.get("settings"))) or _words_of_file(metadata)
    for word, name in _unbundled(path).items():
        words = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", name, words)
    architecture = metadata.get("modelspec.architecture", "")
    card = {
        "description": metadata.get("modelspec.title", ""),
        "sd version": next((name for start, name in _VERSIONS.items() if architecture.startswith(start)), "Unknown"),
        "activation text": words,
        "preferred weight": PREFERRED_WEIGHT,
        "negative text": "",
        "notes": "",
    }
    write_atomic(path.with_suffix(".json"), json.dumps(card, indent=4, ensure_ascii=False).encode())
    preview = newest_preview(run) if run else None
    if run and preview:
        write_file(path.with_suffix(".preview.png"), lambda temporary: shutil.copyfile(run.path / preview, temporary))


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
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is damaged
        card = None
    said = card.get("activation text") if isinstance(card, dict) else None
    try:
        return said.strip() if isinstance(said, str) and said.strip() else _words_of_file(_metadata(path))
    except StorageError:  # it is gone since
        return ""


def _metadata(path: Path) -> dict[str, str]:
    """A LoRA file's metadata.

    Raises:
        StorageError: It can't be read, or is damaged.
    """
    try:
        with explained_os_errors(path), safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise StorageError(
            f"{path} is not a complete LoRA file: {error}.", "Delete it, and use another checkpoint of its run."
        ) from error


def _words_of_file(metadata: Mapping[str, str]) -> str:
    """The words that a file says call it; of its trigger phrase, which may be a whole caption, only what is short."""
    try:
        settings = json.loads(metadata.get(_CONFIG_KEY, ""))
    except ValueError:
        settings = None
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    return _words_in(settings) or (phrase if len(phrase) <= _LONGEST_PHRASE else "")


def _words_in(settings: Any) -> str:
    """The words that call a run's subject, such as "sks dog"; "" if its prompt does not say them by its settings.

    Of several subjects, the words of each.
    """
    if not isinstance(settings, dict):
        return ""
    tables = settings.get("subject")
    if isinstance(tables, list) and tables:
        return ", ".join(dict.fromkeys(filter(None, map(_words_in, tables))))
    prompt, noun = (str(settings.get(name, "")) for name in ("instance_prompt", "class_noun"))
    words = f"{settings.get('token', '')} {noun}".strip()
    return words if "{token}" in prompt or (noun and words in prompt) else ""
