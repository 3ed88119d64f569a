"""The settings of merging, resizing, extracting, converting and fusing adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from ..core.errors import suggest
from ..core.prompts import PromptWords, split_prompts
from .base import MAX_SEED, Needs, Settings, TidyPath, filled_prompts, same_setting, setting
from .model import BaseModelSettings, Precision, SavePrecision
from .train import GenerateCommand, TrainSettings

MethodName = Literal["sum", "svd", "ties", "dare", "dare-ties", "prune", "orthogonal"]
_TRUNCATION = ("rank", "energy", "conv_rank", "ratio")
METHOD_SETTINGS: Mapping[MethodName, tuple[str, ...]] = {
    "sum": (),
    "svd": _TRUNCATION,
    "ties": ("density", *_TRUNCATION),
    "dare": ("density", "seed", *_TRUNCATION),
    "dare-ties": ("density", "seed", *_TRUNCATION),
    "prune": ("density", *_TRUNCATION),
    "orthogonal": ("protected",),
}
"""Merge method → the settings that it takes."""


@dataclass(frozen=True)
class BlockWeight:
    """A factor for the modules whose names match a pattern."""

    pattern: re.Pattern[str]
    factor: float


class TruncationSettings(Settings):
    """How far a result is truncated."""

    rank: int = setting(32, "Maximum rank of the result. 4 to 256 are usual; 0: no limit.", group="Size", ge=0)
    conv_rank: int = setting(0, "Maximum rank of 3×3 convolutions. 0: same as rank.", group="Size", advanced=True, ge=0)
    energy: float = setting(
        1.0,
        "Minimum share of each layer's energy (squared norm) to keep. Below 1, layers get a lower rank where little "
        "is lost: 0.95 often makes the file several times smaller. 1: keep everything.",
        group="Size",
        step=0.01,
        gt=0.0,
        le=1.0,
    )
    ratio: float = setting(
        0.0,
        "Maximum ratio between a layer's largest singular value and the smallest one kept (kohya's sv_ratio). 0: no "
        "limit.",
        group="Size",
        advanced=True,
        ge=0.0,
    )

    @field_validator("ratio")
    @classmethod
    def _ratio_is_at_least_one(cls, ratio: float) -> float:
        if 0 < ratio < 1:
            raise ValueError("must be 1 or more, or 0 for no limit")
        return ratio

    @field_validator("rank", "conv_rank")
    @classmethod
    def _rank_is_plausible(cls, rank: int) -> int:
        if rank > 10_000:
            raise ValueError("is larger than any layer; 4 to 256 is usual")
        return rank


class MergeSettings(TruncationSettings):
    """How adapters are merged."""

    method: MethodName = setting(
        "sum",
        "How to merge. sum: the exact sum; ranks add up. svd: the sum, truncated to a rank. ties: drops small values "
        "and resolves conflicting signs. dare, dare-ties: drop values at random and rescale the rest; dare-ties also "
        "resolves signs. prune: drops small values. orthogonal: leaves the first adapter untouched and keeps the "
        "others away from its inputs.",
        group="Method",
    )
    density: float = setting(
        0.5,
        "Fraction of the values that ties, dare, dare-ties and prune keep.",
        group="Method",
        gt=0.0,
        le=1.0,
        step=0.05,
    )
    protected: float = setting(
        1.0,
        "For orthogonal: share of an adapter's energy whose inputs later adapters must leave alone. Lower it to give "
        "them more room.",
        group="Method",
        gt=0.0,
        le=1.0,
        step=0.01,
    )
    seed: int = setting(
        0,
        "Seed of the random drops in dare and dare-ties.",
        group="Method",
        ge=0,
        le=MAX_SEED,
        needs=Needs("method", ("dare", "dare-ties")),
    )

    @model_validator(mode="after")
    def _settings_suit_the_method(self) -> Self:
        unused = sorted(self.model_fields_set - self.used_settings)
        for name in unused:
            if name in _TRUNCATION:
                raise ValueError(
                    f"method '{self.method}' is exact, so {suggest(name)} does not apply: remove it, or choose "
                    f"{suggest('method', 'svd')}"
                )
        for name in unused:
            if name in ("density", "protected"):
                raise ValueError(
                    f"{suggest(name)} does not apply to method '{self.method}': remove it, or choose another "
                    f"{suggest('method')}"
                )
        return self

    @property
    def used_settings(self) -> set[str]:
        """The settings that the method takes, and the method itself."""
        return {"method", *METHOD_SETTINGS[self.method]}

    @property
    def truncates(self) -> bool:
        """Whether the result is truncated to a lower rank."""
        return "rank" in METHOD_SETTINGS[self.method]


class _FileSettings(Settings):
    """What every command that computes and writes an adapter takes."""

    output: TidyPath = setting(..., "File to write. An existing file is never overwritten.", group="Saving", path=True)
    save_precision: SavePrecision = same_setting(TrainSettings, "save_precision")
    report: TidyPath | None = setting(
        None,
        "Also write a report to a file: FILE.json, or FILE.png for a heat map by block.",
        group="Saving",
        path=True,
    )
    base: TidyPath | None = setting(
        None,
        "Base model that the adapters were trained on: a .safetensors or .ckpt file, or a diffusers folder. Needed "
        "for DoRA and OFT, whose weight change depends on it.",
        group="Base model",
        path=True,
    )
    device: str = same_setting(BaseModelSettings, "device")

    @field_validator("output")
    @classmethod
    def _output_is_an_adapter(cls, path: Path) -> Path:
        return _safetensors(path)

    @field_validator("report")
    @classmethod
    def _report_is_json_or_a_picture(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in (".json", ".png"):
            raise ValueError("must end in .json or .png")
        return path


def _safetensors(path: Path) -> Path:
    if path.suffix.lower() != ".safetensors":
        raise ValueError("must end in .safetensors")
    return path


class MergeCommand(MergeSettings, _FileSettings):
    """Everything that `merge` takes."""

    loras: tuple[str, ...] = setting(
        ...,
        "Adapter files with an optional strength: FILE, FILE:0.8, or FILE:0.8:0.5 for the UNet and the text encoders.",
        path=True,
    )
    block_weights: tuple[str, ...] = setting(
        (),
        "Strength factors for parts of the first adapter: PATTERN=FACTOR, separated by spaces, such as "
        "'down_blocks=0.5 mid_block=0'. The last match in a layer's name wins. Given again, it applies to the second "
        "adapter, and so on.",
        group="Method",
        advanced=True,
    )

    @model_validator(mode="after")
    def _block_weights_belong_to_adapters(self) -> Self:
        if len(self.block_weights) > len(self.loras):
            raise ValueError(
                f"{suggest('block_weights')} is given {len(self.block_weights)} times for {len(self.loras)} adapters"
            )
        for text in self.block_weights:
            parse_block_weights(text)
        return self


class ResizeCommand(TruncationSettings, _FileSettings):
    """Everything that `resize` takes."""

    lora: TidyPath = setting(..., "Adapter file to resize.", path=True)


class LearnedMergeSettings(Settings):
    """How the coefficients of a learned merge are found."""

    subject_prompt: str = setting(
        ...,
        "Prompts that the first adapter was trained on, such as 'a photo of sks dog'. Separate several with '|'.",
        group="Prompts",
    )
    style_prompt: str = setting(
        ...,
        "Prompts that the second adapter was trained on, such as 'pixel art, a house'. Separate several with '|'; "
        "varied subjects keep the style independent of any one of them.",
        group="Prompts",
    )
    steps: int = setting(
        100, "Number of optimiser steps for the coefficients. The paper uses 100.", unit="steps", ge=1, le=100_000
    )
    learning_rate: float = setting(
        0.01, "Learning rate of the coefficients. The paper uses 0.01.", gt=0.0, le=1.0, step=0.000001
    )
    overlap_weight: float = setting(
        0.01,
        "Weight of the penalty on inputs that both adapters use (ZipLoRA's λ).",
        ge=0.0,
        le=100.0,
        advanced=True,
        step=0.001,
    )
    split: float = setting(
        0.6,
        "Noise level, as a fraction of the timesteps, that divides the two adapters: above it the subject's "
        "predictions are matched, below it the style's, since shape is decided at high noise and texture at low "
        "noise. Lower it for more of the subject, raise it for more of the style. 0: both at every noise level, as "
        "in the paper.",
        ge=0.0,
        le=0.95,
        advanced=True,
        step=0.05,
    )
    pictures: int = setting(
        8,
        "Pictures generated with each adapter, as latents, to learn from.",
        unit="pictures",
        ge=1,
        le=1000,
        advanced=True,
    )
    sampling_steps: int = setting(20, "Denoising steps for these pictures.", unit="steps", ge=1, le=200, advanced=True)
    guidance: float = setting(
        5.0, "Classifier-free guidance scale for these pictures. 1: no guidance.", ge=0.0, le=100.0, advanced=True
    )
    resolution: int = same_setting(TrainSettings, "resolution")
    seed: int = setting(0, "Seed of the latents, timesteps and noise.", ge=0, le=MAX_SEED)
    precision: Precision = same_setting(TrainSettings, "precision")
    gradient_checkpointing: bool = same_setting(TrainSettings, "gradient_checkpointing")

    @field_validator("subject_prompt", "style_prompt")
    @classmethod
    def _prompts_are_given(cls, text: str, info: ValidationInfo) -> str:
        if not split_prompts(filled_prompts(str(info.field_name), text, PromptWords())):
            raise ValueError("is empty; enter what the adapter was trained on")
        return text


class LearnedMergeCommand(LearnedMergeSettings, BaseModelSettings):
    """Everything that `learned-merge` takes."""

    loras: tuple[str, ...] = setting(
        ..., "Two adapter files, the subject's first and then the style's, each with an optional strength.", path=True
    )
    output: TidyPath = setting(..., "File to write. An existing file is never overwritten.", group="Saving", path=True)
    save_precision: SavePrecision = same_setting(TrainSettings, "save_precision")
    report: TidyPath | None = same_setting(_FileSettings, "report")

    @model_validator(mode="after")
    def _two_adapters(self) -> Self:
        if len(self.loras) != 2:
            raise ValueError(f"{suggest('loras')}: a learned merge takes two adapters, but {len(self.loras)} are given")
        return self


class ExtractSettings(TruncationSettings):
    """How a LoRA is extracted from two models."""

    biases: bool = setting(
        False, "Also extract changes to biases and norms. Not every program can load them.", group="Size", advanced=True
    )


class ExtractCommand(ExtractSettings, _FileSettings):
    """Everything that `extract` takes."""

    tuned: TidyPath = setting(..., "Fine-tuned model to extract from: a file or a diffusers folder.", path=True)
    base: TidyPath = setting(..., "Model it was fine-tuned from.", group="Base model", path=True)


class ConvertCommand(Settings):
    """Everything that `convert` takes."""

    lora: TidyPath = setting(..., "Adapter file or PEFT folder to convert.", path=True)
    format: Literal["kohya", "diffusers"] = setting(
        "kohya",
        "How layers are named. kohya: for ComfyUI, Automatic1111, Forge and Civitai. diffusers: for diffusers' "
        "load_lora_weights and PEFT.",
    )
    output: TidyPath = same_setting(_FileSettings, "output")
    save_precision: SavePrecision = same_setting(TrainSettings, "save_precision")

    @field_validator("output")
    @classmethod
    def _output_is_an_adapter(cls, path: Path) -> Path:
        return _safetensors(path)


class FuseCommand(Settings):
    """Everything that `fuse` takes."""

    base: TidyPath = setting(
        ..., "Model to fuse the adapters into: a .safetensors or .ckpt file, or a diffusers folder.", path=True
    )
    lora: tuple[str, ...] = same_setting(GenerateCommand, "lora")
    output: TidyPath = setting(
        ...,
        "Checkpoint file to write, or a folder if the model is one. An existing one is never overwritten.",
        path=True,
    )

    @model_validator(mode="after")
    def _something_to_add(self) -> Self:
        if not self.lora:
            raise ValueError(
                f"{suggest('lora')} is not given, so there is nothing to add: set {suggest('lora', 'FILE:STRENGTH')}"
            )
        return self


def parse_block_weights(text: str) -> list[BlockWeight]:
    """Parse PATTERN=FACTOR entries, separated by spaces; the last match in a module's name counts.

    Raises:
        ValueError: An entry has another form.
    """
    weights = []
    for entry in text.split():
        pattern, equals, factor = entry.rpartition("=")
        try:
            number = float(factor)
            compiled = re.compile(pattern)
        except (ValueError, re.error) as error:
            raise ValueError(f"'{entry}' is not PATTERN=FACTOR, such as down_blocks=0.5 ({error})") from None
        if not equals or not pattern or not math.isfinite(number):
            raise ValueError(f"'{entry}' is not PATTERN=FACTOR, such as down_blocks=0.5")
        weights.append(BlockWeight(compiled, number))
    return weights
