"""The objective of rectified flow: straight lines from pictures to noise (Liu et al. 2022; Esser et al. 2024).

A sample at noise level σ in (0, 1) is (1 - σ)·latents + σ·noise, and the denoiser predicts noise - latents. Timesteps
are 1000·σ, float32, as diffusers' flow schedulers count them. Pictures with more tokens get more noise, by a shift
s = e^μ, which takes σ to s·σ / (1 + (s - 1)·σ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SettingsError, suggest
from ..settings.objective import ObjectiveSettings
from ..settings.train import SchedulerName
from .objective import ELEMENTWISE_LOSSES, ElementwiseLoss, masked_mean, squared_error
from .schedulers import flow_dpm_solver

TIMESTEPS = 1000  # per unit of σ
_SMALLEST = 1e-6  # quantile; at 0 a logit-normal distribution has none
_CPU = torch.device("cpu")
_EULER_NAMES = ("ddim", "euler")  # DDIM without added noise is Euler's method on the line


def shifted(sigma: float, mu: float) -> float:
    """A noise level shifted to more noise: e^μ·σ / (1 + (e^μ - 1)·σ) (Esser et al. 2024, equation 23; e^μ is √(m/n)).

    Args:
        sigma: σ, in [0, 1].
        mu: μ; 0 changes nothing, above 0 there is more noise.
    """
    shift = math.exp(mu)
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class LinearMu:
    """μ as a line over the number of tokens: FLUX's 0.5 at 256 tokens (256² pixels) to 1.15 at 4096 (1024²).

    Source: black-forest-labs/flux, `get_lin_function` of sampling.py; diffusers' `calculate_shift`.
    """

    first_tokens: int = 256
    first_mu: float = 0.5
    last_tokens: int = 4096
    last_mu: float = 1.15

    def __call__(self, tokens: int) -> float:
        """The μ for pictures of that many tokens."""
        slope = (self.last_mu - self.first_mu) / (self.last_tokens - self.first_tokens)
        return self.first_mu + slope * (tokens - self.first_tokens)


@dataclass(frozen=True)
class ConstantMu:
    """The same μ for every picture.

    Attributes:
        mu: μ, the logarithm of the shift.
    """

    mu: float

    def __call__(self, tokens: int, steps: int = 0) -> float:
        """The μ, whatever the numbers of tokens and steps."""
        return self.mu


def flux2_sampling_mu(tokens: int, steps: int) -> float:
    """The μ with which FLUX.2 is sampled; it also depends on the number of steps.

    Source: black-forest-labs/flux2, `compute_empirical_mu` of sampling.py; as in diffusers' Flux2Pipeline.

    Args:
        tokens: Of a picture.
        steps: Denoising steps.
    """
    mu_of_200_steps = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return mu_of_200_steps
    mu_of_10_steps = 8.73809524e-05 * tokens + 1.89833333
    slope = (mu_of_200_steps - mu_of_10_steps) / 190
    return slope * steps + mu_of_200_steps - 200 * slope


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow; see `Objective`.

    Attributes:
        training_mu: Tokens of a sample → μ of the noise levels at which it is trained.
        sampling_mu: Tokens and number of steps → μ of a sampler's noise levels.
        patch: Side of the square of latent pixels that is one token.
        elementwise_loss: Loss of an element of the prediction from its error.
        huber_c: Its parameter c.
        device: Where timesteps and latents have to be.
    """

    training_mu: Callable[[int], float]
    sampling_mu: Callable[[int, int], float]
    patch: int = 1
    elementwise_loss: ElementwiseLoss = squared_error
    huber_c: float = 0.1
    device: torch.device = _CPU

    @property
    def prediction_type(self) -> str:
        """The name of flow matching."""
        return "flow"

    @property
    def timesteps(self) -> int:
        """The timestep of pure noise."""
        return TIMESTEPS

    def plain(self) -> FlowObjective:
        """The same with the plain squared error."""
        return replace(self, elementwise_loss=squared_error)

    def with_settings(self, settings: ObjectiveSettings) -> FlowObjective:
        """The same with the loss from the settings.

        Raises:
            SettingsError: A setting is for models with a discrete noise schedule.
        """
        defaults = ObjectiveSettings()
        for name in ("loss_weighting", "zero_terminal_snr"):
            usual = getattr(defaults, name)
            if getattr(settings, name) != usual:
                raise SettingsError(
                    f"{suggest(name)} is for models with a discrete noise schedule, but this one was trained with "
                    "flow matching.",
                    f"Set {suggest(name, usual)}.",
                )
        return replace(self, elementwise_loss=ELEMENTWISE_LOSSES[settings.loss], huber_c=settings.huber_c)

    def to(self, device: torch.device) -> FlowObjective:
        """The same objective on `device`."""
        return replace(self, device=device)

    def _tokens(self, latents_shape: Sequence[int]) -> int:
        _, height, width = latents_shape
        return (height // self.patch) * (width // self.patch)

    def timestep_at(self, fraction: float, settings: ObjectiveSettings, latents_shape: Sequence[int]) -> float:
        """The timestep at a quantile of the run's distribution: shifted by the tokens of the sample or by the settings.

        The settings' range is in thousandths of σ; the distribution is scaled to it.
        """
        sigma = fraction ** (2.0**-settings.timestep_bias)
        if settings.timestep_sampling != "uniform":
            within = min(max(sigma, _SMALLEST), 1 - _SMALLEST)
            sigma = 1 / (1 + math.exp(-NormalDist().inv_cdf(within)))
        usual = self.training_mu(self._tokens(latents_shape))
        sigma = shifted(sigma, math.log(settings.timestep_shift) if settings.timestep_shift else usual)
        return settings.min_timestep + sigma * (settings.max_timestep - settings.min_timestep)

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        """σ of each timestep, shape (batch, 1, 1, 1)."""
        return (timesteps.float() / TIMESTEPS).view(-1, 1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - σ)·latents + σ·noise."""
        sigmas = self._sigmas(timesteps)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise - latents, whatever the timestep."""
        return noise - latents

    def advance(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """The noisy latents further along the line (Euler's method)."""
        return noisy + (self._sigmas(following) - self._sigmas(timesteps)) * prediction

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, shape (batch,), float32; see `Objective.loss`."""
        return self.loss_against(self.target(latents, noise, timesteps), prediction, timesteps, mask)

    def loss_against(self, target: Tensor, prediction: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each sample for a given target, shape (batch,), float32; see `Objective.loss`."""
        sigmas = self._sigmas(timesteps)
        snr = ((1 - sigmas) / sigmas).square()
        return masked_mean(self.elementwise_loss(prediction.float() - target.float(), snr, self.huber_c), mask)

    def make_scheduler(
        self, name: SchedulerName, steps: int, latents_shape: Sequence[int], device: torch.device
    ) -> Any:
        """Euler's method, or DPM-Solver++(2M), at noise levels that are evenly spaced and then shifted.

        Raises:
            SettingsError: Another sampler is chosen.
        """
        if name not in (*_EULER_NAMES, "dpm++"):
            raise SettingsError(
                f"The sampler {name} can't be used with a flow-matching model.",
                f"Use {suggest('scheduler', 'euler')}.",
            )
        mu = self.sampling_mu(self._tokens(latents_shape), steps)
        if name == "dpm++":
            return flow_dpm_solver(mu, steps, device)
        return FlowEuler([shifted(1 - step / steps, mu) for step in range(steps)], device)

    def facts(self) -> dict[str, Any]:
        """The name of flow matching; there is no schedule."""
        return {"prediction": self.prediction_type}


class FlowEuler:
    """Euler's method from noise to latents; with the interface of diffusers' schedulers.

    Attributes:
        init_noise_sigma: Factor of the starting noise.
        timesteps: 1000·σ of each step, (steps,), float32.
    """

    init_noise_sigma = 1.0

    def __init__(self, sigmas: Sequence[float], device: torch.device) -> None:
        """Take the noise levels, from 1 downwards, without the last, which is 0."""
        self._sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self._sigmas[:-1] * TIMESTEPS
        self._next_step = 0

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents, unchanged."""
        return latents

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        """The latents at the next noise level; steps are taken in order."""
        change = self._sigmas[self._next_step + 1] - self._sigmas[self._next_step]
        self._next_step += 1
        return (latents + change * prediction,)
