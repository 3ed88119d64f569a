"""Scores of a set of pictures as a table: one row a picture, the means, and which models judged."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import PicturesError
from ..core.events import Listener
from ..core.figures import SheetRow, as_table, contact_sheet
from ..data.images import Picture
from .feature_extractors import CLIP, DINO, FeatureExtractors
from .metrics import clip_score, clip_t, diversity, own_score, subject_score

SUBJECT_MEASURES = {CLIP: "CLIP-I", DINO: "DINO"}


@dataclass(frozen=True)
class ScoreTable:
    """What was measured.

    Attributes:
        rows: One for each picture: "picture", "prompt" and the measures.
        means: Measure → mean over the pictures, and what is measured of all together.
        models: Measure → name of the model that judged.
        notes: What the reader should know.
    """

    rows: Sequence[Mapping[str, Any]]
    means: Mapping[str, float]
    models: Mapping[str, str]
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "rows": list(self.rows),
            "means": dict(self.means),
            "models": dict(self.models),
            "notes": list(self.notes),
        }

    def as_csv(self) -> str:
        """The rows, with a head."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return stream.getvalue()

    def as_text(self) -> str:
        """For people."""
        measures = [name for name in self.rows[0] if name not in ("picture", "prompt")]
        width = max(len(str(row["picture"])) for row in self.rows)
        lines = ["  ".join([" " * width, *(f"{name:>14}" for name in measures)])]
        for row in self.rows:
            lines.append("  ".join([f"{row['picture']:<{width}}", *(f"{row[name]:>14.4f}" for name in measures)]))
        lines += [f"{name}: {value:.4f}" for name, value in self.means.items()]
        lines += [f"{name} by {model}" for name, model in self.models.items()]
        return "\n".join([*lines, *self.notes])


def score_pictures(
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    references: Sequence[Picture],
    judges: FeatureExtractors,
    listener: Listener,
) -> ScoreTable:
    """Score pictures by every measure that there is a model and something to compare with for.

    Args:
        pictures: To be scored.
        prompts: One for all or one for each picture, for CLIP-T; empty: none.
        references: Real pictures of the subject, for CLIP-I and DINO; empty: none.
        judges: The models.
        listener: Told of the progress; may stop the work.

    Raises:
        PicturesError: There are no pictures, the numbers don't fit, or nothing can be measured.
        WeightsError: The CLIP model reads no text, and there are prompts.
        CancelledError: The listener asked to stop.
    """
    if not pictures:
        raise PicturesError("There are no pictures to score.", "Give picture files or a folder of them.")
    if len(prompts) > 1 and len(prompts) != len(pictures):
        raise PicturesError(
            f"There are {len(prompts)} prompts for {len(pictures)} pictures.",
            "Give one prompt, or one for each picture.",
        )
    columns: dict[str, Tensor] = {}
    means: dict[str, float] = {}
    models: dict[str, str] = {}
    same = _same(pictures, references)
    said = judges.read(prompts) if prompts and CLIP in judges.models else None
    seen = judges.look([*pictures, *references], listener)
    for name, features in seen.items():
        title, model = SUBJECT_MEASURES[name], judges.models[name].name
        drawn, real = features[: len(pictures)], features[len(pictures) :]
        if name == CLIP and said is not None:
            columns |= {"CLIP-T": clip_t(drawn, said), "CLIPScore": clip_score(drawn, said)}
            models["CLIP-T"] = model
        if references:
            columns[title], models[title] = subject_score(drawn, real, same), model
            if len(real) > 1:
                means[f"{title} of the references, each left out of its own"] = own_score(real)
        if len(pictures) > 1:
            means[f"diversity by {model}"] = diversity(drawn)
    if not columns:
        raise PicturesError(
            "There is nothing to measure: CLIP-T needs prompts and a CLIP model, CLIP-I and DINO need pictures of the "
            "subject and a model.",
            "Give prompts with a CLIP model, or the subject's pictures with a CLIP or DINO model.",
        )
    notes = []
    if same.any():
        notes.append(
            f"{int(same.sum())} of the pictures are references themselves; they are not compared with themselves."
        )
    shown = list(prompts) * (len(pictures) if len(prompts) == 1 else 1) or [""] * len(pictures)
    rows = [
        {"picture": picture.name, "prompt": prompt} | {name: float(values[i]) for name, values in columns.items()}
        for i, (picture, prompt) in enumerate(zip(pictures, shown, strict=True))
    ]
    means = {name: float(values.mean()) for name, values in columns.items()} | means
    return ScoreTable(rows, means, models, notes)


def _same(pictures: Sequence[Picture], references: Sequence[Picture]) -> Tensor:
    """(pictures, references): whether they are the same file's content."""
    rows = [[one.digest == other.digest for other in references] for one in pictures]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(pictures), len(references))


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
            rows.append(SheetRow(title, tuple(one.open() for one in pictures[::each]), tuple(map(_note, parts))))
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
    judges: FeatureExtractors,
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
