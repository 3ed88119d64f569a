"""A command that another program watches: its events as lines of a file, and a file that stops it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from ..core.errors import StorageError
from ..core.events import Event, Note, Phase, Preview, RunOpened, Step, Validation
from ..core.files import explained_os_errors
from ..training.runs.metrics import ending

_KINDS: dict[type[Event], str] = {
    Phase: "phase",
    Step: "step",
    Note: "note",
    RunOpened: "run",
    Preview: "preview",
    Validation: "validation",
}
_SECONDS_BETWEEN_LINES = 0.25  # of progress: who watches looks about once a second


def is_shown_elsewhere() -> bool:
    """Whether this is one of several processes of a command, and not the first, which shows what happens."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"


class Watched:
    """What another program sees of a command, and how it stops one; a context manager around all of its work.

    Each line of the event file is a JSON object with "at" (Unix time), "event" and the fields of that event
    (`core.events`): "phase", "step", "note", "run" (its folder is "path"), "preview" or "validation". The last line's
    event is "end", with "state" ("done", "stopped" or "failed"), and "problem" and "remedy" of what failed; there, and
    in a note's "text", settings are not worded yet (`core.errors.worded`). Steps and phases that follow each other in
    less than a quarter of a second are left out, but for the first and the last. A process that was killed leaves no
    "end". Of several processes of one command, the first one writes.

    A stop file needs no signal, which Windows has none of: the work stops at the next safe moment once it exists.
    """

    def __init__(self, events: Path | None = None, stop_file: Path | None = None) -> None:
        """Begin the event file anew.

        Args:
            events: The event file; None: none is written.
            stop_file: The stop file; None: there is none.

        Raises:
            StorageError: The event file can't be written.
        """
        self._stop_file = stop_file
        self._file: TextIO | None = None
        self._written_at = 0.0
        if events is not None and not is_shown_elsewhere():
            with explained_os_errors(events):
                events.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(events, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `__exit__`

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._write("end", ending(error))
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def should_stop(self) -> bool:
        """Whether the stop file exists."""
        return self._stop_file is not None and os.path.exists(self._stop_file)

    def report(self, event: Event) -> None:
        """Write an event."""
        if self._file is None:
            return
        if isinstance(event, Step) and event.step < event.steps and not self._is_due():
            return
        if isinstance(event, Phase) and 0 < event.done < event.total and not self._is_due():
            return
        self._write(_KINDS[type(event)], _fields(event))

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._written_at < _SECONDS_BETWEEN_LINES:
            return False
        self._written_at = now
        return True

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        """Add a line; the work goes on without it on a full disk, whose trouble is reported where it counts."""
        if self._file is not None:
            with contextlib.suppress(OSError, StorageError):
                self._file.write(json.dumps({"at": time.time(), "event": event} | facts) + "\n")


def _fields(event: Event) -> dict[str, Any]:
    """An event's fields as JSON has them; of each of a preview's pictures "file" and "prompt"."""
    fields = dataclasses.asdict(event)
    if isinstance(event, Preview):
        fields["pictures"] = [{"file": str(path), "prompt": prompt} for path, prompt in event.pictures]
        fields["scores"] = dict(event.scores)
    elif isinstance(event, RunOpened):
        fields["path"] = str(event.path)
    return fields
