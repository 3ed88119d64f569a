"""What a merge keeps of each adapter: measurements for every module, text, JSON, and a heat map by block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.module_paths import block_order, module_path
from ..core.figures import figure_as_picture, shortened, text_table
from .deltas import Delta

_STRONG_OVERLAP = 0.3  # |cosine| of two adapters' deltas from which the user is warned; of unrelated ones it is ~0


@dataclass(frozen=True)
class ModuleReport:
    """What is kept in one module of the result.

    With Δᵢ the weighted delta of input i, S their sum and M the result:

    Attributes:
        name: kohya's.
        kept: Input's index → 1 − ⟨S − M, Δᵢ⟩ / ‖Δᵢ‖²: the share of its energy that is kept. 1: all. Above 1 or below
            0 where inputs that reinforce or oppose each other were changed together.
        overlap: Pair of indices → cosine of Δᵢ and Δⱼ.
        lost: ‖S − M‖² / ‖S‖², the share of the sum's energy that is lost.
        energy: Input's index → ‖Δᵢ‖².
        rank: Of the result.
    """

    name: str
    kept: Mapping[int, float]
    overlap: Mapping[tuple[int, int], float]
    lost: float
    energy: Mapping[int, float]
    rank: int

    @classmethod
    def untouched(cls, name: str, index: int, rank: int, energy: float = math.nan) -> ModuleReport:
        """The report of a module that only one adapter has, and that is not changed."""
        return cls(name=name, kept={index: 1.0}, overlap={}, lost=0.0, energy={index: energy}, rank=rank)


def compare_with_inputs(name: str, inputs: Mapping[int, Delta], result: Delta, *, is_sum: bool = False) -> ModuleReport:
    """Compare a module's result with what was merged into it.

    Args:
        name: The module's.
        inputs: Index of an adapter → its weighted delta.
        result: The merged delta.
        is_sum: Whether the result is known to be the sum of the inputs, so that it need not be compared.
    """
    indices = list(inputs)
    gram = torch.zeros(len(indices), len(indices), dtype=torch.float64)  # ⟨Δᵢ, Δⱼ⟩
    for i, first in enumerate(indices):
        for j, second in enumerate(indices[: i + 1]):
            product = inputs[first].inner(inputs[second])
            gram[i, j] = product
            gram[j, i] = product
    with_sum = gram.sum(dim=1)  # ⟨S, Δᵢ⟩
    sum_energy = float(gram.sum())
    if is_sum:
        with_result = with_sum
        result_energy = sum_energy
    else:
        with_result = torch.tensor([delta.inner(result) for delta in inputs.values()], dtype=torch.float64)
        result_energy = result.inner(result)
    energies = gram.diagonal()
    kept = 1 - (with_sum - with_result) / energies
    lost_energy = max(0.0, sum_energy - 2 * float(with_result.sum()) + result_energy)
    overlap = {}
    for i, first in enumerate(indices):
        for j, second in enumerate(indices[i + 1 :], start=i + 1):
            cosine = gram[i, j] / (energies[i] * energies[j]).sqrt()
            overlap[first, second] = _finite_or(0.0, cosine)
    return ModuleReport(
        name=name,
        kept={index: _finite_or(1.0, kept[i]) for i, index in enumerate(indices)},
        overlap=overlap,
        lost=lost_energy / sum_energy if sum_energy > 0 else 0.0,
        energy={index: float(energies[i]) for i, index in enumerate(indices)},
        rank=result.rank,
    )


def _finite_or(default: float, value: Tensor) -> float:
    """A 0-D tensor as a number; `default` for 0 / 0, of an adapter whose delta is zero."""
    number = float(value)
    return number if math.isfinite(number) else default


def overlap_warnings(modules: Sequence[ModuleReport], titles: Sequence[str]) -> list[str]:
    """Warnings about pairs of adapters whose deltas point in the same direction, or in opposite ones."""
    warnings = []
    pairs = sorted({pair for module in modules for pair in module.overlap})
    for first, second in pairs:
        cosine = _overall_cosine(modules, first, second)
        if abs(cosine) > _STRONG_OVERLAP:
            effect = "reinforce each other" if cosine > 0 else "cancel each other out"
            warnings.append(
                f"{titles[first]} and {titles[second]} overlap strongly (cosine {cosine:.2f}) and partly {effect}: "
                "lower their strengths, or use the method orthogonal or a learned merge."
            )
    return warnings


def _overall_cosine(modules: Sequence[ModuleReport], first: int, second: int) -> float:
    """The cosine of two adapters' deltas over all modules that both have."""
    product = 0.0
    first_energy = 0.0
    second_energy = 0.0
    for module in modules:
        cosine = module.overlap.get((first, second))
        if cosine is None:
            continue
        product += cosine * math.sqrt(module.energy[first] * module.energy[second])
        first_energy += module.energy[first]
        second_energy += module.energy[second]
    if first_energy * second_energy <= 0:
        return 0.0
    return product / math.sqrt(first_energy * second_energy)


@dataclass(frozen=True)
class MergeReport:
    """What a merge keeps.

    Attributes:
        titles: Of the adapters.
        method: Of the merge.
        modules: One row for every module.
        warnings: Messages for the user.
    """

    titles: Sequence[str]
    method: str
    modules: Sequence[ModuleReport]
    warnings: Sequence[str] = ()

    def by_block(self) -> dict[str, dict[str, float]]:
        """Block → column → mean over its modules; columns are "kept: <title>", "overlap" and "lost"."""
        blocks: dict[str, list[ModuleReport]] = {}
        for module in self.modules:
            blocks.setdefault(module_path(module.name).block, []).append(module)
        return {block: self._columns(blocks[block]) for block in sorted(blocks, key=block_order)}

    def _columns(self, modules: Sequence[ModuleReport]) -> dict[str, float]:
        columns: dict[str, float] = {}
        for index, title in enumerate(self.titles):
            columns[f"kept: {title}"] = _mean([module.kept[index] for module in modules if index in module.kept])
        columns["overlap"] = _mean([max(map(abs, module.overlap.values())) for module in modules if module.overlap])
        columns["lost"] = _mean([module.lost for module in modules])
        return columns

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values; undefined numbers are None."""
        rows = [
            {
                "module": module.name,
                "block": module_path(module.name).block,
                "rank": module.rank,
                "kept": {self.titles[index]: value for index, value in module.kept.items()},
                "overlap": {" / ".join(self.titles[i] for i in pair): value for pair, value in module.overlap.items()},
                "lost": module.lost,
            }
            for module in self.modules
        ]
        blocks = {
            block: {name: None if math.isnan(value) else value for name, value in columns.items()}
            for block, columns in self.by_block().items()
        }
        return {
            "inputs": list(self.titles),
            "method": self.method,
            "warnings": list(self.warnings),
            "blocks": blocks,
            "modules": rows,
        }

    def as_text(self) -> str:
        """A table by block, as text."""
        ranks = sorted({module.rank for module in self.modules}) or [0]
        rank_range = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [f"{' + '.join(self.titles)}: {self.method}, {len(self.modules)} modules, rank {rank_range}"]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, text_table(self.by_block())])

    def heat_map(self) -> Image.Image:
        """The table by block as a picture."""
        return heat_map(f"{self.method}: what is kept, by block", self.by_block())


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def heat_map(title: str, table: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """A table of numbers from 0 to 1, coloured.

    Args:
        title: Line above it.
        table: Row → column → number; one that is missing or NaN is left white.
    """
    from matplotlib.figure import Figure

    rows = list(table)
    columns = list(dict.fromkeys(column for values in table.values() for column in values))
    figure = Figure(figsize=(2.2 + 1.3 * len(columns), 1.2 + 0.28 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    numbers = [[table[row].get(column, math.nan) for column in columns] for row in rows]
    if numbers:
        axes.imshow(numbers, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [shortened(column, 18) for column in columns], rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=10)
    for y, row in enumerate(numbers):
        for x, value in enumerate(row):
            if not math.isnan(value):
                color = "black" if value > 0.6 else "white"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    return figure_as_picture(figure)
