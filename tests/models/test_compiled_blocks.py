"""Compiled blocks compute what they did before, in every family and with all that is trained in them, or not at all."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILY_WORLDS, family_world
from helpers import Recorder
from pack.trainer import dreambooth
from pack.trainer.core import throughput
from pack.trainer.core.devices import NumberOnItsWay
from pack.trainer.core.events import Step
from pack.trainer.core.throughput import Investment, Throughput
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.models.blocks import blocks_of
from pack.trainer.models.compiled_blocks import CompiledBlocks, can_compile
from worlds import KINDS, TEXT, World

pytestmark = pytest.mark.usefixtures("quick")

CPU = torch.device("cpu")
SMALL_STEPS = {"learning_rate": 1e-5, "prior": "none"}  # Adam's first ones are as large for gradients that are rounding


def losses_of(recipe: DreamBooth, steps: int) -> list[float]:
    """As `train_loop` takes them."""
    losses = []
    for _ in range(steps):
        recipe._compile_if_due()
        loss = recipe._compiled_step(1.0) if recipe.session.compiled else recipe.train_step(1.0)
        losses.append(float(NumberOnItsWay(loss)))
    return losses


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(CPU), reason="wants a C++ compiler")
@pytest.mark.parametrize("family", FAMILY_WORLDS)
def test_every_family_learns_the_same(family: str, tmp_path: Path) -> None:
    """Over eight steps, by the compiler itself; all blocks of a class are compiled once."""
    world = family_world(family, tmp_path)
    expected = losses_of(world.prepared(tmp_path / "plain", **SMALL_STEPS), 8)
    recipe = world.prepared(tmp_path / "compiled", **SMALL_STEPS, compile="blocks")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = losses_of(recipe, 8)
    assert found == pytest.approx(expected, rel=1e-5)
    assert recipe.session.compiled is not None
    assert recipe.session.compiled.trouble == ""
    graphs = recipe.session.compiled.graphs - before
    assert 1 <= graphs <= 8
    recipe.clean_up()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the compiler but the last part, which writes the kernels and takes most of the time."""
    monkeypatch.setattr(dreambooth, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


WAYS: dict[str, dict[str, Any]] = {
    "T-LoRA": KINDS["T-LoRA"],
    "LoKr, checkpointing": {**KINDS["LoKr"], "gradient_checkpointing": True, **TEXT},
    "NF4, bf16, dropout, some checkpointing": {
        "base_quantization": "nf4",
        "precision": "bf16",
        "dropout": 0.2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_interval": 2,
    },
}


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("way", WAYS)
def test_everything_that_is_trained_learns_the_same(way: str, world: World, tmp_path: Path) -> None:
    changes = {**SMALL_STEPS, **WAYS[way]}
    expected = losses_of(world.prepared(tmp_path / "plain", **changes), 3)
    recipe = world.prepared(tmp_path / "compiled", **changes, compile="blocks")
    assert losses_of(recipe, 3) == pytest.approx(expected, rel=1e-2 if "bf16" in way else 1e-5)
    assert recipe.session.compiled is not None
    recipe.clean_up()


def test_what_fails_in_the_forward_pass_is_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that can compile nothing; the losses are those of a run that never tried, to the last bit."""

    def refuses(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such machine")

    expected = losses_of(world.prepared(tmp_path / "plain", **SMALL_STEPS), 2)
    monkeypatch.setattr(dreambooth, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuses))
    recipe = world.prepared(tmp_path / "compiled", listener := Recorder(), **SMALL_STEPS, compile="blocks")
    assert losses_of(recipe, 2) == expected
    assert recipe.session.compiled is None
    assert any("training continues without" in note and "no such machine" in note for note in listener.notes)
    assert all(not hasattr(block.forward, "plain") for block in blocks_of(recipe.session.model.denoiser))


def test_what_fails_in_the_backward_pass_is_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two parts of a step, which is done again from its first."""
    changes = {**SMALL_STEPS, "gradient_accumulation": 2}
    expected = losses_of(world.prepared(tmp_path / "plain", **changes), 2)
    recipe = world.prepared(tmp_path / "compiled", **changes)
    recipe.session.compiled = CompiledBlocks(recipe.session.model.denoiser)
    for block in recipe.session.compiled._blocks:
        block.forward._compiled = block.forward.plain
    real = recipe.session.accelerator.backward
    calls = []

    def fails(loss: Any) -> None:
        calls.append(loss)
        if len(calls) == 2:
            raise RuntimeError("a kernel could not be made")
        real(loss)

    monkeypatch.setattr(recipe.session.accelerator, "backward", fails)
    assert losses_of(recipe, 2) == expected
    assert len(calls) == 2 + 2 + 2
    assert recipe.session.compiled is None


def test_running_out_of_memory_is_no_failure_of_the_compiler(world: World, tmp_path: Path) -> None:
    recipe = world.prepared(tmp_path)
    compiled = CompiledBlocks(recipe.session.model.denoiser)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        compiled.give_up(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert compiled.trouble == ""
    compiled.close()


def test_where_nothing_can_compile_it_is_said(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dreambooth, "can_compile", lambda device: False)
    recipe = world.prepared(tmp_path, listener := Recorder(), compile="blocks")
    assert len(losses_of(recipe, 2)) == 2
    assert [note for note in listener.notes if "ompil" in note] == [
        "Compilation is skipped: a compiler for this device is missing."
    ]


def test_it_has_to_pay_for_itself_in_the_steps_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: 100 steps of 4 s save 80 s at 20 %, enough for 40 s of compiling; half of them are not."""
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
    cheap = Investment(seconds=39.0, saves=0.2)
    measured = Throughput(111, 0, CPU)
    said = []
    for step in range(1, 70):
        measured.event(step, 0.5, 1e-4)
        said.append(measured.pays_for(cheap))
    assert said.index(True) == 10  # after the eleventh step, ten have been measured
    assert said[11:13] == [True, True]
    assert not any(said[13:])


def test_a_pause_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 500.0, 502.0])
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(times))
    measured = Throughput(10, 0, CPU)
    events: list[Step] = [measured.event(1, 0.5, 1e-4), measured.event(2, 0.5, 1e-4)]
    measured.pause()
    events += [measured.event(3, 0.5, 1e-4), measured.event(4, 0.5, 1e-4)]
    assert [event.rate for event in events] == [0.0, 0.5, 0.5, 0.5]
