"""The layout of a run's folder, and what can be read from it without its weights; `folder` writes it.

`<name>-<first digits of the fingerprint>` holds `run.json` (the fingerprint and the settings), `cache.safetensors`,
`metrics.jsonl`, `previews/`, and checkpoints `step-00000100/` (see `checkpoint`).

Hosts list runs in their own process, whatever they have installed: nothing here needs more than Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.errors import StorageError
from ...core.files import explained_os_errors
from ...core.locks import FolderLock

RECORD_FILE = "run.json"
WORKFLOW_FILE = "workflow.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FILE = "adapter.safetensors"
CACHE_FILE = "cache.safetensors"
SUBJECT_FOLDER = "subject"
PREVIEWS_FOLDER = "previews"
ADAPTERS_FOLDER = "adapters"
STEP_PATTERN = r"step-\d{8}"
PREVIEW_PATTERN = r"(subject|class)-\d{2}-\d{2}\.png"
_STEP = "step-"


def step_name(step: int) -> str:
    """The name of a step's file or folder; matches `STEP_PATTERN`."""
    return f"{_STEP}{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a file or folder belongs to by its name; None if it does not look like one."""
    digits = path.stem.removeprefix(_STEP)
    return int(digits) if path.stem.startswith(_STEP) and digits.isdecimal() else None


def preview_name(kind: str, prompt: int, index: int) -> str:
    """The name of a preview picture; matches `PREVIEW_PATTERN`.

    Args:
        kind: "subject" or "class".
        prompt: Number of its prompt, from 0.
        index: Number of the picture among those of the prompt, from 0.
    """
    return f"{kind}-{prompt:02d}-{index:02d}.png"


class RunLayout:
    """The folder of one run, for reading.

    Attributes:
        path: The folder.
        lock: Held by the process that trains the run.
    """

    def __init__(self, path: Path) -> None:
        """Take a folder, which exists."""
        self.path = path
        self.lock = FolderLock(path)

    @property
    def record(self) -> dict[str, Any]:
        """What was written when the run started: "fingerprint", "name", "started_at" and "settings".

        Values of the wrong type, in a file that was damaged or edited by hand, are left out.
        """
        types: dict[str, Any] = {"fingerprint": str, "name": str, "started_at": (int, float), "settings": dict}
        record = read_record(self.path)
        return {key: value for key, value in record.items() if isinstance(value, types.get(key, object))}

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.record.get("name", self.path.name))

    @property
    def started_at(self) -> float:
        """Unix time at which the run started; 0 if the record has none."""
        try:
            return float(self.record.get("started_at", 0.0))
        except OverflowError:  # an integer that no time is, in a damaged record
            return 0.0

    @property
    def workflow_path(self) -> Path:
        """The graph that the run belongs to, if it was kept."""
        return self.path / WORKFLOW_FILE

    @property
    def subject_path(self) -> Path:
        """Folder of small pictures of the subject, if they were kept."""
        return self.path / SUBJECT_FOLDER

    @property
    def cache_path(self) -> Path:
        """The run's encoded pictures and captions."""
        return self.path / CACHE_FILE

    @property
    def metrics_path(self) -> Path:
        """The run's metrics (`metrics`)."""
        return self.path / METRICS_FILE

    @property
    def previews_path(self) -> Path:
        """Folder of all previews."""
        return self.path / PREVIEWS_FOLDER

    def preview_path(self, step: int) -> Path:
        """Folder of the previews of that step."""
        return self.previews_path / step_name(step)

    @property
    def base_preview_path(self) -> Path:
        """Folder of the class pictures of the base model, with which previews are compared."""
        return self.previews_path / "base"

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint of that step."""
        return self.path / step_name(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        steps = [step_of(path) for path in self.path.glob(f"{_STEP}*") if not path.suffix]
        return sorted(step for step in steps if step is not None)

    def newest(self, limit: int) -> int:
        """Step of the newest complete checkpoint up to a step; 0 if there is none."""
        return max((step for step in self.steps() if step <= limit), default=0)

    def adapters(self) -> dict[int, Path]:
        """Step → adapter file, ascending: those of the checkpoints, and those kept from older ones."""
        kept = {}
        for path in self.kept_adapters_path.glob("*.safetensors"):
            step = step_of(path)
            if step is not None:
                kept[step] = path
        of_checkpoints = {step: self.checkpoint_path(step) / ADAPTER_FILE for step in self.steps()}
        adapters = kept | {step: path for step, path in of_checkpoints.items() if path.is_file()}
        return dict(sorted(adapters.items()))

    @property
    def kept_adapters_path(self) -> Path:
        """Folder of the adapters of deleted checkpoints."""
        return self.path / ADAPTERS_FOLDER

    def has(self, step: int) -> bool:
        """Whether what was trained up to that step is kept."""
        return step in self.steps() or step in self.adapters()


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a folder's `run.json`; empty if there is none, or it can't be read."""
    path = folder / RECORD_FILE
    try:
        with explained_os_errors(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (StorageError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
