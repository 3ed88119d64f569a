"""The command line as a listener: a progress bar, notes, and Ctrl-C to stop."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from ..core.errors import Wording, plain, worded
from ..core.events import Event, Note, Phase, Step, Validation


class Terminal:
    """Shows events on standard error; SIGINT and SIGTERM ask the work to stop at the next safe moment.

    A second signal ends the program at once. Use as a context manager.

    Attributes:
        quiet: Whether nothing is shown, because another of several processes shows it.
    """

    def __init__(self, wording: Wording = plain) -> None:
        """Show nothing yet.

        Args:
            wording: How settings in notes are worded.
        """
        is_launched = "LOCAL_RANK" in os.environ  # as one of several processes, of which only the first shows events
        self.quiet = is_launched and os.environ.get("RANK", "0") != "0"
        self._wording = wording
        self._bar: Any = None
        self._title = ""
        self._stop = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Terminal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        if not self.quiet:
            self._write("Stopping after this step; the work so far is kept. Press Ctrl-C again to stop at once.")

    def should_stop(self) -> bool:
        """Whether a signal was received."""
        return self._stop

    def report(self, event: Event) -> None:
        """Show an event."""
        if self.quiet:
            return
        if isinstance(event, Note):
            text = worded(event.text, self._wording)
            self._write(f"warning: {text}" if event.warning else text)
        elif isinstance(event, Phase):
            self._show_progress(event.name, event.done, event.total)
        elif isinstance(event, Step):
            self._show_progress("training", event.step, event.steps)
            memory = f"{event.memory / 2**30:.1f} GB" if event.memory >= 2**29 else f"{event.memory / 2**20:.0f} MB"
            facts = f"loss {event.loss:.4f}, lr {event.learning_rate:.2g}, {memory}"
            self._bar.set_postfix_str(facts, refresh=False)
        elif isinstance(event, Validation):
            self._write(f"Validation loss after step {event.step}: {event.loss:.4f}")

    def _show_progress(self, title: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if title != self._title or self._bar is None:
            self._close()
            self._bar = tqdm(
                total=total,
                desc=title,
                initial=max(0, done - 1) if title == "training" else done,
                file=sys.stderr,
                mininterval=0.2,
            )
            self._title = title
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
            self._title = ""

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
