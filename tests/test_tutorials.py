"""The tutorials: what they link to is there, what they set can be set, and what they quote is what the pack reports."""

from __future__ import annotations

import importlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, Recorder
from make_tutorial_pictures import PARTS
from pack.trainer.cli.plan import run_plan
from pack.trainer.core.errors import plain, worded
from pack.trainer.core.toml import read_toml
from pack.trainer.models.families import FAMILIES
from pack.trainer.settings.train import PlanCommand, TrainCommand, TrainSettings
from pack.trainer.training.presets import apply_preset, preset_subjects
from workflow_recipes import RECIPES

FOLDER = ROOT / "docs" / "tutorials"
INDEX = FOLDER / "README.md"
PAGES = sorted(set(FOLDER.glob("*.md")) - {INDEX})
TEXTS = {path: path.read_text(encoding="utf-8") for path in [INDEX, *PAGES]}
MOST_BYTES = 300_000  # of a picture
_FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
_LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
_HEADER = "| Node | Widget | Value | Why |"
_NODES = {
    title: node_id
    for path in (ROOT / "nodes").glob("*.py")
    for node_id, title in re.findall(
        r'node_id="(\w+)",\s+display_name="([^"]+) \(DreamBooth\)"', path.read_text(encoding="utf-8")
    )
}


@dataclass(frozen=True)
class Row:
    """A line of a page's table of settings."""

    node: str
    widget: str
    value: str
    why: str


def prose(text: str) -> str:
    """A page without its blocks of commands and quotations."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    return [target for target in _LINK.findall(prose(text)) if "://" not in target]


def anchors(text: str) -> set[str]:
    """What GitHub calls a page's headings."""
    found = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", prose(text)):
        kept = "".join(c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LN")
        found.add(kept.replace(" ", "-"))
    return found


def templates_of(text: str) -> set[str]:
    return {Path(target).stem for target in links(text) if target.endswith(".json")}


def rows(text: str) -> Iterator[Row]:
    for table in re.findall(rf"(?m)^{re.escape(_HEADER)}\n\|[-|]+\n((?:\|.*\n)+)", text):
        for line in table.splitlines():
            node, widget, value, why = (cell.strip() for cell in line.strip("|").split(" | "))
            yield Row(node, widget.strip("`"), value, why)


def quoted(text: str, start: str) -> list[str]:
    """The lines of quotations that begin so."""
    return [line for _, block in _FENCE.findall(text) for line in block.splitlines() if line.startswith(start)]


def test_the_index_names_every_page() -> None:
    assert {target for target in links(TEXTS[INDEX]) if re.fullmatch(r"[\w-]+\.md", target)} == {p.name for p in PAGES}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in links(TEXTS[page]):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_a_template_that_there_is(page: Path) -> None:
    """By links to the file and, for the first, to its picture; what is bold and has underscores is a template, too."""
    text = TEXTS[page]
    assert templates_of(text)
    assert templates_of(text) <= set(RECIPES)
    pictures = {Path(target).stem for target in links(text) if target.endswith(".jpg")}
    assert pictures
    assert pictures <= templates_of(text)
    assert set(re.findall(r"\*\*([a-z0-9]+(?:_[a-z0-9]+)+)\*\*", text)) <= set(RECIPES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_sets_what_can_be_set(page: Path) -> None:
    schemas = json.loads((ROOT / "tests" / "golden" / "node_schemas.json").read_text(encoding="utf-8"))
    settings = list(rows(TEXTS[page]))
    assert len(settings) == len(re.findall(r"(?m)^\| [^|]+ \| `\w+` \| [^|]+ \| ", TEXTS[page])) > 0
    for row in settings:
        widget = {each["id"]: each for each in schemas[_NODES[row.node]]["inputs"]}[row.widget]
        if "options" in widget and row.widget not in ("folder", "file"):  # which are what a user has
            assert row.value in widget["options"], row
        if widget["type"] == "BOOLEAN":
            assert row.value in ("true", "false"), row
        if widget["type"] in ("INT", "FLOAT"):
            assert widget.get("min", -math.inf) <= float(row.value) <= widget.get("max", math.inf), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_templates_have_is_what_pages_say(page: Path) -> None:
    """ "The template has 600" in a row of settings."""
    nodes = [node for name in templates_of(TEXTS[page]) for node in RECIPES[name].nodes.values()]
    for row in rows(TEXTS[page]):
        for number in re.findall(r"[Tt]he template has (\d+)", row.why):
            assert int(number) in {node.values.get(row.widget) for node in nodes if node.type == _NODES[row.node]}, row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_presets_are_quoted_as_the_log_reports_them(page: Path) -> None:
    known = set()
    for subject in preset_subjects():
        for family in FAMILIES:
            listener = Recorder()
            apply_preset(TrainSettings(preset=subject), family, listener, ())
            known |= {event.text for event in listener.events}
    assert set(quoted(TEXTS[page], "Preset ")) <= known


def test_presets_are_quoted_where_they_are_chosen() -> None:
    chosen = [FOLDER / f"{name}.md" for name in ("my-dog", "my-face", "a-style")]
    assert all(len(quoted(TEXTS[page], "Preset ")) == 2 for page in chosen)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_files_are_taken(page: Path, tmp_path: Path) -> None:
    for number, (language, block) in enumerate(_FENCE.findall(TEXTS[page])):
        if language == "toml":
            path = tmp_path / f"{number}.toml"
            path.write_text(block, encoding="utf-8")
            assert TrainCommand.checked(read_toml(path)).without_effect() == {}


def test_pictures_are_small_and_made_by_the_tool() -> None:
    pictures = list(FOLDER.glob("*.png"))
    assert {path.stem for path in pictures} == set(PARTS)
    assert [path.name for path in pictures if path.stat().st_size > MOST_BYTES] == []
    shown = {target for text in TEXTS.values() for target in links(text)}
    assert {path.name for path in pictures} <= shown


@pytest.mark.slow
def test_the_plan_is_quoted_as_the_command_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a checkpoint of zeros of SDXL's size. Figures within 5 %: other versions of torch measure other peaks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    base = tmp_path / "sd_xl_base_1.0.safetensors"
    importlib.import_module("fit").write_zeros(base, "sdxl")
    settings = PlanCommand.checked(
        {
            "base": base,
            "tokenizer": ROOT / "demo" / "base" / "tokenizer",
            "resolution": 1024,
            "rank": 8,
            "targets": "attention",
            "memory": 8.0,
            "device": "cpu",
        }
    )
    printed = worded(run_plan(settings), plain).splitlines()
    page = TEXTS[FOLDER / "sdxl-on-8-gb.md"]
    base = "../../models/checkpoints/sd_xl_base_1.0.safetensors"
    assert f"plan --base {base} --resolution 1024 --rank 8 --targets attention --memory 8" in page
    for start in ("Stable Diffusion XL, bf16", "as set", "gradient checkpointing", "Chosen for"):
        expected = [line for line in printed if line.startswith(start) and "adamw" not in line and "nf4" not in line]
        for ours, theirs in zip(quoted(page, start), expected, strict=True):
            number = r"(?<= )-?\d+\.\d+"
            assert re.sub(r"\s+", " ", re.sub(number, "#", ours)) == re.sub(r"\s+", " ", re.sub(number, "#", theirs))
            figures = [[float(each) for each in re.findall(number, line)] for line in (ours, theirs)]
            assert figures[0] == pytest.approx(figures[1], rel=0.05, abs=0.02)
