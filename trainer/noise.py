"""The noise of a sample: plain, or shaped so that a model learns very dark and bright pictures, too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .objective_settings import ObjectiveSettings


def shaped_noise(noise: Tensor, settings: ObjectiveSettings, source: torch.Generator) -> Tensor:
    """Plain noise with the offset and the coarser levels that the settings name; plain if they name none.

    Args:
        noise: Standard normal, (channels, height, width).
        settings: noise_offset, multires_noise_iterations, multires_noise_discount.
        source: Of what is drawn here.
    """
    if settings.multires_noise_iterations:
        noise = pyramid_noise(noise, settings.multires_noise_iterations, settings.multires_noise_discount, source)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn((len(noise), 1, 1), generator=source)
    return noise


def pyramid_noise(noise: Tensor, iterations: int, discount: float, source: torch.Generator) -> Tensor:
    """Add coarser noise, level by level, each `discount` times as strong, and bring the whole to a deviation of 1.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023, as kohya's trainer does it, so
    that its values mean the same here: level 0 has full size.

    Args:
        noise: Standard normal, (channels, height, width).
        iterations: Most levels; they end where a side would be one. One level is plain noise.
        discount: Strength of each level over the one before.
        source: Of what is drawn here.
    """
    channels, height, width = noise.shape
    total = noise * 2**0.5  # as if level 0 had been added: the sum of two standard normals
    for level in range(1, iterations):
        step = (2 + 2 * float(torch.rand((), generator=source))) ** level
        rows, columns = max(1, int(height / step)), max(1, int(width / step))
        coarse = torch.randn((1, channels, rows, columns), generator=source)
        whole = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        total = total + whole[0] * discount**level
        if rows == 1 or columns == 1:
            break
    return total / total.std()


def perturbed_noise(noise: Tensor, settings: ObjectiveSettings, source: torch.Generator) -> Tensor:
    """The noise that is added, where `noise` is asked for: with extra noise on it (Ning et al. 2023, algorithm 1)."""
    if not settings.input_perturbation:
        return noise
    return noise + settings.input_perturbation * torch.randn(noise.shape, generator=source)


def timestep_at(place: float, timesteps: int, settings: ObjectiveSettings) -> int:
    """The timestep at a place of the run's distribution of timesteps.

    Args:
        place: Evenly distributed in [0, 1).
        timesteps: Number of diffusion timesteps, of which `min_timestep` and `max_timestep` count thousandths.
        settings: Range and bias.

    Returns:
        In [0, timesteps); the share of those below x, as a part of the range, is x^(2^timestep_bias).
    """
    first = settings.min_timestep * timesteps // 1000
    end = max(first + 1, settings.max_timestep * timesteps // 1000)
    moved: float = place ** (2.0**-settings.timestep_bias)
    return min(end - 1, first + int(moved * (end - first)))
