"""The settings of merging, resizing, extracting and converting adapters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from .config import MAX_SEED
from .settings import Settings, setting

MethodName = Literal["sum", "svd", "ties", "dare", "dare-ties", "prune", "orthogonal"]
_DENSITY = ("ties", "dare", "dare-ties", "prune")
_EXACT = ("sum", "orthogonal")


@dataclass(frozen=True)
class BlockWeight:
    """A factor for the modules that a pattern is found in."""

    pattern: re.Pattern[str]
    factor: float


class ReductionSettings(Settings):
    """How far a result is reduced."""

    rank: int = setting(
        0, "Rank of the result. 0: of merging, the largest of the inputs' ranks; else no limit.", group="Size", ge=0
    )
    conv_rank: int = setting(0, "Rank of 3×3 convolutions; 0: as rank.", group="Size", advanced=True, ge=0)
    energy: float = setting(
        1.0,
        "Share of each layer's energy (squared norm) that is kept at least: lower ranks where little is lost. 1: all.",
        group="Size",
        gt=0.0,
        le=1.0,
    )

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
        if self.method in _EXACT and (self.rank or self.conv_rank or self.energy < 1):
            raise ValueError(
                f"method '{self.method}' is exact, so rank, conv_rank and energy don't apply: unset them, or choose svd"
            )
        if self.density != 0.5 and self.method not in _DENSITY:
            raise ValueError(f"density is for {', '.join(_DENSITY)}, but method is '{self.method}': unset it")
        if self.protected < 1 and self.method != "orthogonal":
            raise ValueError(f"protected is for orthogonal, but method is '{self.method}': unset it")
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
