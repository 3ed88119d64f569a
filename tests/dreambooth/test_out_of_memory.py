"""A run whose memory runs out goes on once, from its newest checkpoint, with less; what it learns stays the same."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from pack.trainer.core.devices import explained_memory_errors
from pack.trainer.core.errors import OutOfMemoryError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.models.families.stable_diffusion import StableDiffusionModel
from torch import Tensor
from worlds import Finished, World, assert_same_end, differing, newest_step, runs_in, steps_in

pytestmark = pytest.mark.usefixtures("quick")
PROBES = 2  # forward passes of a new run that ask the base model what it predicts
MORE_THAN_THERE_IS = 2**50  # bytes
CUT = {"batch_size": 2, "gradient_checkpointing": True}


class Hungry:
    """Lets some forward passes ask for more memory than there is; the allocator really refuses.

    Attributes:
        networks: The denoiser of every forward pass so far, not kept alive.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], bool]) -> None:
        self.networks: list[weakref.ref[Any]] = []
        real = StableDiffusionModel.predict

        def predict(model: StableDiffusionModel, *arguments: Any) -> Tensor:
            self.networks.append(weakref.ref(model.denoiser))
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


def test_it_goes_on_with_checkpointing(
    finished: Finished, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step fails; the end is that of a run that never did, bit for bit, and the first try left no memory."""
    alive: list[int] = []
    hungry: list[Hungry] = []

    def fails(call: int) -> bool:
        if call > PROBES + 3:
            alive.append(hungry[0].alive)
        return call == PROBES + 3

    hungry.append(Hungry(monkeypatch, fails))
    result = world.train(tmp_path, listener := Recorder())
    assert result.started_from == 2
    assert_same_end(result, finished.result)
    [warning] = listener.warnings
    assert "from step 2 with gradient checkpointing" in warning
    told = [event.step for event in listener.events if hasattr(event, "loss")]
    assert told == [1, 2, 3, 4]  # a loss is read one step late; that of step 2 is reported before it is saved
    assert len(hungry[0].networks) == PROBES + 3 + 2
    assert set(alive) == {1}
    assert len(runs_in(tmp_path)) == 1


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
    assert "from the start with batches of 2 in 2 micro-batches" in listener.warnings[0]
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


def test_a_second_time_it_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hungry, listener = Hungry(monkeypatch, lambda call: call in (PROBES + 2, PROBES + 4)), Recorder()
    with pytest.raises(OutOfMemoryError) as caught:
        world.train(tmp_path, listener, batch_size=4)
    assert "base_quantization" in caught.value.remedy
    assert len(hungry.networks) == PROBES + 4
    assert len([text for text in listener.warnings if "Out of memory" in text]) == 1
    [run] = runs_in(tmp_path)
    assert newest_step(run) == 2


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
    finished: Finished, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With resume "never" an older run of the same settings lies there, finished."""
    old = finished.copy(tmp_path)
    Hungry(monkeypatch, once(PROBES + 3))
    result = world.train(tmp_path, resume="never")
    assert result.run != old
    assert result.started_from == 2
    assert len(runs_in(tmp_path)) == 2
    assert_same_end(result, finished.result)


MEMORY_ERRORS: dict[str, Exception] = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    "CUDA by number": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1 GB)"),
    "Linux": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("name", MEMORY_ERRORS)
def test_every_systems_word_for_no_memory_is_known(name: str) -> None:
    with pytest.raises(OutOfMemoryError) as caught, explained_memory_errors("resolution"):
        raise MEMORY_ERRORS[name]
    assert "memory" in caught.value.problem
    assert "Lower resolution" in caught.value.remedy


def test_other_errors_are_not_taken_for_no_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_memory_errors("resolution"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_out_of_memory_keeps_the_steps_and_says_what_to_lower(
    finished: Finished, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hungry(monkeypatch, once(PROBES + 3))
    with pytest.raises(OutOfMemoryError) as caught:
        world.train(tmp_path, fit="off")
    assert "memory" in caught.value.problem
    assert all(word in caught.value.remedy for word in ("resolution", "base_quantization", "gradient_checkpointing"))
    assert "batch_size" not in caught.value.remedy  # it is 1
    [run] = runs_in(tmp_path)
    assert steps_in(run) == [2]
    monkeypatch.undo()
    result = world.train(tmp_path)
    assert result.started_from == 2
    assert_same_end(result, finished.result)


@pytest.mark.parametrize("call", [1, PROBES + 1], ids=["before the first step", "in the first step"])
def test_out_of_memory_at_once_leaves_nothing_half(
    call: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And frees the networks, also while the error is still being shown: the host needs the memory then."""
    hungry = Hungry(monkeypatch, once(call))
    with pytest.raises(OutOfMemoryError) as caught:
        world.train(tmp_path, steps=2, fit="off")
    [run] = runs_in(tmp_path)
    assert steps_in(run) == []
    assert not list((tmp_path / "loras").iterdir())
    gc.collect()
    assert caught.value.remedy
    assert len(hungry.networks) == call
    assert hungry.alive == 0


def test_a_finished_run_frees_the_networks(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hungry = Hungry(monkeypatch, once(-1))
    result = world.train(tmp_path, steps=1)
    gc.collect()
    assert result.adapter.layers
    assert len(hungry.networks) == PROBES + 1
    assert hungry.alive == 0
