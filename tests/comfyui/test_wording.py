"""How the nodes word the settings that the engine names in errors and notes: every one of them, in terms of nodes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from typing import Any

import pytest
from comfy_host import ENVIRONMENT, find_comfyui, find_python
from helpers import ROOT
from setting_words import TEXTS, settings_names, suggested_names

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"),
]
# What runs in ComfyUI's own Python: reads the settings' names, and prints how they are worded.
PROGRAM = """
import importlib.util, json, sys
comfyui, root = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfyui)
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from pack.nodes import NODES, wording
from pack.nodes.base import NodeError
from pack.nodes.host_routes import _run_pages
from pack.trainer.core.errors import SettingsError, suggest
names, asked = json.load(sys.stdin)
nodes = {node.__name__: node for node in NODES}
answer = {
    "unworded": [name for name in names if not wording.is_worded(name)],
    "stale": sorted({*wording._IN_THE_GRAPH, *wording._COMMAND_LINE_ONLY} - set(names)),
    "texts": [wording.wording_of(nodes.get(node))(name, value) for node, name, value in asked],
    "failure": _run_pages()._completed(
        {"id": "dog", "state": "failed", "problem": "NaN.", "remedy": f"Start again with {suggest('resume', 'never')}."}
    ),
    "error": str(
        NodeError(
            SettingsError(f"{suggest('rank')} is low.", f"Start again with {suggest('resume', 'never')}."),
            wording.wording_of(nodes["TrainLora"].PREPARE_CLASS_CLONE(None)),
        )
    ),
}
print("ANSWER" + json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    comfyui = find_comfyui()
    assert comfyui is not None
    names = sorted({*suggested_names(), *settings_names()})
    command = [str(find_python(comfyui)), "-c", PROGRAM, str(comfyui), str(ROOT)]
    done = subprocess.run(
        command, input=json.dumps([names, list(TEXTS)]), env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("ANSWER")[2])


def test_every_setting_that_the_engine_suggests_has_a_wording(answer: dict[str, Any]) -> None:
    assert answer["unworded"] == []
    assert answer["stale"] == []
    assert len({*suggested_names()}) > 50


def test_settings_are_worded_as_the_node_at_hand_needs_it(answer: dict[str, Any]) -> None:
    assert dict(zip(TEXTS, answer["texts"], strict=True)) == TEXTS


def test_an_error_begins_with_its_remedy(answer: dict[str, Any]) -> None:
    """Also one of the clone of a node's class that ComfyUI runs."""
    assert answer["error"] == "Start again with resume = never (on Training Settings).\n\nrank is low."


def test_errors_and_notes_are_shown_worded() -> None:
    """The nodes show no text of the engine as it is written: its settings are marked for faces to word."""
    plain = []
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("problem", "remedy"):
                plain.append(f"{path.name}:{node.lineno}")
    assert plain == []


def test_comfyui_s_interface_is_named_in_one_place() -> None:
    """By a numbered version, which stays as it is; `comfy_api.latest` may change with every release."""
    modules: dict[str, set[str]] = {}
    for path in [ROOT / "__init__.py", ROOT / "install.py", *(ROOT / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if name.split(".")[0] in ("comfy_api", "comfy_extras", "comfy_execution"):
                    modules.setdefault(path.name, set()).add(name)
    [(file, [module])] = [(file, sorted(names)) for file, names in modules.items()]
    assert file == "api.py"
    comfyui = find_comfyui()
    assert comfyui is not None
    package, version = module.split(".")
    assert (comfyui / package / version / "__init__.py").is_file()
    assert version.removeprefix("v").replace("_", "").isdecimal()


def test_a_failed_run_is_worded_when_pages_ask_for_it_later(answer: dict[str, Any]) -> None:
    """Its folder keeps the remedy without any face's words."""
    remedy = "Start again with resume = never (on Training Settings)."
    assert answer["failure"] == {"id": "dog", "state": "failed", "problem": "NaN.", "remedy": remedy}
