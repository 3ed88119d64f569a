"""The settings of captioning pictures."""

from __future__ import annotations

import re

from pydantic import field_validator, model_validator
from typing_extensions import Self

from .base import Settings, TidyPath, setting
from .model import BaseSettings

_WORDS = "Words"
_PLACES = ("caption", "token", "class")


class CaptionSettings(Settings):
    """What a caption is made of."""

    text: str = setting("", "How captions begin, such as 'a photo of'. Empty: as BLIP likes.", group=_WORDS)
    template: str = setting(
        "{caption}",
        "How a caption is put together of {caption}, {token} and {class}. Without {token} in it, the rare word is put "
        "before the class noun in BLIP's words, or both in front of them.",
        group=_WORDS,
    )
    token: str = setting("", "The rare word that calls the subject, such as sks.", group=_WORDS)
    class_noun: str = setting("", "What the subject is: dog, backpack, man, toy …", group=_WORDS)
    beams: int = setting(
        3,
        "Captions that are followed side by side in the search for the likeliest; 1 is fastest.",
        group="Search",
        ge=1,
        le=16,
    )
    max_tokens: int = setting(40, "Longest caption.", unit="tokens", group="Search", advanced=True, ge=1, le=200)

    @field_validator("template")
    @classmethod
    def _template_has_a_place_for_the_caption(cls, template: str) -> str:
        places = re.findall(r"\{(\w*)\}", template)
        unknown = [place for place in places if place not in _PLACES]
        if unknown:
            raise ValueError(f"has {{{unknown[0]}}}; it may have {{caption}}, {{token}} and {{class}}")
        if "caption" not in places:
            raise ValueError("must have {caption}, where BLIP's words go")
        return template

    @model_validator(mode="after")
    def _template_has_its_words(self) -> Self:
        for place, name in (("token", "token"), ("class", "class_noun")):
            if f"{{{place}}}" in self.template and not getattr(self, name).strip():
                raise ValueError(f"template has {{{place}}} but {name} is not given")
        return self


class CaptionCommand(CaptionSettings):
    """Everything that `caption` takes."""

    images: TidyPath = setting(..., "Folder of pictures; each gets a text file of its name.", path=True)
    model: str = setting(
        ...,
        "BLIP model: a folder as transformers writes it, or a hub name such as Salesforce/blip-image-captioning-base.",
        group="Model",
        path=True,
    )
    download: bool = setting(False, "Fetch a model that is given by hub name and is not there yet.", group="Model")
    device: str = BaseSettings.model_fields["device"]  # type: ignore[assignment]
    overwrite: bool = setting(False, "Also write captions that are there already anew.", group="Saving")

    @field_validator("model")
    @classmethod
    def _model_is_given(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("is blank; name a BLIP model, such as Salesforce/blip-image-captioning-base")
        return model.strip()
