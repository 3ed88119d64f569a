"""The repeated blocks of every family's denoiser, and gradient checkpointing of some of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anima_checkpoints
import krea2_checkpoints
import pytest
import torch
from anima_checkpoints import anima_folder
from cases import mostly_slow
from checkpoints import sd15_checkpoint, sdxl_checkpoint
from flux2_checkpoints import flux2_folder
from helpers import TINY, Recorder
from krea2_checkpoints import krea2_folder
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import load_pictures
from pack.trainer.models.blocks import blocks_of, disable_gradient_checkpointing, enable_gradient_checkpointing
from pack.trainer.models.open import open_base
from worlds import BOTH_TEXTS, PROMPT, TOKENIZER, World, noisy_pictures
from zimage_checkpoints import zimage_folder

pytestmark = pytest.mark.usefixtures("quick")


def always() -> bool:
    return True


MAKERS: dict[str, tuple[Callable[[Path], Any], Callable[[], bool]]] = {
    "sd1": (lambda path: open_base(sd15_checkpoint(path / "sd.safetensors", size=TINY), TOKENIZER), always),
    "sdxl": (lambda path: open_base(sdxl_checkpoint(path / "xl.safetensors", size="tiny"), TOKENIZER), always),
    "flux2": (lambda path: open_base(flux2_folder(path / "base")), always),
    "zimage": (lambda path: open_base(zimage_folder(path / "base")), always),
    "krea2": (lambda path: open_base(krea2_folder(path / "base")), krea2_checkpoints.can_be_made),
    "anima": (lambda path: open_base(anima_folder(path / "base")), anima_checkpoints.can_be_made),
}


@pytest.fixture(params=mostly_slow(MAKERS, "sd1"))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """A small model of a family, and pictures."""
    make, can_be_made = MAKERS[request.param]
    if not can_be_made():
        pytest.skip("needs newer libraries")
    pictures = noisy_pictures(tmp_path / "subject", 3, 0)
    subject = load_pictures(pictures, PROMPT, Recorder(), AnnotationOptions(token="sks"))
    return World(make(tmp_path), subject)


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


def test_it_can_be_turned_off_again(world: World) -> None:
    denoiser = world.base.family.build(world.base).denoiser
    for interval in (1, 3):
        enable_gradient_checkpointing(denoiser, interval)
    disable_gradient_checkpointing(denoiser)
    for block in blocks_of(denoiser):
        assert vars(block).get("forward", block.forward) == type(block).forward.__get__(block)
