"""A run's metrics as JSON lines: one for every step, and one for every preview with its scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .errors import StorageError
from .events import Event, Listener, Preview, Step
from .files import explained_os_errors, write_atomic


class RecordedListener:
    """Writes steps and previews to a file, each at once, and tells everything to another listener.

    A line holds "step" and either "loss", "learning_rate", "rate" and "memory", or "scores" and "pictures".
    """

    def __init__(self, listener: Listener, path: Path, after: int) -> None:
        """Go on with a file.

        Args:
            listener: Told of everything.
            path: The file; what it holds beyond step `after` is another course of the run and is dropped.
            after: Steps that count.

        Raises:
            StorageError: The file can't be written.
        """
        self._listener, self._path = listener, path
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= after]
        write_atomic(path, "".join(kept).encode())
        with explained_os_errors(path):
            self._file: TextIO = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `close`

    def tell(self, event: Event) -> None:
        """Note a step or a preview; pass everything on."""
        if isinstance(event, Step):
            facts = {"loss": event.loss, "learning_rate": event.learning_rate, "rate": event.rate}
            self._add({"step": event.step, **facts, "memory": event.memory})
        elif isinstance(event, Preview):
            pictures = [[path.name, prompt] for path, prompt in event.pictures]
            self._add({"step": event.step, "scores": dict(event.scores), "pictures": pictures})
        self._listener.tell(event)

    def should_stop(self) -> bool:
        """Whether the other listener asks to stop."""
        return self._listener.should_stop()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written, which was said then
            self._file.close()

    def _add(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self._path} can't be written: {error.strerror}.",
                "Free some space on the disk and start again: the run resumes.",
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; none if there is none. A line that was not written whole is left out."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            yield found


def preview_scores(path: Path) -> dict[int, dict[str, float]]:
    """Step → scores of the previews in a metrics file."""
    return {line["step"]: line["scores"] for line in read_metrics(path) if isinstance(line.get("scores"), dict)}
