"""What the nodes tell ComfyUI of themselves, every day and without it: inputs, their order and ranges, and their words.

`golden/node_schemas.json` holds the widgets as saved workflows know them: by their places, names and choices.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_host import all_nodes
from helpers import ROOT
from make_locales import LOCALES, SYNTAX
from pack.trainer.core.errors import SettingsError, suggest
from setting_words import TEXTS, settings_names, suggested_names

GOLDEN = ROOT / "tests" / "golden" / "node_schemas.json"
WORKFLOWS = sorted(path for folder in ("example_workflows", "subgraphs") for path in (ROOT / folder).glob("*.json"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with all_nodes(tmp_path_factory.mktemp("host")) as package:
        yield package


def facts_of(input: Any) -> dict[str, Any]:
    """All of an input but its texts."""
    facts = {"id": input.id, "type": input.get_io_type(), "setting": getattr(input, "setting", None)}
    facts["optional"] = input.optional or None
    if hasattr(input, "default"):
        facts |= {"default": input.default} | input.options
    elif hasattr(input, "template"):
        facts["template"] = vars(input.template)
    elif hasattr(input, "options"):
        facts["options"] = {option.key: [facts_of(inner) for inner in option.inputs] for option in input.options}
    return {name: fact for name, fact in facts.items() if fact is not None or name == "default"}


def schema_facts(schema: Any) -> dict[str, Any]:
    return {
        "category": schema.category,
        "output_node": schema.is_output_node,
        "hidden": schema.hidden,
        "outputs": [[output.get_io_type(), output.display_name] for output in schema.outputs],
        "inputs": [facts_of(input) for input in schema.inputs],
    }


def test_nodes_have_the_inputs_that_saved_workflows_know(nodes: Any, tmp_path: Path) -> None:
    """An input that is new stands behind those of before; nothing else may change."""
    schemas = [node.define_schema() for node in nodes.NODES]
    now = {schema.node_id: schema_facts(schema) for schema in schemas}
    fresh = tmp_path / GOLDEN.name
    fresh.write_text(as_lines(now), encoding="utf-8")
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert json.loads(fresh.read_text(encoding="utf-8")) == kept, f"If that is meant so, copy {fresh} to {GOLDEN}."
    assert list(now) == list(kept)


def as_lines(schemas: dict[str, Any]) -> str:
    """JSON with a line for each input, to be read in a diff."""
    parts = []
    for name, facts in schemas.items():
        inputs = ",\n".join(f"   {json.dumps(input, ensure_ascii=False)}" for input in facts["inputs"])
        others = "".join(
            f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in facts.items() if key != "inputs"
        )
        parts.append(f' {json.dumps(name)}: {{\n{others}  "inputs": [\n{inputs}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_saved_workflows_have_every_widget(path: Path) -> None:
    """A template or subgraph that lacks one was not made again (tools/make_workflows.py)."""
    schemas = json.loads(GOLDEN.read_text(encoding="utf-8"))
    saved = json.loads(path.read_text(encoding="utf-8"))
    graphs = [saved, *(saved.get("definitions") or {}).get("subgraphs", [])]
    ours = [node for graph in graphs for node in graph["nodes"] if node["type"] in schemas]
    assert ours
    for node in ours:
        inputs = schemas[node["type"]]["inputs"]
        widgets = [each["id"] for each in inputs if each["type"] in WIDGETS and not each.get("force_input")]
        shown = [each["widget"]["name"] for each in node["inputs"] if each.get("widget")]
        assert [name for name in shown if "." not in name] == widgets, node["type"]  # "." is in those of a choice


def test_the_extension_gives_all_nodes(nodes: Any) -> None:
    assert asyncio.run(nodes.extension().get_node_list()) == nodes.NODES
    assert len({node.define_schema().node_id for node in nodes.NODES}) == 19


def test_texts_are_those_that_are_translated(nodes: Any) -> None:
    """Names, descriptions and tooltips, but for those with syntax of the frontend's translator."""
    translated = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    compared = 0
    for node in nodes.NODES:
        schema = node.define_schema()
        texts = translated[schema.node_id]
        assert (schema.display_name, schema.description) == (texts["display_name"], texts["description"])
        tooltips = [(each.id, texts["inputs"][each.id], each.tooltip) for each in schema.inputs]
        tooltips += [
            (f"{outer.id}.{each.id}", texts["inputs"][f"{outer.id}_{each.id}"], each.tooltip)
            for outer in schema.inputs
            for each in outer.get_all()[1:]
        ]
        for number, output in enumerate(schema.outputs):
            if str(number) in texts["outputs"]:
                tooltips.append((f"output {number}", texts["outputs"][str(number)], output.tooltip))
        for name, words, tooltip in tooltips:
            shown = None if SYNTAX & set(tooltip or "") else tooltip
            assert words.get("tooltip") == shown, (schema.node_id, name)
            compared += 1
    assert compared > 200


def test_settings_are_worded_as_the_node_at_hand_needs_it(nodes: Any) -> None:
    wording = importlib.import_module("pack.nodes.wording")
    classes = {node.__name__: node for node in nodes.NODES}
    worded = {asked: wording.wording_of(classes.get(asked[0] or ""))(*asked[1:]) for asked in TEXTS}
    assert worded == TEXTS


def test_every_setting_that_the_engine_suggests_has_a_wording(nodes: Any) -> None:
    wording = importlib.import_module("pack.nodes.wording")
    names = {*suggested_names(), *settings_names()}
    assert [name for name in sorted(names) if not wording.is_worded(name)] == []
    assert {*wording._IN_THE_GRAPH, *wording._COMMAND_LINE_ONLY} <= names


def test_an_error_begins_with_its_remedy(nodes: Any) -> None:
    """Also one of the clone of a node's class that ComfyUI runs."""
    base = importlib.import_module("pack.nodes.base")
    wording = importlib.import_module("pack.nodes.wording")
    clone = type("Clone", (nodes.TrainLora,), {})
    error = SettingsError(f"{suggest('rank')} is low.", f"Start again with {suggest('resume', 'never')}.")
    worded = "Start again with resume = never (on Training Settings).\n\nrank is low."
    assert str(base.NodeError(error, wording.wording_of(clone))) == worded
