"""The bridge to ComfyUI, continued: what happens in the engine, shown on a node."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pages.finite import finite
from ..pages.urls import file_url
from ..trainer.core.errors import TrainerError, worded
from ..trainer.core.events import Event, Note, Phase, Preview, RunOpened, Step, Validation
from ..trainer.training.runs.metrics import VALIDATION_LOSS
from . import host, live
from .wording import wording_of

if TYPE_CHECKING:
    from ..trainer.data.images import Picture
    from .api import io

logger = logging.getLogger("dreambooth_lora")
_SECONDS_BETWEEN_UPDATES = 0.4
_MESSAGES_PER_UPDATE = 2  # of progress: one moves ComfyUI's bar, one is the text or the pack's own
# Messages a second up to which progress and notes are sent; with those that are always sent there are at most ten.
_MOST_WITH_PROGRESS = 6
_MOST_WITH_NOTES = 8
_THUMBNAILS = 8  # pictures of the subject of which a run keeps small copies


class NodeListener:
    """Shows events on a node: progress bar and a line of text, a few times a second."""

    def __init__(self, node: type[io.ComfyNode]) -> None:
        """Listen for a node.

        Args:
            node: The clone of its class that ComfyUI runs, with the (unique, maybe composite) id among its `hidden`.
        """
        self._node_id = str(node.hidden.unique_id)
        self._wording = wording_of(node)
        self._last_update = 0.0
        self._sent_at: deque[float] = deque(maxlen=_MOST_WITH_NOTES)  # times of the newest messages

    def should_stop(self) -> bool:
        """Whether the user pressed Cancel."""
        import comfy.model_management

        return bool(comfy.model_management.processing_interrupted())

    def report(self, event: Event) -> None:
        """Show an event; warnings and notes also go to the log."""
        if isinstance(event, Note):
            text = worded(event.text, self._wording)
            logger.log(logging.WARNING if event.warning else logging.INFO, "%s", text)
            if self._messages_of_last_second() < _MOST_WITH_NOTES:
                self._send_text(text)
        elif isinstance(event, Step):
            if self._is_due(event.step in (0, event.steps)):
                self._send_progress(event.step, event.steps)
        elif isinstance(event, Phase) and self._is_due(event.done in (0, event.total)):
            self._send_progress(event.done, event.total)
            self._send_text(f"{event.name}: {event.done} of {event.total}")

    def _is_due(self, at_once: bool) -> bool:
        """Whether it is time for the next update."""
        now = time.monotonic()
        if not at_once and now - self._last_update < _SECONDS_BETWEEN_UPDATES:
            return False
        if self._messages_of_last_second() > _MOST_WITH_PROGRESS - _MESSAGES_PER_UPDATE:
            return False
        self._last_update = now
        return True

    def _messages_of_last_second(self) -> int:
        now = time.monotonic()
        return sum(now - sent_at < 1 for sent_at in self._sent_at)

    def _send_progress(self, done: int, total: int) -> None:
        from .api import ComfyAPISync

        self._sent_at.append(time.monotonic())
        ComfyAPISync().execution.set_progress(value=done, max_value=total, node_id=self._node_id)

    def _send_text(self, text: str) -> None:
        from server import PromptServer

        self._sent_at.append(time.monotonic())
        PromptServer.instance.send_progress_text(text, self._node_id)


class TrainingListener(NodeListener):
    """Shows a run on the panel of its node, and keeps what later pages need, in `live` and in the run's folder."""

    def __init__(
        self,
        node: type[io.ComfyNode],
        name: str,
        subject: Sequence[Picture],
        workflow: Mapping[str, Any] | None,
    ) -> None:
        """Listen for a training node.

        Args:
            node: The clone of its class that ComfyUI runs.
            name: Of the run.
            subject: Small copies of the first pictures are put into the run's folder.
            workflow: The graph as the browser sent it; None if none was sent.
        """
        super().__init__(node)
        self._subject = subject
        self._workflow = workflow
        self._run: Path | None = None
        self._points = _no_points()
        live.forget(self._node_id)
        self._send(state="starting", name=name)

    def report(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, RunOpened):
            self._run = event.path
            self._keep_sources(event.path)
            self._send(run=event.path.name, step=event.step, steps=event.steps)
        elif isinstance(event, Step):
            self._add_point(event)
        elif isinstance(event, Preview):
            run = self._run
            urls = [file_url(run, path) for path, _ in event.pictures] if run else []
            self._send(preview={"step": event.step, "pictures": urls, "scores": dict(event.scores)})
        elif isinstance(event, Validation):
            self._send(scores={"step": event.step, "scores": {VALIDATION_LOSS: event.loss}})
        elif isinstance(event, Phase):
            if self._is_due(event.done in (0, event.total)):
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
            problem = error.problem_in(self._wording)
            self._send(state="failed", problem=problem, remedy=error.remedy_in(self._wording))
            raise
        except Exception as error:
            self._send(state="failed", problem=f"{type(error).__name__}: {error}", remedy="")
            raise
        except BaseException:  # ComfyUI's interrupt is no Exception
            self._send(state="stopped")
            raise
        self._send(state="done")

    def _add_point(self, event: Step) -> None:
        """Keep a step for the next message, and send it if it is time."""
        self._points["steps"].append(event.step)
        self._points["losses"].append(event.loss)
        self._points["rates"].append(event.learning_rate)
        if not self._is_due(at_once=False) and event.step < event.steps:
            return
        self._send_progress(event.step, event.steps)
        self._send(
            state="training",
            steps=event.steps,
            rate=event.rate,
            seconds_left=event.seconds_left,
            memory=event.memory,
        )

    def _send(self, **facts: Any) -> None:
        """Keep facts, and send them with the newest points of the curve if a page is open."""
        from server import PromptServer

        points = finite(self._points)
        facts = finite(facts)
        self._points = _no_points()
        if points["steps"]:
            facts["step"] = points["steps"][-1]
        lasting = {name: value for name, value in facts.items() if name not in ("preview", "scores")}
        known = live.update(self._node_id, **lasting)
        if PromptServer.instance.sockets:
            self._sent_at.append(time.monotonic())
            message = known | facts | ({"points": points} if points["steps"] else {})
            PromptServer.instance.send_sync("dreambooth", message)

    def _keep_sources(self, path: Path) -> None:
        """Put the graph and small pictures of the subject into a run's folder; the run goes on without them, too."""
        from ..pages.thumbnails import as_thumbnail
        from ..trainer.core.files import write_atomic
        from ..trainer.training.runs.layout import RunLayout

        run = RunLayout(path)
        try:
            if self._workflow:
                host.keep_workflow(run, self._workflow)
            for number, picture in enumerate(self._subject[:_THUMBNAILS]):
                thumbnail = run.subject_path / f"{number:02d}.jpg"
                if not thumbnail.exists():
                    write_atomic(thumbnail, as_thumbnail(picture))
        except TrainerError as error:
            logger.warning("%s", error)


def _no_points() -> dict[str, list[float]]:
    """Columns of a curve without points."""
    return {"steps": [], "losses": [], "rates": []}
