"""The settings that say what is learned: pictures, captions, class pictures; of one subject or of several."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from .base import Settings, TidyPath, setting

_GROUP = "Subject"
_OF_THE_RUN = {"token", "prior_count"}  # what a table has, but the run has, too


class PictureSettings(Settings):
    """The subject's pictures and what they show."""

    instance_prompt: str = setting(
        "a photo of sks dog",
        "Caption of every picture that has none of its own: a rare word and the class of the subject. Several, "
        "separated by '|', are used in turn by chance. {token} and {class} stand for the settings of these names.",
        group=_GROUP,
        min_length=1,
    )
    class_noun: str = setting(
        "", "What {class} in captions and prompts stands for: dog, backpack, man, toy.", group=_GROUP
    )
    captions: Literal["files", "file-names", "prompt"] = setting(
        "files",
        "Where captions come from. files: a text file of the same name (.txt, .caption), or metadata.jsonl, or the "
        "name of a folder like '10_sks dog', else the prompt. file-names: the pictures' names. prompt: nothing else.",
        group=_GROUP,
        advanced=True,
    )
    masks: Literal["files", "alpha", "off"] = setting(
        "files",
        "Where masks of the subject come from (white: the subject). files: x-masklabel.png, x_mask.png or masks/x.png "
        "beside x.jpg. alpha: these, or what is not transparent in a picture. off: none.",
        group=_GROUP,
        advanced=True,
    )
    repeats: int = setting(
        1,
        "How often each picture is taken in an epoch; balances several subjects.",
        unit="times",
        group=_GROUP,
        ge=1,
        le=10_000,
        advanced=True,
    )

    @field_validator("instance_prompt")
    @classmethod
    def _prompt_has_words(cls, prompt: str) -> str:
        if not prompt.replace("|", " ").strip():
            raise ValueError("is blank; give a prompt such as 'a photo of sks dog'")
        return prompt


class SubjectTable(PictureSettings):
    """One of several subjects: a table [[subject]] in a settings file."""

    images: TidyPath = setting(..., "Pictures of the subject: a folder or a zip file.", group=_GROUP, path=True)
    token: str = setting("sks", "Rare word that {token} stands for.", group=_GROUP)
    class_prompt: str = setting(
        "", "Prompt of this subject's class pictures, without the rare word; empty: none.", group=_GROUP
    )
    prior_count: int | None = setting(
        None, "Class pictures of this subject. Not set: the run's prior_count.", group=_GROUP, ge=0, le=10_000
    )
    class_images: TidyPath | None = setting(
        None,
        "Class pictures of your own: a folder or a zip file, instead of those that the model makes.",
        group=_GROUP,
        path=True,
    )

    @model_validator(mode="after")
    def _class_prompt_is_given(self) -> Self:
        if self.prior_count and not self.class_prompt.strip() and self.class_images is None:
            raise ValueError("prior_count asks for class pictures but class_prompt is empty: give class_prompt")
        return self


class SubjectSettings(PictureSettings):
    """The subject, or the subjects."""

    images: TidyPath | None = setting(
        None,
        "Pictures of the subject: a folder or a zip file. 3 to 20 pictures are right.",
        group=_GROUP,
        path=True,
    )
    class_images: TidyPath | None = setting(
        None,
        "Class pictures of your own: a folder or a zip file, instead of those that the model makes.",
        group="Class pictures",
        advanced=True,
        path=True,
    )
    subject: tuple[SubjectTable, ...] = setting(
        (),
        "Several subjects in one run: tables [[subject]] in a settings file, each with images, instance_prompt, token, "
        "class_noun, class_prompt, prior_count, class_images, captions, masks and repeats.",
        group=_GROUP,
    )

    @model_validator(mode="after")
    def _one_subject_or_several(self) -> Self:
        if self.subject and self.images:
            raise ValueError(
                "images and tables [[subject]] are both given: move images into a table of its own, with its prompts"
            )
        beside = self.model_fields_set & set(SubjectTable.model_fields) - _OF_THE_RUN
        if self.subject and beside:
            raise ValueError(f"{', '.join(sorted(beside))} stand beside tables [[subject]]: move them into the tables")
        if not self.subject and self.images is None:
            raise ValueError("images is required and was not given")
        return self


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
