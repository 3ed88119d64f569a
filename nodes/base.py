"""What all nodes of the pack have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..trainer.core.errors import TrainerError, Wording
from .api import io
from .wording import wording_of


class NodeError(Exception):
    """An error as ComfyUI's dialog shows it: what to do first, then what is wrong."""

    def __init__(self, error: TrainerError, wording: Wording) -> None:
        """Word the engine's error for users of a node."""
        super().__init__(f"{error.remedy_in(wording)}\n\n{error.problem_in(wording)}")


class Node(io.ComfyNode):
    """A node whose errors begin with their remedy, in terms of nodes and widgets."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap the node's own `execute`; ComfyUI's clones of the class have it wrapped already."""
        super().__init_subclass__(**options)
        if "execute" in cls.__dict__ and not hasattr(cls.__dict__["execute"].__func__, "__wrapped__"):
            cls.execute = classmethod(_with_node_errors(cls.__dict__["execute"].__func__))  # type: ignore[assignment]


def _with_node_errors(execute: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute)
    def wrapped(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> Any:
        try:
            return execute(cls, *args, **inputs)
        except TrainerError as error:
            raise NodeError(error, wording_of(cls)) from error

    return wrapped
