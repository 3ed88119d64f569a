"""The recipe against a plain training loop of diffusers, transformers, PEFT and torch, written out below."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import mostly_slow
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from helpers import DEMO, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.core.seeding import Draw, draw_sample
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import TrainResult, train
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from pack.trainer.training.runs.folder import RunPaths
from peft import LoraConfig
from torch import Tensor

BASE = DEMO / "base"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ATTENTION_MLP = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION_MLP,
    "all": [*ATTENTION_MLP, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "0.conv"],
}
LATENT_SHAPE = (4, 16, 16)


@dataclass
class Reference:
    """What the plain loop saw and made."""

    losses: list[float]
    rates: list[float]
    adapter: dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def base() -> BaseWeights:
    return open_base(BASE)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    """Three pictures, each with a caption of its own."""
    folder = tmp_path_factory.mktemp("subject")
    for number in range(3):
        for ending in ("png", "txt"):
            shutil.copy(DEMO / "style" / f"{number:02d}.{ending}", folder)
    pictures = load_pictures(folder, "unused", Recorder())
    assert len({picture.caption for picture in pictures}) == 3
    return pictures


@pytest.fixture(scope="module")
def priors() -> list[Picture]:
    return load_pictures(DEMO / "subject", "a photo of a dog", Recorder())


def start_of(base: BaseWeights, settings: TrainSettings) -> Adapter:
    """The adapter before the first step."""
    return TrainableAdapter(base.family.build(base), settings).adapter()


def draws_of(settings: TrainSettings, kind: str, step: int, micro: int, count: int) -> list[Draw]:
    slots = settings.batch_size * settings.gradient_accumulation
    first = micro * settings.batch_size
    flip = settings.flip and kind == "instance"
    return [
        draw_sample(settings.seed, kind, step, slot, slots, [LATENT_SHAPE] * count, 1000, flip)
        for slot in range(first, first + settings.batch_size)
    ]


class PlainTrainer:
    """The networks as diffusers loads them, and every picture and caption encoded by them."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        pipe = StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True).to(torch.float32)
        self.unet = pipe.unet.requires_grad_(False)
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        with torch.no_grad():
            self.posteriors = {
                (picture.digest, flip): _posterior(pipe.vae, picture, flip)
                for picture in pictures
                for flip in (False, True)
            }
            self.captions = {caption: _encoding(pipe, caption) for caption in {p.caption for p in pictures}}

    def loss(self, sets: Sequence[tuple[list[Draw], list[Picture], float]]) -> Tensor:
        """Instance loss + weight · class loss, each from a forward pass of its own."""
        loss = torch.zeros(())
        for draws, pictures, weight in sets:
            chosen = [pictures[drawn.item] for drawn in draws]
            rows = []
            for drawn, picture in zip(draws, chosen, strict=True):
                mean, std = self.posteriors[picture.digest, drawn.flip]
                rows.append(mean + std * drawn.posterior_noise)
            text = torch.cat([self.captions[picture.caption] for picture in chosen])
            noise = torch.stack([drawn.noise for drawn in draws])
            timesteps = torch.tensor([drawn.timestep for drawn in draws])
            noisy = self.noise_scheduler.add_noise(torch.cat(rows), noise, timesteps)
            loss = loss + weight * F.mse_loss(self.unet(noisy, timesteps, text).sample, noise)
        return loss


def _posterior(vae: Any, picture: Picture, flip: bool) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.array(picture.open())).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = vae.encode(pixels.flip(-1) if flip else pixels).latent_dist
    return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor


def _encoding(pipe: Any, caption: str) -> Tensor:
    options = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length, "truncation": True}
    return pipe.text_encoder(pipe.tokenizer(caption, return_tensors="pt", **options).input_ids)[0]


def relative_distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def plain_loop(subject: list[Picture], priors: list[Picture], settings: TrainSettings, start: Adapter) -> Reference:
    """DreamBooth with LoRA as diffusers' example scripts write it, with the recipe's draws and start."""
    trainer = PlainTrainer([*subject, *priors])
    unet = trainer.unet
    rank, alpha = settings.rank, settings.alpha or settings.rank
    targets, stabilized = TARGETS[settings.targets], settings.rank_stabilized
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=stabilized))
    lora = {
        "lora_unet_" + path.replace(".", "_"): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for path, module in unet.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(lora) == set(start.layers)
    with torch.no_grad():
        for name, (down, up) in lora.items():
            down.copy_(start.layers[name].down)
            up.copy_(start.layers[name].up)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(lora)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler(
        settings.lr_schedule,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.steps,
    )
    losses, rates = [], []
    for step in range(settings.steps):
        values = []
        for micro in range(settings.gradient_accumulation):
            sets = [(draws_of(settings, "instance", step, micro, len(subject)), subject, 1.0)]
            if priors:
                drawn = draws_of(settings, "class", step, micro, len(priors))
                sets.append((drawn, priors, settings.prior_weight))
            loss = trainer.loss(sets)
            (loss / settings.gradient_accumulation).backward()
            values.append(loss.item())
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(sum(values) / len(values))
    return Reference(losses, rates, lora)


def run(
    base: BaseWeights,
    subject: list[Picture],
    priors: list[Picture],
    settings: TrainSettings,
    folder: Path,
) -> tuple[TrainResult, Recorder]:
    listener = Recorder()
    return train(
        base, subject, priors, settings, RunPaths(folder / "loras", folder / "runs"), "cpu", listener
    ), listener


COMMON = {"resolution": 64, "learning_rate": 3e-3, "precision": "fp32", "save_precision": "fp32", "seed": 7}
CASES = {
    "attention": {"targets": "attention", "rank": 4},
    "mlp, batch 2": {"targets": "attention-mlp", "rank": 2, "batch_size": 2},
    "all, rank-stabilised": {"targets": "all", "rank": 4, "alpha": 2.0, "rank_stabilized": True},
    "attention, accumulation 2, alpha": {"targets": "attention", "rank": 4, "alpha": 8.0, "gradient_accumulation": 2},
    "mlp, prior, accumulation 2, tight clip": {
        "targets": "attention-mlp",
        "rank": 4,
        "alpha": 1.0,
        "prior_weight": 0.5,
        "gradient_accumulation": 2,
        "max_grad_norm": 0.01,
        "weight_decay": 0.5,
    },
    "attention, prior, batch 2, flip, no clip": {
        "targets": "attention",
        "rank": 4,
        "prior_weight": 2.0,
        "batch_size": 2,
        "flip": True,
        "max_grad_norm": 0.0,
    },
}


@pytest.mark.parametrize(
    "case",
    mostly_slow(CASES, "mlp, prior, accumulation 2, tight clip", "attention, prior, batch 2, flip, no clip"),
)
def test_recipe_equals_the_plain_loop(
    case: str, base: BaseWeights, subject: list[Picture], priors: list[Picture], tmp_path: Path
) -> None:
    settings = TrainSettings(**COMMON, **CASES[case], steps=8, lr_schedule="cosine", lr_warmup_steps=2)
    class_pictures = priors if "prior" in case else []
    result, listener = run(base, subject, class_pictures, settings, tmp_path)
    expected = plain_loop(subject, class_pictures, settings, start_of(base, settings))
    assert listener.losses == pytest.approx(expected.losses, rel=0, abs=1e-5)
    rates = [event.learning_rate for event in listener.events if hasattr(event, "learning_rate")]
    assert rates == pytest.approx(expected.rates)
    assert rates[0] == 0
    for name, (down, up) in expected.adapter.items():
        assert relative_distance(result.adapter.layers[name].down, down.detach()) < 1e-3
        assert relative_distance(result.adapter.layers[name].up, up.detach()) < 1e-3


def test_first_loss_is_the_base_models(base: BaseWeights, subject: list[Picture], tmp_path: Path) -> None:
    settings = TrainSettings(**COMMON, steps=1, rank=4, batch_size=2)
    _, listener = run(base, subject, [], settings, tmp_path)
    drawn = draws_of(settings, "instance", 0, 0, len(subject))
    with torch.no_grad():
        loss = PlainTrainer(subject).loss([(drawn, subject, 1.0)])
    assert listener.losses == pytest.approx([loss.item()], rel=0, abs=1e-5)


@pytest.mark.slow
def test_accumulation_equals_a_larger_batch(
    tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = open_base(tiny_checkpoint)
    pictures = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    class_pictures = load_pictures(picture_folder(count=3, name="class"), "a photo of a dog", Recorder())
    # with the common seed one gradient is so near zero that Adam makes its rounding visible
    together = TrainSettings(**COMMON | {"seed": 3}, steps=3, rank=4, batch_size=2)
    apart = together.model_copy(update={"batch_size": 1, "gradient_accumulation": 2})
    first, first_listener = run(base, pictures, class_pictures, together, tmp_path)
    second, second_listener = run(base, pictures, class_pictures, apart, tmp_path)
    assert first.run != second.run
    assert first_listener.losses == pytest.approx(second_listener.losses, rel=1e-5)
    for name, layer in first.adapter.layers.items():
        assert relative_distance(layer.down, second.adapter.layers[name].down) < 1e-3
        assert relative_distance(layer.up, second.adapter.layers[name].up) < 1e-3


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(
    tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = open_base(tiny_checkpoint)
    pictures = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    results = []
    for checkpointing in (False, True):
        settings = TrainSettings(**COMMON, steps=3, rank=4, gradient_checkpointing=checkpointing)
        results.append(run(base, pictures, [], settings, tmp_path / str(checkpointing)))
    (plain, plain_listener), (saving, saving_listener) = results
    assert plain_listener.losses == saving_listener.losses
    for name, layer in plain.adapter.layers.items():
        assert torch.equal(layer.up, saving.adapter.layers[name].up)
        assert torch.equal(layer.down, saving.adapter.layers[name].down)


@pytest.mark.slow
def test_training_learns_the_subject(base: BaseWeights, tmp_path: Path) -> None:
    """The denoising error on the subject, over fixed noise that training never drew, falls clearly."""
    pictures = load_pictures(DEMO / "subject", "a photo of sks dog", Recorder())
    settings = TrainSettings(
        steps=60,
        learning_rate=1e-3,
        rank=8,
        targets="attention",
        resolution=64,
        precision="fp32",
        save_precision="fp32",
    )
    result, _ = run(base, pictures, [], settings, tmp_path)
    model = base.family.build(base)
    for network in (model.unet, model.vae, *model.text_encoders.values()):
        torch.nn.Module.float(network)
    generator = torch.Generator().manual_seed(123)
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(np.array(p.open())).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
        latents = model.vae.encode(pixels).latent_dist.mean * model.vae.config.scaling_factor
        latents = latents.repeat(4, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.arange(len(latents)) * 800 // len(latents) + 150
        noisy = model.objective.add_noise(latents, noise, timesteps)
        text = model.encode_prompts(["a photo of sks dog"])["text"].expand(len(latents), -1, -1)

        def error() -> float:
            return F.mse_loss(model.predict(noisy, timesteps, {"text": text}), noise).item()

        before = error()
        merge_into(model, result.adapter, 1.0)
        after = error()
    assert after < 0.8 * before
