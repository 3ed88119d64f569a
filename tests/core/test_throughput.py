"""Speed and time left: smoothed, without the first step of this process, in seconds a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pack.trainer.core import throughput
from pack.trainer.core.events import Step
from pack.trainer.core.throughput import Throughput

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Step]]:
    """Events of (step, second) pairs."""

    def measure(*times: tuple[int, float], steps: int = 100, started_from: int = 0) -> list[Step]:
        clock = iter([second for _, second in times])
        monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
        speed = Throughput(steps, started_from, CPU)
        return [speed.event(step, 0.5, 1e-4) for step, _ in times]

    return measure


def test_the_first_step_is_not_counted(measured: Callable[..., list[Step]]) -> None:
    first, second, third = measured((41, 1000.0), (42, 1002.0), (43, 1004.0), started_from=40)
    assert (first.rate, first.seconds_left) == (0.0, 0.0)
    assert (second.rate, second.seconds_left) == (0.5, 58 * 2.0)
    assert (third.rate, third.seconds_left) == (0.5, 57 * 2.0)
    assert (third.step, third.steps, third.loss, third.learning_rate) == (43, 100, 0.5, 1e-4)
    assert third.memory > 2**20  # bytes of this process


def test_a_slow_step_counts_a_tenth(measured: Callable[..., list[Step]]) -> None:
    *_, last = measured((1, 0.0), (2, 1.0), (3, 12.0))
    assert last.seconds_left == pytest.approx(97 * (0.9 * 1 + 0.1 * 11))
    assert last.rate == pytest.approx(1 / 2)


def test_several_steps_between_two_events(measured: Callable[..., list[Step]]) -> None:
    *_, last = measured((10, 0.0), (20, 5.0))
    assert last.rate == 2.0
    assert last.seconds_left == 40.0
