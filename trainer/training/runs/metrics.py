"""A run's metrics as JSON lines: one for every step, and one for every preview with its scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ...core.errors import CancelledError, StorageError, TrainerError
from ...core.events import Event, Listener, Preview, Step, Validation
from ...core.files import explained_os_errors, write_atomic

DONE, STOPPED, FAILED = "done", "stopped", "failed"
VALIDATION_LOSS = "validation_loss"
_KINDS = {"loss", "scores", VALIDATION_LOSS, "state"}  # what a line of a step may be about
_TAIL = 16_384  # bytes
_NUMBERS = ("loss", "learning_rate", "rate", "memory", VALIDATION_LOSS)


class RecordedListener:
    """Writes steps and previews to a file, each at once, and passes everything on to another listener.

    A line has "step" and "loss", "learning_rate", "rate" and "memory", or "scores" and "pictures", or
    "validation_loss". As a context manager it ends with a line that has "state", and "problem" and "remedy" of a
    failed run, with settings not worded yet.
    """

    def __init__(self, listener: Listener, path: Path, after: int, reached: int = 0) -> None:
        """Go on with a file.

        Args:
            listener: Gets every event, too.
            path: The file; what it holds of a course that was lost, because nothing was saved of it, is dropped.
            after: Steps that are done.
            reached: The newest step that is saved; later than `after` if the run is shorter now than it was.

        Raises:
            StorageError: The file can't be written.
        """
        self._listener = listener
        self._path = path
        self._step = after
        former = [line for line in read_metrics(path) if line["step"] <= max(after, reached) and "state" not in line]
        self._recorded = {line["step"] for line in former if "loss" in line}
        _write(path, former)
        with explained_os_errors(path):
            self._file: TextIO = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `close`

    def __enter__(self) -> RecordedListener:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Write how the run ended, and close the file."""
        line = {"step": self._step} | ending(error)
        with contextlib.suppress(StorageError):  # the disk's trouble is reported already
            self._add(line)
        self.close()

    def report(self, event: Event) -> None:
        """Write a step, a preview or a validation; pass everything on."""
        if isinstance(event, Step):
            self._step = event.step
            if event.step in self._recorded:  # of the same course, which went further then
                self._listener.report(event)
                return
            facts = {"loss": event.loss, "learning_rate": event.learning_rate, "rate": event.rate}
            self._add({"step": event.step, **facts, "memory": event.memory})
        elif isinstance(event, Preview):
            pictures = [[path.name, prompt] for path, prompt in event.pictures]
            self._add({"step": event.step, "scores": dict(event.scores), "pictures": pictures})
        elif isinstance(event, Validation):
            self._add({"step": event.step, VALIDATION_LOSS: event.loss})
        self._listener.report(event)

    def should_stop(self) -> bool:
        """Whether the other listener asks to stop."""
        return self._listener.should_stop()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written, which was reported then
            self._file.close()

    def _add(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self._path} can't be written: {error.strerror}.",
                "Free some space on the disk and start again; the run will resume.",
            ) from error


def read_metrics(path: Path, after: int = -1) -> list[dict[str, Any]]:
    """The lines of a metrics file by steps; none if there is none. Incomplete lines are skipped.

    Of several lines of a step with the same keys, the last counts: a shortened run measures again.

    Args:
        path: The file.
        after: Only what comes after this step; only the necessary part of the file's end is read.
    """
    lines = _lines(path) if after < 0 else _lines_since(path, after)
    newest = {(line["step"], *sorted(_KINDS & set(line))): line for line in lines if line["step"] > after}
    return sorted(newest.values(), key=lambda line: ("state" in line, line["step"]))


def record_done(path: Path, step: int) -> None:
    """Write that a run is done, if its metrics file says otherwise, because its adapter could not be written before.

    Args:
        path: The file.
        step: Step whose weights are the result.
    """
    if [line.get("state") for line in last_lines(path)[-1:]] == [DONE]:
        return
    lines = [line for line in read_metrics(path) if "state" not in line]
    with contextlib.suppress(StorageError):  # what the run gives is written
        _write(path, [*lines, {"step": step, "state": DONE}])


def ending(error: BaseException | None) -> dict[str, str]:
    """How work ended with this error: "state" and, if it failed, "problem" and "remedy", not worded yet.

    Args:
        error: None if there was none.
    """
    if error is None:
        return {"state": DONE}
    if isinstance(error, TrainerError):
        problem, remedy = error.unworded
        return {"state": FAILED, "problem": problem, "remedy": remedy}
    if isinstance(error, Exception) and not isinstance(error, CancelledError):
        return {"state": FAILED, "problem": f"{type(error).__name__}: {error}", "remedy": ""}
    return {"state": STOPPED}


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of a metrics file, in order, however long it is; none if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return list(_parsed(text))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield from _parsed(text)


def _lines_since(path: Path, step: int) -> list[dict[str, Any]]:
    """The end of a metrics file, which holds all lines after a step: losses are in the order of their steps."""
    size = _TAIL
    try:
        with open(path, "rb") as file:
            length = path.stat().st_size
            while True:
                start = max(0, length - size)
                file.seek(start)
                lines = list(_parsed(file.read().decode("utf-8", "replace")))
                if start == 0 or any("loss" in line and line["step"] <= step for line in lines):
                    return lines
                size *= 4
    except OSError:
        return []


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and _is_well_formed(content):
            yield content


def _is_well_formed(line: Mapping[str, Any]) -> bool:
    """Whether a line has a step, and numbers where it should have numbers."""
    numbers = [line[key] for key in _NUMBERS if key in line]
    scores = line.get("scores") or {}
    if not isinstance(scores, dict) or not is_number(line.get("step")) or ("loss" in line) > ("learning_rate" in line):
        return False
    return isinstance(line["step"], int) and all(map(is_number, [*numbers, *scores.values()]))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that fits a float; `true` and `false` are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def preview_scores(path: Path) -> dict[int, dict[str, float]]:
    """Step → scores of the previews in a metrics file."""
    return {line["step"]: line["scores"] for line in read_metrics(path) if isinstance(line.get("scores"), dict)}


def measured(line: Mapping[str, Any]) -> dict[str, float]:
    """What a metrics line has besides the training loss: preview scores, loss on held-out pictures."""
    metrics = dict(line.get("scores") or {})
    if VALIDATION_LOSS in line:
        metrics[VALIDATION_LOSS] = line[VALIDATION_LOSS]
    return metrics


def validated_steps(path: Path) -> list[int]:
    """Steps with a loss on the held-out pictures in a metrics file."""
    return [line["step"] for line in read_metrics(path) if VALIDATION_LOSS in line]
