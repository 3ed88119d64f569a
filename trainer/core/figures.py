"""Contact sheets, matplotlib figures as images, and tables as text."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_FONT_SIZE = 13  # pixels
_LINE_HEIGHT = 17  # pixels
_LETTER_WIDTH = 7  # pixels
_GAP = 4  # pixels between cells


@dataclass(frozen=True)
class SheetRow:
    """One row of a contact sheet.

    Attributes:
        label: Shown on the left.
        pictures: One for each column.
        notes: Text under each picture, of one or more lines; none, or one for each column.
    """

    label: str
    pictures: tuple[Image.Image, ...]
    notes: tuple[str, ...] = ()


def contact_sheet(caption: str, titles: Sequence[str], rows: Sequence[SheetRow], cell: int = 128) -> Image.Image:
    """Pictures in a labelled grid; small ones are enlarged without smoothing.

    Args:
        caption: Line above the grid.
        titles: One for each column.
        rows: Each with a picture for every column.
        cell: Side of a picture in the grid, in pixels.
    """
    title_lines = [textwrap.wrap(title, cell // _LETTER_WIDTH) for title in titles]
    margin = min(240, max([100] + [_LETTER_WIDTH * len(row.label) + 16 for row in rows]))
    label_lines = [textwrap.wrap(row.label, (margin - 12) // _LETTER_WIDTH) for row in rows]
    header_height = 31 + _LINE_HEIGHT * max([1] + [len(lines) for lines in title_lines])
    note_height = _LINE_HEIGHT * max([0] + [note.count("\n") + 1 for row in rows for note in row.notes])
    row_height = cell + note_height + _GAP
    width = max(margin + len(titles) * (cell + _GAP), 12 + _LETTER_WIDTH * len(caption))
    sheet = Image.new("RGB", (width, header_height + len(rows) * row_height), "white")
    canvas = ImageDraw.Draw(sheet)
    font = _font()
    lefts = [margin + column * (cell + _GAP) for column in range(len(titles))]
    canvas.text((6, 6), caption, fill="black", font=font)
    for left, lines in zip(lefts, title_lines, strict=True):
        canvas.text((left, 28), "\n".join(lines), fill="black", font=font)
    for index, (row, lines) in enumerate(zip(rows, label_lines, strict=True)):
        top = header_height + index * row_height
        label_top = top + cell // 2 - _LINE_HEIGHT * len(lines) // 2
        canvas.text((6, label_top), "\n".join(lines), fill="black", font=font)
        for left, picture in zip(lefts, row.pictures):
            sheet.paste(_in_square(picture, cell), (left, top))
        for left, note in zip(lefts, row.notes):
            canvas.text((left, top + cell + 1), note, fill="black", font=font)
    return sheet


def _font() -> Any:
    """The font of labels and notes."""
    try:
        return ImageFont.load_default(size=_FONT_SIZE)
    except TypeError:  # Pillow before 10.1, whose own font has neither a size nor more than Latin letters
        from matplotlib import get_data_path

        return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), _FONT_SIZE)


def _in_square(picture: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of a white square of `side` pixels, its proportions kept."""
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture.resize((width, height), resampling), ((side - width) // 2, (side - height) // 2))
    return square


def figure_as_picture(figure: Any) -> Image.Image:
    """A matplotlib `Figure`, rendered without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return Image.open(stream).convert("RGB")


def text_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """A table of numbers as aligned plain text, with three decimals.

    Args:
        table: Row → column → number; a missing one or NaN is shown as a dash.
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
