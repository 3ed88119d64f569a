"""The settings of scoring, of comparing adapters, and of a DreamBench."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.prompts import split_prompts
from .base import Settings, TidyPath, setting
from .model import BaseSettings
from .train import OutputSettings, PriorSettings, SchedulerName, SizeSettings, TrainSettings

_DRAWING = "Pictures"


class JudgeSettings(Settings):
    """The models that judge."""

    clip: str = setting(
        "",
        "CLIP model for CLIP-T and CLIP-I: a folder as transformers writes it, a safetensors file, or a hub name. The "
        "papers' is openai/clip-vit-base-patch32.",
        group="Models",
        path=True,
    )
    dino: str = setting(
        "",
        "DINO or DINOv2 model: a folder, a file or a hub name. The DreamBooth paper's is facebook/dino-vits16.",
        group="Models",
        path=True,
    )
    download: bool = setting(False, "Fetch models that are given by hub name and are not there yet.", group="Models")

    @model_validator(mode="after")
    def _models_are_given(self) -> Self:
        if not (self.clip.strip() or self.dino.strip()):
            raise ValueError(
                "neither clip nor dino is given: name a model, such as --clip openai/clip-vit-base-patch32"
            )
        return self


class ScoreCommand(JudgeSettings):
    """Everything that `score` takes."""

    pictures: TidyPath = setting(..., "Folder or zip file of the pictures to score.", path=True)
    prompt: str = setting(
        "", "What they should show, for CLIP-T. A text file of a picture's name holds a prompt of its own."
    )
    subject: TidyPath | None = setting(None, "Folder of real pictures of the subject, for CLIP-I and DINO.", path=True)
    output: TidyPath | None = setting(None, "Also write the scores: FILE.csv or FILE.json.", group="Saving", path=True)
    device: str = BaseSettings.model_fields["device"]  # type: ignore[assignment]

    @field_validator("output")
    @classmethod
    def _output_is_a_table(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in (".csv", ".json"):
            raise ValueError("must end in .csv or .json")
        return path

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> Self:
        if self.dino and not self.subject:
            raise ValueError("dino compares with the subject's pictures: give subject")
        if self.clip and not self.subject and not self.prompt:
            raise ValueError("clip compares with prompts or with the subject's pictures: give prompt or subject")
        return self


class EvaluationSettings(Settings):
    """How pictures for an evaluation are drawn."""

    count: int = setting(
        4, "Pictures of each prompt; the paper's four.", unit="pictures", group=_DRAWING, ge=1, le=1000
    )
    guidance: float = setting(7.5, "Classifier-free guidance; 1 is none.", group=_DRAWING, ge=0.0, le=100.0)
    picture_seed: int = setting(
        0, "Seed of the first picture of every prompt; the same for every adapter.", group=_DRAWING, ge=0, le=2**64 - 1
    )
    picture_batch_size: int = setting(
        4,
        "Pictures drawn at once; lower it if the memory does not suffice.",
        unit="pictures",
        group=_DRAWING,
        advanced=True,
        ge=1,
        le=64,
    )


class CompareSettings(EvaluationSettings, SizeSettings):
    """A grid of adapters, schedulers and numbers of steps."""

    prompts: str = setting(
        ...,
        "What to draw of the subject, separated by '|', with the rare word in each: 'a photo of sks dog in the snow'.",
        group=_DRAWING,
    )
    token: str = TrainSettings.model_fields["token"]  # type: ignore[assignment]
    schedulers: str = setting("ddim", "Samplers, separated by blanks, such as 'ddim pndm'.", group=_DRAWING)
    steps: str = setting("30", "Denoising steps, separated by blanks, such as '50 80'.", unit="steps", group=_DRAWING)

    @field_validator("prompts")
    @classmethod
    def _there_is_a_prompt(cls, prompts: str) -> str:
        if not split_prompts(prompts):
            raise ValueError("is blank; give one or more, separated by '|'")
        return prompts

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
        if not _words(numbers) or not all(one.isdecimal() and 1 <= int(one) <= 1000 for one in _words(numbers)):
            raise ValueError("must be one or more numbers from 1 to 1000, separated by blanks")
        return numbers

    @property
    def grid(self) -> list[tuple[SchedulerName, int]]:
        """Every scheduler with every number of steps."""
        return [(name, int(steps)) for name in _words(self.schedulers) for steps in _words(self.steps)]  # type: ignore[misc]


class CompareCommand(CompareSettings, JudgeSettings, BaseSettings):
    """Everything that `compare` takes."""

    runs: tuple[str, ...] = setting(
        (), "Run folders and adapter files, with an optional strength: RUN or FILE:0.8.", path=True
    )
    checkpoints: str = setting(
        "auto",
        "Of each run folder: 'all' checkpoints, the 'last' one, or steps such as '200 400'. auto: all of a single run, "
        "the last of several.",
    )
    subject: TidyPath = setting(..., "Folder of real pictures of the subject.", path=True)
    with_base: bool = setting(True, "Also draw with the base alone.", group=_DRAWING)
    output_dir: TidyPath = setting(
        Path("output/compare"),
        "Folder for the tables, the contact sheet and the drawn pictures.",
        group="Saving",
        path=True,
    )
    precision: str = TrainSettings.model_fields["precision"]  # type: ignore[assignment]

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
            raise ValueError("must be auto, all, last, or steps separated by blanks")
        return text

    def chosen_steps(self, steps: list[int], runs: int) -> list[int]:
        """Which steps are wanted of a run that has `steps`; `runs` is how many runs there are."""
        if self.checkpoints in ("auto", "all", "last"):
            return steps if self.checkpoints == "all" or (self.checkpoints == "auto" and runs == 1) else steps[-1:]
        return sorted(set(map(int, _words(self.checkpoints))))


class DreamBenchCommand(TrainSettings, EvaluationSettings, JudgeSettings, BaseSettings, OutputSettings):
    """Everything that `dreambench` takes."""

    data: TidyPath = setting(
        ...,
        "Folder of the DreamBooth dataset: a folder for each subject, and prompts_and_classes.txt.",
        group="Subjects",
        path=True,
    )
    subjects: str = setting("", "Only these, separated by blanks. Empty: all.", group="Subjects")
    live: str = setting("cat dog", "Classes that get the prompts of live subjects.", group="Subjects")
    scheduler: SchedulerName = setting("ddim", "Sampler.", group=_DRAWING)
    picture_steps: int = setting(50, "Denoising steps.", unit="steps", group=_DRAWING, ge=1, le=1000)
    drift: bool = setting(
        False, "Also draw the class with and without the adapter, to measure the drift.", group=_DRAWING
    )
    prior_count: int = PriorSettings.model_fields["prior_count"]  # type: ignore[assignment]
    prior_scheduler: SchedulerName = PriorSettings.model_fields["prior_scheduler"]  # type: ignore[assignment]
    prior_steps: int = PriorSettings.model_fields["prior_steps"]  # type: ignore[assignment]
    prior_guidance: float = PriorSettings.model_fields["prior_guidance"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _every_subject_has_its_own_prompts(self) -> Self:
        if self.preview_prompts:
            raise ValueError("preview_prompts would hold one subject's words: leave it empty, each has its own caption")
        if self.combine:
            raise ValueError("combine is on but there is nothing to combine with: turn combine off")
        return self


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()
