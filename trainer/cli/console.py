"""The console, whatever it is: one that can't show every character, one that is closed, or none at all."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

_ERRORS = "dreambooth_console"
_COLOURS = {"error": "1;31", "warning": "1;33", "fix": "1;32"}  # SGR codes: bold red, yellow, green


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""What takes the place of a character that the console's encoding lacks: an escape such as `\u72ac`.

    A byte of a file name that is not UTF-8 stays that byte, so that the path that is shown is the path.
    """
    with contextlib.suppress(UnicodeError):
        return codecs.lookup_error("surrogateescape")(error)
    return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(_ERRORS, _escaped)


class _Watched:
    """A stream that loses what can't be written instead of raising: the terminal was closed, the reader has left.

    Attributes:
        error: The first error; None if all was written.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream, which may lack characters."""
        self._stream = stream
        self._errors_before = stream.errors
        self.error: Exception | None = None
        if isinstance(stream, io.TextIOWrapper):
            self._try(lambda: stream.reconfigure(errors=_ERRORS))

    def write(self, text: str) -> int:
        """Write text, if the stream still takes it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it still takes anything."""
        self._try(self._stream.flush)

    def _try(self, write: Callable[[], object]) -> None:
        if self.error is None:
            try:
                write()
            except (OSError, ValueError) as error:  # a ValueError if it is closed
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def release(self) -> None:
        """Leave the stream as it was; what it did not take is not tried again when the program ends."""
        self.flush()
        if isinstance(self._stream, io.TextIOWrapper) and not self._stream.closed:
            with contextlib.suppress(OSError, ValueError):
                if self.error is not None:
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)
                self._stream.reconfigure(errors=self._errors_before)


def as_json(value: Any) -> str:
    """JSON for standard output, with escapes for what its encoding lacks."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeError:
        return json.dumps(value, indent=1)
    return text


def printable(text: str) -> str:
    """Text without characters that would move the cursor or colour a terminal, as a stranger's file may hold.

    A byte of a file name that is not UTF-8 stays what it is.
    """
    return "".join(
        char if char.isprintable() or "\udc80" <= char <= "\udcff" else char.encode("unicode_escape").decode()
        for char in text
    )


def has_colours(stream: TextIO) -> bool:
    """Whether a stream shows colours: a terminal that is not "dumb", unless NO_COLOR or FORCE_COLOR decide."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    if os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty() and _understands_codes()
    except (OSError, ValueError):  # a ValueError if it is closed
        return False


def _understands_codes() -> bool:
    """Whether the terminal takes escape codes; a console of Windows has to be asked to."""
    if sys.platform != "win32":
        return True
    import ctypes

    standard_error, processes_codes = -12, 0x4
    kernel = ctypes.windll.kernel32
    handle = kernel.GetStdHandle(standard_error)
    mode = ctypes.c_ulong()
    if not kernel.GetConsoleMode(handle, ctypes.byref(mode)):
        return False
    return bool(mode.value & processes_codes or kernel.SetConsoleMode(handle, mode.value | processes_codes))


def labelled(label: str, text: str) -> str:
    """A line for standard error such as "error: …", with its label in colour if it is a terminal that has some."""
    shown = f"{label}:"
    if has_colours(sys.stderr):
        shown = f"\x1b[{_COLOURS[label]}m{shown}\x1b[0m"
    return f"{shown} {text}"


def show_error(problem: str, remedy: str) -> None:
    """Show an error on standard error: what is wrong on one line, what to do on the next."""
    for label, text in (("error", problem), ("fix", remedy)):
        sys.stderr.write(labelled(label, printable(" ".join(text.splitlines()))) + "\n")


class PatientConsole:
    """While it is used as a context manager, nothing that is shown ends the work."""

    def __enter__(self) -> PatientConsole:
        self._before = sys.stdout, sys.stderr
        self._nowhere = open(os.devnull, "w", encoding="utf-8")  # pythonw has no streams
        self._output = _Watched(sys.stdout or self._nowhere)
        self._errors = _Watched(sys.stderr or self._nowhere)
        sys.stdout = cast(TextIO, self._output)
        sys.stderr = cast(TextIO, self._errors)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before
        self._output.release()
        self._errors.release()
        self._nowhere.close()

    def lost_output(self) -> str:
        """Why standard output did not take everything; "" if it did, or if its reader had enough (`| head`)."""
        self._output.flush()
        error = self._output.error
        return "" if error is None or isinstance(error, BrokenPipeError) else str(error)
