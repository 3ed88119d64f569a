"""What the denoiser predicts, and the loss of that prediction.

An `Objective` defines how noise is added, at which timesteps, what is predicted, and how to sample.
Prediction types differ in `target` and in the weights of timesteps, losses in `elementwise_loss`, so that no caller
branches on them. The objective of flow matching is in `flow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from ..core.errors import SettingsError, WeightsError, suggest
from ..settings.objective import ObjectiveSettings
from ..settings.train import SchedulerName
from .schedulers import MIN_ALPHA, discrete_scheduler

_SCHEDULER_REMEDY = "Copy scheduler/scheduler_config.json again from the model's source."
_MAX_SNR = 1000.0  # limits of debiasing: above as kohya has it; below, since pure noise has a ratio of 0
_MIN_SNR = 0.001


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


def _estimates_by_epsilon(noisy: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and noise of which noisy latents consist, by the noise that is predicted; signal √ᾱ, sigma √(1-ᾱ)."""
    return (noisy - sigma * prediction) / signal.clamp(min=MIN_ALPHA**0.5), prediction


def _estimates_by_velocity(noisy: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the velocity that is predicted."""
    return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy


_ESTIMATES = {"epsilon": _estimates_by_epsilon, "v_prediction": _estimates_by_velocity}

ElementwiseLoss = Callable[[Tensor, Tensor, float], Tensor]
"""(error, signal-to-noise ratio of shape (batch, 1, 1, 1), c) → the loss of each element, of the error's shape."""


def squared_error(error: Tensor, snr: Tensor, c: float) -> Tensor:
    """The error squared."""
    return error.pow(2)


def pseudo_huber(error: Tensor, snr: Tensor, c: float) -> Tensor:
    """2c(√(error² + c²) - c): squared for small errors, 2c·|error| for large (Song & Dhariwal 2023; kohya's scale)."""
    return _pseudo_huber(error, c)


def pseudo_huber_snr(error: Tensor, snr: Tensor, c: float) -> Tensor:
    """Pseudo-Huber with c going from 1 at no noise to `c` at pure noise (kohya's schedule "snr")."""
    sigma = snr.rsqrt()
    scheduled_c = (1 - c) / (1 + sigma) ** 2 + c
    return _pseudo_huber(error, scheduled_c)


def _pseudo_huber(error: Tensor, c: float | Tensor) -> Tensor:
    squares = error.pow(2)
    return 2 * c * squares / ((squares + c**2).sqrt() + c)  # the same, without a difference of large numbers


ELEMENTWISE_LOSSES: dict[str, ElementwiseLoss] = {
    "mse": squared_error,
    "huber": pseudo_huber,
    "huber-snr": pseudo_huber_snr,
}


def min_snr_weight(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """min(snr, γ) over snr, or over snr + 1 for velocity (Hang et al. 2023, equation 7 and section 3.4).

    Args:
        snr: Signal-to-noise ratio of each timestep.
        gamma: γ.
        velocity: Whether the model predicts the velocity.
    """
    return snr.clamp(max=gamma) / (snr + 1) if velocity else (gamma / snr).clamp(max=1)  # pure noise has a ratio of 0


def debiased_weight(snr: Tensor, gamma: float, velocity: bool) -> Tensor:
    """1/√snr, or 1/(snr + 1) for velocity (Yu et al. 2023; kohya's debiased estimation); see `min_snr_weight`."""
    snr = snr.clamp(_MIN_SNR, _MAX_SNR)
    return 1 / (snr + 1) if velocity else snr.rsqrt()


_WEIGHTS = {"min-snr": min_snr_weight, "debiased": debiased_weight}


class Objective(Protocol):
    """How noise is added to latents, what the denoiser predicts, and how to sample.

    Latents, noise, predictions and targets are (batch, channels, height, width); timesteps (batch,), of the kind that
    `timestep_at` returns.

    Attributes:
        prediction_type: "epsilon", "v_prediction" or "flow".
        timesteps: Number of diffusion timesteps; timesteps are in [0, timesteps).
        device: Where timesteps and latents have to be.
    """

    @property
    def prediction_type(self) -> str: ...  # noqa: D102
    @property
    def timesteps(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def with_settings(self, settings: ObjectiveSettings) -> Self:
        """The same prediction type with the schedule, loss and weights from the settings."""

    def plain(self) -> Self:
        """The same prediction type and schedule with the plain squared error and equal weights."""

    def to(self, device: torch.device) -> Self:
        """The same objective on `device`."""

    def timestep_at(self, fraction: float, settings: ObjectiveSettings, latents_shape: Sequence[int]) -> float:
        """The timestep at a quantile of the run's distribution of timesteps.

        Args:
            fraction: Which quantile; uniformly distributed in [0, 1).
            settings: Range, bias and distribution.
            latents_shape: (channels, height, width) of the sample.
        """

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents of these timesteps."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict."""

    def advance(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """The noisy latents one step of sampling further, without new noise.

        Args:
            noisy: Latents at `timesteps`.
            prediction: The denoiser's, of these.
            timesteps: Of each sample.
            following: Of each sample, less noisy.
        """

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, shape (batch,), float32.

        Args:
            prediction: The denoiser's.
            latents: Without noise.
            noise: What was added.
            timesteps: Of each sample.
            mask: Weight of each position, (batch, 1, height, width), with a sum above 0; None: all equal.
        """

    def loss_against(self, target: Tensor, prediction: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each sample for a given target, shape (batch,), float32; see `loss`."""

    def make_scheduler(
        self, name: SchedulerName, steps: int, latents_shape: Sequence[int], device: torch.device
    ) -> Any:
        """A sampler with diffusers' interface, and its timesteps set.

        Args:
            name: See `schedulers`.
            steps: Denoising steps.
            latents_shape: (channels, height, width) of each sample.
            device: Of its timesteps.

        Raises:
            SettingsError: There is no such sampler for the objective.
        """

    def facts(self) -> dict[str, Any]:
        """The parts that affect a model's output, for a fingerprint: JSON values by name."""


def masked_mean(elements: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each sample's elements, (batch, channels, height, width), weighted as by `Objective.loss`."""
    if mask is None:
        return elements.mean(dim=(1, 2, 3))
    return (elements.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class DiffusionObjective:
    """A discrete noise schedule and a prediction type; see `Objective`.

    Attributes:
        prediction_type: diffusers' name, "epsilon" or "v_prediction".
        alphas_cumprod: Shape (timesteps,), float32.
        timestep_weights: Of each timestep's loss, shape (timesteps,), float32; None: all equal.
        elementwise_loss: Loss of an element of the prediction from its error.
        huber_c: Its parameter c.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    timestep_weights: Tensor | None = None
    elementwise_loss: ElementwiseLoss = squared_error
    huber_c: float = 0.1

    @property
    def timesteps(self) -> int:
        """Number of diffusion timesteps."""
        return len(self.alphas_cumprod)

    @property
    def device(self) -> torch.device:
        """Where the schedule is."""
        return self.alphas_cumprod.device

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio of each timestep, ᾱ / (1 - ᾱ), shape (timesteps,)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def with_prediction_type(self, prediction_type: str) -> DiffusionObjective:
        """The same schedule with another prediction type, the plain squared error, and equal weights."""
        return DiffusionObjective(prediction_type, self.alphas_cumprod)

    def plain(self) -> DiffusionObjective:
        """The same schedule and prediction type with the plain squared error and equal weights."""
        return self.with_prediction_type(self.prediction_type)

    def with_settings(self, settings: ObjectiveSettings) -> DiffusionObjective:
        """The same prediction type with the schedule, loss and weights from the settings.

        Raises:
            SettingsError: A shift is set, which is for flow-matching models.
        """
        if settings.timestep_shift:
            raise SettingsError(
                f"{suggest('timestep_shift')} is for flow-matching models, but this one has a discrete noise schedule.",
                f"Set {suggest('timestep_shift', 0.0)}.",
            )
        schedule = _rescaled(self.alphas_cumprod) if settings.zero_terminal_snr else self.alphas_cumprod
        unweighted = replace(
            self,
            alphas_cumprod=schedule,
            elementwise_loss=ELEMENTWISE_LOSSES[settings.loss],
            huber_c=settings.huber_c,
        )
        if settings.loss_weighting == "constant":
            return unweighted
        velocity = self.prediction_type == "v_prediction"
        weights = _WEIGHTS[settings.loss_weighting](unweighted.snr, settings.min_snr_gamma, velocity)
        return replace(unweighted, timestep_weights=weights)

    def to(self, device: torch.device) -> DiffusionObjective:
        """The same objective with its schedule on `device`."""
        weights = None if self.timestep_weights is None else self.timestep_weights.to(device)
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device), timestep_weights=weights)

    def timestep_at(self, fraction: float, settings: ObjectiveSettings, latents_shape: Sequence[int]) -> int:
        """The timestep at a quantile of the run's distribution, whatever the latents' shape; see `timestep_at`."""
        return timestep_at(fraction, self.timesteps, settings)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·latents + √(1-ᾱ)·noise, all (batch, channels, height, width); timesteps (batch,), int64."""
        signal, sigma = _coefficients(self.alphas_cumprod, timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict: noise or velocity."""
        return _TARGETS[self.prediction_type](self.alphas_cumprod, latents, noise, timesteps)

    def advance(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """The noisy latents one step of DDIM further (Song et al. 2021, equation 12 with σ = 0)."""
        signal, sigma = _coefficients(self.alphas_cumprod, timesteps)
        latents, noise = _ESTIMATES[self.prediction_type](noisy, prediction, signal, sigma)
        return self.add_noise(latents, noise, following)

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, shape (batch,), float32; see `Objective.loss`."""
        return self.loss_against(self.target(latents, noise, timesteps), prediction, timesteps, mask)

    def loss_against(self, target: Tensor, prediction: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each sample for a given target, shape (batch,), float32; see `Objective.loss`."""
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        snr = alpha / (1.0 - alpha)
        losses = masked_mean(self.elementwise_loss(prediction.float() - target.float(), snr, self.huber_c), mask)
        return losses if self.timestep_weights is None else losses * self.timestep_weights[timesteps]

    def make_scheduler(
        self, name: SchedulerName, steps: int, latents_shape: Sequence[int], device: torch.device
    ) -> Any:
        """A diffusers scheduler on the model's own noise schedule, whatever the latents' shape."""
        scheduler = discrete_scheduler(name, self.alphas_cumprod, self.prediction_type)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def facts(self) -> dict[str, Any]:
        """Prediction type, and some values of the schedule."""
        return {
            "prediction": self.prediction_type,
            "schedule": [f"{value:.5e}" for value in self.alphas_cumprod[::37].tolist()],
        }


def consistency_loss(losses: Tensor, base_losses: Tensor, beta: float) -> Tensor:
    """Direct consistency optimisation (Lee et al. 2024, arXiv 2402.12004): -log σ(-β(loss - base loss)), per sample.

    It is divided by β/2 and shifted by a constant, so that learning rate, clipping and the weights of other samples
    keep their usual meaning: at loss = base loss it has the value and the gradient of the loss, and it becomes the loss
    as β goes to 0.

    Args:
        losses: Of the model, (batch,).
        base_losses: Of the base model, for the same samples and noise, (batch,).
        beta: β, above 0.
    """
    softplus = functional.softplus(beta * (losses - base_losses))
    return base_losses + 2 / beta * (softplus - math.log(2))


def _rescaled(alphas_cumprod: Tensor) -> Tensor:
    """Rescale a schedule so that its last timestep is pure noise (Lin et al. 2023, algorithm 1); same shape."""
    root = alphas_cumprod.double().sqrt()
    first = root[0].clone()
    last = root[-1].clone()
    rescaled: Tensor = ((root - last) * first / (first - last)) ** 2  # a schedule that ends so already stays as it is
    return rescaled.to(alphas_cumprod.dtype)


def make_objective(
    prediction_type: str = "epsilon", scheduler: Mapping[str, Any] | None = None, *, zero_terminal_snr: bool = False
) -> DiffusionObjective:
    """The objective of a model.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        scheduler: The noise schedule's configuration as diffusers writes it; Stable Diffusion's if empty.
        zero_terminal_snr: Whether the schedule is rescaled to end in pure noise.

    Raises:
        WeightsError: The configuration does not give a valid schedule.
    """
    if scheduler:
        from diffusers import DDPMScheduler

        config = {name: value for name, value in scheduler.items() if name != "rescale_betas_zero_snr"}
        try:
            schedule = DDPMScheduler.from_config(config).alphas_cumprod
        except Exception as error:  # diffusers and torch raise anything for values that make no schedule
            raise WeightsError(f"The scheduler's configuration is invalid: {error}.", _SCHEDULER_REMEDY) from error
        if not bool(((schedule >= 0) & (schedule <= 1)).all()):
            raise WeightsError("The scheduler's configuration does not give a valid noise schedule.", _SCHEDULER_REMEDY)
    else:
        schedule = scaled_linear_alphas_cumprod()
    if zero_terminal_snr:
        schedule = _rescaled(schedule)
    return DiffusionObjective(prediction_type, schedule)


def shaped_noise(noise: Tensor, settings: ObjectiveSettings, source: torch.Generator) -> Tensor:
    """Noise with the offset and the coarser levels from the settings; unchanged if they set none.

    Args:
        noise: Standard normal, (channels, height, width).
        settings: noise_offset, multires_noise_iterations, multires_noise_discount.
        source: Of the random numbers.
    """
    if settings.multires_noise_iterations:
        noise = pyramid_noise(noise, settings.multires_noise_iterations, settings.multires_noise_discount, source)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn((len(noise), 1, 1), generator=source)
    return noise


def pyramid_noise(noise: Tensor, iterations: int, discount: float, source: torch.Generator) -> Tensor:
    """Add coarser noise, level by level, each `discount` times as strong, and normalise to a deviation of 1.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023, as in kohya's trainer, so
    that its values mean the same here: level 0 has full size.

    Args:
        noise: Standard normal, (channels, height, width).
        iterations: Maximum number of levels; the last is one whose side would be a single element. One level is
            plain noise.
        discount: Strength of each level relative to the one before.
        source: Of the random numbers.
    """
    channels, height, width = noise.shape
    total = noise * 2**0.5  # as if level 0 had been added: the sum of two standard normals
    for level in range(1, iterations):
        step = (2 + 2 * float(torch.rand((), generator=source))) ** level
        rows = max(1, int(height / step))
        columns = max(1, int(width / step))
        coarse = torch.randn((1, channels, rows, columns), generator=source)
        upsampled = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        total = total + upsampled[0] * discount**level
        if rows == 1 or columns == 1:
            break
    return total / total.std()


def perturbed_noise(noise: Tensor, settings: ObjectiveSettings, source: torch.Generator) -> Tensor:
    """The noise that is added to the latents: the target `noise` with extra noise on it (Ning et al. 2023)."""
    if not settings.input_perturbation:
        return noise
    return noise + settings.input_perturbation * torch.randn(noise.shape, generator=source)


def timestep_at(fraction: float, timesteps: int, settings: ObjectiveSettings) -> int:
    """The timestep at a quantile of the run's distribution of timesteps.

    Args:
        fraction: Which quantile; uniformly distributed in [0, 1).
        timesteps: Number of diffusion timesteps; `min_timestep` and `max_timestep` are in thousandths of it.
        settings: Range and bias.

    Returns:
        In [0, timesteps). The share of timesteps below a fraction x of the range is x^(2^timestep_bias).
    """
    first = settings.min_timestep * timesteps // 1000
    end = max(first + 1, settings.max_timestep * timesteps // 1000)
    biased: float = fraction ** (2.0**-settings.timestep_bias)
    return min(end - 1, first + int(biased * (end - first)))
