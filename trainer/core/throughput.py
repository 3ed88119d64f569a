"""How fast a run goes and what it uses, for its progress events."""

from __future__ import annotations

import time

import torch

from .devices import used_memory
from .events import Step

_SMOOTHING = 0.9


class Throughput:
    """Measures steps per second, smoothed, leaving out the first step of this process (it warms up)."""

    def __init__(self, steps: int, started_from: int, device: torch.device) -> None:
        """Begin to measure.

        Args:
            steps: Steps of the whole run.
            started_from: Steps that were done before.
            device: Whose memory is reported.
        """
        self._steps, self._device = steps, device
        self._last_step = started_from
        self._last_time: float | None = None
        self._seconds_per_step = 0.0

    def event(self, step: int, loss: float, learning_rate: float) -> Step:
        """The event of a step that was just finished."""
        now = time.monotonic()
        if self._last_time is not None:
            seconds = (now - self._last_time) / max(1, step - self._last_step)
            old = self._seconds_per_step or seconds
            self._seconds_per_step = _SMOOTHING * old + (1 - _SMOOTHING) * seconds
        self._last_time, self._last_step = now, step
        rate = 1 / self._seconds_per_step if self._seconds_per_step else 0.0
        left = (self._steps - step) * self._seconds_per_step
        return Step(step, self._steps, loss, learning_rate, rate, left, used_memory(self._device))
