"""Weights that are updated in the backward pass: the same run, with hardly a gradient held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from helpers import Recorder
from pack.trainer.core.errors import SettingsError
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training import preflight
from pack.trainer.training.memory.plan import MemorySaving, Planner
from pack.trainer.training.preflight import require_fused_backward
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path
from worlds import PROMPT, SHAPES, TEXT, World, pictures_of

pytestmark = pytest.mark.usefixtures("quick")

UNCLIPPED: dict[str, Any] = {"max_grad_norm": 0.0, "learning_rate": 1e-3}
FULL: dict[str, Any] = {**UNCLIPPED, "adapter": "full"}
FUSED: dict[str, Any] = {"fused_backward_pass": True}
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": FULL,
    "AdamW and the text encoder": {**FULL, **TEXT, "text_encoder_until": 0.5},
    "Adafactor": {**FULL, "optimizer": "adafactor"},
    "AdamW in 8 bits": {**FULL, "optimizer": "adamw-8bit"},
    "parts of a step": {**FULL, "gradient_accumulation": 2, "batch_size": 2, "aspect_buckets": True, "bucket_step": 16},
    "gradient checkpointing": {**FULL, "gradient_checkpointing": True},
    "moving average": {**FULL, "ema_decay": 0.7},
    "LoRA with a penalty and the base as the teacher": {
        **UNCLIPPED,
        **TEXT,
        "prior": "model",
        "prior_every": 1,
        "weight_penalty": 0.01,
        "lora_plus_ratio": 4.0,
        "max_norm": 1.0,
    },
}


@pytest.fixture(scope="module")
def varied(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With pictures of several shapes, so that a step has several backward passes."""
    pictures = pictures_of(tmp_path_factory.mktemp("shapes") / "shapes", SHAPES, PROMPT)
    return replace(world, subject=[replace(picture, class_captions=("a photo of a dog",)) for picture in pictures])


def steps(world: World, folder: Path, **settings: Any) -> tuple[DreamBooth, list[float]]:
    """A run after four steps, and their losses."""
    recipe = world.prepared(folder, steps=4, **settings)
    losses = []
    for _ in range(4):
        recipe.freeze_text()
        losses.append(float(recipe.train_step(1.0)))
    return recipe, losses


@pytest.mark.parametrize("way", mostly_slow([*WAYS], "AdamW", "parts of a step"))
def test_the_result_is_the_same_to_the_last_bit(way: str, varied: World, tmp_path: Path) -> None:
    plain, losses = steps(varied, tmp_path / "plain", **WAYS[way])
    fused, fused_losses = steps(varied, tmp_path / "fused", **WAYS[way], **FUSED)
    assert fused_losses == losses
    pairs = zip(plain.session.trainable.parameters(), fused.session.trainable.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    states = [dict(tree_flatten_with_path(recipe.session.optimizer.state_dict())[0]) for recipe in (plain, fused)]
    assert states[0].keys() == states[1].keys()
    for path, value in states[0].items():
        other = states[1][path]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, path


def most_held(recipe: DreamBooth) -> int:
    """The most numbers that gradients held together while they were made, in one step."""
    parameters = recipe.session.trainable.parameters()
    held: list[int] = []

    def count(_: Tensor) -> None:
        held.append(sum(other.grad.numel() for other in parameters if other.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    recipe.train_step(1.0)
    return max(held)


def test_gradients_are_freed_as_they_are_made(world: World, tmp_path: Path) -> None:
    recipe = world.prepared(tmp_path / "plain", **FULL)
    numbers = [parameter.numel() for parameter in recipe.session.trainable.parameters()]
    assert most_held(recipe) == sum(numbers)
    recipe = world.prepared(tmp_path / "fused", **FULL, **FUSED)
    recipe.session.fused_backward = None  # its hooks stay, and do nothing
    assert most_held(recipe) == sum(numbers)
    assert most_held(world.prepared(tmp_path / "freed", **FULL, **FUSED)) == 0, "freed before the next hook looks"


def test_a_run_goes_on_exactly(world: World, tmp_path: Path) -> None:
    """The loaded state brings other groups, with the learning rate of each step."""
    listener = Recorder()
    schedule = {"steps": 4, "lr_schedule": "linear"}
    world.train(tmp_path / "whole", listener, **FULL, **FUSED, **schedule)
    world.stop_after(2, tmp_path / "parts", **FULL, **FUSED, **schedule)
    resumed = Recorder()
    world.train(tmp_path / "parts", resumed, **FULL, **FUSED, **schedule)
    assert resumed.losses == listener.losses[2:]
    plain = Recorder()
    world.train(tmp_path / "plain", plain, **FULL, **schedule)
    assert plain.losses == listener.losses


def test_the_plan_counts_no_gradients(world: World) -> None:
    def need(**changes: Any) -> Any:
        settings = TrainSettings(**{"resolution": 64, **FULL, **changes})
        return Planner(world.base, settings, "fp32", None, priors=False).need(MemorySaving(0))

    plain, fused, in_parts = need(), need(**FUSED), need(**FUSED, gradient_accumulation=2)
    weights = 4 * sum(tensor.numel() for tensor in world.base.denoiser.tensors.values())
    assert plain.trained - fused.trained == weights
    assert fused.peak < plain.peak - weights / 2, "of what is held in the middle of a pass some was not made yet"
    assert in_parts.peak > plain.peak - weights / 2, "earlier passes leave theirs"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigy"),
        ({"optimizer": "adamw-schedule-free"}, "adamw-schedule-free"),
        ({"compile": "auto"}, "compile"),
    ],
)
def test_what_needs_all_gradients_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        TrainSettings.checked({**FULL, **FUSED, **changes})


def test_scaled_and_averaged_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(**FULL, **FUSED)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    require_fused_backward(settings, cpu)
    with pytest.raises(SettingsError, match="several processes"):
        require_fused_backward(settings, cpu, processes=2)
    monkeypatch.setattr(preflight, "pick_precision", lambda precision, device: "fp16")
    with pytest.raises(SettingsError, match="fp16"):
        require_fused_backward(settings, cuda)
    require_fused_backward(TrainSettings(**FULL), cuda, processes=2)
