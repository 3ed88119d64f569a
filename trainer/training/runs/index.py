"""All runs below one folder, for whoever shows them: what each is, its curve, its files, and removing one.

Names come from outside here, such as a browser: none of them leads out of the folder of its run.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import SettingsError
from ...core.files import explained_os_errors
from .folder import RunFolder
from .metrics import DONE, STOPPED, last_lines, measured, read_metrics

_FILES = re.compile(
    r"(run\.json|workflow\.json|metrics\.jsonl"
    r"|subject/\d{2}\.jpg"
    r"|previews/step-\d{8}/(subject|class)-\d{2}-\d{2}\.png"
    r"|(step-\d{8}/adapter|adapters/step-\d{8})\.safetensors)",
    re.ASCII,
)
_LONGEST_NAME = 255


@dataclass(frozen=True)
class RunIndex:
    """The folder of all runs.

    Attributes:
        root: Its path; need not exist.
    """

    root: Path

    def names(self) -> list[str]:
        """The runs' folder names, the newest first."""
        found = []
        for path in self.root.glob("*/run.json"):
            if not path.parent.is_symlink():
                found.append((_changed_at(path.parent), path.parent.name))
        return [name for _, name in sorted(found, reverse=True)]

    def run(self, name: str) -> RunFolder:
        """The run of that folder name.

        Raises:
            SettingsError: There is none, or the name leads elsewhere.
        """
        path = self.root / name
        plain = 0 < len(name.encode(errors="replace")) <= _LONGEST_NAME and name not in (".", "..")
        plain = plain and not any(letter in "/\\\0:" or letter < " " for letter in name)
        try:
            known = plain and not path.is_symlink() and (path / "run.json").is_file()
        except (OSError, ValueError):
            known = False
        if not known:
            raise SettingsError(f"There is no run '{name[:80]}'.", "Refresh the list of runs.")
        return RunFolder(path)

    def file(self, name: str, relative: str) -> Path:
        """A file of a run that may be shown or fetched.

        Args:
            name: The run's folder name.
            relative: Path in it, with forward slashes.

        Raises:
            SettingsError: There is no such run or file, or it is none that is shown.
        """
        folder = self.run(name).path
        path = folder / relative if _FILES.fullmatch(relative) else None
        if path is None or not path.is_file() or folder.resolve() not in path.resolve().parents:
            raise SettingsError(f"The run has no file '{relative[:80]}' to show.", "Refresh the list of runs.")
        return path

    def summary(self, name: str) -> dict[str, Any]:
        """What a list shows of a run, as plain values; cheap, whatever the run's length.

        "id", "name", "started_at" and "changed_at" (Unix times), "steps" (wanted), "step" (done), "state" ("done",
        "stopped" or "failed"; who trains knows better which are running), "problem" and "remedy" of a failed one,
        "loss" and "preview" (the newest picture's path in the run) if there are any.
        """
        run = self.run(name)
        settings = run.record.get("settings", {})
        lines = last_lines(run.metrics_path)
        wanted, done = int(settings.get("steps", 0)), max(run.steps(), default=0)
        step = max([done, *(line["step"] for line in lines)])
        loss = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
        found: dict[str, Any] = {
            "id": name,
            "name": run.name,
            "base": settings.get("base", ""),
            "started_at": run.started_at,
            "changed_at": _changed_at(run.path),
            "steps": max(wanted, step),  # a run may go on for more steps than it began with
            "step": step,
            "state": DONE if wanted and done >= wanted else STOPPED,
            "loss": None if loss is None else _short(loss),
            "preview": newest_preview(run),
        }
        ended = lines[-1] if lines and "state" in lines[-1] else {}
        return found | {key: ended[key] for key in ("state", "problem", "remedy", "best") if key in ended}

    def details(self, name: str) -> dict[str, Any]:
        """All of a run but its curve: summary, settings, files with sizes, previews, the subject's pictures.

        Raises:
            SettingsError: There is no such run.
            StorageError: It can't be read, such as one that is being removed.
        """
        run = self.run(name)
        with explained_os_errors(run.path):
            previews = {
                int(folder.name[5:]): sorted(path.name for path in folder.glob("subject-*.png"))
                for folder in sorted((run.path / "previews").glob("step-*"))
                if folder.name[5:].isdecimal()
            }
            return self.summary(name) | {
                "settings": run.record.get("settings", {}),
                "adapters": [
                    {"step": step, "file": path.relative_to(run.path).as_posix(), "bytes": _bytes(path)}
                    for step, path in run.adapters().items()
                ],
                "previews": previews,
                "subject": sorted(path.name for path in run.subject_path.glob("*.jpg")),
                "workflow": run.workflow_path.is_file(),
                "bytes": sum(_bytes(Path(place, file)) for place, _, files in os.walk(run.path) for file in files),
            }

    def curve(self, name: str, after: int = -1) -> dict[str, Any]:
        """The metrics of a run beyond a step, column by column: "steps", "losses", "rates", and "scores" by step."""
        lines = [line for line in read_metrics(self.run(name).metrics_path) if line["step"] > after]
        steps = [line for line in lines if "loss" in line]
        return {
            "steps": [line["step"] for line in steps],
            "losses": [_short(line["loss"]) for line in steps],
            "rates": [_short(line["learning_rate"]) for line in steps],
            "scores": [
                {"step": line["step"], "scores": {name: _short(value) for name, value in scores.items()}}
                for line in lines
                if (scores := measured(line))
            ],
        }

    def delete(self, name: str) -> None:
        """Remove a run with all its files.

        Raises:
            SettingsError: There is no such run.
            StorageError: It can't be removed.
        """
        path = self.run(name).path
        aside = path.with_name(f".deleted-{uuid.uuid4().hex[:8]}")
        with explained_os_errors(path):
            path.rename(aside)  # at once or not at all
            shutil.rmtree(aside)


def newest_preview(run: RunFolder) -> str | None:
    """Path in the run of the newest preview's first picture; None if there is none."""
    pictures = sorted((run.path / "previews").glob("step-*/subject-00-00.png"))
    return pictures[-1].relative_to(run.path).as_posix() if pictures else None


def _changed_at(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.glob("*.json*")))
    except OSError:
        return 0.0


def _bytes(file: Path) -> int:
    """Its size; 0 of a file that is gone, such as that of a checkpoint while newer ones are written."""
    try:
        return file.lstat().st_size
    except OSError:
        return 0


def _short(value: float) -> float | None:
    """Six digits are enough for a curve; what is no finite number is None, as JSON knows none."""
    return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None
