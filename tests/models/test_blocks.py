"""The repeated blocks of every family's denoiser, and gradient checkpointing of some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from families import FAMILY_WORLDS, family_world
from pack.trainer.models.blocks import blocks_of, disable_gradient_checkpointing, enable_gradient_checkpointing
from worlds import BOTH_TEXTS, World

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(params=mostly_slow(FAMILY_WORLDS, "sd1"))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """A small model of a family, and pictures."""
    return family_world(request.param, tmp_path)


def test_all_that_diffusers_checkpoints_is_in_a_block(world: World, tmp_path: Path) -> None:
    recipe = world.prepared(tmp_path, prior="none")
    denoiser = recipe.session.model.denoiser.train()
    checkpointed = []

    def note(module: Any, *args: Any) -> Any:
        checkpointed.append(getattr(module, "__self__", module))
        return module(*args)

    denoiser.enable_gradient_checkpointing(note)
    recipe.train_step(1.0)
    blocks = blocks_of(denoiser)
    assert len(checkpointed) >= 2
    assert {id(module) for module in checkpointed} <= {id(block) for block in blocks}
    assert len({id(block) for block in blocks}) == len(blocks)


def test_checkpointing_of_some_blocks_changes_nothing(world: World, tmp_path: Path) -> None:
    """To the last bit; as many blocks are computed twice as the interval says, in text encoders, too."""
    texts = BOTH_TEXTS if world.base.family.name == "sdxl" else {}
    ends = {}
    for interval in (0, 1, 2, 3):
        changes = {"gradient_checkpointing": interval > 0, "gradient_checkpointing_interval": max(1, interval)}
        recipe = world.prepared(tmp_path / str(interval), prior="none", **texts, **changes)
        denoiser = recipe.session.model.denoiser
        blocks = blocks_of(denoiser)
        again = [block for block in blocks if "forward" in vars(block)]
        assert len(again) == (len(range(0, len(blocks), interval)) if interval else 0)
        losses = [float(recipe.train_step(1.0)) for _ in range(2)]
        ends[interval] = losses, [parameter.detach() for parameter in recipe.session.trainable.parameters()]
    for losses, trained in ends.values():
        assert losses == ends[0][0]
        assert all(torch.equal(*pair) for pair in zip(trained, ends[0][1], strict=True))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_layers_of_text_encoders_are_blocks(family: str, tmp_path: Path) -> None:
    base = family_world(family, tmp_path).base
    for encoder in base.family.build(base).text_encoders.values():
        layers = getattr(encoder, "config").num_hidden_layers  # noqa: B009
        assert len(blocks_of(encoder)) == layers > 0


def test_it_can_be_turned_off_again(world: World) -> None:
    denoiser = world.base.family.build(world.base).denoiser
    for interval in (1, 3):
        enable_gradient_checkpointing(denoiser, interval)
    disable_gradient_checkpointing(denoiser)
    for block in blocks_of(denoiser):
        assert vars(block).get("forward", block.forward) == type(block).forward.__get__(block)
