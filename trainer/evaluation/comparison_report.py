"""A comparison for people and programs: tables, a contact sheet, and a plot of what is gained and lost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.figures import SheetRow, contact_sheet, figure_as_picture
from ..core.files import write_atomic
from ..data.image_cache import as_png
from .comparison import BASE, Comparison, ComparisonRow
from .evaluator import CLIP_SCORE, FIDELITY, FOLLOWING, fidelity_and_drift
from .feature_extractors import CLIP, DINO

_REAL = "real pictures, each left out of its own"


def write_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write everything; returns what → file.

    Raises:
        StorageError: It can't be written.
    """
    files = {
        "table.md": as_markdown(comparison).encode(),
        "table.csv": as_csv(comparison).encode(),
        "table.json": (json.dumps(as_json(comparison), indent=1, ensure_ascii=False) + "\n").encode(),
        "sheet.png": as_png(sheet(comparison)),
    }
    if comparison.best:
        files["best.png"] = as_png(plot(comparison))
    for name, content in files.items():
        write_atomic(folder / name, content)
    return {name: folder / name for name in files}


def as_markdown(comparison: Comparison) -> str:
    """A table of all measures, one of fidelity by scheduler and steps if there are several, and the best checkpoint."""
    measures = list(dict.fromkeys(name for entry in comparison.entries for name in entry.marks if name != CLIP_SCORE))
    best = comparison.best
    lines = [_line(["adapter", "scheduler", "steps", *measures]), _line(["---"] * (3 + len(measures)))]
    for entry in comparison.entries:
        title = f"**{entry.contender.title}**" if best and entry.contender is best.contender else entry.contender.title
        lines.append(
            _line([title, entry.drawing.scheduler, str(entry.drawing.steps), *_numbers(entry.marks, measures)])
        )
    if comparison.real:
        lines.append(_line([_REAL, "", "", *_numbers(comparison.real, measures)]))
    for measure in FIDELITY.values():
        if measure in measures and len(_ways(comparison)) > 1:
            lines += ["", *_by_way(comparison, measure)]
    lines += ["", *(f"{name}: {model}." for name, model in comparison.models.items())]
    if best:
        lines.append(
            f"Best: {best.contender.title}. Of those that show the subject and follow the prompt as well as any, it "
            "lets the class drift least."
        )
    return "\n".join(lines) + "\n"


def _by_way(comparison: Comparison, measure: str) -> Iterator[str]:
    """One measure: a row for each scheduler and number of steps, a column for each adapter."""
    titles = list(dict.fromkeys(entry.contender.title for entry in comparison.entries))
    yield _line([measure, *titles])
    yield _line(["---"] * (1 + len(titles)))
    for scheduler, steps in _ways(comparison):
        found = {
            entry.contender.title: entry.marks for entry in comparison.entries if _way(entry) == (scheduler, steps)
        }
        yield _line([f"{scheduler}, {steps} steps", *(_number(found[title].get(measure)) for title in titles)])


def _way(entry: ComparisonRow) -> tuple[str, int]:
    return entry.drawing.scheduler, entry.drawing.steps


def _ways(comparison: Comparison) -> list[tuple[str, int]]:
    return list(dict.fromkeys(_way(entry) for entry in comparison.entries))


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _numbers(marks: Mapping[str, float], measures: Sequence[str]) -> list[str]:
    return [_number(marks.get(name)) for name in measures]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def as_csv(comparison: Comparison) -> str:
    """A line for every adapter, scheduler, number of steps and prompt, with the measures of single pictures."""
    stream = io.StringIO()
    rows = [
        {**_facts(entry), "prompt": prompt, **marks}
        for entry in comparison.entries
        for prompt, marks in zip(comparison.prompts, entry.evaluated.by_prompt, strict=True)
    ]
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain values."""
    best = comparison.best
    return {
        "prompts": list(comparison.prompts),
        "class_prompts": list(comparison.class_prompts),
        "models": dict(comparison.models),
        "real": dict(comparison.real),
        "best": None if best is None else {"adapter": best.contender.title, "step": best.contender.step},
        "entries": [
            {**_facts(entry), "marks": dict(entry.marks), "by_prompt": [dict(one) for one in entry.evaluated.by_prompt]}
            for entry in comparison.entries
        ],
    }


def _facts(entry: ComparisonRow) -> dict[str, Any]:
    drawing = entry.drawing
    return {
        "adapter": entry.contender.title,
        "step": entry.contender.step,
        "scheduler": drawing.scheduler,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "seed": drawing.seed,
        "count": drawing.count,
    }


def sheet(comparison: Comparison, cell: int = 128) -> Image.Image:
    """The first picture of every prompt, of the subject and of its class; a row for each adapter and way to draw."""
    several = len(_ways(comparison)) > 1
    rows = []
    for entry in comparison.entries:
        each = entry.drawing.count
        kinds = [entry.evaluated.pictures[::each], entry.evaluated.class_pictures[::each]]
        label = entry.contender.title + (f", {entry.drawing.scheduler} {entry.drawing.steps}" if several else "")
        notes = [_note(marks) for marks in entry.evaluated.by_prompt]
        rows.append(SheetRow(label, tuple(one.open() for kind in kinds for one in kind), tuple(notes)))
    titles = [*comparison.prompts, *comparison.class_prompts][: len(rows[0].pictures)]
    judges = ", ".join(f"{name}: {model}" for name, model in comparison.models.items())
    return contact_sheet(
        f"The first picture of every prompt, with the means of its scores.  {judges}", titles, rows, cell
    )


def _note(marks: Mapping[str, float]) -> str:
    return "\n".join(f"{name} {_number(value)}" for name, value in marks.items() if name != CLIP_SCORE)


def plot(comparison: Comparison) -> Image.Image:
    """Fidelity against prompt following, and against drift, step by step; the best checkpoint is marked."""
    from matplotlib.figure import Figure

    steps = [entry for entry in comparison.entries if entry.contender.step is not None]
    base = [entry for entry in comparison.entries if entry.contender.title == BASE]
    best, judge = comparison.best, DINO if DINO in comparison.models else CLIP
    panels: list[tuple[str, Callable[[Mapping[str, float]], float]]]
    panels = [("drift of the class", lambda marks: fidelity_and_drift(marks)[1])]
    if all(FOLLOWING in entry.marks for entry in steps):
        panels.insert(0, ("prompt following (CLIP-T)", lambda marks: marks[FOLLOWING]))
    figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=110, layout="constrained")
    for place, (title, across) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        line = [entry for entry in (*base, *steps) if _way(entry) == _way(steps[0])]
        points = [(across(entry.marks), fidelity_and_drift(entry.marks)[0]) for entry in line]
        axes.plot(*zip(*points, strict=True), "o-", color="tab:blue", markersize=4, linewidth=1)
        for entry, point in zip(line, points, strict=True):
            axes.annotate(str(entry.contender.step or BASE), point, (4, 4), textcoords="offset points", fontsize=7)
            if best and entry.contender is best.contender:
                axes.plot(*point, "*", color="tab:red", markersize=16, label=f"best: step {entry.contender.step}")
                axes.legend(fontsize=8)
        axes.set_xlabel(title)
        axes.set_ylabel(f"fidelity ({FIDELITY[judge]})")
        axes.grid(alpha=0.3)
    return figure_as_picture(figure)
