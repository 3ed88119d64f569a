"""The settings of how pictures and captions are used in training."""

from __future__ import annotations

from pydantic import model_validator
from typing_extensions import Self

from .settings import Settings, setting

_GROUP = "Pictures and captions"


class DataSettings(Settings):
    """How pictures are cut and weighed, and what becomes of their captions."""

    aspect_buckets: bool = setting(
        False,
        "Train every picture near its own shape, with as many pixels as a square of `resolution` has, instead of the "
        "square in its middle.",
        group=_GROUP,
        advanced=True,
    )
    bucket_step: int = setting(
        64,
        "Sides of buckets are multiples of this.",
        unit="pixels",
        group=_GROUP,
        ge=8,
        le=512,
        multiple_of=8,
        advanced=True,
    )
    mask_background: float = setting(
        0.1,
        "Weight of the loss outside of a picture's mask, if it has one; 1: masks are ignored.",
        group=_GROUP,
        ge=0.0,
        le=1.0,
        advanced=True,
    )
    caption_dropout: float = setting(
        0.0,
        "Share of the subject's samples that are trained with an empty caption; 0.05 to 0.1 are usual for styles.",
        group=_GROUP,
        ge=0.0,
        le=1.0,
        advanced=True,
    )
    shuffle_tags: bool = setting(
        False,
        "Put the parts of a caption between commas into another order for each sample.",
        group=_GROUP,
        advanced=True,
    )
    keep_tags: int = setting(
        1,
        "How many parts at a caption's beginning stay where they are (kohya's keep_tokens): the rare word should lead.",
        unit="parts",
        group=_GROUP,
        ge=0,
        le=100,
        advanced=True,
    )
    validation_pictures: int = setting(
        0,
        "Pictures of the subject that are held out: the loss on them, always with the same noise, is told at every "
        "checkpoint. It rises when the run begins to learn the pictures by heart. 0: none.",
        unit="pictures",
        group=_GROUP,
        ge=0,
        le=1000,
        advanced=True,
    )

    @model_validator(mode="after")
    def _buckets_fit_the_resolution(self) -> Self:
        resolution = getattr(self, "resolution", 0)
        if self.aspect_buckets and resolution and self.bucket_step * 2 > resolution:
            raise ValueError(
                f"bucket_step ({self.bucket_step}) leaves no shapes to choose from at resolution {resolution}: lower it"
            )
        return self
