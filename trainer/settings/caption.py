"""The settings of captioning pictures."""

from __future__ import annotations

import re

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.errors import suggest
from .base import Needs, Settings, TidyPath, same_setting, setting
from .model import BaseModelSettings

_GROUP = "Words"
_PLACEHOLDERS = ("caption", "token", "class")


class CaptionSettings(Settings):
    """What a caption is made of."""

    text: str = setting("", "How captions begin, such as 'a photo of'. Empty: BLIP decides.", group=_GROUP)
    template: str = setting(
        "{caption}",
        "How a caption is composed of {caption}, {token} and {class}. If {token} is not in it, the rare word is "
        "inserted before the class noun in BLIP's caption, or both are put in front of it.",
        group=_GROUP,
    )
    token: str = setting("", "The rare word that stands for the subject, such as sks.", group=_GROUP)
    class_noun: str = setting("", "What the subject is: dog, backpack, man, toy …", group=_GROUP, needs=Needs("token"))
    beams: int = setting(
        3,
        "Number of beams in the search for the most likely caption; 1 is fastest.",
        group="Search",
        ge=1,
        le=16,
    )
    max_tokens: int = setting(
        40, "Maximum length of a caption.", unit="tokens", group="Search", advanced=True, ge=1, le=200
    )

    @field_validator("template")
    @classmethod
    def _template_has_the_caption(cls, template: str) -> str:
        placeholders = re.findall(r"\{(\w*)\}", template)
        unknown = [name for name in placeholders if name not in _PLACEHOLDERS]
        if unknown:
            raise ValueError(f"has {{{unknown[0]}}}; it may have {{caption}}, {{token}} and {{class}}")
        if "caption" not in placeholders:
            raise ValueError("must have {caption}, where BLIP's caption goes")
        return template

    @model_validator(mode="after")
    def _template_has_its_words(self) -> Self:
        for placeholder, name in (("token", "token"), ("class", "class_noun")):
            if f"{{{placeholder}}}" in self.template and not getattr(self, name).strip():
                raise ValueError(f"{suggest('template')} has {{{placeholder}}} but {suggest(name)} is not given")
        return self

    def without_effect(self) -> dict[str, tuple[Needs, ...]]:
        """See `Settings.without_effect`; a template may take the class noun without a rare word."""
        idle = super().without_effect()
        if "{class}" in self.template:
            idle.pop("class_noun", None)
        return idle


class CaptionCommand(CaptionSettings):
    """Everything that `caption` takes."""

    images: TidyPath = setting(..., "Folder of pictures; each gets a text file of the same name.", path=True)
    model: str = setting(
        ...,
        "BLIP model: a folder as saved by transformers, or a hub name such as Salesforce/blip-image-captioning-base.",
        group="Model",
        path=True,
    )
    download: bool = setting(
        False, "Download a model that is given by hub name if it is not on this computer yet.", group="Model"
    )
    device: str = same_setting(BaseModelSettings, "device")
    overwrite: bool = setting(False, "Also overwrite captions that exist already.", group="Saving")

    @field_validator("model")
    @classmethod
    def _model_is_given(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("is blank; name a BLIP model, such as Salesforce/blip-image-captioning-base")
        return model.strip()
