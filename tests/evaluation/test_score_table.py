"""A grid of scores holds, for every setting, what scoring its pictures alone gives; and shows and writes all of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DEMO, Recorder
from pack.trainer.core.errors import CancelledError, PicturesError
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.evaluation.feature_extractors import FeatureExtractors
from pack.trainer.evaluation.score_table import ScoreGrid, score_grid, score_pictures

PROMPTS = ["a dog", "a dog on the grass"]


@pytest.fixture(scope="module")
def extractors() -> FeatureExtractors:
    return FeatureExtractors.open(str(DEMO / "scorer"), "", torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return load_pictures(DEMO / "style", "", Recorder())


@pytest.fixture(scope="module")
def subject() -> list[Picture]:
    return load_pictures(DEMO / "subject", "", Recorder())


@pytest.fixture(scope="module")
def settings(pictures: list[Picture]) -> dict[str, list[Picture]]:
    """Three pictures of each of two prompts, and one of each."""
    return {"with LoRA, ünal": pictures[:6], "base": pictures[6:8]}


@pytest.fixture(scope="module")
def grid(settings: dict[str, list[Picture]], subject: list[Picture], extractors: FeatureExtractors) -> ScoreGrid:
    return score_grid(settings, PROMPTS, subject, extractors, Recorder())


def test_every_setting_is_scored_as_if_alone(
    grid: ScoreGrid, settings: dict[str, list[Picture]], subject: list[Picture], extractors: FeatureExtractors
) -> None:
    """Pictures come prompt by prompt."""
    assert list(grid.tables) == list(settings)
    for (title, table), said in zip(
        grid.tables.items(), ([*[PROMPTS[0]] * 3, *[PROMPTS[1]] * 3], PROMPTS), strict=True
    ):
        alone = score_pictures(settings[title], said, subject, extractors, Recorder())
        assert [(row["picture"], row["prompt"]) for row in table.rows] == list(
            zip([one.name for one in settings[title]], said, strict=True)
        )
        assert table.means == pytest.approx(alone.means, abs=1e-6)
        assert {"CLIP-T", "CLIPScore", "CLIP-I"} <= set(table.means)


def test_a_line_for_every_picture_and_everything_as_json(grid: ScoreGrid) -> None:
    lines = list(csv.DictReader(grid.as_csv().splitlines()))
    rows = [{"setting": title, **row} for title, table in grid.tables.items() for row in table.rows]
    assert [{name: type(row[name])(line[name]) for name in row} for line, row in zip(lines, rows, strict=True)] == rows
    facts = json.loads(json.dumps(grid.as_json(), allow_nan=False))
    assert facts["prompts"] == PROMPTS
    assert facts["settings"] == {title: table.as_json() for title, table in grid.tables.items()}


def test_the_text_holds_the_means_and_the_models(grid: ScoreGrid) -> None:
    lines = grid.as_text().splitlines()
    for line, (title, table) in zip(lines[1:], grid.tables.items(), strict=False):
        assert line.startswith(title)
        assert f"{table.means['CLIP-T']:.3f}" in line
        assert f"{table.means['CLIP-I']:.3f}" in line
    assert {"CLIP-T by scorer", "CLIP-I by scorer"} <= set(lines)


def shown(grid: ScoreGrid, cell: int = 64) -> np.ndarray[Any, Any]:
    return np.asarray(grid.sheet(cell), dtype=int)


def place_of(picture: Picture, sheet: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Top and left corner of a picture that the sheet shows at its own size."""
    wanted = np.asarray(picture.open(), dtype=int)
    height, width = wanted.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (1, width, 3))[:, :, 0, 0]
    for top, left in zip(*np.nonzero((windows == wanted[0]).all((-2, -1))), strict=True):
        if np.array_equal(sheet[top : top + height, left : left + width], wanted):
            return int(top), int(left)
    raise AssertionError(f"{picture.name} is not in the sheet")


def test_the_sheet_shows_the_first_picture_of_every_prompt(grid: ScoreGrid, settings: dict[str, list[Picture]]) -> None:
    lora, base = settings.values()
    sheet = shown(grid)
    corners = [[place_of(one, sheet) for one in row] for row in (lora[::3], base)]
    assert [top for top, _ in corners[0]] == [corners[0][0][0]] * 2
    assert [left for _, left in corners[0]] == [left for _, left in corners[1]]
    assert corners[0][0][1] + 64 <= corners[0][1][1]
    assert corners[0][0][0] + 64 <= corners[1][0][0]
    for hidden in (1, 2, 4, 5):
        with pytest.raises(AssertionError, match="not in the sheet"):
            place_of(lora[hidden], sheet)


def test_under_a_picture_stand_the_means_of_all_of_its_prompt(
    grid: ScoreGrid,
    settings: dict[str, list[Picture]],
    pictures: list[Picture],
    subject: list[Picture],
    extractors: FeatureExtractors,
) -> None:
    """Another third picture of the second prompt changes what stands under that prompt's first picture, no more."""
    lora, base = settings.values()
    changed = {**settings, "with LoRA, ünal": [*lora[:5], pictures[20]]}
    other = score_grid(changed, PROMPTS, subject, extractors, Recorder())
    rows, columns = np.nonzero((shown(other) != shown(grid)).any(-1))
    top, left = place_of(lora[3], shown(grid))
    assert top + 64 <= rows.min() < rows.max() < place_of(base[0], shown(grid))[0]
    assert left <= columns.min()


@pytest.mark.parametrize("title", ["a", "dpm++, 30 steps, strength 0.8, seed 1234567"])
def test_the_size_of_the_sheet(
    title: str, pictures: list[Picture], subject: list[Picture], extractors: FeatureExtractors
) -> None:
    """It grows by a cell and its notes with every setting, and by a cell with every prompt."""

    def size(settings: int, prompts: int, cell: int) -> tuple[int, int]:
        given = {f"{title}{number}": pictures[:prompts] for number in range(settings)}
        width, height = score_grid(given, PROMPTS[:prompts], subject, extractors, Recorder()).sheet(cell).size
        return width, height

    notes = size(2, 1, 64)[1] - size(1, 1, 64)[1] - 64
    assert notes > 3 * 13
    assert size(3, 1, 64)[1] - size(1, 1, 64)[1] == 2 * (64 + notes)
    assert size(1, 2, 200)[0] - size(1, 1, 200)[0] == 204


def test_without_a_subject_only_the_prompts_count(
    settings: dict[str, list[Picture]], extractors: FeatureExtractors
) -> None:
    grid = score_grid(settings, PROMPTS, [], extractors, Recorder())
    assert {name for table in grid.tables.values() for name in table.rows[0]} == {
        "picture",
        "prompt",
        "CLIP-T",
        "CLIPScore",
    }
    assert grid.sheet().width > 0


@pytest.mark.parametrize(
    ("count", "prompts", "told"),
    [
        ([2], [], ("no prompt", "one prompt per line")),
        ([], PROMPTS, ("no pictures", "at least one setting")),
        ([2, 0], PROMPTS, ("'1' has 0 pictures for 2 prompts", "same number")),
        ([2, 3], PROMPTS, ("'1' has 3 pictures for 2 prompts", "same number")),
        ([1], PROMPTS, ("'0' has 1 pictures for 2 prompts", "same number")),
    ],
    ids=str,
)
def test_what_makes_no_grid_is_named(
    count: list[int],
    prompts: Sequence[str],
    told: tuple[str, str],
    pictures: list[Picture],
    extractors: FeatureExtractors,
) -> None:
    given = {str(number): pictures[:some] for number, some in enumerate(count)}
    with pytest.raises(PicturesError) as caught:
        score_grid(given, prompts, [], extractors, Recorder())
    assert told[0] in caught.value.problem
    assert told[1] in caught.value.remedy


def test_scoring_can_be_stopped(settings: dict[str, list[Picture]]) -> None:
    extractors = FeatureExtractors.open(str(DEMO / "scorer"), "", torch.device("cpu"))
    with pytest.raises(CancelledError):
        score_grid(settings, PROMPTS, [], extractors, Recorder(stop_after=2))
