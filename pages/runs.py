"""The runs as pages show them, worded for their host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trainer.core.errors import AdapterError, TrainerError, Wording, worded
from ..trainer.core.files import write_atomic
from ..trainer.training.runs.index import RunIndex
from ..trainer.training.runs.layout import RunLayout
from .urls import details_with_urls, summary_with_urls


def take_checkpoint(run: RunLayout, step: int, folder: Path) -> Path:
    """Copy the adapter of a run's step into a folder, under the first free name; returns its path.

    Raises:
        AdapterError: The run has no adapter of that step.
        StorageError: It can't be written.
    """
    adapters = run.adapters()
    if step not in adapters:
        steps = ", ".join(map(str, adapters)) or "none"
        raise AdapterError(f"{run.path.name} has no adapter for step {step}.", f"Choose one of: {steps}.")
    return write_atomic(folder / checkpoint_name(run, step), adapters[step].read_bytes(), replace=False)


def checkpoint_name(run: RunLayout, step: int) -> str:
    """The file name of the adapter of a run's step, outside of the run's folder."""
    name = run.name if Path(run.name).name == run.name else run.path.name  # a record may come from elsewhere
    return f"{name}-{step:06d}.safetensors"


@dataclass(frozen=True)
class RunPages:
    """What pages are told of the runs in one folder.

    Attributes:
        index: The runs.
        wording: How the host words settings.
        is_training: Whether the host is training the run of that id right now.
    """

    index: RunIndex
    wording: Wording
    is_training: Callable[[str], bool]

    def summaries(self) -> list[dict[str, Any]]:
        """All runs (`RunIndex.summary`), the newest first."""
        summaries = []
        for name in self.index.names():
            try:
                summary = summary_with_urls(self.index.run(name), self.index.summary(name))
            except TrainerError:  # removed in the meantime
                continue
            summaries.append(self._completed(summary))
        return summaries

    def details(self, name: str) -> dict[str, Any]:
        """All of a run but its curve (`RunIndex.details`), and the "name" that each of its "adapters" has when used.

        Raises:
            SettingsError: There is no such run.
        """
        run = self.index.run(name)
        details = details_with_urls(run, self.index.details(name))
        for adapter in details["adapters"]:
            adapter["name"] = checkpoint_name(run, adapter["step"])
        return self._completed(details)

    def _completed(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with the state "running" if it is, and what failed in the host's words."""
        failure = {key: worded(summary[key], self.wording) for key in ("problem", "remedy") if key in summary}
        running = {"state": "running"} if self.is_training(str(summary["id"])) else {}
        return dict(summary) | failure | running
