"""Generating images: the same seed gives the same image, whatever else is generated in the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.devices import DTYPES, to_device
from ..core.errors import SettingsError
from ..core.events import Listener, SilentListener, stop_if_asked
from ..settings.train import SchedulerName
from .families.base import BaseWeights, Conditioning, DiffusionModel, joined_rows


@dataclass(frozen=True)
class GenerationConfig:
    """How images are generated from a prompt.

    Attributes:
        width: Pixels; a multiple of 8.
        height: Pixels; a multiple of 8.
        negative_prompt: What the images should not show.
        scheduler: See `schedulers`.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is no guidance, which halves the work.
        guidance_start: Point in the noise schedule from which there is guidance, in [0, 1]: 0 is pure noise.
        guidance_end: Point in the noise schedule up to which there is guidance; 1 is the finished image.
    """

    width: int
    height: int
    negative_prompt: str = ""
    scheduler: SchedulerName = "ddim"
    steps: int = 30
    guidance: float = 7.5
    guidance_start: float = 0.0
    guidance_end: float = 1.0

    def guides(self, timestep: float, timesteps: int) -> bool:
        """Whether a denoising step is guided (the interval of Kynkäänniemi et al. 2024).

        Args:
            timestep: Of the latents before the step, in [0, timesteps]; the maximum only with flow matching.
            timesteps: Of the noise schedule.
        """
        part = max(0.0, 1 - (timestep + 1) / timesteps)
        return self.guidance != 1 and self.guidance_start <= part < self.guidance_end


def build_on_device(base: BaseWeights, device: torch.device, precision: str) -> DiffusionModel:
    """Build a model on a device: its denoiser in "fp32", "bf16" or "fp16", the autoencoder in float32."""
    model = base.family.build(base)
    to_device(model.denoiser, device, DTYPES[precision])
    to_device(model.vae, device, torch.float32)
    for network in model.text_encoders.values():
        to_device(network, device, model.text_dtype)
    return model


def starting_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal latents, (len(seeds), *shape), each from its own seed; as in diffusers' pipelines."""
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed % 2**64)) for seed in seeds]
    return torch.cat(rows)


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    noise: Tensor,
    prompt: Conditioning,
    negative: Conditioning,
    config: GenerationConfig,
    listener: Listener | None = None,
) -> Tensor:
    """Denoise latents with classifier-free guidance (Ho & Salimans 2022), where it applies: see `GenerationConfig`.

    Args:
        model: Its UNet's device and dtype are used.
        noise: From `starting_noise`, (batch, channels, height, width).
        prompt: Conditioning on the prompt, one row for each image.
        negative: Conditioning on the negative prompt, one row for each image.
        config: Scheduler, steps and guidance; size and texts are those of `noise`, `prompt` and `negative`.
        listener: Asked before every step whether to stop.

    Returns:
        Latents, float32, on the UNet's device.

    Raises:
        CancelledError: The listener asked to stop.
    """
    parameter = next(model.denoiser.parameters())
    device = parameter.device
    dtype = parameter.dtype
    scheduler = model.objective.make_scheduler(config.scheduler, config.steps, noise.shape[1:], device)
    latents: Tensor = noise.to(device) * scheduler.init_noise_sigma
    alone = {name: rows.to(device) for name, rows in prompt.items()}
    both = {name: rows.to(device) for name, rows in joined_rows([negative, prompt]).items()}
    for timestep in scheduler.timesteps:
        stop_if_asked(listener or SilentListener())
        guided = config.guides(timestep.item(), model.objective.timesteps)
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        conditioning = both if guided else alone
        prediction = model.predict(scaled.to(dtype), timestep.expand(len(scaled)), conditioning).float()
        if guided:
            without_prompt, with_prompt = prediction.chunk(2)
            prediction = without_prompt + config.guidance * (with_prompt - without_prompt)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode_latents(model: DiffusionModel, latents: Tensor) -> list[Image.Image]:
    """Decode latents to RGB images with a model's autoencoder, one at a time to save memory."""
    parameter = next(model.vae.parameters())
    images = []
    for row in latents.to(parameter.device, parameter.dtype):
        pixels = model.family.latents.decode(model.vae, row[None])[0].float()
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        images.append(Image.fromarray(values.permute(1, 2, 0).numpy()))
    return images


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompt: str,
    seeds: Sequence[int],
    config: GenerationConfig,
    listener: Listener | None = None,
) -> list[Image.Image]:
    """Generate one image for each seed.

    Args:
        model: With all its networks on the device to use.
        prompt: What the images show.
        seeds: One for each image.
        config: Size, negative prompt and sampling.
        listener: Asked before every step whether to stop.

    Raises:
        CancelledError: The listener asked to stop.
    """
    encoded = model.encode_prompts([config.negative_prompt, prompt])
    negative = {name: rows[:1] for name, rows in encoded.items()}
    positive = {name: rows[1:] for name, rows in encoded.items()}
    latents = generate_latents(model, model.vae, positive, negative, seeds, config, listener)
    return decode_latents(model, latents)


def generate_latents(
    model: DiffusionModel,
    vae: Any,
    prompt: Conditioning,
    negative: Conditioning,
    seeds: Sequence[int],
    config: GenerationConfig,
    listener: Listener | None = None,
) -> Tensor:
    """Generate the latents of one image for each seed, from encoded prompts.

    Args:
        model: Its UNet predicts; no other network of it is used.
        vae: The autoencoder that will decode the latents; only its configuration is read.
        prompt: Conditioning on the prompt, one row.
        negative: Conditioning on the negative prompt, one row; `config.negative_prompt` is not read.
        seeds: One for each image.
        config: Size and sampling.
        listener: Asked before every step whether to stop.

    Returns:
        Latents, (len(seeds), channels, height, width), float32, on the UNet's device.

    Raises:
        SettingsError: The model can't generate pictures of that size.
        CancelledError: The listener asked to stop.
    """
    step = model.family.latents.granularity(vae.config)
    if config.width % step or config.height % step:
        raise SettingsError(
            f"{model.family.title} can't generate pictures of {config.width} × {config.height} pixels: sides must be "
            f"multiples of {step}.",
            f"Use a size such as {_multiple(config.width, step)} × {_multiple(config.height, step)}.",
        )
    noise = starting_noise(seeds, model.family.latents.shape(vae, config.height, config.width))
    size = torch.tensor([[config.height, config.width, 0, 0, config.height, config.width]], dtype=torch.float32)
    repeated_prompt = _repeated({**prompt, "size": size}, len(seeds))
    repeated_negative = _repeated({**negative, "size": size}, len(seeds))
    return denoise(model, noise, repeated_prompt, repeated_negative, config, listener)


def _multiple(side: int, step: int) -> int:
    """The nearest multiple of a step, at least one."""
    return max(1, round(side / step)) * step


def _repeated(conditioning: Conditioning, count: int) -> Conditioning:
    return {name: row.expand(count, *row.shape[1:]) for name, row in conditioning.items()}
