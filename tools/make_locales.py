"""Writes locales/en/nodeDefs.json from the nodes' own schemas, as a real ComfyUI describes them.

    python tools/make_locales.py [--out FOLDER]

Run it when a node, an input, an output or one of their texts has changed. The other languages are written by hand; the
texts that they lack are listed, and ComfyUI shows these in English. Needs a ComfyUI (see CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests" / "support")]

from comfy_host import ComfyServer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
MODULE = "custom_nodes.dreambooth-lora"
# Characters that vue-i18n takes for its syntax: in names and descriptions always, in tooltips in frontends of 2025.
SYNTAX = frozenset("{}@|")

Texts = dict[str, Any]  # "name" and "tooltip"


def english(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of this pack's nodes in the frontend's format, from an answer of /object_info."""
    return {node: _node_texts(info) for node, info in object_info.items() if info["python_module"] == MODULE}


def missing(english: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Nodes, inputs and outputs that a language lacks, such as DreamBoothTrainLora.inputs.rank."""
    keys = [node for node in english if node not in other]
    for node in english.keys() & other.keys():
        for part in ("inputs", "outputs"):
            keys += [f"{node}.{part}.{key}" for key in english[node][part] if key not in other[node][part]]
    return sorted(keys)


def as_file(texts: Mapping[str, Any]) -> str:
    """The content of a nodeDefs.json."""
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def _node_texts(info: Mapping[str, Any]) -> Texts:
    inputs = {
        key: texts
        for kind in ("required", "optional")
        for name, spec in info["input"].get(kind, {}).items()
        for key, texts in _input_texts(name, name, spec)
    }
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    outputs = {
        str(index): _texts(name, tooltip)
        for index, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def _input_texts(path: str, name: str, spec: Any) -> Iterator[tuple[str, Texts]]:
    """The texts of an input and of the inputs of its options; the frontend writes the dots of a path as _."""
    options = spec[1] if len(spec) > 1 else {}
    yield path.replace(".", "_"), _texts(name, options.get("tooltip"))
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        for option in options["options"]:
            for inputs in option["inputs"].values():
                for inner, inner_spec in inputs.items():
                    yield from _input_texts(f"{path}.{inner}", inner, inner_spec)


def _texts(name: str, tooltip: str | None) -> Texts:
    """A tooltip with a character of `SYNTAX` is left out: the frontend then shows the node's own."""
    return {"name": name} | ({"tooltip": tooltip} if tooltip and not SYNTAX & set(tooltip) else {})


def main() -> None:
    """Write the English file and list what the others lack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=LOCALES, metavar="FOLDER", help="default: locales")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ComfyServer(Path(scratch), pack=ROOT) as server:
        texts = english(server.object_info())
    (arguments.out / "en").mkdir(parents=True, exist_ok=True)
    (arguments.out / "en" / "nodeDefs.json").write_text(as_file(texts), encoding="utf-8")
    for path in sorted(LOCALES.glob("*/nodeDefs.json")):
        for key in missing(texts, json.loads(path.read_text(encoding="utf-8"))):
            sys.stderr.write(f"{path.parent.name}: {key} is missing\n")


if __name__ == "__main__":
    main()
