"""Epsilon or velocity: who says so, what contradicts, and the schedule that ends in pure noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from checkpoints import SD2_SHAPES, sd2_checkpoint, sdxl_checkpoint
from checkpoints_folders import diffusers_folder
from diffusers import DDPMScheduler
from helpers import DEMO, Recorder
from pack.trainer.core.errors import WeightsError
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models.families.base import CHOSEN, BaseWeights, Conditioning
from pack.trainer.models.families.stable_diffusion import StableDiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, generate
from pack.trainer.settings.train import SchedulerName, TrainSettings
from pack.trainer.training.runs.folder import RunPaths
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick")

TOKENIZER = DEMO / "base" / "tokenizer"
# With the twelve blocks on the way up in which SD 2's velocity models are told from the others.
DEEP = replace(SD2_SHAPES["tiny"], channel_mult=(1, 1, 1, 1), num_res_blocks=2)
SETTINGS = {"resolution": 64, "precision": "fp32", "rank": 4, "targets": "attention", "steps": 1}


# Who says what a model predicts


@pytest.mark.parametrize(
    ("make", "kind", "rescaled", "source"),
    [
        (lambda path: sd2_checkpoint(path, size=DEEP), "epsilon", False, "weights"),
        (lambda path: sd2_checkpoint(path, size=DEEP, velocity=True), "v_prediction", False, "weights"),
        (lambda path: sd2_checkpoint(path, size="tiny", velocity=True), "epsilon", False, "weights"),
        (lambda path: sdxl_checkpoint(path, size="tiny"), "epsilon", False, "family"),
        (lambda path: sdxl_checkpoint(path, size="tiny", v_pred=True), "v_prediction", False, "key v_pred"),
        (lambda path: sdxl_checkpoint(path, size="tiny", v_pred=True, ztsnr=True), "v_prediction", True, "key v_pred"),
        (lambda path: diffusers_folder(path, "sd2"), "epsilon", False, "scheduler"),
        (lambda path: diffusers_folder(path, "sd2", velocity=True), "v_prediction", False, "scheduler"),
        (lambda path: diffusers_folder(path, "sdxl", velocity=True, ztsnr=True), "v_prediction", True, "scheduler"),
    ],
)
def test_what_a_model_predicts_is_found(
    make: Callable[[Path], Path], kind: str, rescaled: bool, source: str, tmp_path: Path
) -> None:
    base = open_base(make(tmp_path / "model.safetensors"), TOKENIZER)
    assert (base.prediction.type, base.prediction.zero_terminal_snr) == (kind, rescaled)
    assert source in base.prediction.source
    assert base.family.build(base).objective.prediction_type == kind


@pytest.mark.parametrize(("std", "kind"), [(0.085, "epsilon"), (0.095, "v_prediction")])
def test_the_spread_that_tells_velocity_is_comfyuis(std: float, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = load_file(sd2_checkpoint(path, size=DEEP, velocity=True))
    bias = tensors["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"]
    bias *= std / bias.std(correction=0)
    save_file(tensors, path)
    assert open_base(path, TOKENIZER).prediction.type == kind


def test_a_choice_overrides_and_counts_in_the_fingerprint(tmp_path: Path) -> None:
    path = sdxl_checkpoint(tmp_path / "model.safetensors", size="tiny", v_pred=True, ztsnr=True)
    found = open_base(path, TOKENIZER)
    same = open_base(path, TOKENIZER, prediction_type="v_prediction")
    other = open_base(path, TOKENIZER, prediction_type="epsilon")
    plain = open_base(sdxl_checkpoint(tmp_path / "plain.safetensors", size="tiny", v_pred=True), TOKENIZER)
    assert (same.prediction.type, same.prediction.zero_terminal_snr, same.prediction.source) == (
        "v_prediction",
        True,
        CHOSEN,
    )
    assert (other.prediction.type, other.prediction.zero_terminal_snr) == ("epsilon", False)
    assert found.fingerprint == same.fingerprint
    assert len({found.fingerprint, other.fingerprint, plain.fingerprint}) == 3


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_other_predictions_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"predicts {kind}"):
        open_base(demo_base(tmp_path, prediction_type=kind))


@pytest.mark.parametrize(
    ("family", "velocity", "ztsnr"),
    mostly_slow(
        [(family, *kind) for family in ("sd2", "sdxl") for kind in ((False, False), (True, False), (True, True))],
        ("sd2", True, False),
        ("sdxl", True, True),
    ),
)
def test_the_schedule_is_diffusers(family: Any, velocity: bool, ztsnr: bool, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "model", family, velocity=velocity, ztsnr=ztsnr)
    base = open_base(folder)
    objective = base.family.build(base).objective
    theirs = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(objective.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=2e-6)
    assert (objective.alphas_cumprod[-1] == 0) == ztsnr
    latents, noise = torch.randn((2, 1000, 4, 2, 2), generator=torch.Generator().manual_seed(0))
    steps = torch.arange(1000)
    noisy = objective.add_noise(latents, noise, steps)
    torch.testing.assert_close(noisy, theirs.add_noise(latents, noise, steps), rtol=0, atol=1e-4)
    target = theirs.get_velocity(latents, noise, steps) if velocity else noise
    assert objective.loss(target, latents, noise, steps).max() < 1e-8


# A model that has learned contradicts


def demo_base(folder: Path, **scheduler: Any) -> Path:
    """The demo's base, an epsilon model, with changes to its scheduler's configuration."""
    base = shutil.copytree(DEMO / "base", folder / "base")
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return base


@pytest.fixture
def as_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns every epsilon model into the velocity model that knows just as much (Salimans & Ho 2022, appendix D)."""
    predict = StableDiffusionModel.predict

    def velocity(self: StableDiffusionModel, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        epsilon = predict(self, latents, timesteps, conditioning)
        alpha = self.objective.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (epsilon - (1 - alpha).sqrt() * latents) / alpha.sqrt()

    monkeypatch.setattr(StableDiffusionModel, "predict", velocity)


@pytest.fixture(scope="module")
def subject() -> list[Picture]:
    return load_pictures(DEMO / "subject", "a photo of sks dog", Recorder())


@pytest.fixture(scope="module")
def style() -> list[Picture]:
    return load_pictures(DEMO / "style", "unused", Recorder())


def warnings_of_training(base: BaseWeights, pictures: list[Picture], folder: Path, **settings: Any) -> list[str]:
    listener = Recorder()
    chosen = TrainSettings(**{**SETTINGS, **settings})
    train(base, pictures, [], chosen, RunPaths(folder / "loras", folder / "runs"), "cpu", listener)
    return [text for text in listener.warnings if "epsilon" in text]


@pytest.mark.slow
def test_an_epsilon_model_is_not_trained_as_velocity(subject: list[Picture], tmp_path: Path) -> None:
    base = open_base(demo_base(tmp_path, prediction_type="v_prediction"))
    with pytest.raises(WeightsError) as refusal:
        warnings_of_training(base, subject, tmp_path)
    problem, remedy = refusal.value.problem, refusal.value.remedy
    assert "trained as v_prediction (according to the scheduler's configuration), but it predicts epsilon" in problem
    assert "prediction_type = epsilon" in remedy
    assert not list((tmp_path / "loras").glob("*"))
    mended = open_base(tmp_path / "base", prediction_type="epsilon")
    assert not warnings_of_training(mended, subject, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("as_velocity")
@pytest.mark.parametrize("shown", ["subject", "style"])
def test_a_velocity_model_is_not_trained_as_epsilon(shown: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pictures = request.getfixturevalue(shown)
    with pytest.raises(WeightsError) as refusal:
        warnings_of_training(open_base(DEMO / "base"), pictures, tmp_path)
    assert "trained as epsilon" in refusal.value.problem
    assert "prediction_type = v_prediction" in refusal.value.remedy
    mended = open_base(DEMO / "base", prediction_type="v_prediction")
    assert not warnings_of_training(mended, pictures, tmp_path)


def test_an_explicit_choice_is_only_warned_of_and_once(subject: list[Picture], tmp_path: Path) -> None:
    base = open_base(DEMO / "base", prediction_type="v_prediction")
    [warning] = warnings_of_training(base, subject, tmp_path)
    assert f"trained as v_prediction (according to {CHOSEN}), but it predicts epsilon" in warning
    assert not warnings_of_training(base, subject, tmp_path, steps=2)  # goes on with the run


@pytest.mark.parametrize(
    ("family", "velocity"),
    mostly_slow([(family, velocity) for family in ("sd2", "sdxl") for velocity in (False, True)], ("sd2", True)),
)
def test_models_that_know_nothing_are_let_through(
    family: Any, velocity: bool, subject: list[Picture], tmp_path: Path
) -> None:
    base = open_base(diffusers_folder(tmp_path / "model", family, velocity=velocity))
    assert not warnings_of_training(base, subject, tmp_path)


def test_the_question_is_put_with_trained_text_encoders_too(subject: list[Picture], tmp_path: Path) -> None:
    base = open_base(demo_base(tmp_path, prediction_type="v_prediction"))
    with pytest.raises(WeightsError, match="but it predicts epsilon"):
        warnings_of_training(base, subject, tmp_path, text_encoder_lr=1e-4)


# Zero terminal signal-to-noise ratio


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "dpm++"])
def test_every_sampler_draws_finite_pictures_from_pure_noise(
    scheduler: SchedulerName, steps: int, rescaled: StableDiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    decode = rescaled.vae.decode
    monkeypatch.setattr(rescaled.vae, "decode", lambda *given, **more: seen.extend(given) or decode(*given, **more))
    config = GenerationConfig(width=64, height=64, scheduler=scheduler, steps=steps)
    [picture] = generate(rescaled, "red dog", [1], config)
    assert all(torch.isfinite(latents).all() and latents.abs().max() < 1000 for latents in seen)
    low, high = min(low for low, _ in picture.getextrema()), max(high for _, high in picture.getextrema())
    assert high - low > 20
    kind = rescaled.objective.make_scheduler(scheduler, steps, (4, 8, 8), torch.device("cpu"))
    assert int(kind.timesteps[0]) == 999  # the first step sees pure noise, as in training


@pytest.fixture(scope="module")
def rescaled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base") / "model"
    base = open_base(diffusers_folder(folder, "sdxl", velocity=True, ztsnr=True))
    return base.family.build(base)
