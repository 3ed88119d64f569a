"""What the denoiser predicts, and the loss of that prediction.

A prediction type differs from another in `target` alone, so that no caller branches on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Objective:
    """A noise schedule and a prediction type.

    Attributes:
        prediction_type: diffusers' name, "epsilon" or "v_prediction".
        alphas_cumprod: Shape (timesteps,), float32.
        target: (alphas_cumprod, latents, noise, timesteps) → what the denoiser should predict.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    @property
    def timesteps(self) -> int:
        """Number of diffusion timesteps."""
        return len(self.alphas_cumprod)

    def as_type(self, prediction_type: str) -> Objective:
        """The same schedule with another prediction type."""
        return Objective(prediction_type, self.alphas_cumprod, _TARGETS[prediction_type])

    def to(self, device: torch.device) -> Objective:
        """The same objective with its schedule on `device`."""
        return Objective(self.prediction_type, self.alphas_cumprod.to(device), self.target)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·latents + √(1-ᾱ)·noise, all (batch, channels, height, width); timesteps (batch,), int64."""
        signal, sigma = _coefficients(self.alphas_cumprod, timesteps)
        return signal * latents + sigma * noise

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of each sample, shape (batch,), float32."""
        target = self.target(self.alphas_cumprod, latents, noise, timesteps)
        return (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))


def _rescaled(alphas_cumprod: Tensor) -> Tensor:
    """Rescale a schedule so that its last timestep is pure noise (Lin et al. 2023, algorithm 1); same shape."""
    root = alphas_cumprod.double().sqrt()
    first, last = root[0].clone(), root[-1].clone()
    rescaled: Tensor = ((root - last) * first / (first - last)) ** 2
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
