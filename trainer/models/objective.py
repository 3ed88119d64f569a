"""What the denoiser predicts, and the loss of that prediction.

A prediction type differs from another in `target` and in a weight of the timesteps, a way to count errors in
`distance`, so that no caller branches on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..settings.objective import ObjectiveSettings

_MOST_SNR, _LEAST_SNR = 1000.0, 0.001  # debiasing weighs those beyond alike: kohya's upper limit; pure noise has 0


def scaled_linear_alphas_cumprod(timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Cumulative products of alpha, shape (timesteps,), float32: the schedule of Stable Diffusion.

    Source: Rombach et al. 2022; computed as diffusers' `DDPMScheduler(beta_schedule="scaled_linear")` does.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def _coefficients(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1-ᾱ) of each timestep, shape (batch, 1, 1, 1)."""
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1.0 - alpha).sqrt()


def epsilon_target(alphas_cumprod: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The noise itself (Ho et al. 2020, equation 14)."""
    return noise


def velocity_target(alphas_cumprod: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """V = √ᾱ·noise - √(1-ᾱ)·latents (Salimans & Ho 2022, section 4)."""
    signal, sigma = _coefficients(alphas_cumprod, timesteps)
    return signal * noise - sigma * latents


_TARGETS = {"epsilon": epsilon_target, "v_prediction": velocity_target}

Distance = Callable[[Tensor, Tensor, float], Tensor]
"""(error, signal-to-noise ratio, (batch, 1, 1, 1), c) → what the error counts, of its shape."""


def squared(error: Tensor, snr: Tensor, c: float) -> Tensor:
    """The error squared."""
    return error.pow(2)


def pseudo_huber(error: Tensor, snr: Tensor, c: float) -> Tensor:
    """2c(√(error² + c²) - c): squared for small errors, 2c·|error| for large (Song & Dhariwal 2023; kohya's scale)."""
    return _pseudo_huber(error, c)


def pseudo_huber_snr(error: Tensor, snr: Tensor, c: float) -> Tensor:
    """Pseudo-Huber whose c goes from 1 without noise to `c` with much of it (kohya's schedule "snr")."""
    sigma = snr.rsqrt()
    sizes = (1 - c) / (1 + sigma) ** 2 + c
    return _pseudo_huber(error, sizes)


def _pseudo_huber(error: Tensor, c: float | Tensor) -> Tensor:
    squares = error.pow(2)
    return 2 * c * squares / ((squares + c**2).sqrt() + c)  # the same, without a difference of large numbers


_DISTANCES: dict[str, Distance] = {"mse": squared, "huber": pseudo_huber, "huber-snr": pseudo_huber_snr}


def min_snr_weight(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """min(snr, γ) over snr, or over snr + 1 for velocity (Hang et al. 2023, equation 7 and section 3.4).

    Args:
        snr: Signal-to-noise ratio of each timestep.
        gamma: γ.
        velocity: Whether the model predicts the velocity.
    """
    return snr.clamp(max=gamma) / (snr + 1) if velocity else (gamma / snr).clamp(max=1)  # pure noise has a ratio of 0


def debiased_weight(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """1/√snr, or 1/(snr + 1) for velocity (Yu et al. 2023; kohya's debiased estimation); arguments as before."""
    snr = snr.clamp(_LEAST_SNR, _MOST_SNR)
    return 1 / (snr + 1) if velocity else snr.rsqrt()


def constant_weight(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """One for every timestep; arguments as before."""
    return torch.ones_like(snr)


_WEIGHTS = {"constant": constant_weight, "min-snr": min_snr_weight, "debiased": debiased_weight}


@dataclass(frozen=True)
class Objective:
    """A noise schedule and a prediction type.

    Attributes:
        prediction_type: diffusers' name, "epsilon" or "v_prediction".
        alphas_cumprod: Shape (timesteps,), float32.
        target: (alphas_cumprod, latents, noise, timesteps) → what the denoiser should predict.
        weights: Of each timestep's loss, shape (timesteps,), float32; None: all alike.
        distance: What an error counts.
        c: The distance's parameter.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    weights: Tensor | None = None
    distance: Distance = squared
    c: float = 0.1

    @property
    def timesteps(self) -> int:
        """Number of diffusion timesteps."""
        return len(self.alphas_cumprod)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio of each timestep, ᾱ / (1 - ᾱ), shape (timesteps,)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def as_type(self, prediction_type: str) -> Objective:
        """The same schedule with another prediction type, plainly."""
        return Objective(prediction_type, self.alphas_cumprod, _TARGETS[prediction_type])

    def shaped(self, settings: ObjectiveSettings) -> Objective:
        """The same prediction, its error weighed as the settings say."""
        schedule = _rescaled(self.alphas_cumprod) if settings.zero_terminal_snr else self.alphas_cumprod
        plain = replace(self, alphas_cumprod=schedule, distance=_DISTANCES[settings.loss], c=settings.huber_c)
        if settings.loss_weighting == "constant":
            return plain
        velocity = self.prediction_type == "v_prediction"
        weights = _WEIGHTS[settings.loss_weighting](plain.snr, settings.min_snr_gamma, velocity)
        return replace(plain, weights=weights)

    def to(self, device: torch.device) -> Objective:
        """The same objective with its schedule on `device`."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device), weights=weights)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·latents + √(1-ᾱ)·noise, all (batch, channels, height, width); timesteps (batch,), int64."""
        signal, sigma = _coefficients(self.alphas_cumprod, timesteps)
        return signal * latents + sigma * noise

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """What the error of each sample counts, shape (batch,), float32.

        Args:
            prediction: The denoiser's, (batch, channels, height, width).
            latents: As `prediction`.
            noise: As `prediction`.
            timesteps: (batch,), int64.
            mask: Weight of each place, (batch, 1, height, width), with a sum above 0; None: all alike.
        """
        target = self.target(self.alphas_cumprod, latents, noise, timesteps)
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        snr = alpha / (1.0 - alpha)
        counted = self.distance(prediction.float() - target.float(), snr, self.c)
        if mask is None:
            losses = counted.mean(dim=(1, 2, 3))
        else:
            losses = (counted.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
        return losses if self.weights is None else losses * self.weights[timesteps]


def _rescaled(alphas_cumprod: Tensor) -> Tensor:
    """Rescale a schedule so that its last timestep is pure noise (Lin et al. 2023, algorithm 1); same shape."""
    root = alphas_cumprod.double().sqrt()
    first, last = root[0].clone(), root[-1].clone()
    rescaled: Tensor = ((root - last) * first / (first - last)) ** 2  # of one that ends so already: itself
    return rescaled.to(alphas_cumprod.dtype)


def make_objective(
    prediction_type: str = "epsilon", scheduler: Mapping[str, Any] | None = None, *, zero_terminal_snr: bool = False
) -> Objective:
    """The objective of a model.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        scheduler: The noise schedule's configuration as diffusers writes it; Stable Diffusion's if empty.
        zero_terminal_snr: Whether the schedule is rescaled to end in pure noise.
    """
    if scheduler:
        from diffusers import DDPMScheduler

        plain = {name: value for name, value in scheduler.items() if name != "rescale_betas_zero_snr"}
        schedule = DDPMScheduler.from_config(plain).alphas_cumprod
    else:
        schedule = scaled_linear_alphas_cumprod()
    if zero_terminal_snr:
        schedule = _rescaled(schedule)
    return Objective(prediction_type, schedule, _TARGETS[prediction_type])


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
