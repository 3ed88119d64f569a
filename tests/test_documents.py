"""README.md is short, and what the documents link to, show, list and quote from committed results is there."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import ROOT
from pack.trainer.__main__ import parse

README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "demo/README.md")),
    *sorted(DOCS.glob("**/*.md")),
]
MOST_LINES_OF_README = 150
CARD_FAMILIES = ("sdxl", "flux2", "zimage", "krea2", "anima")
CARD_ROWS = {  # title in docs/training.md: name in the results
    "plain": "plain",
    "every fourth block recomputed": "every fourth block recomputed",
    "every second block": "every second block recomputed",
    "every block": "every block recomputed",
    "and half of the blocks swapped": "half of the blocks swapped",
    "and all blocks swapped": "all blocks swapped",
    "every block, NF4": "NF4, every block recomputed",
    "every block, base in fp8": "every block recomputed, fp8 base",
    "all blocks swapped, base in fp8": "all blocks swapped, fp8 base",
}
_FENCE = re.compile(r"(?ms)^```[^\n]*\n.*?^```$")
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"(?m)^#{1,6} +(.+?) *$")


def text_of(document: Path) -> str:
    """A document without its blocks of code."""
    return _FENCE.sub("", document.read_text(encoding="utf-8"))


def links_of(document: Path) -> Iterator[str]:
    """What a document links to or shows, within this repository."""
    for target in _LINK.findall(_CODE.sub("", text_of(document))):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    anchors: set[str] = set()
    for heading in _HEADING.findall(text_of(document)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        kept = (one for one in words if one in " -_" or unicodedata.category(one)[0] in "LN")
        anchor = "".join(kept).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in anchors:
            number += 1
        anchors.add(name)
    return anchors


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def first_cells(document: Path, heading: str) -> set[str]:
    """The words in backticks in the first cells of a section's table."""
    section = re.split(r"(?m)^#+ ", document.read_text(encoding="utf-8").partition(f"{heading}\n")[2])[0]
    rows = (line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    return {words.split()[0] for row in rows for words in re.findall(r"`([^`]+)`", row)}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_README


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in links_of(document):
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not (target.is_relative_to(ROOT.resolve()) and target.exists()):
            broken.append(f"{link}: there is no such file")
        elif anchor and anchor not in anchors_of(target):
            broken.append(f"{link}: {named(target)} has no such heading")
    assert broken == []


def test_every_page_is_found_from_readme() -> None:
    found, waiting = set(), [README]
    while waiting:
        document = waiting.pop()
        found.add(document)
        targets = {(document.parent / unquote(link).partition("#")[0]).resolve() for link in links_of(document)}
        waiting += [path for path in targets - found if path.suffix == ".md" and path.is_file()]
    assert {named(path) for path in DOCS.glob("**/*.md")} - {named(path) for path in found} == set()


def test_every_picture_is_shown() -> None:
    shown = {
        (document.parent / unquote(link).partition("#")[0]).resolve()
        for document in DOCUMENTS
        for link in links_of(document)
    }
    shown |= {DOCS / "icon.png", DOCS / "banner.png"}  # by ComfyUI's registry: see test_registry.py
    pictures = {path for ending in ("png", "jpg", "gif", "webp", "svg") for path in DOCS.glob(f"**/*.{ending}")}
    assert {named(path) for path in pictures if path.resolve() not in shown} == set()


def test_every_template_is_listed() -> None:
    templates = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
    assert first_cells(DOCS / "comfyui.md", "## Templates") == templates


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    commands = set(re.findall(r"(?m)^    ([a-z][a-z-]*)(?: |$)", capsys.readouterr().out))
    assert {"train", "generate", "inspect"} < commands
    assert commands - first_cells(DOCS / "command-line.md", "# Command line") == set()


def rows_below(document: Path, head: str) -> list[list[str]]:
    """The cells of the table with this first line."""
    table = document.read_text(encoding="utf-8").partition(f"{head}\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def test_kinds_of_klein_are_those_of_the_results() -> None:
    results = json.loads((RESULTS / "kinds-flux2.json").read_text(encoding="utf-8"))
    base, truth = results["ends"]["base"], results["ends"]["truth"]
    head = f"| kind | rank | fidelity (base {base:.3f}, truth {truth:.3f}) | dog drift | other drift |"
    assert rows_below(DOCS / "training.md", head) == [
        [row["kind"], str(row["rank"]), *(f"{row[name][0]:.3f}" for name in ("fidelity", "dog_drift", "other_drift"))]
        for row in results["table"]
    ]


def test_plans_for_cards_are_those_of_the_results() -> None:
    families = json.loads((RESULTS / "cards-plan.json").read_text(encoding="utf-8"))["families"]
    columns = [families[name] for name in ("sd15 512", *(f"{one} 1024" for one in CARD_FAMILIES))]
    rows = rows_below(DOCS / "training.md", "| | SD 1.5 | SDXL | klein 4B | Z-Image | Krea 2 | Anima |")
    assert rows == [
        [title, *(f"{column[way]['planned']:.2f}" if way in column else "–" for column in columns)]
        for title, way in CARD_ROWS.items()
    ]
