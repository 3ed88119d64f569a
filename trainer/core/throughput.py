"""Steps per second, time left and memory of a run, for its progress events."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .devices import used_memory
from .events import Step

_SMOOTHING = 0.9
_STEPS_TO_JUDGE = 10  # that were measured


@dataclass(frozen=True)
class Investment:
    """Something that takes time once and saves time in every step.

    Attributes:
        seconds: What it takes.
        saves: Share of a step's time, in (0, 1).
    """

    seconds: float
    saves: float


class Throughput:
    """Measures steps per second, smoothed, without the first step of this process, which is slower."""

    def __init__(self, steps: int, started_from: int, device: torch.device) -> None:
        """Start to measure.

        Args:
            steps: Steps of the whole run.
            started_from: Steps completed before.
            device: The device whose memory is reported.
        """
        self._steps = steps
        self._device = device
        self._last_step = started_from
        self._last_time: float | None = None
        self._seconds_per_step = 0.0
        self._measured = 0

    def pause(self) -> None:
        """Leave out the time until the next step that is reported."""
        self._last_time = None

    def pays_for(self, investment: Investment) -> bool:
        """Whether, at the speed so far, something would save twice its cost in the remaining steps."""
        saved = investment.saves * self._seconds_per_step * (self._steps - self._last_step)
        return self._measured >= _STEPS_TO_JUDGE and saved > 2 * investment.seconds

    def event(self, step: int, loss: float, learning_rate: float) -> Step:
        """The event of a step that has just finished."""
        now = time.monotonic()
        if self._last_time is not None:
            seconds = (now - self._last_time) / max(1, step - self._last_step)
            self._measured += 1
            previous = self._seconds_per_step or seconds
            self._seconds_per_step = _SMOOTHING * previous + (1 - _SMOOTHING) * seconds
        self._last_time = now
        self._last_step = step
        rate = 1 / self._seconds_per_step if self._seconds_per_step else 0.0
        return Step(
            step=step,
            steps=self._steps,
            loss=loss,
            learning_rate=learning_rate,
            rate=rate,
            seconds_left=(self._steps - step) * self._seconds_per_step,
            memory=used_memory(self._device),
        )
