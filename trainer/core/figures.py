"""Pictures in a labelled grid, and figures as pictures."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_LINE, _LETTER = 17, 7  # height of a line and width of a letter, in pixels


@dataclass(frozen=True)
class SheetRow:
    """One row of a contact sheet.

    Attributes:
        label: On the left.
        pictures: One for each column.
        notes: Lines under each picture; none, or one text for each column.
    """

    label: str
    pictures: tuple[Image.Image, ...]
    notes: tuple[str, ...] = ()


def contact_sheet(caption: str, titles: Sequence[str], rows: Sequence[SheetRow], cell: int = 128) -> Image.Image:
    """Pictures in a labelled grid, `cell` pixels a side; small ones are enlarged without smoothing.

    Args:
        caption: Line above the grid.
        titles: One for each column.
        rows: Each with a picture for every column.
        cell: Side of a picture in the grid.
    """
    gap, letters = 4, cell // _LETTER
    heads = [textwrap.wrap(title, letters) for title in titles]
    margin = min(240, max([100] + [_LETTER * len(row.label) + 16 for row in rows]))
    labels = [textwrap.wrap(row.label, (margin - 12) // _LETTER) for row in rows]
    head = 31 + _LINE * max([1] + [len(lines) for lines in heads])
    below = _LINE * max([0] + [note.count("\n") + 1 for row in rows for note in row.notes])
    width = max(margin + len(titles) * (cell + gap), 12 + _LETTER * len(caption))
    sheet = Image.new("RGB", (width, head + len(rows) * (cell + below + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    pen.text((6, 6), caption, fill="black", font=font)
    for column, lines in enumerate(heads):
        pen.text((margin + column * (cell + gap), 28), "\n".join(lines), fill="black", font=font)
    for line, (row, words) in enumerate(zip(rows, labels, strict=True)):
        top = head + line * (cell + below + gap)
        pen.text((6, top + cell // 2 - _LINE * len(words) // 2), "\n".join(words), fill="black", font=font)
        for column, picture in enumerate(row.pictures):
            sheet.paste(_fitted(picture, cell), (margin + column * (cell + gap), top))
        for column, note in enumerate(row.notes):
            pen.text((margin + column * (cell + gap), top + cell + 1), note, fill="black", font=font)
    return sheet


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    """The picture in a white square of `cell` pixels, its proportions kept."""
    scale = cell / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    smoothing = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (cell, cell), "white")
    square.paste(picture.resize((width, height), smoothing), ((cell - width) // 2, (cell - height) // 2))
    return square


def figure_as_picture(figure: Any) -> Image.Image:
    """A matplotlib `Figure`, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return Image.open(stream).convert("RGB")


def as_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """A table of numbers as lines for people.

    Args:
        table: Row → column → number; one that is missing or NaN is shown as a dash.
    """
    columns = list(dict.fromkeys(column for values in table.values() for column in values))
    width = max([len(row) for row in table] + [5])
    lines = ["  ".join([" " * width, *(f"{shortened(column):>14}" for column in columns)])]
    for row, values in table.items():
        numbers = [values.get(column, math.nan) for column in columns]
        cells = ("–" if math.isnan(number) else f"{number:.3f}" for number in numbers)
        lines.append("  ".join([f"{row:<{width}}", *(f"{cell:>14}" for cell in cells)]))
    return "\n".join(lines)


def shortened(text: str, limit: int = 14) -> str:
    """The text, cut to at most `limit` characters with an ellipsis at the end."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
