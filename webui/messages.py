"""What the tab says, as HTML."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

from ..trainer.core.errors import TrainerError
from .wording import wording


def as_html(text: str) -> str:
    """A text in HTML; the bytes of a file's name that are no UTF-8, which can't be sent to a page, are spelled out."""
    return html.escape(text.encode(errors="backslashreplace").decode())


def failure(problem: str, remedy: str) -> str:
    """What is wrong, and what to do."""
    return f"<p class='dreambooth-error'><b>{as_html(problem)}</b> {as_html(remedy)}</p>"


def error_message(error: TrainerError | ValueError) -> str:
    """The same of an error. Python's own are those of a name that no file can have."""
    if isinstance(error, TrainerError):
        return failure(error.problem_in(wording), error.remedy_in(wording))
    return failure(f"A name or path can't be used: {error}.", "Type it again, without invisible characters.")


def saying_errors(function: Callable[..., str]) -> Callable[..., str]:
    """A function that gives a message; where it fails, the message says why."""

    @functools.wraps(function)
    def said(*arguments: Any) -> str:
        try:
            return function(*arguments)
        except (TrainerError, ValueError) as error:
            return error_message(error)

    return said
