"""The settings that say what is trained: kind of adapter, layers, ranks, text encoders."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from .base import Settings, TidyPath, setting

AdapterKind = Literal["lora", "dora", "loha", "lokr", "full"]
_ONLY_FOR_ADAPTERS = (
    "include",
    "exclude",
    "block_ranks",
    "max_norm",
    "start_from",
    "dropout",
    "rank_stabilized",
    "base_quantization",
)


@dataclass(frozen=True)
class BlockRank:
    """A rank for the modules that a pattern is found in; `alpha` None: equal to the rank. Rank 0: no adapter."""

    pattern: re.Pattern[str]
    rank: int
    alpha: float | None


class AdapterSettings(Settings):
    """What is trained."""

    adapter: AdapterKind = setting(
        "lora",
        "Kind of adapter. lora: low rank (LoCon with targets 'all'). dora: LoRA with trained magnitudes. loha: product "
        "of two low-rank matrices. lokr: Kronecker product, the smallest file. full: no adapter, all weights "
        "(Stable Diffusion 1.x), written as a checkpoint and as a LoRA extracted from it.",
        group="Adapter",
    )
    rank: int = setting(16, "Rank of the adapter: how much it can hold.", group="Adapter", ge=1, le=1024)
    alpha: float | None = setting(
        None, "LoRA alpha; the adapter is scaled by alpha / rank. Not set: equal to the rank.", group="Adapter", gt=0.0
    )
    rank_stabilized: bool = setting(
        False,
        "rsLoRA: scale by alpha / √rank instead of alpha / rank, for high ranks.",
        group="Adapter",
        advanced=True,
    )
    targets: Literal["attention", "attention-mlp", "all", "b-lora-content", "b-lora-style", "none"] = setting(
        "attention-mlp",
        "Layers of the UNet that get an adapter. attention: its projections (diffusers' choice). attention-mlp: every "
        "Linear and 1×1 convolution of the attention blocks (kohya's choice). all: the residual blocks' and "
        "resamplers' layers, too (LoCon). b-lora-content, b-lora-style: one block of SDXL each (B-LoRA). none: only "
        "what 'include' names.",
        group="Adapter",
    )
    conv_rank: int = setting(
        0,
        "Rank of 3×3 convolutions (kohya's conv_dim); 0: the same rank.",
        group="Adapter",
        advanced=True,
        ge=0,
        le=1024,
    )
    conv_alpha: float | None = setting(
        None,
        "Alpha of 3×3 convolutions (kohya's conv_alpha). Not set: equal to their rank.",
        group="Adapter",
        advanced=True,
        gt=0.0,
    )
    include: str = setting(
        "",
        "Further layers: regular expressions, separated by blanks, that are searched in diffusers' names of the "
        r"UNet's layers, such as ^conv_in$ or mid_block\..*to_v.",
        group="Adapter",
        advanced=True,
    )
    exclude: str = setting(
        "",
        r"Layers to leave out: regular expressions, separated by blanks, such as down_blocks\.0 or ff\.net.",
        group="Adapter",
        advanced=True,
    )
    block_ranks: str = setting(
        "",
        "Other ranks for parts of the model: PATTERN=RANK or PATTERN=RANK:ALPHA, separated by blanks, such as "
        r"down_blocks=4 mid_block=32:16 ff\.net=8; the last that is found counts. Rank 0: no adapter there.",
        group="Adapter",
        advanced=True,
    )
    lokr_factor: int = setting(
        -1,
        "LoKr: size of the Kronecker product's smaller factor; -1: as even as possible (the smallest file).",
        group="Adapter",
        advanced=True,
        ge=-1,
        le=256,
    )
    dropout: float = setting(
        0.0,
        "Share of an adapter's inputs dropped in each step.",
        group="Adapter",
        advanced=True,
        ge=0.0,
        lt=1.0,
    )
    max_norm: float = setting(
        0.0,
        "Limit for the norm of each layer's change (kohya's scale_weight_norms); 0: no limit. 1 is usual.",
        group="Adapter",
        advanced=True,
        ge=0.0,
    )
    start_from: TidyPath | None = setting(
        None,
        "Adapter file to go on from. Its kind, layers, ranks and alphas are taken over.",
        group="Adapter",
        advanced=True,
        path=True,
    )
    combine: bool = setting(
        False,
        "With adapters applied to the base (two-stage training): write one file that holds them, too, and stands "
        "alone. Off: the new file holds what was learned now, and is used together with them.",
        group="Adapter",
        advanced=True,
        affects_result=False,
    )
    base_quantization: Literal["none", "nf4"] = setting(
        "none",
        "Hold the frozen UNet's Linear layers in fewer bits. nf4: in four (QLoRA), by the package bitsandbytes; takes "
        "less memory, is slower, and changes what is learned a little. The adapter is an ordinary one.",
        group="Memory",
        advanced=True,
    )
    text_encoder_lr: float = setting(
        0.0,
        "Learning rate of the text encoder (SDXL: of the first, CLIP-L). 0: it is not trained. 5e-6 to 5e-5 are usual.",
        group="Text encoders",
        ge=0.0,
        le=1.0,
    )
    text_encoder_2_lr: float = setting(
        0.0,
        "Learning rate of SDXL's second text encoder, CLIP-G. 0: it is not trained.",
        group="Text encoders",
        advanced=True,
        ge=0.0,
        le=1.0,
    )
    text_encoder_until: float = setting(
        1.0,
        "Fraction of the steps after which the text encoders are left as they are and leave the device.",
        group="Text encoders",
        advanced=True,
        gt=0.0,
        le=1.0,
    )

    @field_validator("include", "exclude")
    @classmethod
    def _patterns_compile(cls, text: str) -> str:
        for pattern in text.split():
            _compiled(pattern)
        return text

    @field_validator("block_ranks")
    @classmethod
    def _block_ranks_are_read(cls, text: str) -> str:
        _block_ranks(text)
        return text

    @model_validator(mode="after")
    def _kind_and_settings_fit(self) -> Self:
        kind = self.adapter
        if kind == "full":
            for name in _ONLY_FOR_ADAPTERS:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for adapters, but adapter is 'full': unset {name} or choose lora")
        if kind in ("loha", "lokr") and (self.dropout or self.rank_stabilized):
            raise ValueError(
                f"dropout and rank_stabilized exist for lora and dora only, and adapter is '{kind}': unset them"
            )
        alphas = [self.alpha, self.conv_alpha, *(entry.alpha for entry in self.ranks_by_block)]
        if kind == "lokr" and any(alpha is not None for alpha in alphas):
            raise ValueError(
                "LoKr is not scaled by an alpha: unset alpha, conv_alpha and the alphas in block_ranks, and set the "
                "strength by learning_rate"
            )
        if self.lokr_factor == 0:
            raise ValueError("lokr_factor is 0: choose -1 (as even as possible) or 1 and more")
        if self.lokr_factor != -1 and kind != "lokr":
            raise ValueError(f"lokr_factor is for LoKr, but adapter is '{kind}': unset it or choose lokr")
        if self.combine and kind not in ("lora", "full"):
            raise ValueError(
                f"combine adds adapters up, which is exact for LoRA only, and adapter is '{kind}': "
                "choose lora, or turn combine off and use both files"
            )
        if self.targets == "none" and not self.include.strip():
            raise ValueError("targets is 'none' and include names no layers either: give include, or choose targets")
        if (self.conv_rank or self.conv_alpha) and self.targets != "all" and not self.include.strip():
            raise ValueError(
                f"conv_rank and conv_alpha are for convolutions, but targets '{self.targets}' has none: "
                "choose targets 'all' or unset them"
            )
        if self.text_encoder_until < 1 and not self.text_rates:
            raise ValueError(
                "text_encoder_until ends the training of text encoders, but none is trained: give text_encoder_lr "
                "or set text_encoder_until to 1"
            )
        return self

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by: alpha / rank, or alpha / √rank if rank-stabilised."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(self.rank) if self.rank_stabilized else alpha / self.rank

    @property
    def text_rates(self) -> dict[str, float]:
        """Text encoders that are trained, by their component's name, with their learning rates."""
        rates = {"text_encoder": self.text_encoder_lr, "text_encoder_2": self.text_encoder_2_lr}
        return {name: rate for name, rate in rates.items() if rate}

    @property
    def include_patterns(self) -> list[re.Pattern[str]]:
        """`include`, compiled."""
        return [_compiled(pattern) for pattern in self.include.split()]

    @property
    def exclude_patterns(self) -> list[re.Pattern[str]]:
        """`exclude`, compiled."""
        return [_compiled(pattern) for pattern in self.exclude.split()]

    @property
    def ranks_by_block(self) -> list[BlockRank]:
        """`block_ranks`, read."""
        return _block_ranks(self.block_ranks)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression ({error}); put \\ before a dot or bracket") from None


def _block_ranks(text: str) -> list[BlockRank]:
    found = []
    for entry in text.split():
        match = re.fullmatch(r"(.+)=(\d{1,4})(?::(\d+(?:\.\d+)?))?", entry)
        alpha: Any = match and match[3]
        if not match or (alpha and float(alpha) <= 0):
            raise ValueError(f"'{entry}' is not PATTERN=RANK or PATTERN=RANK:ALPHA, such as mid_block=32:16")
        found.append(BlockRank(_compiled(match[1]), int(match[2]), float(alpha) if alpha else None))
    return found
