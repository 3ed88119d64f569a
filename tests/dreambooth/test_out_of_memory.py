"""A run whose memory runs out goes on once, from its newest checkpoint, with less; what it learns stays the same."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from pack.trainer.core.errors import OutOfMemoryError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.models.families.stable_diffusion import StableDiffusionModel
from torch import Tensor
from worlds import World, assert_same_end, differing, make_world, newest_step, runs_in

pytestmark = pytest.mark.usefixtures("quick")
PROBES = 4  # forward passes of a new run that ask the base model what it predicts
MORE_THAN_THERE_IS = 2**50  # bytes
CUT = {"batch_size": 2, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("out of memory") / "subject")


class Hungry:
    """Lets some forward passes ask for more memory than there is; the allocator really refuses.

    Attributes:
        networks: The denoiser of every forward pass so far, not kept alive.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], bool]) -> None:
        self.networks: list[weakref.ref[Any]] = []
        real = StableDiffusionModel.predict

        def predict(model: StableDiffusionModel, *arguments: Any) -> Tensor:
            self.networks.append(weakref.ref(model.unet))
            if calls(len(self.networks)):
                torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
            return real(model, *arguments)

        monkeypatch.setattr(StableDiffusionModel, "predict", predict)

    @property
    def alive(self) -> int:
        return len({id(one()) for one in self.networks if one() is not None})


def once(number: int) -> Callable[[int], bool]:
    return lambda call: call == number


def adapter_differs(ours: TrainResult, theirs: TrainResult) -> list[str]:
    return differing(ours.path, theirs.path)


@pytest.mark.slow
def test_it_goes_on_with_checkpointing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step fails; the end is that of a run that recomputed activations from the start, bit for bit."""
    straight = world.train(tmp_path / "straight", gradient_checkpointing=True)
    hungry, listener = Hungry(monkeypatch, once(PROBES + 3)), Recorder()
    result = world.train(tmp_path / "hungry", listener)
    assert result.started_from == 2
    assert_same_end(result, straight)
    [warning] = listener.warnings
    assert "from step 2 with gradient checkpointing" in warning
    told = [event.step for event in listener.events if hasattr(event, "loss")]
    assert told == [1, 2, 3, 4]  # a loss is read one step late; that of step 2 is reported before it is saved
    assert len(hungry.networks) == PROBES + 3 + 2
    assert len(runs_in(tmp_path / "hungry")) == 1


@pytest.mark.slow
def test_it_begins_anew_with_a_batch_in_parts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step fails; the end is that of a run with half the batch and twice the accumulation, bit for bit."""
    halved = world.train(tmp_path / "halved", batch_size=1, gradient_accumulation=2, gradient_checkpointing=True)
    whole = world.train(tmp_path / "whole", **CUT)
    assert adapter_differs(whole, halved)  # by rounding
    hungry, listener = Hungry(monkeypatch, once(PROBES + 1)), Recorder()
    result = world.train(tmp_path / "hungry", listener, **CUT)
    assert result.started_from == 0
    assert adapter_differs(result, halved) == []
    for name, layer in whole.adapter.layers.items():
        torch.testing.assert_close(result.adapter.layers[name].tensors(), layer.tensors(), rtol=1e-3, atol=1e-4)
    assert "from the start with batches of 2 computed in 2 parts" in listener.warnings[0]
    assert len(hungry.networks) == PROBES + 1 + PROBES + 4 * 2


@pytest.mark.slow
def test_the_run_stays_the_same_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprint, file and record tell of the settings that were given, not of what it took to compute them."""
    whole = world.train(tmp_path / "whole", **CUT)
    Hungry(monkeypatch, once(PROBES + 2))
    result = world.train(tmp_path / "hungry", **CUT)
    monkeypatch.undo()
    assert result.run.name == whole.run.name
    records = [json.loads((one.run / "run.json").read_text(encoding="utf-8"))["settings"] for one in (result, whole)]
    assert records[0] == records[1]
    told = [dict(one.adapter.metadata) for one in (result, whole)]
    for name in ("ss_batch_size_per_device", "ss_gradient_accumulation_steps", "ss_gradient_checkpointing"):
        assert told[0][name] == told[1][name], name
    assert world.train(tmp_path / "hungry", **CUT).started_from == 4  # it is finished


def test_what_the_first_try_held_is_given_back(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    hungry: list[Hungry] = []

    def fails(call: int) -> bool:
        if call > PROBES + 1:
            alive.append(hungry[0].alive)
        return call == PROBES + 1

    hungry.append(Hungry(monkeypatch, fails))
    world.train(tmp_path)
    assert set(alive) == {1}


def test_a_second_time_it_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hungry, listener = Hungry(monkeypatch, lambda call: call in (PROBES + 2, PROBES + 4)), Recorder()
    with pytest.raises(OutOfMemoryError) as caught:
        world.train(tmp_path, listener, batch_size=4)
    assert "base_quantization" in caught.value.remedy
    assert len(hungry.networks) == PROBES + 4
    assert len([text for text in listener.warnings if "Out of memory" in text]) == 1
    [run] = runs_in(tmp_path)
    assert newest_step(run) == 2
    monkeypatch.undo()
    assert world.train(tmp_path, batch_size=4).started_from == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": "off"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "batch_size": 2, "dropout": 0.5},
    ],
    ids=["off", "nothing left", "dropout"],
)
def test_nothing_is_tried_that_does_not_help(
    changes: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry, listener = Hungry(monkeypatch, once(PROBES + 1)), Recorder()
    with pytest.raises(OutOfMemoryError):
        world.train(tmp_path, listener, **changes)
    assert len(hungry.networks) == PROBES + 1
    assert listener.warnings == []


def test_a_run_that_is_to_start_anew_goes_on_with_itself(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With resume "never" an older run of the same settings lies there, finished."""
    old = world.train(tmp_path)
    Hungry(monkeypatch, once(PROBES + 3))
    result = world.train(tmp_path, resume="never")
    assert result.run != old.run
    assert result.started_from == 2
    assert len(runs_in(tmp_path)) == 2
    assert adapter_differs(result, old) == []
