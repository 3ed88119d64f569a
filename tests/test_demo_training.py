"""The demo's trainings: one that was interrupted goes on with the same numbers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEMO
from torch import Tensor, nn

STEPS = 7


class Interrupted(Exception):
    """Raised in place of a signal."""


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DEMO))
    module = importlib.import_module("training")
    monkeypatch.setattr(module, "KEEP_EVERY_STEPS", 2)
    return module


def trained(training: Any, state: Path, *, stop_at: int | None = None, origin: str = "one") -> tuple[Tensor, list[int]]:
    """The weight after a training of noise, and the steps that it took."""
    torch.manual_seed(3)
    model = nn.Linear(4, 4)
    generator = torch.Generator().manual_seed(0)
    phase = training.Phase("test", steps=STEPS, batch_size=2, learning_rate=0.1, warmup_share=0.3, ema_decay=0.9)
    taken: list[int] = []

    def loss_at(step: int) -> Tensor:
        if step == stop_at:
            raise Interrupted
        taken.append(step)
        inputs: Tensor = model(torch.randn((2, 4), generator=generator))
        return inputs.square().mean()

    training.train(model, phase, loss_at, training.Interruptible(state, generator, origin))
    return model.weight.detach(), taken


def test_an_interrupted_training_goes_on_with_the_same_numbers(training: Any, tmp_path: Path) -> None:
    straight, every_step = trained(training, tmp_path / "straight.pt")
    assert every_step == list(range(STEPS))
    with pytest.raises(Interrupted):
        trained(training, tmp_path / "state.pt", stop_at=5)
    resumed, steps = trained(training, tmp_path / "state.pt")
    assert steps == [4, 5, 6]
    assert torch.equal(resumed, straight)


def test_the_state_of_another_training_is_not_read(training: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(training, tmp_path / "state.pt", stop_at=5)
    _, steps = trained(training, tmp_path / "state.pt", origin="another")
    assert steps == list(range(STEPS))
