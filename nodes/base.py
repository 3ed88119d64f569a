"""What all nodes of the pack have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..trainer.core.errors import TrainerError


class NodeError(Exception):
    """An error as ComfyUI's dialog shows it: what to do first, then what is wrong."""

    def __init__(self, error: TrainerError) -> None:
        """Word the engine's error anew."""
        super().__init__(f"{error.remedy}\n\n{error.problem}")


class Node(io.ComfyNode):
    """A node whose errors begin with their remedy."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap the node's own `execute`; ComfyUI's clones of the class have it wrapped already."""
        super().__init_subclass__(**options)
        if "execute" in cls.__dict__ and not hasattr(cls.__dict__["execute"].__func__, "__wrapped__"):
            cls.execute = classmethod(_remedy_first(cls.__dict__["execute"].__func__))  # type: ignore[assignment]


def _remedy_first(execute: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute)
    def wrapped(*given: Any, **named: Any) -> Any:
        try:
            return execute(*given, **named)
        except TrainerError as error:
            raise NodeError(error) from error

    return wrapped
