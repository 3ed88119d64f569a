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
        "How errors count. mse: squared. huber: pseudo-Huber, linear for large errors, so that flawed pictures count "
        "less. huber-snr: the same, linear from smaller errors on at noisier timesteps (kohya's schedule 'snr').",
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
        "How timesteps are weighted. min-snr: those with little noise count less, which balances them (Hang et al. "
        "2023). debiased: those with much noise count more, in favour of large shapes (Yu et al. 2023).",
        group=_GROUP,
        advanced=True,
    )
    min_snr_gamma: float = setting(
        5.0,
        "Signal-to-noise ratio above which min-snr lowers the weight.",
        group=_GROUP,
        gt=0.0,
        le=1000.0,
        advanced=True,
        needs=Needs("loss_weighting", ("min-snr",)),
    )
    noise_offset: float = setting(
        0.0,
        "Strength of noise that is constant over a whole channel, so that very dark and bright pictures can be "
        "learned; 0: none. 0.05 to 0.1 are typical.",
        group=_GROUP,
        ge=0.0,
        le=10.0,
        advanced=True,
        step=0.01,
    )
    multires_noise_iterations: int = setting(
        0,
        "Levels of coarser noise that are added (pyramid noise), for the same purpose as noise_offset; 0: none. 6 is "
        "typical.",
        unit="levels",
        group=_GROUP,
        ge=0,
        le=20,
        advanced=True,
    )
    multires_noise_discount: float = setting(
        0.3,
        "Strength of each level of noise relative to the one before.",
        group=_GROUP,
        gt=0.0,
        le=1.0,
        advanced=True,
        step=0.05,
        needs=Needs("multires_noise_iterations", above=1),
    )
    input_perturbation: float = setting(
        0.0,
        "Extra noise in the model's input that is not in its target (Ning et al. 2023); 0: none. 0.1 is typical.",
        group=_GROUP,
        ge=0.0,
        le=10.0,
        advanced=True,
        step=0.01,
    )
    zero_terminal_snr: bool = setting(
        False,
        "Rescale the noise schedule so that the last timestep is pure noise (Lin et al. 2023), for v-prediction models "
        "that were trained this way. Generate with the same schedule: ModelSamplingDiscrete's zsnr in ComfyUI.",
        group=_GROUP,
        advanced=True,
    )
    min_timestep: int = setting(
        0,
        "First timestep that is trained; 0 has the least noise.",
        unit="timesteps",
        group=_GROUP,
        ge=0,
        le=999,
        advanced=True,
    )
    max_timestep: int = setting(
        1000,
        "Timestep before which training stops; 1000: all.",
        unit="timesteps",
        group=_GROUP,
        ge=1,
        le=1000,
        advanced=True,
    )
    timestep_bias: float = setting(
        0.0,
        "Above 0: noisy timesteps, where shapes are learned, are drawn more often; below 0: those with little noise, "
        "where details are learned. The share of timesteps below x is x to the power of 2^bias.",
        group=_GROUP,
        ge=-4.0,
        le=4.0,
        advanced=True,
    )

    timestep_sampling: Literal["logit-normal", "uniform"] = setting(
        "logit-normal",
        "How noise levels are drawn for models of flow matching; the timesteps of others are uniform. logit-normal: "
        "those in the middle more often (Esser et al. 2024), as their makers advise. uniform: all alike.",
        group=_GROUP,
        advanced=True,
        neutral=("logit-normal",),
    )
    timestep_shift: float = setting(
        0.0,
        "By how much noise levels are shifted towards noise for models of flow matching, where shapes are learned; 0: "
        "as the model is usually trained, for FLUX.2 and Krea 2 more for larger pictures. 1: not at all; 2 to 3 are "
        "typical.",
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
