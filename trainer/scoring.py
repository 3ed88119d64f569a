"""Scores of a set of pictures as a table: one row a picture, the means, and which models judged."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import PicturesError
from .events import Listener
from .judges import CLIP, DINO, Judges
from .pictures import Picture
from .scores import clip_score, clip_t, diversity, own_score, subject_score

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
    judges: Judges,
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
