"""Tables and contact sheets of benchmarks/learning.py, from its results alone."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learning_ways import PEERS, WAYS
from PIL import Image

SUBJECT_NAMES = ("dog", "cat", "robot", "mug")
SEEDS = (0, 1, 2)
JUDGE_FILE, JUDGE_WEIGHTS = "judge.json", "judge.safetensors"
RECIPE_TITLE = "the recipe"
SEARCH_TABLE = "table.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
_LAST = {
    "clip_i": "CLIP-I",
    "recognised": "recognised",
    "clip_t": "CLIP-T",
    "place": "in its place",
    "drift": "drift",
    "plain": "plain",
    "taken": "taken",
    "other_drift": "others",
    "diversity": "diversity",
}
_COSTS = {"passes": "passes", "cpu_seconds": "seconds"}
_CURVE = {"clip_i": "CLIP-I", "recognised": "recognised"}
_REFERENCES = ("base", "truth")
_TITLES = ("subject", "subject", "subject", "class", "class", "class", "other", "other", "other")

Result = dict[str, Any]


def load_results(folder: Path) -> list[Result]:
    """The results in a folder of ways, in the order of ways, subjects and seeds."""
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/*.json"))
        if path.parent.name not in ("work", "search")
    ]


def missing_jobs(results: Sequence[Result], ways: Sequence[str]) -> list[str]:
    """Jobs of the full comparison that have no result yet."""
    done = {(result["way"], result["subject"], result["seed"]) for result in results}
    return [
        f"{way}, {subject}, seed {seed}"
        for way in ways
        for subject in SUBJECT_NAMES
        for seed in SEEDS
        if (way, subject, seed) not in done
    ]


def ways_in(results: Sequence[Result]) -> list[str]:
    """The ways that have results: base and truth first, then as the comparison lists them."""
    present = {result["way"] for result in results}
    return [way for way in (*_REFERENCES, *WAYS, *PEERS) if way in present]


def mean_and_spread(values: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Mean and standard deviation over seeds of the means over subjects.

    Args:
        values: (seed, value) of each subject and seed. A seed with fewer subjects than another is left out, since
            subjects differ more than seeds do.
    """
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        by_seed.setdefault(seed, []).append(value)
    most = max(len(of_seed) for of_seed in by_seed.values())
    means = [statistics.mean(of_seed) for of_seed in by_seed.values() if len(of_seed) == most]
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def as_page(results: Sequence[Result], folder: Path) -> str:
    """All tables, with what is missing and the judge's own test."""
    parts = [as_table(results), as_curves(results), judge_lines(folder)]
    of_each = len(SUBJECT_NAMES) * len(SEEDS)
    done = {way: sum(result["way"] == way for result in results) for way in ways_in(results) if way not in _REFERENCES}
    partial = [f"{way}: {count}" for way, count in done.items() if count < of_each]
    if partial:
        parts.insert(1, f"Of {of_each} jobs (4 subjects, 3 seeds) some ways have run fewer. {'; '.join(partial)}.")
    searched = folder / "search" / SEARCH_TABLE
    if searched.is_file():
        parts.append(searched.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def as_table(results: Sequence[Result]) -> str:
    """A row for each way, at the end of its training."""
    lines = [
        _row(["way", *_LAST.values(), *_COSTS.values(), "jobs"]),
        _row(["---"] * (2 + len(_LAST) + len(_COSTS))),
    ]
    for way in ways_in(results):
        of_way = [result for result in results if result["way"] == way]
        cells = [way]
        for name in _LAST:
            values = [(result["seed"], result["curve"][-1][name]) for result in of_way if name in result["curve"][-1]]
            cells.append(_cell(values, 3, spread=way not in _REFERENCES))
        for name in _COSTS:
            costs = [(result["seed"], float(result[name])) for result in of_way if result.get(name)]
            cells.append(_cell(costs, 0, spread=False))
        lines.append(_row([*cells, str(len(of_way))]))
    return "\n".join(lines)


def as_curves(results: Sequence[Result]) -> str:
    """Fidelity and drift after so many steps, a row for each way."""
    steps = sorted({point["step"] for result in results for point in result["curve"] if point["step"]})
    titles = [f"{title}, {step}" for title in _CURVE.values() for step in steps]
    lines = [_row(["way", *titles]), _row(["---"] * (1 + len(titles)))]
    for way in ways_in(results):
        if way in _REFERENCES:
            continue
        cells = [way]
        for name in _CURVE:
            for step in steps:
                values = [
                    (result["seed"], point[name])
                    for result in results
                    if result["way"] == way
                    for point in result["curve"]
                    if point["step"] == step
                ]
                cells.append(_cell(values, 3, spread=False))
        lines.append(_row(cells))
    return "\n".join(lines)


def judge_lines(folder: Path) -> str:
    """What the judge got right of drawings that it had not seen."""
    accuracy = json.loads((folder / JUDGE_FILE).read_text(encoding="utf-8"))
    names = [name for name in sorted(accuracy) if not name.endswith(" decoded")]
    lines = [_row(["the judge on new drawings", *names]), _row(["---"] * (1 + len(names)))]
    for title, suffix in (("as drawn", ""), ("through the autoencoder", " decoded")):
        lines.append(_row([title, *(f"{accuracy[name + suffix]:.3f}" for name in names)]))
    return "\n".join(lines)


def as_csv(results: Sequence[Result]) -> str:
    """A line for each way, subject, seed and step."""
    columns = list(dict.fromkeys(name for result in results for point in result["curve"] for name in point))
    costs = ["passes", "passes_of_class_pictures", "cpu_seconds", "seconds"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["way", "subject", "seed", *columns, *costs], lineterminator="\n")
    writer.writeheader()
    for result in results:
        facts = {name: result[name] for name in ("way", "subject", "seed")}
        for point in result["curve"]:
            is_last = point is result["curve"][-1]
            writer.writerow({**facts, **point, **({name: result.get(name, 0) for name in costs} if is_last else {})})
    return stream.getvalue()


def search_table(
    results: Sequence[Result],
    tuned_on: Sequence[str],
    judged_on: Sequence[str],
    objective: Callable[[dict[str, float]], float],
) -> str:
    """A row for each trial, the best first: its objective, and what it gains over the recipe.

    A gain is the mean over subjects and seeds of the differences from the recipe with the same subject and seed, with
    its standard error.
    """
    scores = {(result["way"], result["subject"], result["seed"]): objective(result["curve"][-1]) for result in results}
    ways = list(dict.fromkeys(result["way"] for result in results))
    rows = []
    for way in ways:
        cells = []
        means = []
        for subjects in (tuned_on, judged_on):
            of_way = {
                (subject, seed): score
                for (trial, subject, seed), score in scores.items()
                if trial == way and subject in subjects
            }
            means.append(statistics.mean(of_way.values()) if of_way else None)
            differences = [
                score - scores[RECIPE_TITLE, subject, seed]
                for (subject, seed), score in of_way.items()
                if (RECIPE_TITLE, subject, seed) in scores
            ]
            cells += [f"{means[-1]:.3f}" if of_way else "–", _gain(differences) if way != RECIPE_TITLE else "–"]
        rows.append((means[0] or 0.0, [way, *cells]))
    titles = [" + ".join(subjects) for subjects in (tuned_on, judged_on)]
    lines = [_row(["trial", titles[0], "gain", titles[1], "gain"]), _row(["---"] * 5)]
    lines += [_row(cells) for _, cells in sorted(rows, key=lambda row: -row[0])]
    return "\n".join(lines) + "\n"


def _gain(differences: Sequence[float]) -> str:
    if not differences:
        return "–"
    if len(differences) == 1:
        return f"{differences[0]:+.3f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.3f} ± {error:.3f}"


def put_into_page(page: Path, text: str) -> None:
    """Replace what stands between a page's markers."""
    content = page.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}. Add them where the tables belong.")
    before, _, rest = content.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def contact_sheet_of(folder: Path, ways: Sequence[str], seed: int = 0) -> Image.Image:
    """Pictures of each subject, beneath one another: of the subject, its class, and others, in three places each."""
    from trainer.core.figures import SheetRow, contact_sheet  # here alone, so that tables need nothing of the trainer

    sheets = []
    for subject in SUBJECT_NAMES:
        rows = []
        for way in ("base", *ways):
            strip = folder / "work" / "strips" / way / f"{subject}-{seed}.png"
            if strip.is_file():
                rows.append(SheetRow(way, tuple(_cut(Image.open(strip)))))
        if rows:
            sheets.append(contact_sheet(f"{subject}, seed {seed}", _TITLES, rows, cell=64))
    if not sheets:
        raise SystemExit(f"{folder} holds no pictures. Run something first.")
    whole = Image.new("RGB", (max(part.width for part in sheets), sum(part.height for part in sheets)), "white")
    top = 0
    for part in sheets:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _cut(strip: Image.Image) -> list[Image.Image]:
    return [strip.crop((left, 0, left + 64, 64)) for left in range(0, strip.width, 64)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(values: Sequence[tuple[int, float]], digits: int, *, spread: bool) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_spread(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if spread and deviation else f"{mean:.{digits}f}"
