"""The settings of scoring, of comparing adapters, and of DreamBench."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.errors import suggest
from ..core.prompts import PromptWords, split_prompts
from .base import MAX_SEED, Needs, Settings, TidyPath, filled_prompts, same_setting, setting
from .model import BaseModelSettings, Precision
from .train import (
    OutputSettings,
    PriorSettings,
    SchedulerName,
    SizeSettings,
    TrainSettings,
    idle_guidance_interval,
    require_guidance_interval,
)

_PICTURES = "Pictures"


class FeatureExtractorSettings(Settings):
    """The feature extractors."""

    clip: str = setting(
        "",
        "CLIP model for CLIP-T and CLIP-I: a folder saved by transformers, a safetensors file, or a Hugging Face "
        "model ID. The papers use openai/clip-vit-base-patch32.",
        group="Models",
        path=True,
    )
    dino: str = setting(
        "",
        "DINO or DINOv2 model for subject fidelity: a folder, a file, or a Hugging Face model ID. The DreamBooth "
        "paper uses facebook/dino-vits16.",
        group="Models",
        path=True,
    )
    download: bool = setting(
        False, "Download models from Hugging Face if they aren't on this computer yet.", group="Models"
    )

    @model_validator(mode="after")
    def _models_are_given(self) -> Self:
        if not (self.clip.strip() or self.dino.strip()):
            raise ValueError(
                f"neither {suggest('clip')} nor {suggest('dino')} is set: choose a model, such as "
                f"{suggest('clip', 'openai/clip-vit-base-patch32')}"
            )
        return self


class ScoreCommand(FeatureExtractorSettings):
    """Everything that `score` takes."""

    pictures: TidyPath = setting(..., "Pictures to score: a folder or a zip file.", path=True)
    prompt: str = setting(
        "",
        "What the pictures should show, for CLIP-T. A text file of the same name overrides it for that picture.",
        needs=Needs("clip"),
    )
    subject: TidyPath | None = setting(None, "Folder of real pictures of the subject, for CLIP-I and DINO.", path=True)
    output: TidyPath | None = setting(
        None, "Also write the scores to a file: FILE.csv or FILE.json.", group="Saving", path=True
    )
    device: str = same_setting(BaseModelSettings, "device")

    @field_validator("prompt")
    @classmethod
    def _there_is_one_prompt(cls, prompt: str) -> str:
        if len(split_prompts(filled_prompts("prompt", prompt, PromptWords()))) > 1:
            raise ValueError(
                "contains several prompts: use one, or put each picture's own prompt into a text file next to it"
            )
        return prompt

    @field_validator("output")
    @classmethod
    def _output_is_a_table(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in (".csv", ".json"):
            raise ValueError("must end in .csv or .json")
        return path

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> Self:
        if self.dino and not self.subject:
            raise ValueError(f"{suggest('dino')} compares with the subject's pictures: set {suggest('subject')}")
        if self.clip and not self.subject and not self.prompt:
            raise ValueError(
                f"{suggest('clip')} compares with prompts or with the subject's pictures: set {suggest('prompt')} or "
                f"{suggest('subject')}"
            )
        return self


class EvaluationSettings(Settings):
    """How pictures for an evaluation are generated."""

    count: int = setting(
        4,
        "Pictures generated per prompt. The DreamBooth paper uses four; more give steadier scores.",
        unit="pictures",
        group=_PICTURES,
        ge=1,
        le=1000,
    )
    guidance: float = setting(
        7.5, "Classifier-free guidance scale. 7.5 is typical; 1: no guidance.", group=_PICTURES, ge=0.0, le=100.0
    )
    picture_seed: int = setting(
        0,
        "Seed of each prompt's first picture, the same for every adapter so that scores are comparable.",
        group=_PICTURES,
        ge=0,
        le=MAX_SEED,
    )
    picture_batch_size: int = setting(
        4,
        "Pictures generated at once. Lower it if you run out of memory.",
        unit="pictures",
        group=_PICTURES,
        advanced=True,
        ge=1,
        le=64,
    )


class CompareSettings(EvaluationSettings, SizeSettings):
    """A grid of adapters, schedulers and numbers of steps."""

    prompts: str = setting(
        ...,
        "Prompts to generate, separated by '|', each with the rare word, such as 'a photo of sks dog in the snow'.",
        group=_PICTURES,
    )
    token: str = same_setting(TrainSettings, "token")
    schedulers: str = setting("ddim", "Samplers to compare, separated by spaces, such as 'ddim pndm'.", group=_PICTURES)
    steps: str = setting(
        "30",
        "Numbers of denoising steps to compare, separated by spaces, such as '50 80'.",
        unit="steps",
        group=_PICTURES,
    )

    @field_validator("prompts")
    @classmethod
    def _there_is_a_prompt(cls, prompts: str) -> str:
        if not split_prompts(prompts):
            raise ValueError("is blank; enter one or more, separated by '|'")
        return prompts

    @model_validator(mode="after")
    def _templates_are_known(self) -> Self:
        _ = self.prompt_list
        return self

    @property
    def prompt_list(self) -> list[str]:
        """The prompts, with the rare word for {token}."""
        return split_prompts(filled_prompts("prompts", self.prompts, PromptWords(self.token)))

    @field_validator("schedulers")
    @classmethod
    def _schedulers_are_known(cls, names: str) -> str:
        known = get_args(SchedulerName)
        unknown = [name for name in _words(names) if name not in known]
        if unknown or not _words(names):
            raise ValueError(f"must be one or more of: {', '.join(known)}")
        return names

    @field_validator("steps")
    @classmethod
    def _steps_are_numbers(cls, numbers: str) -> str:
        if not _words(numbers) or not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in _words(numbers)):
            raise ValueError("must be one or more numbers from 1 to 1000, separated by spaces")
        return numbers

    @property
    def grid(self) -> list[tuple[SchedulerName, int]]:
        """Every scheduler with every number of steps."""
        schedulers = [cast(SchedulerName, name) for name in _words(self.schedulers)]
        return [(scheduler, int(steps)) for scheduler in schedulers for steps in _words(self.steps)]


class CompareCommand(CompareSettings, FeatureExtractorSettings, BaseModelSettings):
    """Everything that `compare` takes."""

    runs: tuple[str, ...] = setting(
        (), "Run folders and adapter files to compare, each with an optional strength: RUN or FILE:0.8.", path=True
    )
    checkpoints: str = setting(
        "auto",
        "Which checkpoints of each run folder to compare: 'all', 'last', or steps such as '200 400'. auto: all of a "
        "single run, the last one of each of several.",
    )
    subject: TidyPath = setting(..., "Folder of real pictures of the subject.", path=True)
    with_base: bool = setting(
        True, "Also generate pictures with the base model alone, for comparison.", group=_PICTURES
    )
    output_dir: TidyPath = setting(
        Path("output/compare"),
        "Folder for the tables, the contact sheet and the generated pictures.",
        group="Saving",
        path=True,
    )
    precision: Precision = same_setting(TrainSettings, "precision")

    @field_validator("runs")
    @classmethod
    def _there_are_runs(cls, runs: tuple[str, ...]) -> tuple[str, ...]:
        if not runs:
            raise ValueError("name a run folder or an adapter file")
        return runs

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_are_known(cls, text: str) -> str:
        if text not in ("auto", "all", "last") and not (text.strip() and all(map(str.isdecimal, _words(text)))):
            raise ValueError("must be auto, all, last, or steps separated by spaces")
        return text

    def chosen_steps(self, steps: list[int], runs: int) -> list[int]:
        """Which checkpoints of a run to compare.

        Args:
            steps: Steps of the checkpoints that the run has.
            runs: How many runs are compared.
        """
        if self.checkpoints == "all" or (self.checkpoints == "auto" and runs == 1):
            return steps
        if self.checkpoints in ("auto", "last"):
            return steps[-1:]
        return sorted(set(map(int, _words(self.checkpoints))))


class DreamBenchCommand(TrainSettings, EvaluationSettings, FeatureExtractorSettings, BaseModelSettings, OutputSettings):
    """Everything that `dreambench` takes."""

    data: TidyPath = setting(
        ...,
        "Folder of the DreamBooth dataset: one subfolder per subject, and prompts_and_classes.txt.",
        group="Subjects",
        path=True,
    )
    subjects: str = setting("", "Only these subjects, separated by spaces. Empty: all of them.", group="Subjects")
    live: str = setting(
        "cat dog", "Classes that get the prompts for live subjects, separated by spaces.", group="Subjects"
    )
    scheduler: SchedulerName = setting("ddim", "Sampler to generate with.", group=_PICTURES)
    picture_steps: int = setting(50, "Denoising steps per picture.", unit="steps", group=_PICTURES, ge=1, le=1000)
    drift: bool = setting(
        False, "Also generate the class with and without the adapter, to measure drift.", group=_PICTURES
    )
    prior_count: int = same_setting(PriorSettings, "prior_count")
    prior_scheduler: SchedulerName = same_setting(PriorSettings, "prior_scheduler")
    prior_steps: int = same_setting(PriorSettings, "prior_steps")
    prior_guidance: float = same_setting(PriorSettings, "prior_guidance")
    prior_batch_size: int = same_setting(PriorSettings, "prior_batch_size")
    prior_guidance_start: float = same_setting(PriorSettings, "prior_guidance_start")
    prior_guidance_end: float = same_setting(PriorSettings, "prior_guidance_end")

    @model_validator(mode="after")
    def _guidance_ends_after_it_starts(self) -> Self:
        require_guidance_interval(self)
        return self

    def effect_notes(self) -> list[str]:
        """See `Settings.effect_notes`; also of an interval of guidance without guidance."""
        return [*super().effect_notes(), *idle_guidance_interval(self)]

    @model_validator(mode="after")
    def _every_subject_has_its_own_prompts(self) -> Self:
        if self.preview_prompts:
            raise ValueError(
                f"{suggest('preview_prompts')} would be the same for every subject: leave it empty to use each "
                "subject's own caption"
            )
        if self.combine:
            raise ValueError(
                f"{suggest('combine')} is on but there is nothing to combine with: set {suggest('combine', False)}"
            )
        return self


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()
