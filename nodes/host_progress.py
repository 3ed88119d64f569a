"""The bridge to ComfyUI, continued: what happens in the engine, shown on a node."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..trainer.core.errors import TrainerError
from ..trainer.core.events import Event, Note, Opened, Phase, Preview, Step, Validation
from ..trainer.training.runs.metrics import VALIDATION_LOSS
from . import host, live

if TYPE_CHECKING:
    from ..trainer.data.images import Picture

logger = logging.getLogger("dreambooth_lora")
_SECONDS_BETWEEN_MESSAGES = 0.4  # of progress, two each
_MOST_PROGRESS, _MOST_NOTES = 6, 8  # messages a second, so that with what must not be lost there are at most ten
_SHOWN = 8  # pictures of the subject that a run keeps small copies of


class NodeListener:
    """Shows events on a node: progress bar and a line of text, a few times a second."""

    def __init__(self, node_id: str) -> None:
        """Listen for the node with that (unique, maybe composite) id."""
        self._node_id = node_id
        self._last_sent = 0.0
        self._sent: deque[float] = deque(maxlen=_MOST_NOTES)  # when the last messages were sent

    def should_stop(self) -> bool:
        """Whether the user pressed Cancel."""
        import comfy.model_management

        return bool(comfy.model_management.processing_interrupted())

    def report(self, event: Event) -> None:
        """Show an event; warnings and notes also go to the log."""
        if isinstance(event, Note):
            logger.log(logging.WARNING if event.warning else logging.INFO, "%s", event.text)
            if self._messages_of_a_second() < _MOST_NOTES:
                self._send_text(event.text)
        elif isinstance(event, Phase | Step):
            done, total = (event.step, event.steps) if isinstance(event, Step) else (event.done, event.total)
            if self._due(done in (0, total)):
                self._send_progress(done, total)
                self._send_line(event)

    def _due(self, at_once: bool) -> bool:
        """Whether it is time for the next message."""
        now = time.monotonic()
        waited = at_once or now - self._last_sent >= _SECONDS_BETWEEN_MESSAGES
        if not waited or self._messages_of_a_second() > _MOST_PROGRESS - 2:
            return False
        self._last_sent = now
        return True

    def _messages_of_a_second(self) -> int:
        """How many messages the last second saw."""
        return sum(time.monotonic() - sent < 1 for sent in self._sent)

    def _send_progress(self, done: int, total: int) -> None:
        from comfy_api.latest import ComfyAPISync

        self._sent.append(time.monotonic())
        ComfyAPISync().execution.set_progress(value=done, max_value=total, node_id=self._node_id)

    def _send_line(self, event: Phase | Step) -> None:
        if isinstance(event, Phase):
            self._send_text(f"{event.name}: {event.done} of {event.total}")

    def _send_text(self, text: str) -> None:
        from server import PromptServer

        self._sent.append(time.monotonic())
        PromptServer.instance.send_progress_text(text, self._node_id)


class TrainingListener(NodeListener):
    """Shows a run on the panel of its node, and keeps what later pages need, in `live` and in the run's folder."""

    def __init__(self, node_id: str, name: str, subject: Sequence[Picture], workflow: Mapping[str, Any] | None) -> None:
        """Listen for a training node.

        Args:
            node_id: Its (maybe composite) id.
            name: Of the run.
            subject: Small copies of the first pictures are put into the run's folder.
            workflow: The graph as the browser sent it; None if none was sent.
        """
        super().__init__(node_id)
        self._subject, self._workflow = subject, workflow
        self._points: dict[str, list[float]] = {"steps": [], "losses": [], "rates": []}
        live.begin(node_id)
        self._send(state="starting", name=name)

    def report(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Opened):
            self._keep(event)
            self._send(run=event.path.name, step=event.step, steps=event.steps)
        elif isinstance(event, Step):
            self._add(event)
        elif isinstance(event, Preview):
            names = [path.name for path, _ in event.pictures]
            self._send(preview={"step": event.step, "pictures": names, "scores": dict(event.scores)})
        elif isinstance(event, Validation):
            self._send(scores={"step": event.step, "scores": {VALIDATION_LOSS: event.loss}})
        elif isinstance(event, Phase):
            if self._due(event.done in (0, event.total)):
                self._send_progress(event.done, event.total)
                self._send(state=event.name, done=event.done, total=event.total)
        else:
            super().report(event)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Show how the block ends: done, stopped by the user, or failed with what to do."""
        try:
            yield
        except TrainerError as error:
            self._send(state="failed", problem=error.problem, remedy=error.remedy)
            raise
        except Exception as error:
            self._send(state="failed", problem=f"{type(error).__name__}: {error}", remedy="")
            raise
        except BaseException:  # ComfyUI's interrupt is no Exception
            self._send(state="stopped")
            raise
        self._send(state="done")

    def _add(self, event: Step) -> None:
        for name, value in (("steps", event.step), ("losses", event.loss), ("rates", event.learning_rate)):
            self._points[name].append(value)
        if not self._due(at_once=False) and event.step < event.steps:
            return
        facts = {"rate": event.rate, "seconds_left": event.seconds_left, "memory": event.memory}
        self._send_progress(event.step, event.steps)
        self._send(state="training", steps=event.steps, **facts)

    def _send(self, **facts: Any) -> None:
        """Keep facts, and send them with the newest points of the curve if a page is open."""
        from server import PromptServer

        points, self._points = self._points, {name: [] for name in self._points}
        if points["steps"]:
            facts["step"] = points["steps"][-1]
        kept = {name: value for name, value in facts.items() if name not in ("preview", "scores")}
        known = live.note(self._node_id, **kept)
        if PromptServer.instance.sockets:
            self._sent.append(time.monotonic())
            message = known | facts | ({"points": points} if points["steps"] else {})
            PromptServer.instance.send_sync("dreambooth", message)

    def _keep(self, event: Opened) -> None:
        """Put the graph and small pictures of the subject into a run's folder; without them the run goes on as well."""
        from ..trainer.core.files import write_atomic
        from ..trainer.training.runs.checkpoint import RunFolder
        from . import host_pictures

        run = RunFolder(event.path)
        try:
            if self._workflow:
                host.keep_workflow(run, self._workflow)
            for number, picture in enumerate(self._subject[:_SHOWN]):
                path = run.subject_path / f"{number:02d}.jpg"
                if not path.exists():
                    write_atomic(path, host_pictures.as_thumbnail(picture))
        except TrainerError as error:
            logger.warning("%s", error)
