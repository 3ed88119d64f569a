"""Every setting, once: type, range, default, unit and help.

Command-line flags, TOML keys, node widgets and tooltips, and the metadata of adapter files derive from the
fields below. A field that does not change what is learned is marked `affects_result=False` and stays out of
the run's fingerprint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.prompts import fill_placeholders, split_prompts
from .adapter import AdapterSettings
from .base import Settings, TidyPath, field_extra, setting
from .data import DataSettings, SubjectSettings, SubjectTable
from .model import BaseSettings
from .objective import ObjectiveSettings
from .optimizer import OptimizerSettings
from .preview import PreviewSettings

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SchedulerName = Literal["ddim", "pndm", "euler", "dpm++"]
MAX_SEED = 2**64 - 1
_TEXT_ENCODER = ("text_encoder_lr", "text_encoder_2_lr", "text_encoder_until")


class PriorSettings(Settings):
    """Class pictures, made by the base model itself, that keep the class from turning into the subject."""

    class_prompt: str = setting(
        "", "Prompt of the class pictures, without the rare word: a photo of a dog.", group="Class pictures"
    )
    prior_count: int = setting(
        0,
        "Class pictures to make (0: train without). 100 to 200 are usual.",
        unit="pictures",
        group="Class pictures",
        ge=0,
        le=10_000,
    )
    prior_scheduler: SchedulerName = setting("ddim", "Sampler of the class pictures.", group="Class pictures")
    prior_steps: int = setting(
        30, "Denoising steps per class picture.", unit="steps", group="Class pictures", ge=1, le=200
    )
    prior_guidance: float = setting(
        7.5, "Classifier-free guidance of the class pictures; 1 is none.", group="Class pictures", ge=0.0, le=100.0
    )
    prior_seed: int = setting(0, "Seed of the first class picture.", group="Class pictures", ge=0, le=MAX_SEED)
    prior_batch_size: int = setting(
        4,
        "Class pictures made at once; lower it if the memory does not suffice.",
        unit="pictures",
        group="Class pictures",
        advanced=True,
        affects_result=False,
        ge=1,
        le=64,
    )

    @model_validator(mode="after")
    def _class_prompt_is_given(self) -> Self:
        if self.prior_count and not self.class_prompt.strip():
            raise ValueError(
                "prior_count asks for class pictures but class_prompt is empty: "
                "give class_prompt, such as 'a photo of a dog', or set prior_count to 0"
            )
        return self


class TrainSettings(AdapterSettings, OptimizerSettings, PreviewSettings, DataSettings, ObjectiveSettings):
    """What and how to learn: the recipe's own settings."""

    preset: Literal["none", "object", "animal", "person", "style"] = setting(
        "none",
        "Good values for what is learned and for the model's family: they replace every setting that was left alone. "
        "What they are and where they come from stands in trainer/presets/.",
        affects_result=False,  # its values do
    )
    name: str = setting(
        "my-subject",
        "Name of the adapter file, without ending.",
        affects_result=False,
        min_length=1,
        max_length=100,
        pattern=r'^[^<>:"/\\|?*\x00-\x1f]+$',
    )
    steps: int = setting(800, "Optimiser steps of the whole run.", unit="steps", ge=1, le=1_000_000)
    learning_rate: float = setting(1e-4, "Peak learning rate.", gt=0.0, le=1.0)
    resolution: int = setting(
        512, "Side of the training pictures; a multiple of 8.", unit="pixels", ge=32, le=4096, multiple_of=8
    )
    seed: int = setting(0, "Seed of the run: order, timesteps, noise and start of the adapter.", ge=0, le=MAX_SEED)
    batch_size: int = setting(1, "Subject pictures per forward pass.", unit="pictures", ge=1, le=256, advanced=True)
    gradient_accumulation: int = setting(
        1, "Forward passes per optimiser step.", unit="passes", ge=1, le=1024, advanced=True
    )
    prior_weight: float = setting(
        1.0, "Weight λ of the class pictures' loss (prior preservation).", ge=0.0, le=100.0, advanced=True
    )
    flip: bool = setting(
        False, "Mirror half of the samples. Not for faces, text or anything asymmetric.", advanced=True
    )
    lr_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant", "How the learning rate develops (diffusers' schedules).", advanced=True)
    lr_warmup_steps: int = setting(
        0, "Steps over which the learning rate rises to its peak.", unit="steps", ge=0, advanced=True
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are clipped to this norm; 0: not clipped.", ge=0.0, le=1000.0, advanced=True
    )
    weight_decay: float = setting(0.01, "Weight decay of the optimiser.", ge=0.0, le=1.0, advanced=True)
    precision: Precision = setting(
        "auto",
        "Precision of the base model while training: auto takes bf16 where the GPU has it, else fp16 on CUDA "
        "and fp32 elsewhere. The adapter itself is always trained in fp32.",
        advanced=True,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: about half the memory, about a third slower.",
        advanced=True,
        affects_result=False,
    )
    fit: Literal["auto", "off"] = setting(
        "auto",
        "auto: on a CUDA GPU the memory of a step is estimated before the first one, and what saves memory without "
        "changing what is learned is turned on if it is needed: gradient checkpointing, then batches in several parts. "
        "If the memory runs out all the same, the run goes on once with less. off: everything as set.",
        group="Memory",
        advanced=True,
        affects_result=False,
    )
    checkpoint_every: int = setting(
        100,
        "Steps between checkpoints; 0: only at the end.",
        unit="steps",
        group="Saving",
        ge=0,
        advanced=True,
        affects_result=False,
    )
    keep_checkpoints: int = setting(
        3, "How many checkpoints are kept.", group="Saving", ge=1, le=1000, advanced=True, affects_result=False
    )
    keep_adapters: bool = setting(
        True,
        "Keep the adapter of every checkpoint, without what is needed to resume from it, so that the best one can be "
        "picked afterwards.",
        group="Saving",
        advanced=True,
        affects_result=False,
    )
    resume: Literal["auto", "never"] = setting(
        "auto",
        "auto: go on with the same run where it stopped, and return it if it is finished. never: start anew.",
        group="Saving",
        advanced=True,
        affects_result=False,
    )
    save_precision: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "Precision of the adapter file.", group="Saving", advanced=True, affects_result=False
    )

    log_with: Literal["none", "tensorboard", "wandb"] = setting(
        "none",
        "Also log losses, scores and previews with TensorBoard (into logs/ in the run's folder) or Weights & Biases "
        "(sends them to its server, unless the environment says WANDB_MODE=offline).",
        group="Watching",
        advanced=True,
        affects_result=False,
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        reserved = {"con", "prn", "aux", "nul"} | {f"{kind}{digit}" for kind in ("com", "lpt") for digit in range(10)}
        if name.strip(" .") != name or name.split(".")[0].lower() in reserved:
            raise ValueError("can't be a file name on every system; choose letters, digits, '-' and '_'")
        if len(name.encode()) > 180:
            raise ValueError("is too long for a file name; choose a shorter one")
        return name

    @model_validator(mode="after")
    def _presets_are_for_adapters(self) -> Self:
        if self.preset != "none" and self.adapter == "full":
            raise ValueError("preset is for adapters, but adapter is 'full': unset preset or choose lora")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.lr_warmup_steps >= self.steps:
            raise ValueError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) must be less than steps ({self.steps}): "
                "lower it or train longer"
            )
        if self.lr_schedule == "constant" and self.lr_warmup_steps:
            raise ValueError(
                "lr_schedule 'constant' has no warm-up: choose 'constant_with_warmup' or set lr_warmup_steps to 0"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        return self.require_fitting(self.learning_rate, self.text_rates, self.lr_schedule, self.adapter, self.max_norm)

    @property
    def text_encoder_steps(self) -> int:
        """Step after which trained text encoders stay as they are."""
        return max(1, round(self.steps * self.text_encoder_until))

    @property
    def length_changes_the_course(self) -> bool:
        """Whether a longer run takes other steps from the start, because a rate depends on the length."""
        return self.lr_schedule not in ("constant", "constant_with_warmup") or self.text_encoder_until < 1

    def result_settings(self) -> dict[str, Any]:
        """The settings on which the trained weights depend; with a steady rate, not the run's length."""
        values = {
            name: getattr(self, name)
            for name in TrainSettings.model_fields
            if field_extra(TrainSettings, name)["affects_result"] and name != "start_from"  # its content counts
        }
        if not self.length_changes_the_course:
            del values["steps"]
        if self.adapter == "full":  # rank and layers are those of the LoRA that is extracted at the end
            adapters = set(AdapterSettings.model_fields) - {"adapter", *_TEXT_ENCODER}
            return {name: value for name, value in values.items() if name not in adapters}
        values["alpha"] = self.scale * self.rank
        return values


class StageSettings(Settings):
    """Two-stage training."""

    base_lora: tuple[str, ...] = setting(
        (),
        "Adapter to apply to the base before training, with an optional strength: FILE or FILE:0.8. May be given "
        "several times.",
        group="Base model",
        path=True,
    )


class OutputSettings(Settings):
    """Where the command line writes."""

    output_dir: TidyPath = setting(
        Path("output"),
        "Folder for the adapter file; run state and class pictures go into runs/ and class-pictures/ in it.",
        group="Saving",
        affects_result=False,
        path=True,
    )


class TrainCommand(TrainSettings, StageSettings, BaseSettings, SubjectSettings, PriorSettings, OutputSettings):
    """Everything that `train` takes."""

    @model_validator(mode="after")
    def _class_prompt_is_given(self) -> Self:
        if not self.subject:
            return self if self.class_images else PriorSettings._class_prompt_is_given(self)  # type: ignore[operator]
        if self.prior_count and not any(one.class_prompt.strip() or one.class_images for one in self.subject):
            raise ValueError("prior_count asks for class pictures: give tables [[subject]] a class_prompt")
        return self

    @model_validator(mode="after")
    def _prompts_differ(self) -> Self:
        for one in self.subject or [self]:
            if not one.class_noun.strip() and "{class}" in one.instance_prompt + one.class_prompt:
                raise ValueError("the prompts hold {class}, but class_noun is empty: give class_noun, such as 'dog'")
        for one in self.subjects:
            if one.prior_count and one.class_prompt in split_prompts(one.instance_prompt):
                raise ValueError(
                    "class_prompt equals instance_prompt: leave the rare word out of class_prompt ('a photo of a dog')"
                )
        if self.combine and not self.base_lora:
            raise ValueError("combine is on but there is nothing to combine with: give base_lora or turn combine off")
        return self

    @property
    def subjects(self) -> list[SubjectTable]:
        """The subjects, each with the number of its class pictures, and its words in the prompts."""
        if not self.subject:
            names = set(SubjectTable.model_fields)
            tables = [SubjectTable.model_construct(**{name: value for name, value in self if name in names})]
        else:
            tables = list(self.subject)
        found = []
        for one in tables:
            count = self.prior_count if one.prior_count is None else one.prior_count
            prompts = {
                name: fill_placeholders(getattr(one, name), one.token, one.class_noun).strip()
                for name in ("instance_prompt", "class_prompt")
            }
            wanted = count if prompts["class_prompt"] and not one.class_images else 0
            found.append(one.model_copy(update=prompts | {"prior_count": wanted}))
        return found


class PlanCommand(TrainCommand):
    """Everything that `plan` takes: what `train` does, and the memory to plan for. Pictures need not be there yet."""

    images: TidyPath | None = setting(None, "Pictures of the subject; not needed to plan.", group="Subject", path=True)
    memory: float | None = setting(
        None,
        "Memory of the card to plan for. Not set: what is free on the device.",
        unit="GB",
        group="Memory",
        affects_result=False,
        gt=0.0,
        le=10_000.0,
    )

    @model_validator(mode="after")
    def _one_subject_or_several(self) -> Self:
        return self


class PriorsCommand(StageSettings, BaseSettings, PriorSettings, OutputSettings):
    """Everything that `priors` takes."""

    resolution: int = TrainSettings.model_fields["resolution"]  # type: ignore[assignment]
    precision: Precision = TrainSettings.model_fields["precision"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _something_to_make(self) -> Self:
        if not self.prior_count:
            raise ValueError("prior_count is 0, so there is nothing to make: give --prior-count 100")
        return self


class SizeSettings(Settings):
    """The size of drawn pictures."""

    size: str = setting("512", "Size: SIDE or WIDTHxHEIGHT, multiples of 8.", unit="pixels", group="Picture")

    @field_validator("size")
    @classmethod
    def _size_is_two_numbers(cls, size: str) -> str:
        sides = size.lower().split("x")
        if len(sides) > 2 or not all(
            side.isdecimal() and int(side) % 8 == 0 and 32 <= int(side) <= 4096 for side in sides
        ):
            raise ValueError("must be SIDE or WIDTHxHEIGHT in pixels, multiples of 8 from 32 to 4096, e.g. 512x768")
        return size

    @property
    def width_height(self) -> tuple[int, int]:
        """Width and height in pixels."""
        sides = [int(side) for side in self.size.lower().split("x")]
        return sides[0], sides[-1]


class GenerateSettings(BaseSettings, SizeSettings):
    """Everything that `generate` takes."""

    lora: tuple[str, ...] = setting(
        (),
        "Adapter file, with an optional strength: FILE or FILE:0.8. May be given several times.",
        group="Picture",
        path=True,
    )
    prompt: str = setting(..., "What to draw.", group="Picture")
    negative_prompt: str = setting("", "What not to draw.", group="Picture")
    steps: int = setting(30, "Denoising steps.", unit="steps", group="Picture", ge=1, le=200)
    scheduler: SchedulerName = setting("ddim", "Sampler.", group="Picture")
    guidance: float = setting(7.5, "Classifier-free guidance; 1 is none.", group="Picture", ge=0.0, le=100.0)
    seed: int = setting(0, "Seed of the first picture; the next pictures count up.", group="Picture", ge=0, le=MAX_SEED)
    count: int = setting(1, "Pictures to make.", unit="pictures", group="Picture", ge=1, le=10_000)
    output: TidyPath = setting(
        Path("picture.png"),
        "File to write; with several pictures a number is added.",
        group="Picture",
        path=True,
    )
    precision: Precision = TrainSettings.model_fields["precision"]  # type: ignore[assignment]
