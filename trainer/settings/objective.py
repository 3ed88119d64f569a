"""The settings of the objective: which noise, which timesteps, which loss."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from ..core.errors import suggest
from .base import Needs, Settings, setting

_GROUP = "Objective"


class ObjectiveSettings(Settings):
    """Which noise is added at which timesteps, and how the error of the prediction is weighted."""

    loss: Literal["mse", "huber", "huber-snr"] = setting(
        "mse",
        "Loss function. mse: squared error. huber: pseudo-Huber, linear for large errors, so that flawed pictures "
        "count less. huber-snr: the same, but linear from smaller errors at noisier timesteps (kohya's 'snr' "
        "schedule).",
        group=_GROUP,
        advanced=True,
    )
    huber_c: float = setting(
        0.1,
        "Error above which huber is linear, in standard deviations of the latents.",
        group=_GROUP,
        gt=0.0,
        le=100.0,
        advanced=True,
        step=0.01,
        needs=Needs("loss", ("huber", "huber-snr")),
    )
    loss_weighting: Literal["constant", "min-snr", "debiased"] = setting(
        "constant",
        "How the loss is weighted by timestep. min-snr: less weight at low noise, which balances the timesteps (Hang "
        "et al. 2023). debiased: more weight at high noise, in favour of large shapes (Yu et al. 2023).",
        group=_GROUP,
        advanced=True,
    )
    min_snr_gamma: float = setting(
        5.0,
        "Signal-to-noise ratio above which min-snr lowers the weight. 5 is typical.",
        group=_GROUP,
        gt=0.0,
        le=1000.0,
        advanced=True,
        needs=Needs("loss_weighting", ("min-snr",)),
    )
    noise_offset: float = setting(
        0.0,
        "Strength of noise that is constant across each channel, which lets the model learn very dark and very "
        "bright pictures. 0.05 to 0.1 are typical; 0: off.",
        group=_GROUP,
        ge=0.0,
        le=10.0,
        advanced=True,
        step=0.01,
    )
    multires_noise_iterations: int = setting(
        0,
        "Number of coarser noise levels to add (pyramid noise), for the same purpose as noise_offset. 6 is typical; "
        "0: off.",
        unit="levels",
        group=_GROUP,
        ge=0,
        le=20,
        advanced=True,
    )
    multires_noise_discount: float = setting(
        0.3,
        "Strength of each noise level relative to the one before.",
        group=_GROUP,
        gt=0.0,
        le=1.0,
        advanced=True,
        step=0.05,
        needs=Needs("multires_noise_iterations", above=1),
    )
    input_perturbation: float = setting(
        0.0,
        "Extra noise added to the model's input but not to its target (Ning et al. 2023), against overfitting. 0.1 "
        "is typical; 0: off.",
        group=_GROUP,
        ge=0.0,
        le=10.0,
        advanced=True,
        step=0.01,
    )
    zero_terminal_snr: bool = setting(
        False,
        "Rescale the noise schedule so that the last timestep is pure noise (Lin et al. 2023), for v-prediction "
        "models trained that way. Generate with the same schedule: zsnr on ComfyUI's ModelSamplingDiscrete.",
        group=_GROUP,
        advanced=True,
    )
    min_timestep: int = setting(
        0,
        "Lowest of the timesteps to train; 0 has the least noise. Raise it to leave fine detail alone.",
        unit="timesteps",
        group=_GROUP,
        ge=0,
        le=999,
        advanced=True,
    )
    max_timestep: int = setting(
        1000,
        "Timesteps from this one up are not trained. 1000: all are trained.",
        unit="timesteps",
        group=_GROUP,
        ge=1,
        le=1000,
        advanced=True,
    )
    timestep_bias: float = setting(
        0.0,
        "Above 0, noisy timesteps, where shapes are learned, are sampled more often; below 0, those with little "
        "noise, where details are learned. The share of samples below a fraction x of the timesteps is x to the "
        "power of 2^bias.",
        group=_GROUP,
        ge=-4.0,
        le=4.0,
        advanced=True,
    )

    timestep_sampling: Literal["logit-normal", "uniform"] = setting(
        "logit-normal",
        "How noise levels are sampled for flow-matching models; other models sample timesteps uniformly. "
        "logit-normal: middle levels more often (Esser et al. 2024), as their makers recommend. uniform: all equally "
        "often.",
        group=_GROUP,
        advanced=True,
        neutral=("logit-normal",),
    )
    timestep_shift: float = setting(
        0.0,
        "How far noise levels are shifted towards high noise, where shapes are learned, for flow-matching models. 0: "
        "as the model is usually trained, which for FLUX.2 and Krea 2 means more for larger pictures. 2 to 3 are "
        "typical; 1: no shift.",
        group=_GROUP,
        ge=0.0,
        le=100.0,
        advanced=True,
        neutral=(0.0,),
    )

    @model_validator(mode="after")
    def _timesteps_are_left(self) -> Self:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"{suggest('min_timestep')} ({self.min_timestep}) must be less than {suggest('max_timestep')} "
                f"({self.max_timestep}): no timestep is left to train"
            )
        return self
