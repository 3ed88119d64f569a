"""The recipe on a GPU, as far as a computer without one can show it: see tests/support/emulated_cuda.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from emulated_cuda import DEVICE, OnDevice, emulated_cuda
from families import family_world
from helpers import Recorder
from pack.trainer.core.devices import NumberOnItsWay
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.models.block_swap import PLACES, BlockSwap
from pack.trainer.models.blocks import blocks_of
from pack.trainer.settings.train import TrainSettings
from torch.nn.attention import SDPBackend, sdpa_kernel
from worlds import BOTH_TEXTS, COMMON, PROMPT, SHAPES, TEXT, World, paths_in, pictures_of

pytestmark = pytest.mark.usefixtures("quick")

EVERYTHING: dict[str, Any] = {
    "targets": "all",
    "batch_size": 2,
    "aspect_buckets": True,
    "bucket_step": 16,
    "flip": True,
    "mask_background": 0.25,
    "caption_dropout": 0.3,
    "noise_offset": 0.05,
    "multires_noise_iterations": 2,
    "input_perturbation": 0.1,
    "loss": "huber-snr",
    "loss_weighting": "min-snr",
    "dropout": 0.1,
    "max_norm": 1.0,
    "ema_decay": 0.7,
    **TEXT,
}
TAUGHT: dict[str, Any] = {"prior": "model", "prior_empty": 0.5, "dco_beta": 100.0, "weight_penalty": 0.01}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "everything": EVERYTHING,
    "the base as the teacher": TAUGHT,
    "T-LoRA": {"rank_schedule": "timestep", "targets": "all"},
    "DoRA": {"adapter": "dora"},
    "LoKr": {"adapter": "lokr"},
    "OFT": {"adapter": "oft", "rank": 4},
    "a word": {"token_vectors": 2, "token": "sks"},
    "checkpointing": {"gradient_checkpointing": True, **TEXT},
    "in four bits": {"base_quantization": "nf4"},
    "pictures and measures": {"preview_every": 2, "preview_steps": 2, "preview_count": 1, "validation_pictures": 1},
    "all weights": {"adapter": "full", "learning_rate": 1e-4, **TEXT},
}

ALIKE = ("DoRA", "LoKr", "OFT")  # their layers compute as LoRA's do; swapping tries them


def recipe_on(
    device: torch.device, world: World, folder: Path, listener: Recorder | None = None, **changes: Any
) -> DreamBooth:
    settings = TrainSettings(**{**COMMON, "fit": "off", **changes})
    return DreamBooth(world.base, world.subject, world.priors, settings, paths_in(folder), device, listener)


def losses_on(device: torch.device, world: World, folder: Path, **changes: Any) -> list[float]:
    listener = Recorder()
    recipe_on(device, world, folder, listener, **changes).run()
    assert len(listener.losses) >= COMMON["steps"]  # also those of held-out pictures
    return listener.losses


def waits_of_steps(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    """Where a program would wait for its GPU in the second and third step of a run."""
    recipe = recipe_on(DEVICE, world, folder, **changes)
    with emulated_cuda(monkeypatch) as cuda:
        recipe.open_run()
        recipe.prepare()
        assert all(isinstance(parameter, OnDevice) for parameter in recipe.session.trainable.parameters())
        recipe.train_step(1.0)
        cuda.waits.clear()
        for _ in range(2):
            loss = NumberOnItsWay(recipe.train_step(1.0))
        waits = list(cuda.waits)
        assert float(loss) > 0
    return waits


@pytest.fixture(scope="module")
def varied(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With pictures of many shapes, masks and class captions."""
    pictures = pictures_of(tmp_path_factory.mktemp("shapes") / "shapes", SHAPES, PROMPT, masked=True)
    return replace(world, subject=[replace(picture, class_captions=("a photo of a dog",)) for picture in pictures])


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["everything", "T-LoRA", "a word", "checkpointing", "in four bits", "pictures and measures", "all weights"]
)
def test_a_run_on_a_device_is_the_one_on_the_cpu(
    way: str, varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the order of sums: the device's copy of the weights is laid out for convolutions, and so is what dropout
    drops, which is left out.
    """
    changes = {**WAYS[way], "dropout": 0.0}
    with sdpa_kernel(SDPBackend.MATH):
        expected = losses_on(torch.device("cpu"), varied, tmp_path / "cpu", **changes)
    with emulated_cuda(monkeypatch):
        found = losses_on(DEVICE, varied, tmp_path / "cuda", precision="fp32", **changes)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("way", mostly_slow([way for way in WAYS if way not in ALIKE], "LoRA"))
def test_no_step_waits(way: str, varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GradScaler, too."""
    assert waits_of_steps(varied, tmp_path, monkeypatch, precision="fp16", **WAYS[way]) == []


@pytest.mark.slow
def test_no_step_of_sdxl_waits(xl: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_of_steps(xl, tmp_path, monkeypatch, precision="bf16", **BOTH_TEXTS) == []


def two_steps(world: World, folder: Path, **changes: Any) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of two steps on the emulated device, and what is trained after them."""
    recipe = recipe_on(DEVICE, world, folder, precision="fp32", **changes)
    recipe.open_run()
    recipe.prepare()
    losses = [float(recipe.train_step(1.0)) for _ in range(2)]
    return losses, [parameter.detach().cpu() for parameter in recipe.session.trainable.parameters()]


SWAPPED_WAYS = [way for way in WAYS if way not in ("all weights", "checkpointing", "pictures and measures")]


@pytest.mark.parametrize("way", mostly_slow(SWAPPED_WAYS, "LoRA"))
def test_swapped_blocks_change_nothing(
    way: str, varied: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit."""
    with emulated_cuda(monkeypatch):
        losses, trained = two_steps(varied, tmp_path / "plain", **WAYS[way])
        swapped_losses, swapped_trained = two_steps(varied, tmp_path / "swapped", **WAYS[way], swap_blocks=5)
    assert swapped_losses == losses
    assert all(torch.equal(*pair) for pair in zip(swapped_trained, trained, strict=True))


def test_swapped_blocks_travel_ahead_and_leave(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them are on the device, the others in the computer's memory; after the first step all have come before
    they compute, and none is waited for."""
    with emulated_cuda(monkeypatch) as cuda:
        recipe = recipe_on(DEVICE, world, tmp_path, precision="fp32", swap_blocks=1000)
        recipe.open_run()
        recipe.prepare()
        blocks = blocks_of(recipe.session.model.denoiser)
        recipe.train_step(1.0)
        cuda.waits.clear()
        brought: list[bool] = []
        real = BlockSwap.fetch

        def fetch(self: BlockSwap, visitor: Any) -> None:
            brought.append(visitor.place is None)
            real(self, visitor)

        monkeypatch.setattr(BlockSwap, "fetch", fetch)
        recipe.train_step(1.0)
        devices = [
            {parameter.device.type for parameter in block.parameters() if not parameter.requires_grad}
            for block in blocks
        ]
        trained = {parameter.device.type for parameter in recipe.session.trainable.parameters()}
    assert cuda.waits == []
    assert len(brought) > len(blocks)  # also to compute again
    assert not any(brought)
    assert all(len(kinds) == 1 for kinds in devices)
    assert 1 <= sum(kinds == {"cuda"} for kinds in devices) <= PLACES
    assert trained == {"cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux2", "zimage", "krea2", "anima"])
def test_no_step_of_flow_matching_waits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = family_world(family, tmp_path)
    assert waits_of_steps(world, tmp_path, monkeypatch, precision="bf16", batch_size=2, prior="none") == []
