"""The settings of scoring."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator, model_validator
from typing_extensions import Self

from .config import BaseSettings
from .settings import Settings, TidyPath, setting


class ScoreCommand(Settings):
    """Everything that `score` takes."""

    pictures: TidyPath = setting(..., "Folder or zip file of the pictures to score.")
    prompt: str = setting(
        "", "What they should show, for CLIP-T. A text file of a picture's name holds a prompt of its own."
    )
    subject: TidyPath | None = setting(None, "Folder of real pictures of the subject, for CLIP-I and DINO.")
    clip: str = setting(
        "",
        "CLIP model for CLIP-T and CLIP-I: a folder as transformers writes it, or a hub name. The papers' is "
        "openai/clip-vit-base-patch32.",
        group="Models",
    )
    dino: str = setting(
        "",
        "DINO or DINOv2 model: a folder or a hub name. The DreamBooth paper's is facebook/dino-vits16.",
        group="Models",
    )
    download: bool = setting(False, "Fetch models that are given by hub name and are not there yet.", group="Models")
    output: TidyPath | None = setting(None, "Also write the scores: FILE.csv or FILE.json.", group="Saving")
    device: str = BaseSettings.model_fields["device"]  # type: ignore[assignment]

    @field_validator("output")
    @classmethod
    def _output_is_a_table(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in (".csv", ".json"):
            raise ValueError("must end in .csv or .json")
        return path

    @model_validator(mode="after")
    def _models_are_given(self) -> Self:
        if not (self.clip or self.dino):
            raise ValueError(
                "neither clip nor dino is given: name a model, such as --clip openai/clip-vit-base-patch32"
            )
        if self.dino and not self.subject:
            raise ValueError("dino compares with the subject's pictures: give subject")
        if self.clip and not self.subject and not self.prompt:
            raise ValueError("clip compares with prompts or with the subject's pictures: give prompt or subject")
        return self
