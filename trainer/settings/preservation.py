"""The settings of preservation: what keeps the class, and everything else, from turning into the subject."""

from __future__ import annotations

from typing import Literal

from .base import Needs, Settings, setting

_GROUP = "Preservation"
_TEACHER = Needs("prior", ("auto", "model"))


class PreservationSettings(Settings):
    """What stays as the base model has it."""

    prior: Literal["auto", "none", "class-pictures", "model"] = setting(
        "auto",
        "What keeps the class as it is. class-pictures: pictures of the class, trained beside the subject's (Ruiz et "
        "al. 2023). model: for prompts without the rare word, the target is what the base model itself predicts; it "
        "needs no pictures. none: nothing. auto: class pictures if there are any; without any, model if an adapter is "
        "trained and every caption holds the rare word, else none.",
        group=_GROUP,
        neutral=("auto", "none", "class-pictures"),  # which pictures there are is in the fingerprint already
    )
    prior_every: int = setting(
        2,
        "Every how many steps the base model's predictions are learned; those samples count as many times as much. "
        "1: in every step, which takes more than twice as long as without.",
        unit="steps",
        group=_GROUP,
        ge=1,
        le=1000,
        advanced=True,
        needs=_TEACHER,
        neutral=(),
    )
    prior_prompts: str = setting(
        "",
        "Further prompts, separated by '|', for which the model stays as it is: a photo of a cat | a house.",
        group=_GROUP,
        advanced=True,
        needs=_TEACHER,
        neutral=(),
    )
    prior_empty: float = setting(
        0.0,
        "Fraction of these samples that has an empty prompt.",
        group=_GROUP,
        ge=0.0,
        le=1.0,
        step=0.05,
        advanced=True,
        needs=_TEACHER,
        neutral=(),
    )
    dco_beta: float = setting(
        0.0,
        "Direct consistency optimisation (Lee et al. 2024): what the base model predicts well already is learned less; "
        "the larger, the sooner a sample counts as learned. 0: off. 1000 is the authors' value.",
        group=_GROUP,
        ge=0.0,
        le=1_000_000.0,
        step=100,
        advanced=True,
        neutral=(0.0,),
    )
    weight_penalty: float = setting(
        0.0,
        "Penalty on the squared change of the weights, λ‖ΔW‖² (Kim et al. 2025), which keeps everything nearer to the "
        "base model; 0: none. 0.0001 to 0.01 are typical.",
        group=_GROUP,
        ge=0.0,
        le=1000.0,
        step=0.0001,
        advanced=True,
        neutral=(0.0,),
    )
