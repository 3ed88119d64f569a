"""The thinnest slice through every floor: pictures in, adapter out, picture generated."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack.trainer.adapters.apply import merge_into
from pack.trainer.models.sampling import GenerationConfig, generate
from worlds import Finished, World

pytestmark = pytest.mark.usefixtures("quick")


def test_pictures_in_adapter_out(finished: Finished, world: World) -> None:
    assert finished.result.path == finished.folder / "loras" / "dog.safetensors"
    assert len(finished.listener.losses) == 4
    before, after = (world.base.family.build(world.base) for _ in range(2))
    merge_into(after, finished.result.adapter, 1.0)
    config = GenerationConfig(width=64, height=64, steps=2)
    plain, changed = (generate(model, "a dog", [1], config)[0] for model in (before, after))
    assert plain.size == (64, 64)
    assert plain.tobytes() != changed.tobytes()


def test_accelerates_state_is_given_back(world: World, tmp_path: Path) -> None:
    """Another program in the process may hold an accelerator of its own."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    other = Accelerator(cpu=True, mixed_precision="no")
    world.train(tmp_path, steps=1, precision="bf16")
    assert other.mixed_precision == "no"
    assert Accelerator(cpu=True).mixed_precision == "no"
