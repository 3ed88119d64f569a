"""What was trained, in the Extra Networks browser: the file with a picture, its words, weight and version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..trainer.core.errors import StorageError
from ..trainer.core.files import explained_os_errors, write_atomic, write_file
from ..trainer.training.runs.index import newest_preview
from ..trainer.training.runs.layout import RunLayout
from . import host
from .jobs import Job

PREFERRED_WEIGHT = 0.9
_VERSIONS = {"stable-diffusion-v1": "SD1", "stable-diffusion-v2": "SD2", "stable-diffusion-xl": "SDXL"}
"""Beginning of a file's architecture → what the browser calls it."""


def deliver(job: Job) -> Path:
    """Copy a finished training's file into the host's LoRA folder under a free name, with its card; returns the path.

    Raises:
        StorageError: The folder can't be written.
    """
    made = [Path(line) for line in job.output() if line.endswith(".safetensors")]
    if not made or not made[-1].is_file():
        raise StorageError(
            f"The training '{job.name}' is done, but its file is gone.",
            "Open the run in the list of runs, and use one of its checkpoints.",
        )
    path = write_file(
        host.loras_folder() / made[-1].name, lambda temporary: shutil.copyfile(made[-1], temporary), replace=False
    )
    run = job.progress().facts.get("run")
    write_card(path, RunLayout(host.data_folder() / "runs" / str(run)) if run else None)
    return path


def write_card(path: Path, run: RunLayout | None = None) -> None:
    """Write picture and words beside a LoRA file.

    Args:
        path: The file; its metadata has the words and the family.
        run: Whose newest sample becomes the picture; None: there is no picture.

    Raises:
        StorageError: They can't be written, or the file is damaged.
    """
    try:
        with explained_os_errors(path), safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise StorageError(
            f"{path} is no whole LoRA file: {error}.", "Remove it, and use another checkpoint of its run."
        ) from error
    architecture = metadata.get("modelspec.architecture", "")
    card = {
        "description": metadata.get("modelspec.title", ""),
        "sd version": next((name for start, name in _VERSIONS.items() if architecture.startswith(start)), "Unknown"),
        "activation text": (run and _words(run)) or metadata.get("modelspec.trigger_phrase", ""),
        "preferred weight": PREFERRED_WEIGHT,
        "negative text": "",
        "notes": "",
    }
    write_atomic(path.with_suffix(".json"), json.dumps(card, indent=4, ensure_ascii=False).encode())
    preview = newest_preview(run) if run else None
    if run and preview:
        write_file(path.with_suffix(".preview.png"), lambda temporary: shutil.copyfile(run.path / preview, temporary))


def _words(run: RunLayout) -> str:
    """The words that call a run's subject, such as "sks dog"; "" if its prompt does not say them by its settings."""
    settings = run.record.get("settings", {})
    if "{token}" not in str(settings.get("instance_prompt", "")):
        return ""
    return f"{settings.get('token', '')} {settings.get('class_noun', '')}".strip()
