"""Events: what the engine reports while it works.

The engine reports events to a `Listener` and asks it whether to stop; it never prints and knows nothing of progress
bars. Reporting must be cheap: it happens at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .errors import CancelledError


@dataclass(frozen=True)
class Phase:
    """Progress of work other than training steps.

    Attributes:
        name: What is being done, e.g. "reading pictures", "class pictures".
        done: Units finished.
        total: Units in all; at least 1.
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Step:
    """One finished optimiser step.

    Attributes:
        step: Number of steps completed, from 1.
        steps: Steps of the whole run.
        loss: Loss of this step (instance + prior_weight · prior), averaged over its micro-batches.
        learning_rate: Learning rate used in this step.
        rate: Steps per second, smoothed; 0.0 while unknown.
        seconds_left: Estimated seconds to the end of the run; 0.0 while unknown.
        memory: Peak memory of the device in bytes; of the process on the CPU.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    rate: float
    seconds_left: float
    memory: int


@dataclass(frozen=True)
class Note:
    """A message for the user.

    Attributes:
        text: One or two sentences; settings are named by `suggest`, which each face words by `worded`.
        warning: Whether something may be wrong.
        picture: Name of the picture that it is about, as in `Picture.name`; "" if it is about none or several.
    """

    text: str
    warning: bool = False
    picture: str = ""


@dataclass(frozen=True)
class RunOpened:
    """A run's folder was found or made.

    Attributes:
        path: The folder.
        step: Steps completed already.
        steps: Steps of the whole run.
    """

    path: Path
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """Pictures generated with the weights of a step.

    Attributes:
        step: Steps completed; 0 is the base model itself.
        pictures: File and prompt of each.
        scores: Metric → value (`evaluation`); empty without feature extractors.
    """

    step: int
    pictures: Sequence[tuple[Path, str]]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Validation:
    """The loss on the held-out pictures with the weights of a step.

    Attributes:
        step: Steps completed; 0 is the base model itself.
        loss: Mean squared error, always at the same timesteps with the same noise.
    """

    step: int
    loss: float


Event = Phase | Step | Note | RunOpened | Preview | Validation


class Listener(Protocol):
    """Receives the events and may ask the engine to stop."""

    def report(self, event: Event) -> None:
        """Receive an event. Must return quickly."""

    def should_stop(self) -> bool:
        """Whether the work should stop at the next safe moment."""


class SilentListener:
    """Ignores all events and never stops the work."""

    def report(self, event: Event) -> None:
        """Ignore the event."""

    def should_stop(self) -> bool:
        """Never."""
        return False


def stop_if_asked(listener: Listener, step: int = 0, steps: int = 0) -> None:
    """Raise `CancelledError` if the listener asks to stop."""
    if listener.should_stop():
        raise CancelledError(step, steps)
