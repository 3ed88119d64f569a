"""The settings of the objective: which noise, which timesteps, which loss."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from .base import Settings, setting

_GROUP = "Objective"


class ObjectiveSettings(Settings):
    """Which noise is added at which timesteps, and how the prediction's error is weighed."""

    loss: Literal["mse", "huber", "huber-snr"] = setting(
        "mse",
        "How an error counts. mse: squared. huber: pseudo-Huber, linear for large errors, so that flawed pictures "
        "count less. huber-snr: the same, linear the sooner the noisier the timestep is (kohya's schedule 'snr').",
        group=_GROUP,
        advanced=True,
    )
    huber_c: float = setting(
        0.1,
        "Error above which huber counts linearly, of latents' standard deviation.",
        group=_GROUP,
        gt=0.0,
        le=100.0,
        advanced=True,
    )
    loss_weighting: Literal["constant", "min-snr", "debiased"] = setting(
        "constant",
        "How timesteps are weighed. min-snr: those with little noise count less, which evens out learning (Hang et al. "
        "2023). debiased: those with much noise count more, for the large shapes (Yu et al. 2023).",
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
    )
    noise_offset: float = setting(
        0.0,
        "Strength of a noise that is the same over a whole channel, so that very dark and bright pictures can be "
        "learned; 0: none. 0.05 to 0.1 are usual.",
        group=_GROUP,
        ge=0.0,
        le=10.0,
        advanced=True,
    )
    multires_noise_iterations: int = setting(
        0,
        "Levels of coarser noise that are added (pyramid noise), to the same end as noise_offset; 0: none, 6 is usual.",
        unit="levels",
        group=_GROUP,
        ge=0,
        le=20,
        advanced=True,
    )
    multires_noise_discount: float = setting(
        0.3, "Strength of each level of noise over the one before.", group=_GROUP, gt=0.0, le=1.0, advanced=True
    )
    input_perturbation: float = setting(
        0.0,
        "Extra noise that the model sees and is not asked for (Ning et al. 2023); 0: none. 0.1 is usual.",
        group=_GROUP,
        ge=0.0,
        le=10.0,
        advanced=True,
    )
    zero_terminal_snr: bool = setting(
        False,
        "Rescale the noise schedule so that the last timestep is pure noise (Lin et al. 2023), for models of velocity "
        "that were trained so. Draw with the same schedule: ModelSamplingDiscrete's zsnr in ComfyUI.",
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
        "Timestep before which training ends; 1000: all.",
        unit="timesteps",
        group=_GROUP,
        ge=1,
        le=1000,
        advanced=True,
    )
    timestep_bias: float = setting(
        0.0,
        "Above 0: noisy timesteps, where shapes are learned, are drawn more often; below: those with little noise, "
        "where details are. The share of timesteps below x is x to the power of 2^bias.",
        group=_GROUP,
        ge=-4.0,
        le=4.0,
        advanced=True,
    )

    @model_validator(mode="after")
    def _timesteps_are_left(self) -> Self:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep ({self.min_timestep}) must be less than max_timestep ({self.max_timestep}): no timestep "
                "is left to train"
            )
        return self
