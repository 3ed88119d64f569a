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
