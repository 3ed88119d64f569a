"""What the tab says, as HTML."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

from ..trainer.core.errors import TrainerError
from .wording import wording


def failure(problem: str, remedy: str) -> str:
    """What is wrong, and what to do."""
    return f"<p class='dreambooth-error'><b>{html.escape(problem)}</b> {html.escape(remedy)}</p>"


def saying_errors(function: Callable[..., str]) -> Callable[..., str]:
    """A function that gives a message; where it fails, the message says why."""

    @functools.wraps(function)
    def said(*arguments: Any) -> str:
        try:
            return function(*arguments)
        except TrainerError as error:
            return failure(error.problem_in(wording), error.remedy_in(wording))
        except ValueError as error:
            return failure(f"{error}.", "Give a number.")

    return said
