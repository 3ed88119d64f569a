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
        "How the class is preserved, so that not every dog turns into yours. class-pictures: pictures of the class "
        "are trained alongside the subject's (Ruiz et al. 2023). model: for prompts without the rare word, the "
        "target is the base model's own prediction; needs no pictures. none: not at all. auto: class-pictures if "
        "there are any; otherwise model, if an adapter is trained and every caption contains the rare word; "
        "otherwise none.",
        group=_GROUP,
        neutral=("auto", "none", "class-pictures"),  # which pictures there are is in the fingerprint already
    )
    prior_every: int = setting(
        2,
        "Interval in steps at which the base model's predictions are learned as well; their weight is scaled up to "
        "make up for it. 1: every step, which takes more than twice as long as training without.",
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
        "More prompts, separated by '|', for which the model should stay as it is, such as 'a photo of a cat | a "
        "house'.",
        group=_GROUP,
        advanced=True,
        needs=_TEACHER,
        neutral=(),
    )
    prior_empty: float = setting(
        0.0,
        "Fraction of the class-preserving samples that use an empty prompt.",
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
        "Direct consistency optimisation (Lee et al. 2024): samples that the model already predicts better than the "
        "base model count less; the larger the value, the sooner. The authors use 1000; 0: off.",
        group=_GROUP,
        ge=0.0,
        le=1_000_000.0,
        step=100,
        advanced=True,
        neutral=(0.0,),
    )
    weight_penalty: float = setting(
        0.0,
        "Penalty on the squared weight change, λ‖ΔW‖² (Kim et al. 2025), which keeps the model close to its base. "
        "0.0001 to 0.01 are typical; 0: off.",
        group=_GROUP,
        ge=0.0,
        le=1000.0,
        step=0.0001,
        advanced=True,
        neutral=(0.0,),
    )
