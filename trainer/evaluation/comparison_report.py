"""A comparison as tables, a contact sheet, and a plot of the trade-offs."""

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
from .evaluator import fidelity_and_drift
from .feature_extractors import CLIP, DINO
from .metrics import CLIP_SCORE, CLIP_T, FIDELITY_METRICS

_REFERENCES = "real pictures, each left out of its own"


def write_report(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write everything.

    Returns:
        File name → path.

    Raises:
        StorageError: It can't be written.
    """
    files = {
        "table.md": as_markdown(comparison).encode(),
        "table.csv": as_csv(comparison).encode(),
        "table.json": (json.dumps(as_json(comparison), indent=1, ensure_ascii=False) + "\n").encode(),
        "sheet.png": as_png(as_contact_sheet(comparison)),
    }
    if comparison.best:
        files["best.png"] = as_png(as_plot(comparison))
    for name, content in files.items():
        write_atomic(folder / name, content)
    return {name: folder / name for name in files}


def as_markdown(comparison: Comparison) -> str:
    """A table of all metrics, one of fidelity by scheduler and steps if there are several, and the best checkpoint."""
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.metrics if name != CLIP_SCORE))
    best = comparison.best
    lines = [_markdown_row(["adapter", "scheduler", "steps", *names]), _markdown_row(["---"] * (3 + len(names)))]
    for row in comparison.rows:
        is_best = best is not None and row.candidate is best.candidate
        title = f"**{row.candidate.title}**" if is_best else row.candidate.title
        scheduler, steps = row.sampler
        lines.append(_markdown_row([title, scheduler, str(steps), *_cells(row.metrics, names)]))
    if comparison.reference_metrics:
        lines.append(_markdown_row([_REFERENCES, "", "", *_cells(comparison.reference_metrics, names)]))
    if len(comparison.samplers) > 1:
        for name in FIDELITY_METRICS.values():
            if name in names:
                lines += ["", *_table_by_sampler(comparison, name)]
    lines += ["", *(f"{name}: {model}." for name, model in comparison.models.items())]
    if best:
        lines.append(
            f"Best: {best.candidate.title}. Of the candidates that match the best in subject fidelity and prompt "
            "following, it has the least class drift."
        )
    return "\n".join(lines) + "\n"


def _table_by_sampler(comparison: Comparison, metric: str) -> Iterator[str]:
    """One metric: a row for each scheduler and number of steps, a column for each candidate."""
    titles = list(dict.fromkeys(row.candidate.title for row in comparison.rows))
    yield _markdown_row([metric, *titles])
    yield _markdown_row(["---"] * (1 + len(titles)))
    for scheduler, steps in comparison.samplers:
        by_title = {row.candidate.title: row.metrics for row in comparison.rows if row.sampler == (scheduler, steps)}
        yield _markdown_row([f"{scheduler}, {steps} steps", *(_cell(by_title[title].get(metric)) for title in titles)])


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _cells(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [_cell(metrics.get(name)) for name in names]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def as_csv(comparison: Comparison) -> str:
    """One line per candidate, scheduler, number of steps and prompt, with the per-picture metrics."""
    rows = [
        {**_facts(row), "prompt": prompt, **metrics}
        for row in comparison.rows
        for prompt, metrics in zip(comparison.prompts, row.result.by_prompt, strict=True)
    ]
    stream = io.StringIO()
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
        "real": dict(comparison.reference_metrics),
        "best": None if best is None else {"adapter": best.candidate.title, "step": best.candidate.step},
        "entries": [
            {
                **_facts(row),
                "marks": dict(row.metrics),
                "by_prompt": [dict(metrics) for metrics in row.result.by_prompt],
            }
            for row in comparison.rows
        ],
    }


def _facts(row: ComparisonRow) -> dict[str, Any]:
    """What a row is about, for CSV and JSON."""
    return {
        "adapter": row.candidate.title,
        "step": row.candidate.step,
        "scheduler": row.config.scheduler,
        "steps": row.config.steps,
        "guidance": row.config.guidance,
        "seed": row.config.seed,
        "count": row.config.count,
    }


def as_contact_sheet(comparison: Comparison, cell: int = 128) -> Image.Image:
    """The first picture of every prompt, of the subject and of its class; one row per candidate and sampler.

    Args:
        comparison: To show.
        cell: Side of a picture in pixels.
    """
    has_several_samplers = len(comparison.samplers) > 1
    rows = []
    for row in comparison.rows:
        per_prompt = row.config.count
        pictures = [*row.result.pictures[::per_prompt], *row.result.class_pictures[::per_prompt]]
        label = row.candidate.title
        if has_several_samplers:
            scheduler, steps = row.sampler
            label += f", {scheduler} {steps}"
        notes = tuple(_sheet_note(metrics) for metrics in row.result.by_prompt)
        rows.append(SheetRow(label, tuple(picture.open() for picture in pictures), notes))
    titles = [*comparison.prompts, *comparison.class_prompts][: len(rows[0].pictures)]
    models = ", ".join(f"{name}: {model}" for name, model in comparison.models.items())
    caption = f"The first picture of every prompt, with the means of its scores.  {models}"
    return contact_sheet(caption, titles, rows, cell)


def _sheet_note(metrics: Mapping[str, float]) -> str:
    return "\n".join(f"{name} {_cell(value)}" for name, value in metrics.items() if name != CLIP_SCORE)


def as_plot(comparison: Comparison) -> Image.Image:
    """Fidelity against prompt following, and against drift, step by step; the best checkpoint is highlighted."""
    from matplotlib.figure import Figure

    checkpoints = [row for row in comparison.rows if row.candidate.step is not None]
    base = [row for row in comparison.rows if row.candidate.title == BASE]
    line = [row for row in (*base, *checkpoints) if row.sampler == checkpoints[0].sampler]
    best = comparison.best
    fidelity_metric = FIDELITY_METRICS[DINO if DINO in comparison.models else CLIP]
    panels: list[tuple[str, Callable[[Mapping[str, float]], float]]] = []
    if all(CLIP_T in row.metrics for row in checkpoints):
        panels.append((f"prompt following ({CLIP_T})", lambda metrics: metrics[CLIP_T]))
    panels.append(("drift of the class", lambda metrics: fidelity_and_drift(metrics)[1]))
    figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=110, layout="constrained")
    for number, (title, value_of) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        points = [(value_of(row.metrics), fidelity_and_drift(row.metrics)[0]) for row in line]
        axes.plot(*zip(*points, strict=True), "o-", color="tab:blue", markersize=4, linewidth=1)
        for row, point in zip(line, points, strict=True):
            axes.annotate(str(row.candidate.step or BASE), point, (4, 4), textcoords="offset points", fontsize=7)
            if best and row.candidate is best.candidate:
                axes.plot(*point, "*", color="tab:red", markersize=16, label=f"best: step {row.candidate.step}")
                axes.legend(fontsize=8)
        axes.set_xlabel(title)
        axes.set_ylabel(f"fidelity ({fidelity_metric})")
        axes.grid(alpha=0.3)
    return figure_as_picture(figure)
