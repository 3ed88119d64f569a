"""Turns a workflow as the browser saves it into a prompt as the server takes it, by the server's definitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_CONTROLS = {"fixed", "increment", "decrement", "randomize"}


def as_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a workflow.

    Args:
        workflow: Content of a workflow file.
        object_info: The server's /object_info.

    Returns:
        Node id → {"class_type", "inputs"}. Notes are left out.

    Raises:
        KeyError: A node or an input does not exist in this server.
        ValueError: A node has more or fewer widget values than widgets.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: dict[str, dict[str, Any]] = {}
    for node in workflow["nodes"]:
        if node["type"] in ("MarkdownNote", "Note"):
            continue
        definition = object_info[node["type"]]
        inputs = _widget_values(node, definition)
        known = _specs(definition)
        for slot in node["inputs"]:
            if slot.get("link") is not None:
                known[slot["name"]]  # a KeyError names an input that is gone
                inputs[slot["name"]] = sources[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _specs(definition: Mapping[str, Any]) -> dict[str, Any]:
    return {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}


def _widget_values(node: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    specs = _specs(definition)
    names = [name for kind in ("required", "optional") for name in definition["input_order"].get(kind, [])]
    widgets = [name for name in names if isinstance(specs[name][0], list) or specs[name][0] in _WIDGETS]
    values = list(node.get("widgets_values") or [])
    found = {}
    for name in widgets:
        if not values:
            raise ValueError(f"{node['type']}: no value for {name}")
        found[name] = values.pop(0)
        if values and values[0] in _CONTROLS and len(specs[name]) > 1 and specs[name][1].get("control_after_generate"):
            values.pop(0)
    if values:
        raise ValueError(f"{node['type']}: values without a widget: {values}")
    return found
