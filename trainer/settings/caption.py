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

    text: str = setting(
        "",
        "Text that every caption starts with, such as 'a photo of'; BLIP continues from there. Empty: BLIP writes "
        "the whole caption.",
        group=_GROUP,
    )
    template: str = setting(
        "{caption}",
        "How each caption is built from {caption}, {token} and {class}. Without {token}, the rare word is inserted "
        "before the class noun in BLIP's caption; if BLIP doesn't use that noun, both are put in front.",
        group=_GROUP,
    )
    token: str = setting("", "Rare word that stands for the subject, such as sks.", group=_GROUP)
    class_noun: str = setting("", "What the subject is: dog, backpack, man, toy …", group=_GROUP, needs=Needs("token"))
    beams: int = setting(
        3,
        "Number of beams in the caption search. More beams find more likely captions; 1 is fastest.",
        group="Search",
        ge=1,
        le=16,
    )
    max_tokens: int = setting(
        40, "Maximum length of a caption in tokens.", unit="tokens", group="Search", advanced=True, ge=1, le=200
    )

    @field_validator("template")
    @classmethod
    def _template_has_the_caption(cls, template: str) -> str:
        placeholders = re.findall(r"\{(\w*)\}", template)
        unknown = [name for name in placeholders if name not in _PLACEHOLDERS]
        if unknown:
            raise ValueError(f"has the unknown placeholder {{{unknown[0]}}}; use {{caption}}, {{token}} and {{class}}")
        if "caption" not in placeholders:
            raise ValueError("must contain {caption}, where BLIP's caption goes")
        return template

    @model_validator(mode="after")
    def _template_has_its_words(self) -> Self:
        for placeholder, name in (("token", "token"), ("class", "class_noun")):
            if f"{{{placeholder}}}" in self.template and not getattr(self, name).strip():
                raise ValueError(f"{suggest('template')} contains {{{placeholder}}} but {suggest(name)} is not set")
        return self

    def without_effect(self) -> dict[str, tuple[Needs, ...]]:
        """See `Settings.without_effect`; a template may take the class noun without a rare word."""
        idle = super().without_effect()
        if "{class}" in self.template:
            idle.pop("class_noun", None)
        return idle


class CaptionCommand(CaptionSettings):
    """Everything that `caption` takes."""

    images: TidyPath = setting(..., "Folder of pictures to caption. Each gets a text file of the same name.", path=True)
    model: str = setting(
        ...,
        "BLIP model: a folder saved by transformers, or a Hugging Face model ID such as "
        "Salesforce/blip-image-captioning-base.",
        group="Model",
        path=True,
    )
    download: bool = setting(
        False, "Download the model from Hugging Face if it isn't on this computer yet.", group="Model"
    )
    device: str = same_setting(BaseModelSettings, "device")
    overwrite: bool = setting(False, "Replace captions that already exist. Off: they are kept.", group="Saving")

    @field_validator("model")
    @classmethod
    def _model_is_given(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("is blank; name a BLIP model, such as Salesforce/blip-image-captioning-base")
        return model.strip()
