"""Class pictures, training and drawing with SD 2 and SDXL by the command line's functions; other autoencoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VAE_PREFIX, sd2_checkpoint, sdxl_checkpoint, sdxl_state_dict
from checkpoints_folders import diffusers_folder
from helpers import DEMO, Recorder
from pack.trainer.cli.train import run_generate, run_priors, run_train
from pack.trainer.core.errors import WeightsError
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import GenerateCommand, PriorsCommand, TrainCommand
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick")

TOKENIZER = DEMO / "base" / "tokenizer"
FAMILIES = ["sd2", "sdxl", "sdxl-v-ztsnr"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Single-file checkpoints of 16 bit, as they are shared."""
    root = tmp_path_factory.mktemp("models")
    half = torch.float16
    return {
        "sd2": sd2_checkpoint(root / "sd2.safetensors", size="tiny", dtype=half),
        "sdxl": sdxl_checkpoint(root / "sdxl.safetensors", size="tiny", dtype=half),
        "sdxl-v-ztsnr": sdxl_checkpoint(root / "v.safetensors", size="tiny", v_pred=True, ztsnr=True, dtype=half),
    }


def common(path: Path, folder: Path) -> dict[str, Any]:
    return {"base": path, "tokenizer": TOKENIZER, "device": "cpu", "output_dir": folder}


def train_command(path: Path, folder: Path, **changes: Any) -> TrainCommand:
    values: dict[str, Any] = {
        **common(path, folder),
        "images": DEMO / "subject",
        "class_prompt": "a photo of a dog",
        "prior_count": 2,
        "prior_steps": 2,
        "steps": 2,
        "rank": 4,
        "targets": "attention",
        "resolution": 64,
        "learning_rate": 0.02,
    }
    return TrainCommand(**{**values, **changes})


def drawn(path: Path, folder: Path, **changes: Any) -> np.ndarray[Any, Any]:
    """The pixels of a small picture."""
    values = {name: value for name, value in common(path, folder).items() if name != "output_dir"}
    output = folder / "picture.png"
    settings = GenerateCommand(**values, prompt="a red dog", size="64x96", steps=2, output=output, **changes)
    assert run_generate(settings, Recorder()) == [output]
    with Image.open(output) as picture:
        assert picture.size == (64, 96)
        return np.asarray(picture, dtype=int)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rates", "prefixes", "metadata"),
    [
        (
            "sd2",
            {"text_encoder_lr": 0.01},
            {"lora_unet_down_", "lora_unet_up_b", "lora_unet_mid_", "lora_te_text_m"},
            {"ss_base_model_version": "sd_v2", "ss_v2": "True", "modelspec.prediction_type": "epsilon"}
            | {"modelspec.architecture": "stable-diffusion-v2-512/lora", "ss_text_encoder_lr": "0.01"},
        ),
        (
            "sdxl",
            {"text_encoder_lr": 0.01, "text_encoder_2_lr": 0.02},
            {"lora_unet_input", "lora_unet_outpu", "lora_unet_middl", "lora_te1_text_m", "lora_te2_text_m"},
            {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "modelspec.prediction_type": "epsilon"}
            | {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_text_encoder_lr": "0.01, 0.02"},
        ),
        (
            "sdxl-v-ztsnr",
            {},
            {"lora_unet_input", "lora_unet_outpu", "lora_unet_middl"},
            {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "v", "ss_text_encoder_lr": "0.0"},
        ),
    ],
)
def test_train_with_class_pictures_then_draw(
    family: str,
    rates: dict[str, float],
    prefixes: set[str],
    metadata: Mapping[str, str],
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    listener = Recorder()
    result = run_train(train_command(files[family], tmp_path, **rates), listener)
    assert len(listener.losses) == 2
    assert len(list((tmp_path / "class-pictures").rglob("*.png"))) == 2
    with safe_open(result.path, "pt") as file:
        written, names = file.metadata(), list(file.keys())
    assert {key: written[key] for key in metadata} == metadata
    assert {next(prefix for prefix in [*prefixes, name] if name.startswith(prefix)) for name in names} == prefixes
    plain = drawn(files[family], tmp_path)
    assert plain.std() > 5
    assert np.abs(drawn(files[family], tmp_path, lora=(str(result.path),)) - plain).max() > 5
    assert np.abs(drawn(files[family], tmp_path, lora=(f"{result.path}:0",)) - plain).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_priors_alone_are_used_again(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    asked = {"class_prompt": "a photo of a dog", "prior_count": 2, "prior_steps": 2, "resolution": 64}
    [folder] = run_priors(PriorsCommand(**common(files[family], tmp_path), **asked), Recorder())
    made = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(made) == 2
    listener = Recorder()
    run_train(train_command(files[family], tmp_path, steps=1), listener)
    assert any("already exist" in note for note in listener.notes)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == made
    for prediction in ("epsilon", "v_prediction"):  # another kind of model, other pictures
        other = PriorsCommand(**common(files[family], tmp_path), **asked, prediction_type=prediction)
        is_same = prediction == open_base(files[family], TOKENIZER).prediction.type
        assert (run_priors(other, Recorder()) == [folder]) == is_same


# Autoencoders


@torch.no_grad()
def latents_of(base: BaseWeights) -> Tensor:
    vae = base.family.build(base).vae.float()
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor


@pytest.mark.slow
def test_another_autoencoder_from_a_file_or_a_folder(tmp_path: Path) -> None:
    """A file, with the checkpoint's prefix or without, takes the family's scaling; a folder says its own."""
    base = sdxl_checkpoint(tmp_path / "base.safetensors", size="tiny")
    other = sdxl_state_dict("tiny", seed=1)
    parts = {name: tensor for name, tensor in other.items() if name.startswith(VAE_PREFIX)}
    save_file(other, tmp_path / "whole.safetensors")
    save_file({name.removeprefix(VAE_PREFIX): t for name, t in parts.items()}, tmp_path / "vae.safetensors")
    torch.save({"state_dict": parts}, tmp_path / "vae.pt")
    folder = diffusers_folder(tmp_path / "folder", "sdxl", seed=1) / "vae"
    plain, expected = open_base(base, TOKENIZER), open_base(tmp_path / "whole.safetensors", TOKENIZER)
    assert (latents_of(plain) - latents_of(expected)).abs().max() > 0.1
    opened = [open_base(base, TOKENIZER, vae=tmp_path / f"{name}.safetensors") for name in ("whole", "vae")]
    opened += [open_base(base, TOKENIZER, vae=tmp_path / "vae.pt"), open_base(base, TOKENIZER, vae=folder)]
    for one in opened:
        torch.testing.assert_close(latents_of(one), latents_of(expected), rtol=0, atol=1e-4)
        assert one.fingerprint == opened[0].fingerprint != plain.fingerprint
    in_sd2 = open_base(diffusers_folder(tmp_path / "sd2", "sd2"), vae=tmp_path / "vae.safetensors")
    torch.testing.assert_close(latents_of(in_sd2) / 0.18215, latents_of(expected) / 0.13025, rtol=0, atol=1e-4)


def test_a_single_file_of_diffusers_is_an_autoencoder_too(files: dict[str, Path], tmp_path: Path) -> None:
    """As SDXL's autoencoder for half precision is shared."""
    folder = diffusers_folder(tmp_path / "folder", "sdxl", seed=1) / "vae"
    from_folder = open_base(files["sdxl"], TOKENIZER, vae=folder)
    from_file = open_base(files["sdxl"], TOKENIZER, vae=folder / "diffusion_pytorch_model.safetensors")
    assert from_file.fingerprint == from_folder.fingerprint
    assert torch.equal(latents_of(from_file), latents_of(from_folder))


def test_an_autoencoder_that_is_not_there_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors does not exist"):
        open_base(files["sdxl"], TOKENIZER, vae=tmp_path / "nowhere.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="no Stable Diffusion encoder"):
        open_base(files["sdxl"], TOKENIZER, vae=tmp_path / "half.safetensors")


@pytest.mark.slow
def test_an_autoencoder_that_overflows_in_half_precision_works(tmp_path: Path) -> None:
    """As SDXL's own: it computes in float32, whatever the weights' type, when it encodes and when it draws."""
    tensors = sdxl_state_dict("tiny", dtype=torch.float16)
    for side in ("encoder", "decoder"):
        tensors[f"{VAE_PREFIX}{side}.conv_in.weight"] *= 30_000
    path = tmp_path / "loud.safetensors"
    save_file(tensors, path)
    base = open_base(path, TOKENIZER)
    vae = base.family.build(base).vae
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        assert not torch.isfinite(vae.encode(pixels.half()).latent_dist.mean).all()
        assert not torch.isfinite(vae.decode(torch.full((1, 4, 8, 8), 20.0, dtype=torch.float16)).sample).all()
    assert torch.isfinite(latents_of(base)).all()
    listener = Recorder()
    run_train(train_command(path, tmp_path, steps=1, precision="bf16"), listener)
    assert np.isfinite(listener.losses).all()
    [first, *_] = sorted((tmp_path / "class-pictures").rglob("*.png"))
    with Image.open(first) as picture:
        assert np.asarray(picture).std() > 5
    assert drawn(path, tmp_path).std() > 5
