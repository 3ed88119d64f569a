"""The command line as a listener: a progress bar, notes, and Ctrl-C as a request to stop."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from ..core.events import Event, Note, Phase, Step, Validation


class Terminal:
    """Shows events on standard error; SIGINT and SIGTERM ask the work to stop at the next safe moment.

    A second signal ends the program at once. Use as a context manager.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._title = ""
        self._stop = False
        launched = "LOCAL_RANK" in os.environ  # as one of several processes, of which the first speaks
        self.quiet = launched and os.environ.get("RANK", "0") != "0"
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Terminal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        if not self.quiet:
            self._write("Stopping after this step; what is done is kept. Again to stop at once.")

    def should_stop(self) -> bool:
        """Whether a signal came."""
        return self._stop

    def report(self, event: Event) -> None:
        """Show an event."""
        if self.quiet:
            return
        if isinstance(event, Note):
            self._write(("warning: " if event.warning else "") + event.text)
        elif isinstance(event, Phase):
            self._show(event.name, event.done, event.total)
        elif isinstance(event, Step):
            memory = f"{event.memory / 2**30:.1f} GB" if event.memory >= 2**29 else f"{event.memory / 2**20:.0f} MB"
            self._show("training", event.step, event.steps)
            self._bar.set_postfix_str(f"loss {event.loss:.4f}, lr {event.learning_rate:.2g}, {memory}", refresh=False)
        elif isinstance(event, Validation):
            self._write(f"Validation loss after step {event.step}: {event.loss:.4f}")

    def _show(self, title: str, done: int, total: int) -> None:
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
