"""A family that only its own class and its entry in `FAMILIES` know is opened, trained, recognised and refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CLIP_PREFIX, sd15_state_dict
from helpers import DEMO, TINY, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.diffusers_format import diffusers_state_dict
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter
from pack.trainer.adapters.names import adapter_names, family_of, with_kohya_names
from pack.trainer.adapters.targets import require_family_fits
from pack.trainer.cli.inspect import inspect
from pack.trainer.core.errors import AdapterError, SettingsError, UnsupportedModelError
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models import families
from pack.trainer.models.families.base import AdapterMarks, Prediction
from pack.trainer.models.families.sd1 import StableDiffusion1
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.runs.folder import RunPaths
from safetensors.torch import save_file

LATENT_CHANNELS = 8


class MadeUp(StableDiffusion1):
    """Eight latent channels, and a text encoder that is named otherwise in checkpoints and in adapters."""

    name = "made-up"
    title = "Made-Up Diffusion"
    short_title = "MUD"
    adapter_marks = AdapterMarks(
        context_width=0, module_names="^lora_te7_", architecture="made-up-diffusion", base_version="mud"
    )
    original_names = True
    transformer_depths = (0, 1, 1)
    text_encoders = (
        replace(
            StableDiffusion1.text_encoders[0],
            short_name="clip_m",
            file_prefixes=("made_up.text.",),
            adapter_prefix="lora_te7_",
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        return "made-up-diffusion-v3"

    def base_version(self, prediction: Prediction) -> str:
        return "mud_v3"

    def claims(self, unet_config: Mapping[str, Any]) -> bool:
        return bool(unet_config["in_channels"] == LATENT_CHANNELS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made up") / "tiny.safetensors"
    tensors = sd15_state_dict(replace(TINY, in_channels=LATENT_CHANNELS, latent_channels=LATENT_CHANNELS))
    save_file({name.replace(CLIP_PREFIX, "made_up.text."): tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    family = MadeUp()
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    return family


@pytest.fixture
def trained(made_up: MadeUp, checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """The file of an adapter for UNet and text encoder after two steps."""
    base = open_base(checkpoint, DEMO / "base" / "tokenizer")
    assert base.family is made_up
    pictures = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    settings = TrainSettings(
        name="dog", steps=2, rank=2, resolution=64, learning_rate=1e-2, text_encoder_lr=1e-2, targets="all"
    )
    return train(base, pictures, [], settings, RunPaths(tmp_path / "loras", tmp_path / "runs"), "cpu").path


def test_without_its_entry_it_is_no_family(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        open_base(checkpoint, DEMO / "base" / "tokenizer")


def test_an_adapter_is_named_stated_and_recognized_as_the_familys(
    trained: Path, checkpoint: Path, tiny_checkpoint: Path
) -> None:
    adapter = read_adapter(trained)
    base = open_base(checkpoint, DEMO / "base" / "tokenizer")
    model = base.family.build(base)
    own = set(adapter_names(model).values())
    assert own >= set(adapter.layers)
    beginnings = ("lora_te7_text_model_", "lora_unet_input_blocks_", "lora_unet_middle_", "lora_unet_output_blocks_")
    for beginning in beginnings:
        assert any(name.startswith(beginning) for name in adapter.layers)
    assert all(name.startswith(beginnings) for name in adapter.layers)
    assert adapter.metadata["modelspec.architecture"] == "made-up-diffusion-v3/lora"
    assert adapter.metadata["ss_base_model_version"] == "mud_v3"
    assert family_of(adapter) == "MUD"
    assert family_of(Adapter({}, adapter.metadata)) == "MUD"
    assert inspect(checkpoint)["family"] == "Made-Up Diffusion"
    assert set(inspect(trained)["modules"]) == {"unet", "text_encoder"}

    weight = model.denoiser.mid_block.resnets[0].conv1.weight
    merge_into(model, adapter, 1.0)
    assert not torch.equal(model.denoiser.mid_block.resnets[0].conv1.weight, weight)
    other = open_base(tiny_checkpoint)
    with pytest.raises(AdapterError, match=r"made-up-diffusion-v3, but the base model is Stable Diffusion 1\.x"):
        merge_into(other.family.build(other), adapter, 1.0)


@pytest.mark.slow
def test_other_programs_names_become_the_familys(trained: Path) -> None:
    """There and back, through the names of diffusers, which are the same for every family."""
    adapter = read_adapter(trained)
    numbered_alike = Adapter(  # the tiny UNet's other modules have other numbers than in a published one
        {name: layer for name, layer in adapter.layers.items() if "_middle_block_" in name or "lora_te7_" in name},
        {"modelspec.architecture": adapter.metadata["modelspec.architecture"]},
    )
    tensors = diffusers_state_dict(numbered_alike, torch.float32)
    assert {name.partition(".")[0] for name in tensors} == {"unet", "text_encoder"}
    [renamed] = with_kohya_names([parse_adapter(tensors, numbered_alike.metadata)])
    assert set(renamed.layers) == set(numbered_alike.layers)


def test_a_setting_of_another_family_names_those_that_have_it(made_up: MadeUp, checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="is not available for Made-Up Diffusion") as failure:
        require_family_fits(made_up, TrainSettings(targets="b-lora-style"))
    assert "Stable Diffusion XL" in failure.value.remedy
