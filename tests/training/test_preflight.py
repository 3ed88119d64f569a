"""What is checked of a base model before all of its weights are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_worlds import checkpoint
from pack.trainer.core.errors import NotFiniteError, SettingsError
from pack.trainer.models.families.base import BaseWeights, Component
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.preflight import require_trainable
from pack.trainer.training.runs.folder import RunPaths

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    return open_base(checkpoint(tmp_path_factory.mktemp("base"), "sd15"))


def check(base: BaseWeights, folder: Path, **settings: Any) -> None:
    values = TrainSettings(adapter="full", **settings)
    require_trainable(base, values, RunPaths(folder, folder / "runs", folder), StartingPoint())


def changed(component: Component, ending: str, value: float) -> Component:
    name = next(name for name in component.tensors if name.endswith(ending))
    tensor = component.tensors[name].clone()
    tensor.view(-1)[0] = value
    return replace(component, tensors={**component.tensors, name: tensor})


def test_weights_that_the_file_cant_hold_are_named(base: BaseWeights, tmp_path: Path) -> None:
    """Before hours of training, whose result could not be written."""
    large = replace(base, vae=changed(base.vae, "decoder.conv_out.bias", 1e5))
    with pytest.raises(NotFiniteError, match=r"decoder\.conv_out\.bias") as caught:
        check(large, tmp_path, save_precision="fp16")
    assert "save_precision = bf16" in caught.value.remedy
    check(large, tmp_path, save_precision="bf16")
    check(base, tmp_path, save_precision="fp16")


def test_weights_that_are_not_finite_are_named(base: BaseWeights, tmp_path: Path) -> None:
    [encoder] = base.text_encoders
    spoilt = replace(base, text_encoders=[changed(encoder, "final_layer_norm.bias", torch.nan)])
    with pytest.raises(NotFiniteError, match=r"final_layer_norm\.bias"):
        check(spoilt, tmp_path, save_precision="fp32")


def test_heads_may_be_listed_by_level(base: BaseWeights, tmp_path: Path) -> None:
    """As a folder's configuration may have them."""
    heads = base.denoiser.config["attention_head_dim"]

    def with_heads(value: Any) -> BaseWeights:
        return replace(
            base, denoiser=replace(base.denoiser, config={**base.denoiser.config, "attention_head_dim": value})
        )

    check(with_heads([heads, heads]), tmp_path)
    for other in ([heads, 2 * heads], 2 * heads):
        with pytest.raises(SettingsError, match="heads"):
            check(with_heads(other), tmp_path)
