"""A comparison draws what `generate` draws, measures it as `Evaluator` does, tells it whole, and picks by rule."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import mostly_slow
from helpers import DEMO, MadeOnce, Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.__main__ import main
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import AdapterError, CancelledError, StorageError
from pack.trainer.core.events import Phase
from pack.trainer.data.image_cache import generated_picture
from pack.trainer.data.images import Picture
from pack.trainer.evaluation import comparison_report
from pack.trainer.evaluation.comparison import (
    Candidate,
    Comparison,
    ComparisonRow,
    adapter_candidate,
    base_candidate,
    checkpoint_candidates,
    compare_candidates,
)
from pack.trainer.evaluation.comparison_report import as_contact_sheet, as_json, as_markdown, as_plot, write_report
from pack.trainer.evaluation.evaluator import EvaluationResult, Evaluator, best_index, overall_score
from pack.trainer.evaluation.feature_extractors import FeatureExtractors
from pack.trainer.evaluation.generator import CachedGenerator, SampleConfig, sample_configs
from pack.trainer.models.sampling import GenerationConfig, build_on_device, generate
from pack.trainer.settings.base import Settings
from pack.trainer.settings.evaluate import CompareCommand, CompareSettings, DreamBenchCommand, ScoreCommand
from pack.trainer.training.runs.folder import RunFolder
from PIL import Image
from worlds import World, make_world, newest_step

pytestmark = pytest.mark.usefixtures("quick")

CPU = torch.device("cpu")
PROMPTS = ["a photo of sks dog", "the sks dog on the grass"]
CLASS_PROMPTS = ["a photo of a dog", "the dog on the grass"]
GRID: dict[str, Any] = {"schedulers": "ddim pndm", "steps": "2 3", "count": 2, "size": "32x40", "guidance": 3.0}
GRID |= {"picture_seed": 5, "picture_batch_size": 2}
WAYS = [("ddim", 2), ("ddim", 3), ("pndm", 2), ("pndm", 3)]
MEASURES = ["CLIP-T", "CLIPScore", "CLIP-I", "DINO", "drift (CLIP)", "drift (DINO)", "diversity", "class diversity"]
OF_PICTURES = MEASURES[:4]


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("comparison") / "subject")


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Three steps with an adapter of each, of which one whole checkpoint is kept: without and with class pictures."""
    folder = tmp_path_factory.mktemp("runs ü")
    settings = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 1, "learning_rate": 3e-2}
    pictures = {"plain": lambda: world, "priors": lambda: world.with_priors(folder / "class")}
    return MadeOnce(lambda name: pictures[name]().train(folder, name=name, **settings).run)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINO of random weights."""
    folder = tmp_path_factory.mktemp("models") / "dino"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    preprocessing = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="module")
def extractors(dino: Path) -> FeatureExtractors:
    return FeatureExtractors.open(str(DEMO / "scorer"), str(dino), CPU)


def evaluation(extractors: FeatureExtractors, world: World, listener: Recorder | None = None) -> Evaluator:
    return Evaluator(extractors, world.subject, PROMPTS, "sks", listener or Recorder())


def compared_in(
    folder: Path,
    world: World,
    extractors: FeatureExtractors,
    found: Sequence[Candidate],
    listener: Recorder | None = None,
    **grid: Any,
) -> Comparison:
    listener = listener or Recorder()
    ways = sample_configs(CompareSettings.checked({**GRID, "prompts": "|".join(PROMPTS), **grid}))
    studio = CachedGenerator(world.base, folder, CPU, "fp32", listener)
    return compare_candidates(studio, evaluation(extractors, world, listener), found, ways)


@pytest.fixture(scope="module")
def compared(
    world: World, runs: Mapping[str, Path], extractors: FeatureExtractors, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    """The base, every checkpoint of the plain run, and its last one at strength 0; in four ways."""
    run = RunFolder.existing(runs["plain"])
    found = [
        base_candidate(),
        *checkpoint_candidates(run.adapters(), run.name),
        adapter_candidate(run.adapters()[3], 0.0, "off"),
    ]
    return compared_in(tmp_path_factory.mktemp("compared"), world, extractors, found)


def test_every_step_in_every_way_in_order(compared: Comparison, runs: Mapping[str, Path]) -> None:
    assert newest_step(runs["plain"]) == 3
    assert len(list(runs["plain"].glob("step-*"))) == 1
    titles = ["base", "plain, step 1", "plain, step 2", "plain, step 3", "off at 0"]
    told = [(one.candidate.title, one.config.scheduler, one.config.steps) for one in compared.rows]
    assert told == [(title, *way) for title, way in product(titles, WAYS)]
    assert [one.candidate.step for one in compared.rows[::4]] == [None, 1, 2, 3, None]
    assert {tuple(one.metrics) for one in compared.rows} == {tuple(compared.rows[0].metrics)}
    assert set(compared.rows[0].metrics) == set(MEASURES)
    assert (compared.prompts, compared.class_prompts) == (PROMPTS, CLASS_PROMPTS)
    assert compared.models == {"CLIP": "scorer", "DINO": "dino"}
    assert set(compared.reference_metrics) == {"CLIP-I", "DINO"}


def drawn_apart(model: Any, prompts: Sequence[str], how: SampleConfig) -> list[Picture]:
    way = {"scheduler": how.scheduler, "steps": how.steps, "guidance": how.guidance}
    return [
        generated_picture("x.png", prompt, image)
        for prompt in prompts
        for image in generate(model, prompt, [5, 6], GenerationConfig(width=32, height=40, **way))
    ]


def test_marks_are_those_of_pictures_drawn_apart(
    compared: Comparison, world: World, runs: Mapping[str, Path], extractors: FeatureExtractors
) -> None:
    plain, taught = (build_on_device(world.base, CPU, "fp32") for _ in range(2))
    merge_into(taught, read_adapter(RunFolder(runs["plain"]).adapters()[3]), 1.0)
    for entry in compared.rows[12:16]:
        before = drawn_apart(plain, CLASS_PROMPTS, entry.config)
        pictures, after = (drawn_apart(taught, prompts, entry.config) for prompts in (PROMPTS, CLASS_PROMPTS))
        for ours, theirs in ((entry.result.pictures, pictures), (entry.result.class_pictures, after)):
            assert [one.open().tobytes() for one in ours] == [one.open().tobytes() for one in theirs]
        assert entry.metrics == pytest.approx(
            evaluation(extractors, world).compute_metrics(pictures, before, after), abs=1e-5
        )
        assert entry.metrics["drift (CLIP)"] > 1e-4


def test_the_base_does_not_drift_and_strength_0_is_the_base(compared: Comparison) -> None:
    for base, off in zip(compared.rows[:4], compared.rows[-4:], strict=True):
        assert [base.metrics[f"drift ({judge})"] for judge in ("CLIP", "DINO")] == pytest.approx([0, 0], abs=1e-6)
        assert off.metrics == base.metrics
        for part in ("pictures", "class_pictures"):
            ours, theirs = (getattr(one.result, part) for one in (base, off))
            assert [one.digest for one in ours] == [one.digest for one in theirs]
    assert "-0.000" not in as_markdown(compared)


def test_prompts_average_to_the_marks(compared: Comparison) -> None:
    for entry in compared.rows:
        assert len(entry.result.by_prompt) == 2
        for name in OF_PICTURES:
            parts = [part[name] for part in entry.result.by_prompt]
            assert sum(parts) / 2 == pytest.approx(entry.metrics[name], abs=1e-5)
            assert parts[0] != parts[1]


def strictly(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_hold_a_line_for_every_adapter_way_and_prompt(compared: Comparison, tmp_path: Path) -> None:
    files = write_report(compared, tmp_path / "new ü")
    assert set(files) == {"table.md", "table.csv", "table.json", "sheet.png", "best.png"}
    assert set(files.values()) == set((tmp_path / "new ü").iterdir())
    assert files["table.md"].read_text(encoding="utf-8") == as_markdown(compared)
    facts = strictly(files["table.json"].read_text(encoding="utf-8"))
    assert facts == as_json(compared)
    rows = list(csv.DictReader(files["table.csv"].read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 5 * 4 * 2
    expected = [
        (one.candidate.title, str(one.candidate.step or ""), *map(str, way), prompt, part)
        for one, way in zip(compared.rows, WAYS * 5, strict=True)
        for prompt, part in zip(PROMPTS, one.result.by_prompt, strict=True)
    ]
    names = ("adapter", "step", "scheduler", "steps", "prompt")
    told = [(*(row[name] for name in names), {name: float(row[name]) for name in OF_PICTURES}) for row in rows]
    assert told == expected
    assert {(row["guidance"], row["seed"], row["count"]) for row in rows} == {("3.0", "5", "2")}
    assert [one["marks"] for one in facts["entries"]] == [dict(one.metrics) for one in compared.rows]
    assert [one["by_prompt"] for one in facts["entries"]] == [list(one.result.by_prompt) for one in compared.rows]
    best = compared.best
    assert best is not None
    assert facts["best"] == {"adapter": best.candidate.title, "step": best.candidate.step}
    for name, picture in (("sheet.png", as_contact_sheet(compared)), ("best.png", as_plot(compared))):
        assert Image.open(files[name]).tobytes() == picture.tobytes()


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table's rows of cells, without the line below its head."""
    found: list[list[list[str]]] = []
    for block in markdown.split("\n\n"):
        rows = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("|")]
        if rows:
            assert set(rows[1]) == {"---"}
            assert {len(row) for row in rows} == {len(rows[0])}
            found.append([rows[0], *rows[2:]])
    return found


def test_the_tables_hold_all_marks_and_fidelity_by_way(compared: Comparison) -> None:
    text = as_markdown(compared)
    whole, *by_way = tables(text)
    measures = [name for name in compared.rows[0].metrics if name != "CLIPScore"]
    assert whole[0] == ["adapter", "scheduler", "steps", *measures]
    assert len(whole) == 1 + 20 + 1
    for row, entry in zip(whole[1:], compared.rows, strict=False):
        assert row[0].strip("*") == entry.candidate.title
        assert row[0].startswith("**") == (compared.best is not None and entry.candidate is compared.best.candidate)
        assert row[1:3] == [entry.config.scheduler, str(entry.config.steps)]
        assert row[3:] == [f"{entry.metrics[name]:.3f}" for name in measures]
    assert whole[-1][3:] == [
        f"{compared.reference_metrics[name]:.3f}" if name in compared.reference_metrics else "–" for name in measures
    ]
    titles = [one.candidate.title for one in compared.rows[::4]]
    assert [table[0] for table in by_way] == [["CLIP-I", *titles], ["DINO", *titles]]
    for (measure, *_), *rows in by_way:
        assert [row[0] for row in rows] == [f"{scheduler}, {steps} steps" for scheduler, steps in WAYS]
        for place, row in enumerate(rows):
            assert row[1:] == [f"{one.metrics[measure]:.3f}" for one in compared.rows[place::4]]
    assert "CLIP: scorer.\nDINO: dino.\n" in text
    assert f"Best: {compared.best.candidate.title}." in text  # type: ignore[union-attr]


def test_one_way_needs_no_table_of_ways(compared: Comparison) -> None:
    alone = replace(compared, rows=compared.rows[::4])
    assert len(tables(as_markdown(alone))) == 1


def test_a_title_with_a_bar_is_one_cell(compared: Comparison) -> None:
    contender = Candidate("a|b", list)
    text = as_markdown(replace(compared, rows=[replace(compared.rows[0], candidate=contender)]))
    assert text.splitlines()[2].startswith("| a\\|b | ddim | 2 |")


def test_the_sheet_shows_the_first_picture_of_every_prompt(compared: Comparison) -> None:
    """At the pictures' own size every one is there to the pixel, row by row, column by column."""
    shown = np.asarray(as_contact_sheet(compared, 40))
    corners = []
    for entry in compared.rows:
        row = [*entry.result.pictures[::2], *entry.result.class_pictures[::2]]
        corners.append([place_of(np.asarray(one.open()), shown) for one in row])
    for row in corners[4:16]:  # those of the base stand there twice
        assert len({top for top, _ in row}) == 1
    assert [row[0][0] for row in corners[4:16]] == sorted(row[0][0] for row in corners[4:16])
    for column in range(4):
        assert len({row[column][1] for row in corners}) == 1
    assert [left for _, left in corners[4]] == sorted({left for _, left in corners[4]})


def place_of(picture: np.ndarray[Any, Any], shown: np.ndarray[Any, Any]) -> tuple[int, int]:
    height, width = picture.shape[:2]
    for top, row in enumerate(shown):
        left = row.tobytes().find(picture[0].tobytes()) // 3
        if left >= 0 and np.array_equal(shown[top : top + height, left : left + width], picture):
            return top, left
    raise AssertionError("the picture is not in the sheet")


def crafted(judge: str = "CLIP", **marks: Sequence[tuple[float, float | None, float]]) -> Comparison:
    """Contenders by title, "s12" being step 12, each with (fidelity, CLIP-T, drift) for every way."""
    entries = []
    for title, ways in marks.items():
        contender = Candidate(title, list, int(title[-2:]) if title[-1].isdecimal() else None)
        entries += [
            ComparisonRow(contender, SampleConfig(steps=number), EvaluationResult(as_marks(*one, judge), [], [], []))
            for number, one in enumerate(ways, 1)
        ]
    return Comparison(entries, PROMPTS, CLASS_PROMPTS, {}, {judge: "scorer"})


def as_marks(fidelity: float, following: float | None, drift: float | None, judge: str = "CLIP") -> dict[str, float]:
    found = {"CLIP-I" if judge == "CLIP" else "DINO": fidelity, "CLIP-T": following, f"drift ({judge})": drift}
    return {name: value for name, value in found.items() if value is not None}


def test_the_plot_marks_the_best() -> None:
    """A panel for prompt following and one for drift; without CLIP-T one alone. One star each, and its legend."""
    marks = {"base": (0.5, 0.3, 0.0), "s01": (0.6, 0.31, 0.02), "s02": (0.7, 0.3, 0.05), "s03": (0.75, 0.27, 0.2)}
    both = as_plot(crafted(**{title: [one] for title, one in marks.items()}))
    assert both.size == (1144, 462)
    assert [heights_of_red(both.crop((left, 0, left + 572, 462))) in (1, 2) for left in (0, 572)] == [True, True]
    drift = as_plot(crafted("DINO", **{title: [(one[0], None, one[2])] for title, one in marks.items()}))
    assert drift.size == (572, 462)
    assert heights_of_red(drift) in (1, 2)
    assert heights_of_red(as_plot(crafted(base=[marks["base"]], s01=[marks["s01"]]))) == 0


def test_the_plot_shows_what_its_axes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first way alone, the base first; another adapter is no step of a run."""
    monkeypatch.setattr(comparison_report, "figure_as_picture", lambda figure: figure)
    marks = {"base": (0.5, 0.3, 0.0), "s01": (0.6, 0.31, 0.02), "s02": (0.7, 0.25, 0.05)}
    ways = {title: [one, (0.1, 0.1, 0.1)] for title, one in marks.items()}
    panels: Any = as_plot(crafted(**ways, file=[(0.9, 0.9, 0.9)]))
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in panels.axes] == [
        ("prompt following (CLIP-T)", "fidelity (CLIP-I)"),
        ("drift of the class", "fidelity (CLIP-I)"),
    ]
    for axes, place in zip(panels.axes, (1, 2), strict=True):
        line, star = axes.lines
        points = [(one[place], one[0]) for one in marks.values()]
        assert [tuple(point) for point in line.get_xydata()] == points
        assert [(text.get_text(), tuple(text.xy)) for text in axes.texts] == list(
            zip(("base", "1", "2"), points, strict=True)
        )
        assert tuple(star.get_xydata()[0]) == points[2]
        assert star.get_label() == "best: step 2"
    both = Comparison(
        crafted("DINO", base=[marks["base"]], s01=[marks["s01"]]).rows, [], [], {}, {"CLIP": "", "DINO": ""}
    )
    panels = as_plot(both)
    assert panels.axes[0].get_ylabel() == "fidelity (DINO)"
    partly = Comparison(
        [*crafted(s01=[marks["s01"]]).rows, *crafted(s02=[(0.7, None, 0.1)]).rows], [], [], {}, {"CLIP": "scorer"}
    )
    panels = as_plot(partly)
    assert [axes.get_xlabel() for axes in panels.axes] == ["drift of the class"]


def heights_of_red(image: Image.Image) -> int:
    """At how many separate heights something of the colour of the best stands."""
    rows = (np.abs(np.asarray(image, dtype=int) - (214, 39, 40)) < 60).all(-1).any(1)
    return int(np.count_nonzero(rows[1:] & ~rows[:-1]))


def test_every_way_has_its_say_in_the_best() -> None:
    """The first is better in one way, the second on the average; other adapters and the base are not asked."""
    ways = {"s01": [(0.8, 0.3, 0.1), (0.4, 0.3, 0.1)], "s02": [(0.7, 0.3, 0.1), (0.7, 0.3, 0.1)]}
    others = {"base": [(0.1, 0.3, 0.0)] * 2, "file": [(0.9, 0.9, 0.0)] * 2}
    best = crafted(**others, **ways).best
    assert best is not None
    assert best.candidate.step == 2
    swapped = crafted(s01=ways["s01"][:1], s02=ways["s02"][:1]).best
    assert swapped is not None
    assert swapped.candidate.step == 1


def test_two_checkpoints_are_needed_for_a_best() -> None:
    assert crafted(base=[(0.5, 0.3, 0.0)], s01=[(0.5, 0.3, 0.1)], file=[(0.5, 0.3, 0.1)]).best is None
    assert "Best" not in as_markdown(crafted(s01=[(0.5, 0.3, 0.1)]))


def test_the_same_step_of_two_runs_is_two_checkpoints() -> None:
    comparison = crafted(a_s03=[(0.5, 0.3, 0.1)], b_s03=[(0.9, 0.3, 0.1)], a_s04=[(0.6, 0.3, 0.1)])
    assert comparison.best is not None
    assert comparison.best.candidate.title == "b_s03"


@pytest.mark.parametrize(
    ("marks", "best"),
    [
        ([(0.5, 0.3, 0.1)], 0),
        ([(0.5, 0.3, 0.1), (0.8, 0.3, 0.1)], 1),
        ([(0.8, 0.2, 0.1), (0.8, 0.3, 0.1)], 1),
        ([(0.80, 0.3, 0.1), (0.81, 0.3, 0.2)], 0),  # as good, and drifts less
        ([(0.80, 0.3, 0.1), (0.84, 0.3, 0.2)], 1),  # better by more than noise
        ([(0.6, 0.4, 0.1), (0.9, 0.15, 0.0)], 0),  # likeness that is paid for with the prompt
        ([(0.5, 0.3, 0.2), (0.5, 0.3, 0.2), (0.5, 0.3, 0.1)], 2),
        ([(0.5, 0.3, 0.1), (0.5, 0.3, 0.1)], 0),
        ([(0.5, None, 0.1), (0.8, None, 0.2)], 1),
        ([(0.80, None, 0.2), (0.805, None, 0.1)], 1),
        ([(0.5, 0.3, None), (0.5, 0.3, None)], 0),
        ([(-0.9, 0.3, 0.1), (0.01, 0.3, 0.9)], 1),
        ([(-0.9, -0.3, 0.1), (-0.1, 0.3, 0.05)], 1),  # nothing is like the subject: the one that harms least
    ],
)
@pytest.mark.parametrize("judge", ["CLIP", "DINO"])
def test_which_to_keep(marks: list[tuple[float, float | None, float | None]], best: int, judge: str) -> None:
    assert best_index([as_marks(*one, judge=judge) for one in marks]) == best


def test_dino_has_the_say_if_both_judged() -> None:
    clip = [as_marks(0.9, 0.3, 0.1), as_marks(0.5, 0.3, 0.1)]
    dino = [as_marks(0.5, 0.3, 0.1, "DINO"), as_marks(0.9, 0.3, 0.1, "DINO")]
    assert [best_index(clip), best_index([one | other for one, other in zip(clip, dino, strict=True)])] == [0, 1]


def test_balance_is_the_geometric_mean() -> None:
    assert overall_score(as_marks(0.8, 0.1, 0.5)) == pytest.approx(0.4)  # fidelity counts twice
    assert overall_score(as_marks(0.4, 0.4, 0.1)) == pytest.approx(0.4)
    assert overall_score(as_marks(0.8, None, 0.5)) == 0.8
    assert overall_score(as_marks(-0.8, -0.2, 0.5)) == overall_score(as_marks(0.5, -0.2, 0.5)) == 0


cosines, drifts = st.floats(-0.25, 1, width=32), st.floats(0, 2, width=32)
checkpoint_marks = st.lists(st.tuples(cosines, cosines, drifts), min_size=1, max_size=8)


@given(checkpoint_marks, st.integers(-8, 8), st.sampled_from([0, 1]))
def test_the_scale_of_a_measure_is_no_matter(marks: list[tuple[float, ...]], power: int, measure: int) -> None:
    """By powers of eight, whose cube roots are exact."""
    scaled = [
        tuple(value * 8.0**power if place == measure else value for place, value in enumerate(one)) for one in marks
    ]
    assert best_index([as_marks(*one) for one in marks]) == best_index([as_marks(*one) for one in scaled])


@given(checkpoint_marks, st.data())
def test_better_in_everything_is_picked(marks: list[tuple[float, ...]], data: st.DataObject) -> None:
    fidelity, following, drift = (
        pick(column) for pick, column in zip((max, max, min), zip(*marks, strict=True), strict=True)
    )
    place = data.draw(st.integers(0, len(marks)))
    better = as_marks(fidelity + 0.01, following + 0.01, drift - 0.01)
    found = [as_marks(*one) for one in marks]
    assert best_index([*found[:place], better, *found[place:]]) == place


@given(checkpoint_marks)
def test_what_drifts_less_than_the_pick_is_worse(marks: list[tuple[float, ...]]) -> None:
    found = [as_marks(*one) for one in marks]
    pick, most = found[best_index(found)], max(map(overall_score, found))
    assert overall_score(pick) >= 0.99 * most or math.isclose(overall_score(pick), 0.99 * most)
    for one in found:
        assert one["drift (CLIP)"] >= pick["drift (CLIP)"] or overall_score(one) < 0.99 * most


def files(root: Path) -> dict[Path, tuple[int, int]]:
    """Every picture with what would change if it were written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(root.rglob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", mostly_slow([5, 20], 20))
def test_an_interrupted_comparison_goes_on(
    stop_after: int, compared: Comparison, world: World, runs: Mapping[str, Path], dino: Path, tmp_path: Path
) -> None:
    """What is drawn is not drawn again, and the end is the same."""
    found, listener = (
        [base_candidate(), *checkpoint_candidates(RunFolder(runs["plain"]).adapters(), "plain")[:2]],
        Recorder(),
    )
    one_way = {"schedulers": "ddim", "steps": "2"}

    def again(told: Recorder) -> Comparison:
        return compared_in(
            tmp_path, world, FeatureExtractors.open(str(DEMO / "scorer"), str(dino), CPU), found, told, **one_way
        )

    with pytest.raises(CancelledError):
        again(Recorder(stop_after=stop_after))
    before = files(tmp_path)
    assert len(before) < 3 * 8
    whole = again(listener)
    after = files(tmp_path)
    assert len(after) == 3 * 8  # two of each of two prompts, of the subject and the class
    assert after.items() >= before.items()
    for entry, expected in zip(whole.rows, compared.rows[:12:4], strict=True):
        assert entry.metrics == pytest.approx(expected.metrics, abs=1e-5)
    last = Recorder()
    assert as_json(again(last)) == as_json(whole)
    assert files(tmp_path) == after
    assert all(
        event.done == event.total for event in last.events if isinstance(event, Phase) and event.name != "scoring"
    )


def test_without_class_pictures_there_is_no_drift(
    world: World, runs: Mapping[str, Path], extractors: FeatureExtractors, tmp_path: Path
) -> None:
    studio = CachedGenerator(world.base, tmp_path, CPU, "fp32", Recorder())
    ways = [SampleConfig(count=1, width=64, height=64, steps=1, guidance=1.0)]
    comparison = compare_candidates(
        studio,
        evaluation(extractors, world),
        checkpoint_candidates(RunFolder(runs["plain"]).adapters(), "plain"),
        ways,
        prior=False,
    )
    assert {tuple(one.metrics) for one in comparison.rows} == {tuple(OF_PICTURES)}
    assert not any(one.result.class_pictures for one in comparison.rows)
    assert len(files(tmp_path)) == 3 * 2
    assert comparison.best is not None
    assert {path.name for path in write_report(comparison, tmp_path / "report").values()} >= {"table.md", "best.png"}


@pytest.fixture
def words(
    tiny_checkpoint: Path, world: World, dino: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> list[str]:
    """A comparison without its runs."""
    given = {"base": tiny_checkpoint, "subject": picture_folder(3), "output-dir": tmp_path / "out", "device": "cpu"}
    given |= {"clip": DEMO / "scorer", "dino": dino, "prompts": " | ".join(PROMPTS), "size": 32, "count": 1}
    return [
        "compare",
        *(str(word) for name, value in given.items() for word in (f"--{name}", value)),
        "--guidance",
        "1",
    ]


@pytest.mark.slow
def test_two_runs_by_scheduler_and_steps(
    words: list[str], runs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of DDIM and PNDM, fewer and more steps, with and without class pictures: of each run the last step."""
    given = [str(runs[name]) for name in ("plain", "priors")]
    assert main([*words, *given, "--schedulers", "ddim pndm", "--steps", "2 3", "--no-with-base"]) == 0
    shown = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert shown.startswith(table)
    whole, *by_way = tables(table)
    assert [row[0].strip("*") for row in whole[1:-1]] == ["plain, step 3"] * 4 + ["priors, step 3"] * 4
    for (measure, *titles), *rows in by_way:
        assert measure in ("CLIP-I", "DINO")
        assert titles == ["plain, step 3", "priors, step 3"]
        assert [row[0] for row in rows] == [f"{scheduler}, {steps} steps" for scheduler, steps in WAYS]
    assert len(by_way) == 2
    paths = shown.splitlines()[-5:]
    assert {Path(path).name for path in paths} == {"table.md", "table.csv", "table.json", "sheet.png", "best.png"}
    assert all(Path(path).is_file() for path in paths)


@pytest.mark.slow
def test_one_run_gives_its_best_step(
    words: list[str], runs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, str(runs["plain"]), "--steps", "1"]) == 0
    facts = strictly((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    titles = [f"plain, step {step}" for step in (1, 2, 3)]
    assert [one["adapter"] for one in facts["entries"]] == ["base", *titles]
    assert facts["best"]["adapter"] in titles
    adapter = RunFolder(runs["plain"]).adapters()[facts["best"]["step"]]
    assert str(adapter) in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("given", "titles"),
    [
        (["{plain}", "--checkpoints", "last"], ["plain, step 3"]),
        (["{plain}", "--checkpoints", "3,1"], ["plain, step 1", "plain, step 3"]),
        (["{plain}:0.5", "--checkpoints", "2"], ["plain, step 2 at 0.5"]),
        pytest.param(
            ["{plain}", "{priors}", "--checkpoints", "all"],
            [f"{r}, step {n}" for r in ("plain", "priors") for n in (1, 2, 3)],
            marks=pytest.mark.slow,  # which trains the second run
        ),
        (["{plain}", "{plain}"], ["plain, step 3", "plain, step 3 (2)"]),
        (["{file}:-1", "{file}"], ["{stem} at -1", "{stem}"]),
        (["{plain}", "{file}"], ["plain, step 1", "plain, step 2", "plain, step 3", "{stem}"]),
    ],
    ids=str,
)
def test_who_is_compared(given: list[str], titles: list[str], runs: Mapping[str, Path]) -> None:
    from pack.trainer.cli.evaluate import candidates_of

    file = RunFolder(runs["plain"]).adapters()[1]
    names = ChainMap({"file": file, "stem": file.stem}, runs)
    named, more = [one.format_map(names) for one in given], {}
    if "--checkpoints" in named:
        *named, _, more["checkpoints"] = named
    settings = {"base": "x", "subject": "x", "prompts": "x", "clip": "x", "runs": tuple(named), **more}
    found = candidates_of(CompareCommand.checked(settings))
    assert [one.title for one in found] == ["base", *(title.format_map(names) for title in titles)]
    for one in found[1:]:
        [(_, strength)] = one.load()
        at = re.search(r" at (\S+)", one.title)
        assert strength == (float(at[1]) if at else 1)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    for content in (None, "{", "[]", "{}"):
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(StorageError, match="is not a run folder"):
            RunFolder.existing(tmp_path)
    (tmp_path / "run.json").write_text('{"fingerprint": "1"}')
    assert RunFolder.existing(tmp_path).name == tmp_path.name
    with pytest.raises(AdapterError, match="contains no checkpoint with an adapter"):
        checkpoint_candidates(RunFolder.existing(tmp_path).adapters(), "empty")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], ["runs", "name a run folder or an adapter file"]),
        (["{plain}", "--schedulers", "heun"], ["schedulers", "heun", "ddim, pndm"]),
        (["{plain}", "--schedulers", " "], ["schedulers", "ddim, pndm"]),
        (["{plain}", "--steps", "0"], ["steps", "'0'", "1 to 1000"]),
        (["{plain}", "--steps", "30 1001"], ["steps", "1 to 1000"]),
        (["{plain}", "--steps", "abc"], ["steps", "'abc'", "numbers"]),
        (["{plain}", "--steps", ""], ["steps", "numbers"]),
        (["{plain}", "--size", "65"], ["size", "multiples of 8"]),
        (["{folder}"], ["{folder} is not a run folder", "run.json"]),
        (["{folder}/nothing"], ["nothing is neither a file nor a folder", "run folder or an adapter file"]),
        (["{plain}:much"], ["{plain}:much", "0.8"]),
        (["{plain}", "{text}"], ["{text}"]),
        (["{bare}"], ["The run bare contains no checkpoint with an adapter", "checkpoint_every"]),
        (["{plain}", "--checkpoints", "9"], ["{plain} has no checkpoint of step 9", "It has: 1, 2, 3"]),
        (["{plain}", "--checkpoints", "2 9"], ["{plain} has no checkpoint of step 9", "It has: 1, 2, 3"]),
        (["{plain}", "--checkpoints", "best"], ["checkpoints", "auto, all, last"]),
        (["{plain}", "--prompts", "sks dog|a photo of a dog"], ["'a photo of a dog'", "rare word 'sks'", "token"]),
        (["{plain}", "--prompts", " | "], ["prompts", "blank"]),
        (["{plain}", "--token", "ohwx"], ["rare word 'ohwx'", "token"]),
        (["{plain}", "--clip", "", "--dino", ""], ["neither --clip nor --dino", "openai/clip-vit-base-patch32"]),
        (["{plain}", "--clip", "nobody/nothing"], ["nobody/nothing", "preprocessor_config.json"]),
        (["{plain}", "--subject", "{folder}"], ["{folder} contains no pictures"]),
        (["{plain}", "--subject", "{folder}/nothing"], ["{folder}/nothing"]),
        (["{plain}", "--base", "{folder}/nothing"], ["{folder}/nothing"]),
        (["{plain}", "--count", "0"], ["count"]),
        (["{plain}", "--output-dir", "{text}"], ["{text} is a file"]),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_drawn(
    given: list[str],
    told: list[str],
    words: list[str],
    runs: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.safetensors").write_text("no adapter")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text('{"fingerprint": "1", "name": "bare"}')
    made = {"folder": tmp_path / "folder", "text": tmp_path / "text.safetensors", "bare": tmp_path / "bare"}
    names = ChainMap(made, runs)
    assert main([*words, *(one.format_map(names) for one in given)]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ") or "\nerror: " in captured.err
    assert captured.err.count("error: ") == captured.err.count("\nfix: ") == 1
    for text in told:
        assert text.format_map(names) in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "settings", "positional"),
    [("compare", CompareCommand, "runs"), ("dreambench", DreamBenchCommand, ""), ("score", ScoreCommand, "pictures")],
)
def test_help_names_every_setting(
    command: str,
    settings: type[Settings],
    positional: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help", "all"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in settings.model_fields.items():
        assert f"{field.description} [" in text
        assert bool(re.search(rf" --{name.replace('_', '-')}[ ,]", text)) == (name != positional)
