"""The command line as a listener: a progress bar, notes, and Ctrl-C to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any

from ..core.errors import Wording, plain, worded
from ..core.events import Event, Note, Phase, Step, Validation
from .console import labelled
from .watching import Watched, is_shown_elsewhere

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # of Ctrl-C, kill, a terminal that is closed, Ctrl-Break
_CLOSING_EVENTS = (2, 5, 6)  # of a console on Windows: its window is closed, the user logs off, the computer shuts down


class Terminal:
    """Shows events on standard error; whatever ends a program asks the work to stop at the next safe moment.

    That is Ctrl-C, Ctrl-Break, `kill`, and a terminal that is closed. A second one ends the program at once, except
    that closing a terminal may well come twice. What is ignored when the program starts, as by nohup, stays ignored.
    Use as a context manager, in the main thread.

    Attributes:
        quiet: Whether nothing is shown, because another of several processes shows it.
        wording: How settings in what is shown are worded.
    """

    def __init__(self, wording: Wording = plain, watched: Watched | None = None) -> None:
        """Show nothing yet.

        Args:
            wording: How settings in what is shown are worded.
            watched: Gets every event, too, and may stop the work; None: nobody else watches.
        """
        self.quiet = is_shown_elsewhere()
        self.wording = wording
        self._watched = watched or Watched()
        self._bar: Any = None
        self._title = ""
        self._stop = False
        self._ended = threading.Event()
        self._previous_handlers: dict[int, Any] = {}
        self._console_handler: Any = None

    def __enter__(self) -> Terminal:
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # each system has some of them
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL
        if sys.platform == "win32":
            import ctypes

            self._console_handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(self._on_console_event)
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self._console_handler, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if sys.platform == "win32":
            import ctypes

            ctypes.windll.kernel32.SetConsoleCtrlHandler(self._console_handler, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._stop:
            self._stop = True
            if self.quiet:
                return
            text = "Stopping after this step; the work so far is kept. Press Ctrl-C again to stop at once."
            with contextlib.suppress(RuntimeError):  # the signal came while something was being written
                self._write(text)
        elif number != getattr(signal, "SIGHUP", None):
            raise KeyboardInterrupt

    def _on_console_event(self, event: int) -> int:
        """Called by Windows in a thread of its own; when this returns, or after some seconds, the program ends."""
        if event not in _CLOSING_EVENTS:
            return 0  # Python makes signals of the others
        self._stop = True
        self._ended.wait()
        return 1

    def should_stop(self) -> bool:
        """Whether a signal was received, or whoever watches the command stops it."""
        return self._stop or self._watched.should_stop()

    def report(self, event: Event) -> None:
        """Show an event."""
        if self.quiet:
            return
        self._watched.report(event)
        if isinstance(event, Note):
            text = worded(event.text, self.wording)
            self._write(labelled("warning", text) if event.warning else text)
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
        bar = self._bar
        self._bar = None
        self._title = ""
        if bar is not None:
            bar.refresh()
            bar.close()

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
