"""The bridge to ComfyUI, continued: what happens in the engine, shown on a node."""

from __future__ import annotations

import logging
import time

from ..trainer.events import Event, Note, Phase, Preview, Step

logger = logging.getLogger("dreambooth_lora")
_SECONDS_BETWEEN_MESSAGES = 0.25


class NodeListener:
    """Shows events on a node: progress bar and a line of text, at most four times a second."""

    def __init__(self, node_id: str) -> None:
        """Listen for the node with that (unique, maybe composite) id."""
        self._node_id = node_id
        self._last_sent = 0.0

    def should_stop(self) -> bool:
        """Whether the user pressed Cancel."""
        import comfy.model_management

        return bool(comfy.model_management.processing_interrupted())

    def tell(self, event: Event) -> None:
        """Show an event; warnings and notes also go to the log."""
        if isinstance(event, Note):
            logger.log(logging.WARNING if event.warning else logging.INFO, "%s", event.text)
            self._send_text(event.text)
            return
        if isinstance(event, Preview):
            scores = ", ".join(f"{name} {value:.3f}" for name, value in event.scores.items())
            logger.info("Step %d: %s", event.step, scores or f"{len(event.pictures)} preview pictures")
            return
        done, total = (event.step, event.steps) if isinstance(event, Step) else (event.done, event.total)
        now = time.monotonic()
        if now - self._last_sent < _SECONDS_BETWEEN_MESSAGES and done not in (0, total):
            return
        self._last_sent = now
        self._send_progress(done, total)
        self._send_text(_line(event))

    def _send_progress(self, done: int, total: int) -> None:
        from comfy_api.latest import ComfyAPISync

        ComfyAPISync().execution.set_progress(value=done, max_value=total, node_id=self._node_id)

    def _send_text(self, text: str) -> None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, self._node_id)


def _line(event: Phase | Step) -> str:
    if isinstance(event, Phase):
        return f"{event.name}: {event.done} of {event.total}"
    minutes, seconds = divmod(round(event.seconds_left), 60)
    return (
        f"step {event.step} of {event.steps} · loss {event.loss:.4f} · rate {event.learning_rate:.2g} · "
        f"{event.rate:.2f} steps/s · {minutes}:{seconds:02d} left · {event.memory / 2**30:.1f} GB"
    )
