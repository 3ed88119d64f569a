"""Scores of given pictures as tables: one row per picture, the means, and the models used.

`score_pictures` scores one set of pictures; `score_grid` scores the same prompts under several generation settings.
"""

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
from ..core.figures import SheetRow, contact_sheet, text_table
from ..data.images import Picture
from .feature_extractors import CLIP, FeatureExtractors
from .metrics import (
    CLIP_SCORE,
    CLIP_T,
    DIVERSITY,
    FIDELITY_METRICS,
    clip_score,
    clip_t,
    diversity,
    leave_one_out_score,
    subject_score,
)

_PICTURE = "picture"
_PROMPT = "prompt"


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one set of pictures.

    Attributes:
        rows: One for each picture: "picture", "prompt" and the metrics.
        means: Metric → mean over the pictures, and metrics of the set as a whole.
        models: Metric → name of the model that measured it.
        notes: Remarks for the reader.
    """

    rows: Sequence[Mapping[str, Any]]
    means: Mapping[str, float]
    models: Mapping[str, str]
    notes: Sequence[str]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that every picture has."""
        return [name for name in self.rows[0] if name not in (_PICTURE, _PROMPT)]

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "rows": list(self.rows),
            "means": dict(self.means),
            "models": dict(self.models),
            "notes": list(self.notes),
        }

    def as_csv(self) -> str:
        """The rows, with a header."""
        return _as_csv(self.rows)

    def as_text(self) -> str:
        """For people."""
        width = max(len(str(row[_PICTURE])) for row in self.rows)
        lines = ["  ".join([" " * width, *(f"{name:>14}" for name in self.metrics)])]
        for row in self.rows:
            lines.append("  ".join([f"{row[_PICTURE]:<{width}}", *(f"{row[name]:>14.4f}" for name in self.metrics)]))
        lines += [f"{name}: {value:.4f}" for name, value in self.means.items()]
        return "\n".join([*lines, *_model_lines(self), *self.notes])


@dataclass(frozen=True)
class ScoreGrid:
    """The scores of pictures of the same prompts under several settings.

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
        """One line per picture, with a header."""
        return _as_csv([{"setting": title, **row} for title, table in self.tables.items() for row in table.rows])

    def as_text(self) -> str:
        """The means, one line per setting."""
        means = text_table({title: table.means for title, table in self.tables.items()})
        notes = dict.fromkeys(note for table in self.tables.values() for note in table.notes)
        return "\n".join([means, *_model_lines(self._first_table), *notes])

    def sheet(self, cell: int = 160) -> Image.Image:
        """A row for each setting, a column for each prompt: the first picture, under it the means of all of them.

        Args:
            cell: Side of a picture in pixels.
        """
        rows = []
        for title, table in self.tables.items():
            per_prompt = len(table.rows) // len(self.prompts)
            starts = range(0, len(table.rows), per_prompt)
            images = tuple(self.pictures[title][start].open() for start in starts)
            notes = tuple(_mean_scores(table, table.rows[start : start + per_prompt]) for start in starts)
            rows.append(SheetRow(title, images, notes))
        return contact_sheet("   ".join(_model_lines(self._first_table)), self.prompts, rows, cell)

    @property
    def _first_table(self) -> ScoreTable:
        return next(iter(self.tables.values()))


def score_pictures(
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    references: Sequence[Picture],
    extractors: FeatureExtractors,
    listener: Listener,
) -> ScoreTable:
    """Score pictures by every metric for which there is a model and something to compare with.

    Args:
        pictures: To be scored.
        prompts: One for all or one for each picture, for CLIP-T; empty: none.
        references: Real pictures of the subject, for CLIP-I and DINO; empty: none.
        extractors: The models.
        listener: Gets the progress; may stop the work.

    Raises:
        PicturesError: There are no pictures, the counts don't match, or nothing can be measured.
        WeightsError: There are prompts, but the CLIP model has no text encoder.
        CancelledError: The listener asked to stop.
    """
    if not pictures:
        raise PicturesError("There are no pictures to score.", "Provide picture files or a folder of them.")
    if len(prompts) > 1 and len(prompts) != len(pictures):
        raise PicturesError(
            f"There are {len(prompts)} prompts for {len(pictures)} pictures.",
            "Provide one prompt, or one for each picture.",
        )
    columns: dict[str, Tensor] = {}
    means_of_all: dict[str, float] = {}
    models: dict[str, str] = {}
    same = _same_content(pictures, references)
    text_features = extractors.text_features(prompts) if prompts and CLIP in extractors.models else None
    features_by_model = extractors.image_features([*pictures, *references], listener)
    for name, all_features in features_by_model.items():
        model = extractors.models[name].name
        features = all_features[: len(pictures)]
        reference_features = all_features[len(pictures) :]
        if name == CLIP and text_features is not None:
            columns[CLIP_T] = clip_t(features, text_features)
            columns[CLIP_SCORE] = clip_score(features, text_features)
            models[CLIP_T] = model
        if references:
            metric = FIDELITY_METRICS[name]
            columns[metric] = subject_score(features, reference_features, same)
            models[metric] = model
            if len(references) > 1:
                means_of_all[f"{metric} of the references, each left out of its own"] = leave_one_out_score(
                    reference_features
                )
        if len(pictures) > 1:
            means_of_all[f"{DIVERSITY} by {model}"] = diversity(features)
    if not columns:
        raise PicturesError(
            "There is nothing to measure: CLIP-T needs prompts and a CLIP model, CLIP-I and DINO need pictures of the "
            "subject and a model.",
            "Provide prompts and a CLIP model, or the subject's pictures and a CLIP or DINO model.",
        )
    notes = []
    if same.any():
        notes.append(f"{int(same.sum())} of the pictures are also references; they are not compared with themselves.")
    prompt_of_each = list(prompts) if len(prompts) > 1 else [prompts[0] if prompts else ""] * len(pictures)
    rows = [
        {_PICTURE: picture.name, _PROMPT: prompt} | {name: float(values[index]) for name, values in columns.items()}
        for index, (picture, prompt) in enumerate(zip(pictures, prompt_of_each, strict=True))
    ]
    means = {name: float(values.mean()) for name, values in columns.items()}
    return ScoreTable(rows, means | means_of_all, models, notes)


def score_grid(
    settings: Mapping[str, Sequence[Picture]],
    prompts: Sequence[str],
    references: Sequence[Picture],
    extractors: FeatureExtractors,
    listener: Listener,
) -> ScoreGrid:
    """Score the pictures of several settings.

    Args:
        settings: Title → pictures, prompt by prompt, the same number of each.
        prompts: At least one.
        references: Real pictures of the subject; empty: none.
        extractors: The models.
        listener: Gets the progress; may stop the work.

    Raises:
        PicturesError: There are no pictures or prompts, or the number of pictures is not a multiple of that of prompts.
        WeightsError: The CLIP model has no text encoder.
        CancelledError: The listener asked to stop.
    """
    if not prompts:
        raise PicturesError(
            "There are no prompts to score against.", "Write what the pictures should show, one prompt per line."
        )
    if not settings:
        raise PicturesError("There are no pictures to score.", "Connect pictures for at least one setting.")
    tables = {}
    for title, pictures in settings.items():
        if not pictures or len(pictures) % len(prompts):
            raise PicturesError(
                f"'{title}' has {len(pictures)} pictures for {len(prompts)} prompts.",
                "Provide the same number of pictures for every prompt, in the order of the prompts.",
            )
        per_prompt = len(pictures) // len(prompts)
        prompt_of_each = [prompt for prompt in prompts for _ in range(per_prompt)]
        tables[title] = score_pictures(pictures, prompt_of_each, references, extractors, listener)
    return ScoreGrid(prompts, settings, tables)


def _same_content(pictures: Sequence[Picture], references: Sequence[Picture]) -> Tensor:
    """(pictures, references), bool: whether they have the same content."""
    rows = [[picture.digest == reference.digest for reference in references] for picture in pictures]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(pictures), len(references))


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _model_lines(table: ScoreTable) -> list[str]:
    return [f"{name} by {model}" for name, model in table.models.items()]


def _mean_scores(table: ScoreTable, rows: Sequence[Mapping[str, Any]]) -> str:
    """The means over some rows, a line for each metric."""
    return "\n".join(f"{name} {statistics.mean(row[name] for row in rows):.3f}" for name in table.metrics)
