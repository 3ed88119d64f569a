"""What a merge keeps of each adapter: numbers for every module, text, JSON, and a heat map by block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.names import block_order, module_path
from ..core.figures import as_table, figure_as_picture, shortened
from .deltas import Delta

_STRONG = 0.3  # |cosine| of two changes above which adapters are said to overlap strongly; of unrelated ones it is ~0


@dataclass(frozen=True)
class ModuleReport:
    """What one module of the result keeps.

    With Δᵢ the weighted change of input i, S their sum and M the result:

    Attributes:
        name: kohya's.
        kept: Input's index → 1 − ⟨S − M, Δᵢ⟩ / ‖Δᵢ‖²: the share of its energy that is kept. 1: all. Above 1 or below
            0 where inputs that reinforce or oppose each other were changed together.
        overlap: Pair of indices → cosine of Δᵢ and Δⱼ.
        lost: ‖S − M‖² / ‖S‖², the share of the sum's energy that was cut off.
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
        """Of a module that one adapter alone has, and that stays as it is."""
        return cls(name, {index: 1.0}, {}, 0.0, {index: energy}, rank)


def compare_with_inputs(
    name: str,
    weighted: Sequence[tuple[Delta, float]],
    indices: Sequence[int],
    result: Delta,
    *,
    exact: bool = False,
) -> ModuleReport:
    """Compare a module's result with what was merged into it.

    Args:
        name: The module's.
        weighted: The changes with their weights.
        indices: The number of each one's adapter.
        result: The merged change.
        exact: Whether the result is known to be the sum, which need not be looked at then.
    """
    inputs = [change.times(weight) for change, weight in weighted]
    count = len(inputs)
    between = torch.zeros(count, count, dtype=torch.float64)
    for row in range(count):
        for column in range(row + 1):
            between[row, column] = between[column, row] = inputs[row].inner(inputs[column])
    with_result, length = between.sum(dim=1), float(between.sum())
    if not exact:
        with_result = torch.tensor([one.inner(result) for one in inputs], dtype=torch.float64)
        length = result.inner(result)
    missing = between.sum(dim=1) - with_result  # ⟨S − M, Δᵢ⟩
    energies = between.diagonal()
    summed = float(between.sum())
    lost = max(0.0, summed - 2 * float(with_result.sum()) + length)
    kept = {index: _share(1 - missing[i] / energies[i]) for i, index in enumerate(indices)}
    overlap = {
        (indices[i], indices[j]): _share(between[i, j] / (energies[i] * energies[j]).sqrt(), 0.0)
        for i in range(count)
        for j in range(i + 1, count)
    }
    energy = {index: float(energies[i]) for i, index in enumerate(indices)}
    return ModuleReport(name, kept, overlap, lost / summed if summed > 0 else 0.0, energy, result.rank)


def _share(value: Tensor, default: float = 1.0) -> float:
    """A number; `default` for 0 / 0, of an adapter that changes nothing here."""
    number = float(value)
    return number if math.isfinite(number) else default


def overlap_warnings(modules: Sequence[ModuleReport], titles: Sequence[str]) -> list[str]:
    """Warnings of pairs of adapters whose changes point the same way, or opposite ways."""
    warnings = []
    pairs = sorted({pair for module in modules for pair in module.overlap})
    for first, second in pairs:
        mean = _overall(modules, (first, second))
        if abs(mean) > _STRONG:
            effect = "do the same twice" if mean > 0 else "undo each other"
            warnings.append(
                f"{titles[first]} and {titles[second]} overlap strongly (cosine {mean:.2f}) and partly {effect}: "
                "lower their strengths, or choose the method orthogonal or a learned merge."
            )
    return warnings


def _overall(modules: Sequence[ModuleReport], pair: tuple[int, int]) -> float:
    """The cosine of two adapters over all modules that both have."""
    inner = first = second = 0.0
    for module in modules:
        if pair in module.overlap:
            a, b = (module.energy[index] for index in pair)
            inner, first, second = inner + module.overlap[pair] * math.sqrt(a * b), first + a, second + b
    return inner / math.sqrt(first * second) if first * second > 0 else 0.0


@dataclass(frozen=True)
class Report:
    """What a merge keeps.

    Attributes:
        titles: Of the adapters.
        method: Of the merge.
        modules: One row for every module.
        warnings: What the user should read.
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
        found: dict[str, float] = {}
        for index, title in enumerate(self.titles):
            values = [module.kept[index] for module in modules if index in module.kept]
            found[f"kept: {title}"] = sum(values) / len(values) if values else math.nan
        overlaps = [max(map(abs, module.overlap.values())) for module in modules if module.overlap]
        found["overlap"] = sum(overlaps) / len(overlaps) if overlaps else math.nan
        found["lost"] = sum(module.lost for module in modules) / len(modules)
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values; numbers that don't exist are None."""
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
        """A table by block for people."""
        table = self.by_block()
        ranks = sorted({module.rank for module in self.modules}) or [0]
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [f"{' + '.join(self.titles)}: {self.method}, {len(self.modules)} modules, rank {shown}"]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, as_table(table)])

    def heat_map(self) -> Image.Image:
        """The table by block as a picture."""
        return heat_map(f"{self.method}: what is kept, by block", self.by_block())


def heat_map(title: str, table: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """A table of numbers from 0 to 1, coloured.

    Args:
        title: Line above it.
        table: Row → column → number; one that is missing or NaN is left white.
    """
    from matplotlib.figure import Figure

    rows, columns = list(table), list(dict.fromkeys(column for values in table.values() for column in values))
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
