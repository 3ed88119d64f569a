"""All runs in one folder: a run's summary, its curve, its files, and deleting it.

Names of runs and files come from outside, such as a browser: none can point outside its run's folder.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import SettingsError
from ...core.files import delete_at_once, explained_os_errors, is_temporary
from .layout import (
    ADAPTER_FILE,
    ADAPTERS_FOLDER,
    METRICS_FILE,
    PREVIEW_PATTERN,
    PREVIEWS_FOLDER,
    RECORD_FILE,
    STEP_PATTERN,
    SUBJECT_FOLDER,
    WORKFLOW_FILE,
    RunLayout,
    preview_name,
    step_of,
)
from .metrics import DONE, STOPPED, is_number, last_lines, measured, read_metrics

_SHOWN_FILES = re.compile(
    "|".join(
        [
            *map(re.escape, (RECORD_FILE, WORKFLOW_FILE, METRICS_FILE)),
            rf"{SUBJECT_FOLDER}/\d{{2}}\.jpg",
            rf"{PREVIEWS_FOLDER}/{STEP_PATTERN}/{PREVIEW_PATTERN}",
            rf"{STEP_PATTERN}/{re.escape(ADAPTER_FILE)}",
            rf"{ADAPTERS_FOLDER}/{STEP_PATTERN}\.safetensors",
        ]
    ),
    re.ASCII,
)
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class RunIndex:
    """The runs in one folder.

    Attributes:
        root: The folder; need not exist.
    """

    root: Path

    def names(self) -> list[str]:
        """The runs' folder names, the newest first."""
        folders = [path.parent for path in self.root.glob(f"*/{RECORD_FILE}")]
        folders = [folder for folder in folders if not folder.is_symlink() and not is_temporary(folder)]
        dated = sorted(((_changed_at(folder), folder.name) for folder in folders), reverse=True)
        return [name for _, name in dated]

    def run(self, name: str) -> RunLayout:
        """The run of that folder name.

        Raises:
            SettingsError: There is none, or the name points elsewhere.
        """
        path = self.root / name
        try:
            exists = _is_plain(name) and not path.is_symlink() and (path / RECORD_FILE).is_file()
        except (OSError, ValueError):
            exists = False
        if not exists:
            raise SettingsError(f"There is no run '{name[:80]}'.", "Refresh the list of runs.")
        return RunLayout(path)

    def with_fingerprint(self, fingerprint: str) -> RunLayout | None:
        """The newest run of that fingerprint, by which an adapter file names it, or None."""
        runs = (RunLayout(self.root / name) for name in (self.names() if fingerprint else ()))
        return next((run for run in runs if run.record.get("fingerprint") == fingerprint), None)

    def file(self, name: str, relative: str) -> Path:
        """A file of a run that may be shown or downloaded.

        Args:
            name: The run's folder name.
            relative: Path in it, with forward slashes.

        Raises:
            SettingsError: There is no such run or file, or the file is not one that may be shown.
        """
        folder = self.run(name).path
        path = folder / relative if _SHOWN_FILES.fullmatch(relative) else None
        if path is None or not path.is_file() or folder.resolve() not in path.resolve().parents:
            raise SettingsError(f"The run has no file '{relative[:80]}' to show.", "Refresh the list of runs.")
        return path

    def summary(self, name: str) -> dict[str, Any]:
        """What a list shows of a run, as plain values; fast, whatever the run's length.

        "id", "name", "base", "started_at" and "changed_at" (Unix times), "steps" (requested), "step" (completed),
        "state" ("done", "stopped" or "failed"; the caller knows which are running), "loss" and "preview"
        (path of the newest picture in the run), each None if there is none; and, for a run that ended, "problem" and
        "remedy" if it failed, and "best" if it has one.
        """
        run = self.run(name)
        settings = run.record.get("settings", {})
        lines = last_lines(run.metrics_path)
        requested = settings.get("steps", 0)
        requested = int(requested) if is_number(requested) and math.isfinite(requested) else 0
        saved = max(run.steps(), default=0)
        step = max([saved, *(line["step"] for line in lines)])
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        summary: dict[str, Any] = {
            "id": name,
            "name": run.name,
            "base": settings.get("base", ""),
            "started_at": run.started_at,
            "changed_at": _changed_at(run.path),
            "steps": max(requested, step),  # a run may go on for more steps than it began with
            "step": step,
            "state": DONE if requested and saved >= requested else STOPPED,
            "loss": _rounded(max(losses)[1]) if losses else None,
            "preview": newest_preview(run),
        }
        if lines and "state" in lines[-1]:
            end = lines[-1]
            summary |= {key: end[key] for key in ("state", "problem", "remedy", "best") if key in end}
        return summary

    def details(self, name: str) -> dict[str, Any]:
        """A run except its curve: summary, settings, files with sizes, previews, the subject's pictures.

        Raises:
            SettingsError: There is no such run.
            StorageError: It can't be read, for instance while it is being deleted.
        """
        run = self.run(name)
        with explained_os_errors(run.path):
            previews = {
                step: sorted(path.name for path in folder.glob("subject-*.png"))
                for folder in sorted(run.previews_path.glob("*"))
                if (step := step_of(folder)) is not None
            }
            all_files = [Path(folder, file) for folder, _, files in os.walk(run.path) for file in files]
            return self.summary(name) | {
                "settings": run.record.get("settings", {}),
                "adapters": [
                    {"step": step, "file": path.relative_to(run.path).as_posix(), "bytes": _size(path)}
                    for step, path in run.adapters().items()
                ],
                "previews": previews,
                "subject": sorted(path.name for path in run.subject_path.glob("*.jpg")),
                "workflow": run.workflow_path.is_file(),
                "bytes": sum(_size(path) for path in all_files),
            }

    def curve(self, name: str, after: int = -1) -> dict[str, Any]:
        """The metrics of a run after a step, column by column: "steps", "losses", "rates", and "scores" by step."""
        lines = read_metrics(self.run(name).metrics_path, after)
        steps = [line for line in lines if "loss" in line]
        return {
            "steps": [line["step"] for line in steps],
            "losses": [_rounded(line["loss"]) for line in steps],
            "rates": [_rounded(line["learning_rate"]) for line in steps],
            "scores": [
                {"step": line["step"], "scores": {metric: _rounded(value) for metric, value in scores.items()}}
                for line in lines
                if (scores := measured(line))
            ],
        }

    def delete(self, name: str) -> None:
        """Delete a run with all its files.

        Raises:
            SettingsError: There is no such run.
            BusyError: A process is training it.
            StorageError: It can't be deleted.
        """
        path = self.run(name).path
        lock = RunLayout(path).lock
        if not lock.acquire():
            raise lock.refusal(f"The run {name} is being trained", "Stop it first.")
        try:
            if os.name == "nt":  # where a folder with an open file can't be moved; nor can it if a process takes it now
                lock.release()
            with explained_os_errors(path):
                delete_at_once(path)
        finally:
            lock.release()


def newest_preview(run: RunLayout) -> str | None:
    """Path in the run of the newest preview's first picture; None if there is none."""
    pictures = sorted(run.previews_path.glob(f"*/{preview_name('subject', 0, 0)}"))
    return pictures[-1].relative_to(run.path).as_posix() if pictures else None


def _is_plain(name: str) -> bool:
    """Whether a name is one of a folder, with nothing in it that leads elsewhere on any system."""
    if name in ("", ".", "..") or len(name.encode(errors="replace")) > _MAX_NAME_BYTES:
        return False
    return not any(character in "/\\\0:" or character < " " for character in name)


def _changed_at(folder: Path) -> float:
    """When a run's records last changed, as a Unix time; 0.0 if it is gone."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.glob("*.json*")))
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    """A file's size in bytes; 0 if it is gone, such as that of a checkpoint while newer ones are written."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _rounded(value: float) -> float | None:
    """A number with six digits, which are enough for a curve; None if it is not finite, which JSON can't express."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
