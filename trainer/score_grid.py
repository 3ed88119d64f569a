"""Pictures of several settings side by side, prompt by prompt, with their scores."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .errors import PicturesError
from .events import Listener
from .judges import Judges
from .merge_report import as_table
from .pictures import Picture
from .scoring import ScoreTable, score_pictures
from .sheets import Row, contact_sheet

_FACTS = ("picture", "prompt")


@dataclass(frozen=True)
class ScoreGrid:
    """What was measured.

    Attributes:
        prompts: One for each column; the pictures of a setting come prompt by prompt, the same number of each.
        pictures: Setting → pictures.
        tables: Setting → their scores.
    """

    prompts: Sequence[str]
    pictures: Mapping[str, Sequence[Picture]]
    tables: Mapping[str, ScoreTable]

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "prompts": list(self.prompts),
            "settings": {title: table.as_json() for title, table in self.tables.items()},
        }

    def as_csv(self) -> str:
        """A line for every picture, with a head."""
        stream = io.StringIO()
        rows = [{"setting": title, **row} for title, table in self.tables.items() for row in table.rows]
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def as_text(self) -> str:
        """The means, a line for every setting."""
        first = next(iter(self.tables.values()))
        models = [f"{name} by {model}" for name, model in first.models.items()]
        notes = dict.fromkeys(note for table in self.tables.values() for note in table.notes)
        return "\n".join([as_table({title: table.means for title, table in self.tables.items()}), *models, *notes])

    def sheet(self, cell: int = 160) -> Image.Image:
        """A row for each setting, a column for each prompt: the first picture, under it the means of all of them."""
        rows = []
        for title, table in self.tables.items():
            each, pictures = len(table.rows) // len(self.prompts), self.pictures[title]
            parts = [table.rows[start : start + each] for start in range(0, len(table.rows), each)]
            rows.append(Row(title, tuple(one.open() for one in pictures[::each]), tuple(map(_note, parts))))
        first = next(iter(self.tables.values()))
        caption = "   ".join(f"{name} by {model}" for name, model in first.models.items())
        return contact_sheet(caption, self.prompts, rows, cell)


def _note(rows: Sequence[Mapping[str, Any]]) -> str:
    measures = [name for name in rows[0] if name not in _FACTS]
    return "\n".join(f"{name} {statistics.mean(row[name] for row in rows):.3f}" for name in measures)


def score_grid(
    settings: Mapping[str, Sequence[Picture]],
    prompts: Sequence[str],
    references: Sequence[Picture],
    judges: Judges,
    listener: Listener,
) -> ScoreGrid:
    """Score the pictures of several settings.

    Args:
        settings: Title → pictures, prompt by prompt, the same number of each.
        prompts: One at least.
        references: Real pictures of the subject; empty: none.
        judges: The models.
        listener: Told of the progress; may stop the work.

    Raises:
        PicturesError: There are no pictures or prompts, or a number of pictures that the prompts can't share.
        WeightsError: The CLIP model reads no text.
        CancelledError: The listener asked to stop.
    """
    if not prompts:
        raise PicturesError("There is no prompt to score by.", "Write what the pictures should show, a line each.")
    if not settings:
        raise PicturesError("There are no pictures to score.", "Connect the pictures of one setting or more.")
    tables = {}
    for title, pictures in settings.items():
        if not pictures or len(pictures) % len(prompts):
            raise PicturesError(
                f"'{title}' has {len(pictures)} pictures for {len(prompts)} prompts.",
                "Give the same number of pictures of every prompt, in the prompts' order.",
            )
        each = len(pictures) // len(prompts)
        said = [prompt for prompt in prompts for _ in range(each)]
        tables[title] = score_pictures(pictures, said, references, judges, listener)
    return ScoreGrid(prompts, settings, tables)
