"""Pictures from a model: the same seed gives the same picture, whatever else is made beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.devices import DTYPES, to_device
from ..core.events import Listener, SilentListener, stop_if_asked
from ..settings.train import SchedulerName
from .families.base import BaseWeights, Conditioning, DiffusionModel
from .objective import Objective

_SMALLEST = 4.9e-8  # signal that is left at a zero terminal SNR, so that no sampler divides by zero


def ready_model(base: BaseWeights, device: torch.device, precision: str) -> DiffusionModel:
    """A built model on the device: the UNet in "fp32", "bf16" or "fp16", the rest in float32."""
    model = base.family.build(base)
    to_device(model.unet, device, DTYPES[precision])
    for network in (model.vae, *model.text_encoders.values()):
        to_device(network, device, torch.float32)
    return model


def make_scheduler(name: SchedulerName, objective: Objective) -> Any:
    """A diffusers scheduler on the model's own noise schedule, configured as Stable Diffusion's pipelines are.

    Args:
        name: "ddim" (Song et al. 2021), "pndm" (Liu et al. 2022), "euler" (Karras et al. 2022, algorithm 2
            without churn) or "dpm++" (Lu et al. 2022, DPM-Solver++(2M)).
        objective: Noise schedule and prediction type.
    """
    import diffusers

    alphas = objective.alphas_cumprod.double().cpu()
    zero_snr = bool(alphas[-1] < _SMALLEST)
    alphas = alphas.clamp(min=_SMALLEST)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    common = {
        "num_train_timesteps": objective.timesteps,
        "trained_betas": betas.numpy(),
        "prediction_type": objective.prediction_type,
        "timestep_spacing": "trailing" if zero_snr else "leading",  # the first step must see pure noise
        "steps_offset": 1,
    }
    if name == "ddim":
        return diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False)
    if name == "pndm":
        return diffusers.PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=False)
    if name == "euler":
        return diffusers.EulerDiscreteScheduler(**common)
    return diffusers.DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++")


def starting_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal latents (len(seeds), *shape); each row from its own seed, as diffusers' pipelines draw them."""
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed % 2**64)) for seed in seeds]
    return torch.cat(rows)


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    noise: Tensor,
    prompt: Conditioning,
    negative: Conditioning,
    scheduler_name: SchedulerName,
    steps: int,
    guidance: float,
    listener: Listener | None = None,
) -> Tensor:
    """Denoise latents with classifier-free guidance (Ho & Salimans 2022).

    Args:
        model: Its UNet's device and dtype are used.
        noise: From `starting_noise`, (batch, channels, height, width).
        prompt: One row for each picture.
        negative: One row for each picture.
        scheduler_name: See `make_scheduler`.
        steps: Denoising steps.
        guidance: Scale; 1 runs the prompt alone.
        listener: Asked before every step whether to stop.

    Returns:
        Latents, float32, on the UNet's device.
    """
    parameter = next(model.unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    scheduler = make_scheduler(scheduler_name, model.objective)
    scheduler.set_timesteps(steps, device=device)
    latents: Tensor = noise.to(device) * scheduler.init_noise_sigma
    rows = [prompt] if guidance == 1 else [negative, prompt]
    conditioning = {name: torch.cat([row[name] for row in rows]).to(device) for name in prompt}
    for timestep in scheduler.timesteps:
        stop_if_asked(listener or SilentListener())
        scaled = scheduler.scale_model_input(torch.cat([latents] * len(rows)), timestep)
        prediction = model.predict(scaled.to(dtype), timestep.expand(len(scaled)), conditioning).float()
        if guidance != 1:
            without, with_prompt = prediction.chunk(2)
            prediction = without + guidance * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Turn latents into RGB pictures with an `AutoencoderKL`, one at a time to save memory."""
    parameter = next(vae.parameters())
    pictures = []
    for row in latents.to(parameter.device, parameter.dtype):
        pixels = vae.decode(row[None] / vae.config.scaling_factor, return_dict=False)[0][0].float()
        values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        pictures.append(Image.fromarray(values.permute(1, 2, 0).numpy()))
    return pictures


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompt: str,
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    negative_prompt: str = "",
    scheduler: SchedulerName = "ddim",
    steps: int = 30,
    guidance: float = 7.5,
    listener: Listener | None = None,
) -> list[Image.Image]:
    """Draw one picture for each seed.

    Args:
        model: With all its networks on the device to use.
        prompt: What to draw.
        seeds: One for each picture.
        width: Pixels; a multiple of 8.
        height: Pixels; a multiple of 8.
        negative_prompt: What not to draw.
        scheduler: See `make_scheduler`.
        steps: Denoising steps.
        guidance: Classifier-free guidance.
        listener: Asked before every step whether to stop.
    """
    encoded = model.encode_prompts([negative_prompt, prompt])
    negative, positive = ({name: rows[i : i + 1] for name, rows in encoded.items()} for i in (0, 1))
    latents = draw_latents(
        model,
        model.vae,
        positive,
        negative,
        seeds,
        width=width,
        height=height,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        listener=listener,
    )
    return decode_latents(model.vae, latents)


def draw_latents(
    model: DiffusionModel,
    vae: Any,
    positive: Conditioning,
    negative: Conditioning,
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    scheduler: SchedulerName = "ddim",
    steps: int = 30,
    guidance: float = 7.5,
    listener: Listener | None = None,
) -> Tensor:
    """Latents of one picture for each seed, with texts that are encoded already, one row each; see `generate`."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    noise = starting_noise(seeds, (vae.config.latent_channels, height // factor, width // factor))
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    with_prompt, without = (
        {name: row.expand(len(seeds), *row.shape[1:]) for name, row in {**said, "size": size}.items()}
        for said in (positive, negative)
    )
    return denoise(model, noise, with_prompt, without, scheduler, steps, guidance, listener)
