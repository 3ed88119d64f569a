"""The samples of a step: which pictures, which noise, which timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Cache, LatentSet
from .config import TrainSettings
from .randomness import Draw, draw


@dataclass(frozen=True)
class Batch:
    """The samples of one forward pass, on the device.

    Attributes:
        latents: (batch, channels, height, width), float32.
        noise: As `latents`.
        timesteps: (batch,), int64.
        captions: Row of each sample's caption, (batch,), int64.
        sizes: Size and crop of each sample's picture, (batch, 6), float32.
        weights: Weight of each set's mean loss, in order; every set has as many samples.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: Tensor
    sizes: Tensor
    weights: Sequence[float]


def draw_batch(
    cache: Cache, settings: TrainSettings, step: int, micro: int, timesteps: int, device: torch.device
) -> Batch:
    """The samples of one micro-batch: `batch_size` of the subject, then as many of the class.

    Args:
        cache: Encoded pictures.
        settings: Seed, batch size, flip, weight of the class pictures.
        step: Optimiser step, from 0.
        micro: Micro-batch of the step, from 0.
        timesteps: Number of diffusion timesteps.
        device: Where the samples go.
    """
    sets = [("instance", cache.instance, 1.0)]
    if cache.prior is not None:
        sets.append(("class", cache.prior, settings.prior_weight))
    rows = [_rows(latents, _draws(kind, latents, settings, step, micro, timesteps)) for kind, latents, _ in sets]
    latents, noise, moments, captions, sizes = (torch.cat(part).to(device) for part in zip(*rows, strict=True))
    return Batch(latents, noise, moments, captions, sizes, [weight for _, _, weight in sets])


def _draws(kind: str, latents: LatentSet, settings: TrainSettings, step: int, micro: int, timesteps: int) -> list[Draw]:
    slots = settings.batch_size * settings.gradient_accumulation
    first = micro * settings.batch_size
    flip = settings.flip and kind == "instance"
    return [
        draw(settings.seed, kind, step, slot, slots, len(latents), latents.latent_shape, timesteps, flip)
        for slot in range(first, first + settings.batch_size)
    ]


def _rows(latents: LatentSet, draws: Sequence[Draw]) -> tuple[Tensor, ...]:
    items = torch.tensor([d.item for d in draws])
    noise = torch.stack([d.noise for d in draws])
    timesteps = torch.tensor([d.timestep for d in draws])
    return latents.sample(draws), noise, timesteps, latents.caption[items], latents.size[items]
