"""What is no base model, or only part of one, is refused with its name before anything is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import UNET_PREFIX, sd15_state_dict
from helpers import DEMO, TINY
from pack.trainer.core.errors import UnsupportedModelError, WeightsError
from pack.trainer.models.families import SD1, identify
from pack.trainer.models.families.clip import text_component
from pack.trainer.models.families.ldm import unet_component, unet_config, with_prefix
from pack.trainer.models.hub import model_type
from pack.trainer.models.state_dicts import read_component, read_single_file
from pack.trainer.models.tokenizer import load_tokenizer
from torch import Tensor


@pytest.fixture(scope="module")
def unet() -> dict[str, Tensor]:
    return dict(with_prefix(sd15_state_dict(TINY), UNET_PREFIX))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"in_channels": 9, "cross_attention_dim": 768}, "an inpainting model (SD 1.x)"),
        ({"in_channels": 8, "use_linear_projection": True}, "an InstructPix2Pix model (SD 2.x)"),
        ({"in_channels": 9, "addition_embed_type": "text_time"}, "an inpainting model (SDXL)"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "the SDXL refiner"),
        ({"class_embed_type": "projection", "cross_attention_dim": 1024}, "Stable unCLIP"),
        ({"in_channels": 12, "cross_attention_dim": 999}, "an unknown UNet (12 input channels, context width 999)"),
    ],
)
def test_unets_that_no_family_claims_are_named(config: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        identify(config)
    assert f"The base model is {name}, which" in refused.value.problem


def test_a_checkpoint_without_its_text_encoder() -> None:
    with pytest.raises(WeightsError) as refused:
        text_component({}, SD1.text_encoders[0])
    assert "no CLIP text encoder (clip_l)" in refused.value.problem


def test_levels_of_different_depth(unet: dict[str, Tensor]) -> None:
    """Two residual blocks on the first level and one on the second."""
    uneven = {name: tensor for name, tensor in unet.items() if not name.startswith("input_blocks.3.")}
    uneven["input_blocks.3.0.out_layers.3.weight"] = unet["input_blocks.1.0.out_layers.3.weight"]
    uneven["input_blocks.2.0.out_layers.3.weight"] = unet["input_blocks.1.0.out_layers.3.weight"]
    del uneven["input_blocks.2.0.op.weight"]
    uneven["input_blocks.4.0.op.weight"] = unet["input_blocks.2.0.op.weight"]
    uneven["input_blocks.5.0.out_layers.3.weight"] = unet["input_blocks.3.0.out_layers.3.weight"]
    with pytest.raises(WeightsError) as refused:
        unet_config(uneven)
    assert "different numbers of layers" in refused.value.problem


def test_a_unet_without_cross_attention(unet: dict[str, Tensor]) -> None:
    blind = {name: tensor for name, tensor in unet.items() if "attn2" not in name}
    with pytest.raises(WeightsError) as refused:
        unet_config(blind)
    assert "prompts would have no effect" in refused.value.problem


def test_a_unet_with_a_tensor_that_diffusers_does_not_know(unet: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError) as refused:
        unet_component({**unet, "surprise.weight": torch.zeros(1)}, unet_config(unet))
    assert "unknown tensor: surprise.weight" in refused.value.problem


def test_hub_names_are_no_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(OSError, match="it is a file, not a folder"):
        model_type(str(file), ("blip",), download=False)
    with pytest.raises(OSError, match="the folder does not exist"):
        model_type(str(tmp_path / "nowhere" / "deep" / "below"), ("blip",), download=False)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as refused:
        read_component(tmp_path, "diffusion_pytorch_model")
    assert str(tmp_path) in refused.value.problem
    assert "diffusion_pytorch_model.safetensors" in refused.value.problem


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"state_dict": {"step": 3}}])
def test_a_ckpt_that_holds_no_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    assert read_single_file(tmp_path / "model.ckpt") == {}


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as refused:
        load_tokenizer(tmp_path)
    assert f"{tmp_path} contains no CLIP tokenizer" in refused.value.problem


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(DEMO / "base" / "tokenizer", folder)
    for name in ("vocab.json", "tokenizer.json"):
        (folder / name).write_text("{")
    with pytest.raises(WeightsError) as refused:
        load_tokenizer(folder)
    assert f"The tokenizer in {folder} can't be read" in refused.value.problem
