"""Steps per second, time left and memory of a run, for its progress events."""

from __future__ import annotations

import time

import torch

from .devices import used_memory
from .events import Step

_SMOOTHING = 0.9


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

    def event(self, step: int, loss: float, learning_rate: float) -> Step:
        """The event of a step that has just finished."""
        now = time.monotonic()
        if self._last_time is not None:
            seconds = (now - self._last_time) / max(1, step - self._last_step)
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
