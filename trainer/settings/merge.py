"""The settings of merging, resizing, extracting and converting adapters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.prompts import split_prompts
from .base import Settings, TidyPath, setting
from .model import BaseSettings
from .train import MAX_SEED, GenerateSettings, Precision, TrainSettings

MethodName = Literal["sum", "svd", "ties", "dare", "dare-ties", "prune", "orthogonal"]
SavePrecision = Literal["fp16", "bf16", "fp32"]
_DENSITY = ("ties", "dare", "dare-ties", "prune")
_EXACT = ("sum", "orthogonal")


@dataclass(frozen=True)
class BlockWeight:
    """A factor for the modules that a pattern is found in."""

    pattern: re.Pattern[str]
    factor: float


class ReductionSettings(Settings):
    """How far a result is reduced."""

    rank: int = setting(32, "Highest rank of the result; 0: no limit.", group="Size", ge=0)
    conv_rank: int = setting(0, "Rank of 3×3 convolutions; 0: as rank.", group="Size", advanced=True, ge=0)
    energy: float = setting(
        1.0,
        "Share of each layer's energy (squared norm) that is kept at least: lower ranks where little is lost. 1: all.",
        group="Size",
        gt=0.0,
        le=1.0,
    )
    ratio: float = setting(
        0.0,
        "Highest ratio of a layer's largest singular value to the smallest that is kept (kohya's sv_ratio); "
        "0: no limit.",
        group="Size",
        advanced=True,
        ge=0.0,
    )

    @field_validator("ratio")
    @classmethod
    def _ratio_is_one(cls, ratio: float) -> float:
        if 0 < ratio < 1:
            raise ValueError("must be 1 or more, or 0 for no limit")
        return ratio

    @field_validator("rank", "conv_rank")
    @classmethod
    def _rank_is_no_typing_error(cls, rank: int) -> int:
        if rank > 10_000:
            raise ValueError("is above every layer's size; 4 to 256 are usual")
        return rank


class MergeSettings(ReductionSettings):
    """How adapters are merged."""

    method: MethodName = setting(
        "sum",
        "How. sum: exactly what all of them add, ranks added up. svd: the same, reduced to a rank. ties: small numbers "
        "dropped, signs elected. dare, dare-ties: numbers dropped at random and the rest scaled. prune: small numbers "
        "dropped. orthogonal: the first stays as it is, the others leave its inputs alone.",
        group="Method",
    )
    density: float = setting(
        0.5, "Share of the numbers that is kept, for ties, dare, dare-ties and prune.", group="Method", gt=0.0, le=1.0
    )
    protected: float = setting(
        1.0,
        "Share of an adapter's energy whose inputs the later ones leave alone, for orthogonal.",
        group="Method",
        gt=0.0,
        le=1.0,
    )
    seed: int = setting(
        0, "Seed of the numbers that are dropped, for dare and dare-ties.", group="Method", ge=0, le=MAX_SEED
    )

    @model_validator(mode="after")
    def _method_and_settings_fit(self) -> Self:
        foreign = sorted(self.model_fields_set - self.used)
        for name in (name for name in foreign if name in ReductionSettings.model_fields):
            raise ValueError(f"method '{self.method}' is exact, so {name} does not apply: leave it out, or choose svd")
        for name in (name for name in foreign if name in ("density", "protected")):
            raise ValueError(f"{name} does not apply to method '{self.method}': leave it out, or choose another method")
        return self

    @property
    def used(self) -> set[str]:
        """The settings that the method looks at."""
        own = {"density"} if self.method in _DENSITY else {"protected"} if self.method == "orthogonal" else set()
        drawn = {"seed"} if self.method.startswith("dare") else set()
        return {"method", *own, *drawn, *(ReductionSettings.model_fields if self.reduces else ())}

    @property
    def reduces(self) -> bool:
        """Whether the result is brought to a lower rank."""
        return self.method not in _EXACT


class _FileSettings(Settings):
    """What every command that writes an adapter takes."""

    output: TidyPath = setting(..., "File to write; an existing one is never overwritten.", group="Saving", path=True)
    save_precision: SavePrecision = TrainSettings.model_fields["save_precision"]  # type: ignore[assignment]
    report: TidyPath | None = setting(
        None,
        "Also write the report: FILE.json, or FILE.png for a heat map by block.",
        group="Saving",
        path=True,
    )
    base: TidyPath | None = setting(
        None,
        "Base model that the adapters were made for: a .safetensors or .ckpt file, or a diffusers folder. Needed for "
        "DoRA and OFT, whose change depends on it.",
        group="Base model",
        path=True,
    )
    device: str = BaseSettings.model_fields["device"]  # type: ignore[assignment]

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
        "Adapter files with an optional strength: FILE, FILE:0.8, or FILE:0.8:0.5 for UNet and text encoders.",
        path=True,
    )
    block_weights: tuple[str, ...] = setting(
        (),
        "Further factors of the first adapter's parts; given again, of the second's, and so on: PATTERN=FACTOR, "
        "separated by blanks, such as 'down_blocks=0.5 mid_block=0'; the last that is found in a layer's place counts.",
        group="Method",
        advanced=True,
    )

    @model_validator(mode="after")
    def _block_weights_belong_to_adapters(self) -> Self:
        if len(self.block_weights) > len(self.loras):
            raise ValueError(f"block_weights is given {len(self.block_weights)} times for {len(self.loras)} adapters")
        for text in self.block_weights:
            read_block_weights(text)
        return self


class ResizeCommand(ReductionSettings, _FileSettings):
    """Everything that `resize` takes."""

    lora: TidyPath = setting(..., "Adapter file to bring to another size.", path=True)


class LearnedMergeSettings(Settings):
    """How the coefficients of a learned merge are found."""

    subject_prompt: str = setting(
        ...,
        "What the first adapter was taught, such as 'a photo of sks dog'; several prompts separated by '|'.",
        group="Prompts",
    )
    style_prompt: str = setting(
        ...,
        "What the second adapter was taught, such as 'pixel art, a house'; several prompts separated by '|'. Prompts "
        "about different things keep the style free of any.",
        group="Prompts",
    )
    steps: int = setting(100, "Optimiser steps.", unit="steps", ge=1, le=100_000)
    learning_rate: float = setting(0.01, "Learning rate of the coefficients.", gt=0.0, le=1.0)
    overlap_weight: float = setting(
        0.01, "Weight of the penalty for inputs that both adapters use (ZipLoRA's λ).", ge=0.0, le=100.0, advanced=True
    )
    split: float = setting(
        0.6,
        "Noise level, as a share of the timesteps, that parts the two: from it upwards the subject's predictions are "
        "matched, below it the style's, since form is decided at high noise and texture at low. 0: both are matched at "
        "every noise level, as in the paper.",
        ge=0.0,
        le=0.95,
        advanced=True,
    )
    pictures: int = setting(
        8, "Latents drawn with each adapter to learn from.", unit="pictures", ge=1, le=1000, advanced=True
    )
    sampling_steps: int = setting(20, "Denoising steps of these latents.", unit="steps", ge=1, le=200, advanced=True)
    guidance: float = setting(
        5.0, "Classifier-free guidance of these latents; 1 is none.", ge=0.0, le=100.0, advanced=True
    )
    resolution: int = TrainSettings.model_fields["resolution"]  # type: ignore[assignment]
    seed: int = setting(0, "Seed of latents, timesteps and noise.", ge=0, le=MAX_SEED)
    precision: Precision = TrainSettings.model_fields["precision"]  # type: ignore[assignment]
    gradient_checkpointing: bool = TrainSettings.model_fields["gradient_checkpointing"]  # type: ignore[assignment]

    @field_validator("subject_prompt", "style_prompt")
    @classmethod
    def _prompts_are_given(cls, text: str) -> str:
        if not split_prompts(text):
            raise ValueError("is empty; write what the adapter was taught")
        return text


class LearnedMergeCommand(LearnedMergeSettings, BaseSettings):
    """Everything that `learned-merge` takes."""

    loras: tuple[str, ...] = setting(
        ..., "Two adapter files, the subject's and the style's, with optional strengths.", path=True
    )
    output: TidyPath = setting(..., "File to write; an existing one is never overwritten.", group="Saving", path=True)
    save_precision: SavePrecision = TrainSettings.model_fields["save_precision"]  # type: ignore[assignment]
    report: TidyPath | None = _FileSettings.model_fields["report"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _two_adapters(self) -> Self:
        if len(self.loras) != 2:
            raise ValueError(f"loras: a learned merge takes two adapters, and {len(self.loras)} are given")
        return self


class ExtractSettings(ReductionSettings):
    """How a LoRA is extracted from two models."""

    biases: bool = setting(
        False, "Also what changed in biases and norms; not every program can load that.", group="Size", advanced=True
    )


class ExtractCommand(ExtractSettings, _FileSettings):
    """Everything that `extract` takes."""

    tuned: TidyPath = setting(..., "Model to extract from: a file or a diffusers folder.", path=True)
    base: TidyPath = setting(..., "Model that it was made from.", group="Base model", path=True)


class ConvertCommand(Settings):
    """Everything that `convert` takes."""

    lora: TidyPath = setting(..., "Adapter file or PEFT folder to convert.", path=True)
    format: Literal["kohya", "diffusers"] = setting(
        "kohya",
        "Names of the layers. kohya: as ComfyUI, Automatic1111, Forge and Civitai read them. diffusers: as diffusers' "
        "load_lora_weights and PEFT name them.",
    )
    output: TidyPath = _FileSettings.model_fields["output"]  # type: ignore[assignment]
    save_precision: SavePrecision = TrainSettings.model_fields["save_precision"]  # type: ignore[assignment]

    @field_validator("output")
    @classmethod
    def _output_is_an_adapter(cls, path: Path) -> Path:
        return _safetensors(path)


class FuseCommand(Settings):
    """Everything that `fuse` takes."""

    base: TidyPath = setting(
        ..., "Model to add the adapters to: a .safetensors or .ckpt file, or a diffusers folder.", path=True
    )
    lora: tuple[str, ...] = GenerateSettings.model_fields["lora"]  # type: ignore[assignment]
    output: TidyPath = setting(
        ...,
        "Checkpoint file to write, or folder if the model is one; an existing one is never overwritten.",
        path=True,
    )

    @model_validator(mode="after")
    def _something_to_add(self) -> Self:
        if not self.lora:
            raise ValueError("lora is not given, so there is nothing to add: give --lora FILE:STRENGTH")
        return self


def read_block_weights(text: str) -> list[BlockWeight]:
    """Read PATTERN=FACTOR entries, separated by blanks; the last that is found in a module's place counts.

    Raises:
        ValueError: An entry is none.
    """
    found = []
    for entry in text.split():
        pattern, equals, factor = entry.rpartition("=")
        try:
            number = float(factor)
            compiled = re.compile(pattern)
        except (ValueError, re.error) as error:
            raise ValueError(f"'{entry}' is not PATTERN=FACTOR, such as down_blocks=0.5 ({error})") from None
        if not equals or not pattern or not math.isfinite(number):
            raise ValueError(f"'{entry}' is not PATTERN=FACTOR, such as down_blocks=0.5")
        found.append(BlockWeight(compiled, number))
    return found
