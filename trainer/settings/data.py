"""The settings of the data: pictures, captions, masks, class pictures; of one subject or of several."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.errors import suggest
from .base import Needs, Settings, TidyPath, setting

_SUBJECT = "Subject"
_PICTURES = "Pictures and captions"
_ALSO_OF_THE_RUN = {"token", "prior_count"}  # settings that a table and the run both have


class PictureSettings(Settings):
    """The subject's pictures and what they show."""

    instance_prompt: str = setting(
        "a photo of sks dog",
        "Caption of pictures that have none of their own: the rare word and the class of the subject. Separate "
        "several with '|' to have one picked at random for each sample. {token} and {class} stand for the settings "
        "token and class_noun.",
        group=_SUBJECT,
        min_length=1,
    )
    class_noun: str = setting(
        "", "What the subject is: dog, backpack, man, toy. Stands for {class} in captions and prompts.", group=_SUBJECT
    )
    captions: Literal["files", "file-names", "prompt"] = setting(
        "files",
        "Where captions come from. files: a text file of the same name (.txt, .caption), metadata.jsonl or .csv, or "
        "a folder name such as '10_sks dog'; otherwise the instance prompt. file-names: the names of the picture "
        "files. prompt: always the instance prompt.",
        group=_SUBJECT,
        advanced=True,
    )
    masks: Literal["files", "alpha", "off"] = setting(
        "files",
        "Where masks of the subject come from (white marks the subject). files: x-masklabel.png, x_mask.png or "
        "masks/x.png for a picture x.jpg. alpha: as files, or else the picture's alpha channel. off: no masks.",
        group=_SUBJECT,
        advanced=True,
    )
    repeats: int = setting(
        1,
        "How many times each picture is used per epoch. Raise it to give a subject with few pictures the same weight "
        "as one with many.",
        unit="times",
        group=_SUBJECT,
        ge=1,
        le=10_000,
        advanced=True,
    )

    @field_validator("instance_prompt")
    @classmethod
    def _prompt_has_words(cls, prompt: str) -> str:
        if not prompt.replace("|", " ").strip():
            raise ValueError("is blank; enter a prompt such as 'a photo of sks dog'")
        return prompt


class SubjectTable(PictureSettings):
    """One of several subjects: a table [[subject]] in a settings file."""

    images: TidyPath = setting(..., "Pictures of the subject: a folder or a zip file.", group=_SUBJECT, path=True)
    token: str = setting("sks", "Rare word that {token} stands for, such as sks.", group=_SUBJECT)
    class_prompt: str = setting(
        "", "Prompt for this subject's class pictures, without the rare word. Empty: no class pictures.", group=_SUBJECT
    )
    prior_count: int | None = setting(
        None,
        "Number of class pictures for this subject. If unset, the run's prior_count applies.",
        group=_SUBJECT,
        ge=0,
        le=10_000,
    )
    class_images: TidyPath | None = setting(
        None,
        "Your own class pictures, a folder or a zip file, used instead of generated ones.",
        group=_SUBJECT,
        path=True,
    )

    @model_validator(mode="after")
    def _class_prompt_is_given(self) -> Self:
        if self.prior_count and not self.class_prompt.strip() and self.class_images is None:
            raise ValueError("prior_count asks for class pictures but class_prompt is empty: set class_prompt")
        return self


class SubjectSettings(PictureSettings):
    """The subject, or the subjects."""

    images: TidyPath | None = setting(
        None,
        "Pictures of the subject: a folder or a zip file. 3 to 20 pictures work best.",
        group=_SUBJECT,
        path=True,
    )
    class_images: TidyPath | None = setting(
        None,
        "Your own class pictures, a folder or a zip file, used instead of generated ones.",
        group="Class pictures",
        advanced=True,
        path=True,
        needs=Needs("prior", ("auto", "class-pictures")),
    )
    subject: tuple[SubjectTable, ...] = setting(
        (),
        "Several subjects in one run: [[subject]] tables in a settings file, each with images, instance_prompt, "
        "token, class_noun, class_prompt, prior_count, class_images, captions, masks and repeats.",
        group=_SUBJECT,
    )

    @model_validator(mode="after")
    def _one_subject_or_several(self) -> Self:
        if self.subject and self.images:
            raise ValueError(
                f"{suggest('images')} and tables [[subject]] are both given: move {suggest('images')} into its own "
                "table, with its prompts"
            )
        outside = self.model_fields_set & set(SubjectTable.model_fields) - _ALSO_OF_THE_RUN
        if self.subject and outside:
            names = ", ".join(suggest(name) for name in sorted(outside))
            raise ValueError(f"{names} and tables [[subject]] are both given: move {names} into the tables")
        if not self.subject and self.images is None:
            raise ValueError(f"{suggest('images')} is required but was not given")
        return self


class DataSettings(Settings):
    """How pictures are cropped and weighted, and how their captions are varied."""

    aspect_buckets: bool = setting(
        False,
        "Train each picture close to its own aspect ratio, with about as many pixels as a square of `resolution`, "
        "instead of cropping it to a centre square. Turn it on for portrait and landscape pictures.",
        group=_PICTURES,
        advanced=True,
    )
    bucket_step: int = setting(
        64,
        "Bucket sides are multiples of this many pixels. Smaller steps crop less but make more buckets.",
        unit="pixels",
        group=_PICTURES,
        ge=8,
        le=512,
        multiple_of=8,
        advanced=True,
        needs=Needs("aspect_buckets"),
    )
    mask_background: float = setting(
        0.1,
        "Loss weight outside a picture's mask, if it has one. 0: ignore the background; 1: ignore the mask.",
        group=_PICTURES,
        ge=0.0,
        le=1.0,
        step=0.05,
        advanced=True,
        needs=Needs("masks", ("files", "alpha")),
    )
    caption_dropout: float = setting(
        0.0,
        "Fraction of the subject's samples trained with an empty caption. 0.05 to 0.1 are typical for styles.",
        group=_PICTURES,
        ge=0.0,
        le=1.0,
        step=0.01,
        advanced=True,
    )
    shuffle_tags: bool = setting(
        False,
        "Shuffle the comma-separated tags of a caption for each sample.",
        group=_PICTURES,
        advanced=True,
    )
    keep_tags: int = setting(
        1,
        "Number of tags at the start of a caption that are not shuffled (kohya's keep_tokens), so that the rare word "
        "stays first.",
        unit="tags",
        group=_PICTURES,
        ge=0,
        le=100,
        advanced=True,
        needs=Needs("shuffle_tags"),
    )
    validation_pictures: int = setting(
        0,
        "Number of the subject's pictures to hold out for validation. Their loss, always with the same noise, is "
        "reported at every checkpoint; when it rises, the run is starting to memorise its training pictures. 0: none.",
        unit="pictures",
        group=_PICTURES,
        ge=0,
        le=1000,
        advanced=True,
    )

    @model_validator(mode="after")
    def _buckets_fit_the_resolution(self) -> Self:
        resolution = getattr(self, "resolution", 0)
        if self.aspect_buckets and resolution and self.bucket_step * 2 > resolution:
            raise ValueError(
                f"{suggest('bucket_step')} ({self.bucket_step}) leaves no bucket shapes to choose from at "
                f"{suggest('resolution')} {resolution}: lower {suggest('bucket_step')}"
            )
        return self
