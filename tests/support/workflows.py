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
        specs = _specs(object_info[node["type"]])
        inputs = _widget_values(node, specs)
        known = {**specs, **_grown(specs)}
        for slot in node["inputs"]:
            if slot.get("link") is not None:
                known[slot["name"]]  # a KeyError names an input that is gone
                inputs[slot["name"]] = sources[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _specs(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Input → its definition, in the order of the node's."""
    given = definition["input"]
    specs = {**given.get("required", {}), **given.get("optional", {})}
    order = [name for kind in ("required", "optional") for name in definition["input_order"].get(kind, [])]
    return {name: specs[name] for name in order}


def _grown(specs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that appear as others are connected."""
    found = {}
    for name, spec in specs.items():
        if spec[0] == "COMFY_AUTOGROW_V3":
            template = spec[1]["template"]
            found |= {f"{name}.{template['prefix']}{number}": template for number in range(template["max"])}
    return found


def _widget_values(node: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
    values = list(node.get("widgets_values") or [])
    waiting = list(specs.items())
    found = {}
    while waiting:
        name, spec = waiting.pop(0)
        dynamic = spec[0] == "COMFY_DYNAMICCOMBO_V3"
        socket = len(spec) > 1 and spec[1].get("forceInput")
        if socket or not (dynamic or isinstance(spec[0], list) or spec[0] in _WIDGETS):
            continue
        if not values:
            raise ValueError(f"{node['type']}: no value for {name}")
        found[name] = values.pop(0)
        if dynamic:  # the inputs of what is chosen follow
            chosen = next(option for option in spec[1]["options"] if option["key"] == found[name])
            inner = {**chosen["inputs"].get("required", {}), **chosen["inputs"].get("optional", {})}
            waiting[:0] = [(f"{name}.{inside}", entry) for inside, entry in inner.items()]
        if values and values[0] in _CONTROLS and len(spec) > 1 and spec[1].get("control_after_generate"):
            values.pop(0)
    if values:
        raise ValueError(f"{node['type']}: values without a widget: {values}")
    return found
